//! Probes on kernel functions, which count their calls.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

/// Where tracefs is mounted.
pub const TRACING: &str = "/sys/kernel/tracing";
/// Where the kernel lists its probes.
const LIST: &str = "/sys/kernel/debug/kprobes/list";
/// The longest wait for the kernel to be done with them.
const PATIENCE: Duration = Duration::from_millis(500);

/// Adds a line to a file below [`TRACING`].
pub fn write(file: impl AsRef<Path>, text: &str) -> Result<()> {
    let path = Path::new(TRACING).join(file);
    let mut file = OpenOptions::new()
        .append(true)
        .open(&path)
        .with_context(|| format!("{} cannot be written to", path.display()))?;
    file.write_all(text.as_bytes())
        .with_context(|| format!("the kernel refuses `{}` in {}", text.trim(), path.display()))
}

/// A probe on a function, removed when dropped.
#[derive(Debug)]
pub struct Probe {
    symbol: String,
    /// The name of its event: that of no other process's probes, and of none that one has left.
    event: String,
}

impl Probe {
    /// Starts to count the calls of a function.
    ///
    /// # Errors
    /// In a line, where the kernel does not let it be probed.
    pub fn new(symbol: &str) -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let event = format!("ublk_witness_{}_{number}", std::process::id());
        write("kprobe_events", &format!("p:{event} {symbol}\n"))
            .with_context(|| format!("{symbol} cannot be probed"))?;
        let probe = Self { symbol: symbol.to_owned(), event };
        probe.enable(true)?;
        Ok(probe)
    }

    fn enable(&self, on: bool) -> Result<()> {
        write(format!("events/kprobes/{}/enable", self.event), if on { "1" } else { "0" })
    }

    /// How often the function was called.
    ///
    /// # Errors
    /// When the kernel does not say, or has missed calls.
    pub fn hits(&self) -> Result<u64> {
        let profile = fs::read_to_string(Path::new(TRACING).join("kprobe_profile"))?;
        hits(&profile, &self.event).with_context(|| format!("the calls of {}", self.symbol))
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        let _ = self.enable(false);
        let _ = write("kprobe_events", &format!("-:{}\n", self.event));
    }
}

/// `  ublk_witness_77_0          2048               0`: the event, its hits, and those missed.
fn hits(profile: &str, event: &str) -> Result<u64> {
    let mut lines = profile.lines().map(str::split_whitespace);
    let fields = lines.find(|fields| fields.clone().next() == Some(event));
    let mut fields = fields.with_context(|| format!("kprobe_profile has no {event}"))?.skip(1);
    let mut number = || fields.next()?.parse::<u64>().ok();
    let (hits, missed) = number().zip(number()).context("kprobe_profile cannot be read")?;
    ensure!(missed == 0, "the kernel has missed {missed}");
    Ok(hits)
}

/// Waits until the kernel is done with these probes, or cannot say so: it turns breakpoints into
/// jumps in the background, and old emulators are at risk where code is patched while it runs.
pub fn settle<'a>(probes: impl Iterator<Item = &'a Probe>) {
    let symbols: Vec<_> = probes.map(|probe| probe.symbol.as_str()).collect();
    let deadline = Instant::now() + PATIENCE;
    while Instant::now() < deadline {
        let list = fs::read_to_string(LIST).unwrap_or_default();
        if symbols.iter().all(|symbol| is_settled(&list, symbol)) {
            return;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// `ffffffffc0a01230  k  ublk_copy_user_pages+0x4  ublk_drv [FTRACE]`
fn is_settled(list: &str, symbol: &str) -> bool {
    let mine = |line: &&str| {
        let name = line.split_whitespace().nth(2).unwrap_or_default();
        name.split_once('+').map_or(name, |(name, _)| name) == symbol
    };
    let mut lines = list.lines().filter(mine).peekable();
    lines.peek().is_some()
        && lines.all(|line| line.contains("[FTRACE]") || line.contains("[OPTIMIZED]"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hits_are_those_of_the_event_and_none_may_be_missed() {
        let profile = "  ublk_witness_7_1            9               0\n  \
                       ublk_witness_7_10        2048               0\n  \
                       ublk_witness_7_2            5               1\n";
        assert_eq!(hits(profile, "ublk_witness_7_10").unwrap(), 2048);
        assert_eq!(hits(profile, "ublk_witness_7_1").unwrap(), 9);
        let text = |event| hits(profile, event).unwrap_err().to_string();
        assert_eq!(text("ublk_witness_7_2"), "the kernel has missed 1");
        assert_eq!(text("ublk_witness_8_1"), "kprobe_profile has no ublk_witness_8_1");
    }

    #[test]
    fn probes_are_settled_when_the_kernel_has_made_jumps_of_them() {
        let list = "ffffffff81a01230  k  io_buffer_register_request+0x4    [FTRACE]\n\
                    ffffffffc0a01230  k  ublk_copy_user_pages+0x0  ublk_drv [OPTIMIZED]\n\
                    ffffffffc0a01231  k  ublk_map_io+0x0  ublk_drv \n";
        assert!(is_settled(list, "io_buffer_register_request"));
        assert!(is_settled(list, "ublk_copy_user_pages"));
        assert!(!is_settled(list, "ublk_map_io") && !is_settled(list, "ublk_copy"));
    }
}

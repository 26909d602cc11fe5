//! A separate instance of the kernel's trace buffer, so that other users' traces are not affected.

use std::fmt::Write as _;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use ublk_target::os::procfs::is_alive;

use super::trace::DeviceNumber;

/// Where tracefs is mounted.
const TRACEFS: &str = "/sys/kernel/tracing";
/// The prefix of the names of our instances, before the process id.
pub const PREFIX: &str = "ublk-bench-";
/// Above this number of threads, events are not filtered by thread: a filter is at most a page
/// long.
const MAX_FILTERED: usize = 64;

/// An instance, which is removed on drop.
#[derive(Debug)]
pub struct Instance {
    directory: PathBuf,
}

impl Instance {
    /// Makes an instance, with a buffer of `kib` KiB for each processor and times of the monotonic
    /// clock. Nothing is traced yet. Removes the instances of dead processes.
    ///
    /// # Errors
    /// A one-line message if there is no tracefs or not enough memory.
    pub fn new(kib: u32) -> anyhow::Result<Self> {
        let instances = Path::new(TRACEFS).join("instances");
        if !instances.is_dir() {
            bail!(
                "there is no tracefs at {TRACEFS}: mount it (`mount -t tracefs tracefs {TRACEFS}`); \
                 it needs a kernel with CONFIG_FTRACE"
            );
        }
        remove_orphans(&instances);
        let directory = instances.join(format!("{PREFIX}{}", std::process::id()));
        fs::create_dir(&directory)
            .with_context(|| format!("cannot make a trace instance, {}", directory.display()))?;
        let instance = Self { directory };
        instance.write("tracing_on", "0")?;
        instance.write("trace_clock", "mono")?;
        instance.write("buffer_size_kb", &kib.to_string())?;
        Ok(instance)
    }

    /// Records requests to these disks.
    ///
    /// # Errors
    /// A one-line message if the kernel has no such events.
    pub fn record_disks(&self, disks: &[DeviceNumber]) -> anyhow::Result<()> {
        // The kernel's own form of a device number: 12 bits of the major, 20 of the minor.
        let number = |(major, minor): &DeviceNumber| (u64::from(*major) << 20) | u64::from(*minor);
        let filter = any("dev", disks.iter().map(number));
        self.enable("block/block_rq_issue", &filter)?;
        self.enable("block/block_rq_complete", &filter)
    }

    /// Records when processors switch to these threads.
    ///
    /// # Errors
    /// A one-line message if the kernel has no such event.
    pub fn record_threads(&self, threads: &[u32]) -> anyhow::Result<()> {
        let filter = any("next_pid", threads.iter().map(|thread| u64::from(*thread)));
        let filter = if threads.len() > MAX_FILTERED { "0" } else { &filter };
        self.enable("sched/sched_switch", filter)
    }

    /// Starts recording.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn start(&self) -> anyhow::Result<()> {
        self.write("tracing_on", "1")
    }

    /// Stops recording, and returns the text of the trace and whether the kernel dropped events.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn finish(&self) -> anyhow::Result<(String, bool)> {
        self.write("tracing_on", "0")?;
        let path = self.directory.join("trace");
        let text = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        Ok((String::from_utf8_lossy(&text).into_owned(), self.has_dropped()?))
    }

    fn has_dropped(&self) -> anyhow::Result<bool> {
        for cpu in fs::read_dir(self.directory.join("per_cpu"))?.flatten() {
            let stats = fs::read_to_string(cpu.path().join("stats"))?;
            if drops(&stats) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn enable(&self, event: &str, filter: &str) -> anyhow::Result<()> {
        let event = Path::new("events").join(event);
        if !self.directory.join(&event).is_dir() {
            bail!("this kernel has no trace event {}", event.display());
        }
        self.write(event.join("filter"), filter)?;
        self.write(event.join("enable"), "1")
    }

    fn write(&self, file: impl AsRef<Path>, text: &str) -> anyhow::Result<()> {
        let path = self.directory.join(file);
        fs::write(&path, text).with_context(|| format!("cannot write to {}", path.display()))
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        if let Err(error) = remove(&self.directory) {
            eprintln!("ublk-bench: cannot remove {}: {error}", self.directory.display());
        }
    }
}

/// `dev == 1 || dev == 2`
fn any(field: &str, numbers: impl Iterator<Item = u64>) -> String {
    let mut filter = String::new();
    for number in numbers {
        let or = if filter.is_empty() { "" } else { " || " };
        // Writing to a string cannot fail.
        let _ = write!(filter, "{or}{field} == {number}");
    }
    filter
}

/// Whether the statistics of a processor's buffer report events that were overwritten or dropped.
fn drops(stats: &str) -> bool {
    let mut counts = stats.lines().filter_map(|line| line.split_once(": "));
    counts.any(|(name, count)| {
        matches!(name, "overrun" | "commit overrun" | "dropped events") && count.trim() != "0"
    })
}

/// Removing the directory removes everything in the instance.
fn remove(directory: &Path) -> io::Result<()> {
    fs::remove_dir(directory)
}

fn remove_orphans(instances: &Path) {
    let Ok(entries) = fs::read_dir(instances) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let pid = name.to_str().and_then(|name| name.strip_prefix(PREFIX)?.parse().ok());
        if pid.is_some_and(|pid| !is_alive(pid)) && remove(&entry.path()).is_ok() {
            eprintln!("ublk-bench: note: removed {} of a dead process", entry.path().display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_name_each_number() {
        assert_eq!(any("dev", [1, 2].into_iter()), "dev == 1 || dev == 2");
        assert_eq!(any("dev", [].into_iter()), "");
    }

    #[test]
    fn dropped_events_are_noticed() {
        let stats = "entries: 81\noverrun: 0\ncommit overrun: 0\nbytes: 4660\ndropped events: 0\n";
        assert!(!drops(stats));
        assert!(drops(&stats.replace("overrun: 0\nb", "overrun: 7\nb")));
        assert!(drops(&stats.replace("events: 0", "events: 1")));
    }

    #[test]
    fn what_dead_processes_have_left_is_removed() {
        let instances = tempfile::tempdir().unwrap();
        let make = |name: &str| fs::create_dir(instances.path().join(name)).unwrap();
        let own = format!("{PREFIX}{}", std::process::id());
        // No process id is this large.
        ["ublk-bench-4194305", "ublk-bench-x", "other", &own].into_iter().for_each(make);
        remove_orphans(instances.path());
        let left = fs::read_dir(instances.path()).unwrap().flatten().map(|entry| entry.file_name());
        let mut left: Vec<String> = left.map(|name| name.into_string().unwrap()).collect();
        left.sort();
        let mut expected = vec!["other".to_owned(), own, "ublk-bench-x".into()];
        expected.sort();
        assert_eq!(left, expected);
    }
}

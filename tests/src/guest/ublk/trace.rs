//! The kernel's trace points and probes, as witnesses.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

const TRACING: &str = "/sys/kernel/tracing";

fn write(file: impl AsRef<Path>, text: &str) -> Result<()> {
    let path = Path::new(TRACING).join(file);
    let mut options = fs::OpenOptions::new();
    let mut file = options.append(true).open(&path).with_context(|| path.display().to_string())?;
    std::io::Write::write_all(&mut file, text.as_bytes())
        .with_context(|| format!("{text} > {}", path.display()))
}

/// The NVMe commands that drives are given, from the trace point `nvme_setup_cmd`.
#[derive(Debug)]
pub struct NvmeCommands {
    event: PathBuf,
}

impl NvmeCommands {
    /// Starts to record the commands of some drives (`nvme1n1`).
    pub fn record(disks: &[&str]) -> Result<Self> {
        let event = PathBuf::from("events/nvme/nvme_setup_cmd");
        let conditions: Vec<_> = disks.iter().map(|disk| format!("disk == \"{disk}\"")).collect();
        write("buffer_size_kb", "16384")?;
        write(event.join("filter"), &conditions.join(" || "))?;
        fs::write(Path::new(TRACING).join("trace"), "")?;
        write(event.join("enable"), "1")?;
        Ok(Self { event })
    }

    /// The commands so far, a line each.
    pub fn lines(&self) -> Result<Vec<String>> {
        let text = fs::read_to_string(Path::new(TRACING).join("trace"))?;
        Ok(text.lines().filter(|line| line.contains("nvme_setup_cmd")).map(str::to_owned).collect())
    }

    /// How many commands contain all of these texts.
    pub fn count(&self, texts: &[&str]) -> Result<usize> {
        let lines = self.lines()?;
        Ok(lines.iter().filter(|line| texts.iter().all(|text| line.contains(text))).count())
    }
}

impl Drop for NvmeCommands {
    fn drop(&mut self) {
        let _ = write(self.event.join("enable"), "0");
        let _ = write(self.event.join("filter"), "0");
    }
}

/// Counts the calls of kernel functions.
#[derive(Debug)]
pub struct CallCounter {
    names: Vec<String>,
}

impl CallCounter {
    /// Starts to count the calls of functions.
    pub fn new(functions: &[&str]) -> Result<Self> {
        let symbols = fs::read_to_string("/proc/kallsyms")?;
        let mut counter = Self { names: Vec::new() };
        for function in functions {
            // The compiler may have made a variant of it, with a suffix.
            let symbol =
                symbols.lines().filter_map(|line| line.split_whitespace().nth(2)).find(|symbol| {
                    *symbol == *function
                        || symbol.strip_prefix(function).is_some_and(|rest| rest.starts_with('.'))
                });
            let symbol = symbol.with_context(|| format!("the kernel has no {function}"))?;
            let name = format!("count_{function}");
            write("kprobe_events", &format!("p:{name} {symbol}\n"))?;
            write(format!("events/kprobes/{name}/enable"), "1")?;
            counter.names.push(name);
        }
        Ok(counter)
    }

    /// How often a function was called.
    pub fn calls(&self, function: &str) -> Result<u64> {
        let profile = fs::read_to_string(Path::new(TRACING).join("kprobe_profile"))?;
        let name = format!("count_{function}");
        let mut lines = profile.lines().map(str::split_whitespace);
        let mut fields = lines.find(|fields| fields.clone().next() == Some(&name)).context(name)?;
        let (hits, misses) = (fields.nth(1), fields.next());
        ensure!(misses == Some("0"), "missed calls: {profile}");
        hits.context("no count")?.parse().context("a count")
    }
}

impl Drop for CallCounter {
    fn drop(&mut self) {
        for name in &self.names {
            let _ = write(format!("events/kprobes/{name}/enable"), "0");
            let _ = write("kprobe_events", &format!("-:{name}\n"));
        }
    }
}

//! What drives were told, from the kernel's trace.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};

use super::probes::{TRACING, write};
use super::symbols;

/// The trace point (`drivers/nvme/host/trace.h`).
const EVENT: &str = "events/nvme/nvme_setup_cmd";

/// The NVMe commands that drives are given, from the trace point `nvme_setup_cmd`.
#[derive(Debug)]
pub struct NvmeCommands {
    event: PathBuf,
}

impl NvmeCommands {
    /// Starts to record the commands of some drives (`nvme1n1`).
    ///
    /// # Errors
    /// In a line, where the kernel has no such trace point.
    pub fn record(disks: &[&str]) -> Result<Self> {
        let event = PathBuf::from(EVENT);
        let path = Path::new(TRACING).join(EVENT);
        ensure!(
            path.is_dir(),
            "Linux {} has no trace point of the commands to NVMe drives that is known here: \
             looked for {}",
            symbols::release()?,
            path.display()
        );
        let conditions: Vec<_> = disks.iter().map(|disk| format!("disk == \"{disk}\"")).collect();
        write("buffer_size_kb", "16384")?;
        write(event.join("filter"), &conditions.join(" || "))?;
        fs::write(Path::new(TRACING).join("trace"), "")?;
        write(event.join("enable"), "1")?;
        Ok(Self { event })
    }

    /// The commands so far, a line each.
    ///
    /// # Errors
    /// When the trace cannot be read.
    pub fn lines(&self) -> Result<Vec<String>> {
        let text = fs::read_to_string(Path::new(TRACING).join("trace"))?;
        Ok(text.lines().filter(|line| line.contains("nvme_setup_cmd")).map(str::to_owned).collect())
    }

    /// How many commands contain all of these texts.
    ///
    /// # Errors
    /// As [`NvmeCommands::lines`].
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

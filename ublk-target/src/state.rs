//! What is known about devices: the state file of each, and what the driver and sysfs say.
//!
//! A state file is untrusted when it is read back: it is used only for what the driver does not
//! know (the target and its backings), and only while its server is the device's.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use uring_ext::control::{Control, ControlError};
use uring_ext::{Errno, sys};

use crate::lend::LendMode;
use crate::units::{Bytes, Sectors};

/// Where the state files are.
pub const RUN_DIR: &str = "/run/ublk-target";
/// Where the logs of servers are.
pub const LOG_DIR: &str = "/var/log/ublk-target";
/// The format that this version writes and reads.
const VERSION: u32 = 1;

/// The block device of an id.
#[must_use]
pub fn block_path(id: u32) -> PathBuf {
    PathBuf::from(format!("/dev/ublkb{id}"))
}

/// The log of the server of a device.
#[must_use]
pub fn log_path(id: u32) -> PathBuf {
    Path::new(LOG_DIR).join(format!("{id}.log"))
}

/// The contents of a state file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StateFile {
    version: u32,
    /// Device id.
    pub id: u32,
    /// Process id of the server.
    pub pid: u32,
    /// Name of the target.
    pub target: String,
    /// How the device lends.
    pub lend: LendMode,
    /// Canonical paths of the backings.
    pub backings: Vec<PathBuf>,
}

impl StateFile {
    /// A state file of this version.
    #[must_use]
    pub fn new(id: u32, target: &str, lend: LendMode, backings: Vec<PathBuf>) -> Self {
        let pid = std::process::id();
        Self { version: VERSION, id, pid, target: target.to_owned(), lend, backings }
    }

    fn path(directory: &Path, id: u32) -> PathBuf {
        directory.join(format!("{id}.json"))
    }

    /// Writes the file, whole or not at all.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn write(&self, directory: &Path) -> io::Result<()> {
        fs::create_dir_all(directory)?;
        let path = Self::path(directory, self.id);
        let new = path.with_extension("json.new");
        let mut file = fs::File::create(&new)?;
        serde_json::to_writer_pretty(&mut file, self)?;
        file.write_all(b"\n")?;
        fs::rename(new, path)
    }

    /// Reads the file of a device; `None` if there is none, or none that can be understood.
    #[must_use]
    pub fn read(directory: &Path, id: u32) -> Option<Self> {
        let text = fs::read_to_string(Self::path(directory, id)).ok()?;
        let state: Self = serde_json::from_str(&text).ok()?;
        (state.version == VERSION && state.id == id).then_some(state)
    }

    /// Removes the file of a device, if there is one.
    pub fn remove(directory: &Path, id: u32) {
        // A missing file is what is wanted; another error leaves a file that nobody trusts.
        let _ = fs::remove_file(Self::path(directory, id));
    }
}

/// A device, as `list` and `add` show it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Description {
    /// Device id.
    pub id: u32,
    /// The block device.
    pub device: PathBuf,
    /// The driver's word: `LIVE`, `DEAD`, `QUIESCED` or `FAIL_IO`.
    pub state: String,
    /// Name of the target, `unknown` for a device of another program.
    pub target: String,
    /// How the device lends.
    pub lend: String,
    /// Process id of the server, `null` if it is gone.
    pub pid: Option<u32>,
    /// Number of queues.
    pub queues: u16,
    /// Tags of each queue.
    pub depth: u16,
    /// Size in bytes.
    pub size_bytes: u64,
    /// Canonical paths of the backings.
    pub backings: Vec<PathBuf>,
}

impl Description {
    /// Describes the device `id`.
    ///
    /// # Errors
    /// `ENODEV` if there is none, and those of the driver.
    pub fn of(control: &Control, id: u32) -> Result<Self, ControlError> {
        let info = control.info(id)?;
        // A device that was never started has no parameters to be read.
        let sectors = control.params(id).map_or(0, |params| params.basic().dev_sectors);
        let pid = u32::try_from(info.ublksrv_pid).ok().filter(|pid| is_alive(*pid));
        let file = StateFile::read(Path::new(RUN_DIR), id)
            .filter(|file| u32::try_from(info.ublksrv_pid) == Ok(file.pid) || pid.is_none());
        let lend = LendMode::of_flags(info.flags).to_string();
        let (target, backings) =
            file.map_or_else(|| ("unknown".to_owned(), Vec::new()), |f| (f.target, f.backings));
        Ok(Self {
            id,
            device: block_path(id),
            state: state_name(info.state).to_owned(),
            target,
            lend,
            pid,
            queues: info.nr_hw_queues,
            depth: info.queue_depth,
            size_bytes: Bytes::from(Sectors(sectors)).0,
            backings,
        })
    }
}

/// The ids of all ublk devices, of this and other programs, in order.
#[must_use]
pub fn device_ids() -> Vec<u32> {
    let Ok(entries) = fs::read_dir("/sys/class/ublk-char") else { return Vec::new() };
    let mut ids: Vec<u32> = entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.strip_prefix("ublkc")?.parse().ok())
        .collect();
    ids.sort_unstable();
    ids
}

/// Whether a process exists and is no zombie.
#[must_use]
pub fn is_alive(pid: u32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat"))
        .ok()
        .and_then(|stat| stat.rsplit_once(')')?.1.trim_start().chars().next())
        .is_some_and(|state| state != 'Z' && state != 'X')
}

/// The driver's name of a device state (`UBLK_S_DEV_*`).
fn state_name(state: u16) -> &'static str {
    match u32::from(state) {
        sys::UBLK_S_DEV_DEAD => "DEAD",
        sys::UBLK_S_DEV_LIVE => "LIVE",
        sys::UBLK_S_DEV_QUIESCED => "QUIESCED",
        sys::UBLK_S_DEV_FAIL_IO => "FAIL_IO",
        _ => "UNKNOWN",
    }
}

/// Whether an error says that there is no such device.
#[must_use]
pub fn is_missing(error: &ControlError) -> bool {
    error.errno() == Some(Errno::ENODEV)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state() -> StateFile {
        StateFile::new(3, "loop", LendMode::Fused, vec![PathBuf::from("/dev/nvme0n1")])
    }

    #[test]
    fn a_state_file_is_read_back() {
        let directory = tempfile::tempdir().unwrap();
        let run = directory.path().join("run");
        state().write(&run).unwrap();
        assert_eq!(StateFile::read(&run, 3), Some(state()));
        assert_eq!(StateFile::read(&run, 4), None);
        StateFile::remove(&run, 3);
        assert_eq!(StateFile::read(&run, 3), None);
    }

    #[test]
    fn a_corrupt_state_file_is_not_believed() {
        let directory = tempfile::tempdir().unwrap();
        let good = serde_json::to_string(&state()).unwrap();
        let bad = [
            String::new(),
            good[..good.len() / 2].to_owned(),
            good.replace("\"version\":1", "\"version\":99"),
            good.replace("\"id\":3", "\"id\":4"),
            good.replace("fused", "telepathy"),
        ];
        for text in bad {
            fs::write(directory.path().join("3.json"), &text).unwrap();
            assert_eq!(StateFile::read(directory.path(), 3), None, "{text}");
        }
    }

    #[test]
    fn processes_are_told_alive_from_dead() {
        assert!(is_alive(std::process::id()));
        assert!(!is_alive(u32::MAX));
    }
}

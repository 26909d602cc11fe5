//! A file with the device that the run has made and not removed yet, so that the next run can
//! remove it if this one is killed. The file is locked, so that there is only one run at a time:
//! two would disturb each other.

use std::cell::Cell;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use super::made_device::MadeDevice;

/// Removed by a reboot, like the devices.
pub const PATH: &str = "/run/ublk-bench.json";

/// The record.
#[derive(Debug)]
pub struct Record {
    path: PathBuf,
    file: Flock<File>,
    /// Whether it names a device.
    is_full: Cell<bool>,
}

impl Record {
    /// Opens the file. Returns also the device that a killed run has left.
    pub fn open(path: &Path) -> Result<(Self, Option<MadeDevice>)> {
        let doing = || format!("open {}", path.display());
        let mut file = loop {
            let mut options = File::options();
            options.read(true).write(true).create(true).truncate(false);
            let file = options.open(path).with_context(doing)?;
            let file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(file) => file,
                Err((_, Errno::EWOULDBLOCK)) => bail!(
                    "another ublk-bench runs on this machine, and the two would measure each other; \
                     wait for its end"
                ),
                Err((_, errno)) => return Err(errno).with_context(doing),
            };
            // The previous run may have removed the file after it was opened here.
            let is_same = fs::metadata(path).is_ok_and(|now| {
                file.metadata().is_ok_and(|ours| (now.dev(), now.ino()) == (ours.dev(), ours.ino()))
            });
            if is_same {
                break file;
            }
        };
        let mut text = String::new();
        file.read_to_string(&mut text).with_context(doing)?;
        let left = first_line(&text);
        let is_full = Cell::new(left.is_some());
        Ok((Self { path: path.to_owned(), file, is_full }, left))
    }

    /// Records the device that is about to be made, or that there is none.
    pub fn write(&self, made: Option<&MadeDevice>) -> Result<()> {
        let line = format!("{}\n", serde_json::to_string(&made)?);
        // In one write, so that the first line is always complete. Later lines are ignored.
        self.file.write_all_at(line.as_bytes(), 0)?;
        self.file.set_len(u64::try_from(line.len())?)?;
        self.is_full.set(made.is_some());
        Ok(())
    }

    /// Whether it names a device.
    pub fn is_full(&self) -> bool {
        self.is_full.get()
    }
}

fn first_line(text: &str) -> Option<MadeDevice> {
    serde_json::from_str(text.lines().next()?).ok().flatten()
}

impl Drop for Record {
    fn drop(&mut self) {
        if !self.is_full() {
            let _ = fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mapper(name: &str) -> MadeDevice {
        MadeDevice::Mapper { name: name.to_owned() }
    }

    #[test]
    fn what_is_left_is_found_by_the_next_run() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("record");
        let (record, left) = Record::open(&path).unwrap();
        assert_eq!(left, None);
        record.write(Some(&mapper("a-long-name-of-a-device"))).unwrap();
        record.write(Some(&mapper("a"))).unwrap();
        let second = Record::open(&path).unwrap_err().to_string();
        assert!(second.contains("another ublk-bench"), "{second}");
        drop(record);
        let (record, left) = Record::open(&path).unwrap();
        assert_eq!(left, Some(mapper("a")));
        assert!(record.is_full());
        record.write(None).unwrap();
        assert!(!record.is_full());
        drop(record);
        assert!(!path.exists());
    }

    #[test]
    fn a_write_that_was_cut_off_is_understood() {
        let whole = serde_json::to_string(&Some(mapper("a"))).unwrap();
        assert_eq!(first_line(&format!("{whole}\nthe rest of a longer line\n")), Some(mapper("a")));
        assert_eq!(first_line("null\n{\"kind\""), None);
        assert_eq!(first_line("nonsense"), None);
        assert_eq!(first_line(""), None);
    }
}

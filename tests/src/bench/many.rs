//! Many devices in one process of ours, each on a `null_blk` device of its own.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::guest::ublk::fleet::Fleet;
use crate::guest::udev;

/// Where `null_blk` devices are made.
const CONFIGFS: &str = "/sys/kernel/config/nullb";

/// `null_blk` devices, and perhaps ours on them.
#[derive(Debug)]
pub struct Many {
    nulls: Vec<Null>,
    fleet: Option<Fleet>,
    scratch: tempfile::TempDir,
}

impl Many {
    /// So many `null_blk` devices.
    pub fn raw(count: u32) -> Result<Self> {
        let nulls = (0..count).map(Null::make).collect::<Result<Vec<_>>>()?;
        udev::settle()?;
        Ok(Self { nulls, fleet: None, scratch: tempfile::tempdir()? })
    }

    /// So many of ours, which one lane serves.
    pub fn ours(count: u32) -> Result<Self> {
        let mut many = Self::raw(count)?;
        let devices = (0..).zip(&many.nulls).map(|(id, null)| {
            let file = null.path();
            format!("[[device]]\nid = {id}\ntarget = \"loop\"\nfile = \"{file}\"\n")
        });
        let config = many.scratch.path().join("fleet.toml");
        fs::write(&config, devices.collect::<String>())?;
        many.fleet = Some(Fleet::start(many.scratch.path(), &config)?);
        udev::settle()?;
        Ok(many)
    }

    /// All block devices, as fio takes several.
    pub fn path(&self) -> String {
        let paths: Vec<String> = match &self.fleet {
            None => self.nulls.iter().map(Null::path).collect(),
            Some(fleet) => fleet.devices.iter().map(|path| path.display().to_string()).collect(),
        };
        paths.join(":")
    }

    /// Removes all of it.
    pub fn remove(self) -> Result<()> {
        self.fleet.map_or(Ok(()), Fleet::end)
    }
}

/// A `null_blk` device, removed with its handle.
#[derive(Debug)]
struct Null {
    directory: PathBuf,
    number: String,
}

impl Null {
    /// As [`load_drivers`](super::stack::load_drivers) has its.
    fn make(number: u32) -> Result<Self> {
        let directory = Path::new(CONFIGFS).join(format!("bench{number}"));
        fs::create_dir(&directory).with_context(|| directory.display().to_string())?;
        let mut null = Self { directory, number: String::new() };
        let options = [
            ("queue_mode", "2"),
            ("irqmode", "0"),
            ("no_sched", "1"),
            ("size", "1024"),
            ("blocksize", "512"),
            ("max_sectors", "2048"),
            ("power", "1"),
        ];
        for (name, value) in options {
            let file = null.directory.join(name);
            fs::write(&file, value).with_context(|| file.display().to_string())?;
        }
        null.number = fs::read_to_string(null.directory.join("index"))?.trim().to_owned();
        Ok(null)
    }

    fn path(&self) -> String {
        // Where the name of the directory is not that of the device.
        let by_name = self.directory.file_name().map(|name| Path::new("/dev").join(name));
        let by_name = by_name.filter(|path| path.exists());
        let by_name = by_name.map(|path| path.display().to_string());
        by_name.unwrap_or_else(|| format!("/dev/nullb{}", self.number))
    }
}

impl Drop for Null {
    fn drop(&mut self) {
        // What this leaves is found by the check for leaks.
        let _ = fs::write(self.directory.join("power"), "0");
        let _ = fs::remove_dir(&self.directory);
    }
}

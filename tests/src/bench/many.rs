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
    pub fn raw(count: u32, max_sectors: u32) -> Result<Self> {
        let null = |number| Null::make(&format!("many{number}"), max_sectors);
        let nulls = (0..count).map(null).collect::<Result<Vec<_>>>()?;
        udev::settle()?;
        Ok(Self { nulls, fleet: None, scratch: tempfile::tempdir()? })
    }

    /// So many of ours, which one lane serves.
    pub fn ours(count: u32, max_sectors: u32) -> Result<Self> {
        let mut many = Self::raw(count, max_sectors)?;
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
pub struct Null {
    directory: PathBuf,
    path: String,
}

impl Null {
    /// Every request completes in the call that submits it, so that the CPU never idles. With 0 for
    /// the longest request the driver chooses.
    pub fn make(name: &str, max_sectors: u32) -> Result<Self> {
        let directory = Path::new(CONFIGFS).join(name);
        fs::create_dir(&directory).with_context(|| directory.display().to_string())?;
        let mut null = Self { directory, path: String::new() };
        let max_sectors = max_sectors.to_string();
        let options = [
            ("queue_mode", "2"),
            ("irqmode", "0"),
            ("no_sched", "1"),
            ("size", "1024"),
            ("blocksize", "512"),
            ("max_sectors", &max_sectors),
            ("power", "1"),
        ];
        for (name, value) in options {
            let file = null.directory.join(name);
            fs::write(&file, value).with_context(|| file.display().to_string())?;
        }
        null.path = Self::path_of(name)?;
        Ok(null)
    }

    /// The block device of that name.
    pub fn path_of(name: &str) -> Result<String> {
        let path = format!("/dev/{name}");
        if Path::new(&path).exists() {
            return Ok(path);
        }
        // A kernel that does not name devices as their directories.
        let index = Path::new(CONFIGFS).join(name).join("index");
        let index = fs::read_to_string(&index).with_context(|| index.display().to_string())?;
        Ok(format!("/dev/nullb{}", index.trim()))
    }

    /// Leaves it there.
    pub fn keep(self) {
        std::mem::forget(self);
    }

    fn path(&self) -> String {
        self.path.clone()
    }
}

impl Drop for Null {
    fn drop(&mut self) {
        // What this leaves is found by the check for leaks.
        let _ = fs::write(self.directory.join("power"), "0");
        let _ = fs::remove_dir(&self.directory);
    }
}

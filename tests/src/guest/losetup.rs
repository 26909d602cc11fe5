//! The kernel's own loop devices.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};

use super::{process, wait_for};

/// How the driver gets at its file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Caching {
    /// Through the page cache.
    Buffered,
    /// By direct I/O.
    Direct,
}

/// A loop device that is detached with its handle.
#[derive(Debug)]
pub struct KernelLoop {
    path: PathBuf,
    detached: bool,
}

impl KernelLoop {
    /// Attaches a file.
    ///
    /// # Errors
    /// When the kernel does not take it.
    pub fn attach(file: &Path, caching: Caching) -> Result<Self> {
        process::run(&["modprobe", "loop"])?;
        let file = file.to_str().context("a path that is not UTF-8")?;
        let direct = match caching {
            Caching::Buffered => "--direct-io=off",
            Caching::Direct => "--direct-io=on",
        };
        let printed = process::run(&["losetup", "--find", "--show", direct, file])?.stdout;
        Ok(Self { path: PathBuf::from(printed.trim()), detached: false })
    }

    /// The block device.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Detaches it, and waits until that is done: while udev has it open, it is put off.
    ///
    /// # Errors
    /// When somebody goes on using it.
    pub fn detach(mut self) -> Result<()> {
        self.detached = true;
        detach(&self.path)?;
        let name = self.path.file_name().context("a device name")?;
        let attached = Path::new("/sys/block").join(name).join("loop/backing_file");
        wait_for("the loop device to be detached", Duration::from_secs(30), || {
            Ok((!attached.exists()).then_some(()))
        })
    }
}

impl Drop for KernelLoop {
    fn drop(&mut self) {
        if !self.detached {
            // The test has failed already; what this leaves is found by the check for leaks.
            let _ = detach(&self.path);
        }
    }
}

fn detach(path: &Path) -> Result<()> {
    process::run(&["losetup", "--detach", &path.to_string_lossy()]).map(drop)
}

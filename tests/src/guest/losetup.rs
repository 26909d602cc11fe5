//! The kernel's own loop devices.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::process;

/// A loop device that is detached with its handle.
#[derive(Debug)]
pub struct KernelLoop {
    path: PathBuf,
    detached: bool,
}

impl KernelLoop {
    /// Attaches a file, which the driver reads and writes through the page cache.
    ///
    /// # Errors
    /// When the kernel does not take it.
    pub fn attach(file: &Path) -> Result<Self> {
        process::run(&["modprobe", "loop"])?;
        let file = file.to_str().context("a path that is not UTF-8")?;
        let printed = process::run(&["losetup", "--find", "--show", file])?.stdout;
        Ok(Self { path: PathBuf::from(printed.trim()), detached: false })
    }

    /// The block device.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Detaches it.
    ///
    /// # Errors
    /// When the kernel refuses. A device that is in use is detached later.
    pub fn detach(mut self) -> Result<()> {
        self.detached = true;
        detach(&self.path)
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

//! Keeps udev from reading devices.

use anyhow::Result;

use super::process;

/// While it lives, udev does not read devices that appear or were written to, so that every
/// request is the test's own.
#[derive(Debug)]
pub struct QuietUdev;

impl QuietUdev {
    /// Lets udev do what it has to do, then stops it.
    ///
    /// # Errors
    /// When udev does not answer.
    pub fn new() -> Result<Self> {
        process::run(&["udevadm", "settle"])?;
        process::run(&["udevadm", "control", "--stop-exec-queue"])?;
        Ok(Self)
    }
}

impl Drop for QuietUdev {
    fn drop(&mut self) {
        let _ = process::run(&["udevadm", "control", "--start-exec-queue"]);
    }
}

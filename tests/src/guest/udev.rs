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
        settle()?;
        process::run(&["udevadm", "control", "--stop-exec-queue"])?;
        Ok(Self)
    }
}

/// Waits until udev has dealt with all that has happened so far.
///
/// An event that udev has put off, since the device was locked or its queue was stopped, may lie
/// there until something else happens; so it is asked to go on every few seconds.
///
/// # Errors
/// When it does not settle within a minute.
pub fn settle() -> Result<()> {
    for _ in 0..20 {
        process::run(&["udevadm", "control", "--start-exec-queue"])?;
        if process::run(&["udevadm", "settle", "--timeout=3"]).is_ok() {
            return Ok(());
        }
    }
    process::run(&["udevadm", "settle", "--timeout=1"]).map(drop)
}

impl Drop for QuietUdev {
    fn drop(&mut self) {
        let _ = process::run(&["udevadm", "control", "--start-exec-queue"]);
    }
}

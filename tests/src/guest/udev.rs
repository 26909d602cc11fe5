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
        tell("--stop-exec-queue")?;
        Ok(Self)
    }
}

/// Tells udevd something, three times.
///
/// udevd 257 now and then loses a control message that reached its socket before it had accepted
/// the connection (`Invalid sender uid 65534, ignoring message` in its log), and
/// `udevadm control` succeeds all the same.
fn tell(what: &str) -> Result<()> {
    for _ in 0..3 {
        process::run(&["udevadm", "control", what])?;
    }
    Ok(())
}

/// Waits until udev has dealt with all that has happened so far, its queue started if it was not.
///
/// # Errors
/// When it does not settle within a minute.
pub fn settle() -> Result<()> {
    tell("--start-exec-queue")?;
    process::run(&["udevadm", "settle", "--timeout=60"]).map(drop)
}

/// Has udev read its rules again.
///
/// # Errors
/// When udev does not answer.
pub fn reload() -> Result<()> {
    tell("--reload")
}

impl Drop for QuietUdev {
    fn drop(&mut self) {
        let _ = tell("--start-exec-queue");
    }
}

//! Keeps udev from reading devices.

use std::time::Duration;

use anyhow::{Context, Result};

use super::{process, wait_for};

/// How long udevd may refuse a command. A refusal takes milliseconds; where there is no udevd, each
/// command takes this long.
const LIMIT: Duration = Duration::from_secs(10);
/// How often each message is sent.
const TIMES: u32 = 3;

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

/// Sends a control message to udevd until it has been accepted [`TIMES`] times.
fn tell(what: &str) -> Result<()> {
    accepted(TIMES, LIMIT, &["udevadm", "control", what])
}

/// Runs a command of udev until it has succeeded so many times.
///
/// udevd 257 now and then drops a control message that reached its socket before it had accepted
/// the connection (`Invalid sender uid 65534, ignoring message` in its log). `udevadm` then either
/// succeeds all the same, or fails with `Broken pipe` as udevd closes the connection.
fn accepted(times: u32, limit: Duration, argv: &[&str]) -> Result<()> {
    let mut accepted = 0;
    let mut refused = String::new();
    let sent = wait_for(&format!("udev to accept `{}`", argv.join(" ")), limit, || {
        match process::run(argv) {
            Ok(_) => accepted += 1,
            Err(error) => refused = format!("{error:#}"),
        }
        Ok((accepted == times).then_some(()))
    });
    sent.with_context(|| format!("its last refusal: {refused}"))
}

/// Waits until udev has dealt with all that has happened so far, its queue started if it was not.
///
/// # Errors
/// When it does not settle within a minute.
pub fn settle() -> Result<()> {
    tell("--start-exec-queue")?;
    accepted(1, LIMIT, &["udevadm", "settle", "--timeout=60"])
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refused_command_is_given_again() {
        let directory = tempfile::tempdir().unwrap();
        let count = directory.path().join("count");
        // Fails at every other call.
        let script = format!("echo >> {0}; test $(($(wc -l < {0}) % 2)) = 0", count.display());
        accepted(2, Duration::from_secs(60), &["sh", "-c", &script]).unwrap();
        assert_eq!(std::fs::read_to_string(&count).unwrap().lines().count(), 4);
        let error = accepted(1, Duration::ZERO, &["sh", "-c", "echo why; false"]).unwrap_err();
        assert!(format!("{error:#}").contains("why"), "{error:#}");
    }
}

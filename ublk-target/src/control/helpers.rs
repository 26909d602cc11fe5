//! A server's interface to its process: helpers, protection, wake-ups.

use std::io;
use std::path::Path;
use std::process::Child;
use std::sync::Arc;

use crate::control::error::SetupError;
use crate::device::paths::{LOG_DIR, RUN_DIR};
use crate::device::program::Program;
use crate::os::protection::protect;
use crate::os::wakeups::{Hangup, Wakeups};

/// Processes that do what the server must not do itself, or cannot.
pub struct Helpers<'a> {
    /// Starts a process that stops a device
    /// ([`deletion::command`](crate::control::deletion::command)).
    pub stop: Box<StopHelper<'a>>,
    /// Starts a process that supervises the device of the calling process.
    pub supervise: Box<dyn Fn(u32) -> io::Result<Child> + 'a>,
    /// Starts a process that quiesces a device ([`quiesce`](crate::control::upgrade::quiesce)).
    pub quiesce: Box<dyn Fn(u32) -> io::Result<Child> + 'a>,
    /// Replaces the process by another program, which recovers a device with the same supervisor.
    /// Returns only on an error.
    pub become_next: Box<BecomeNext<'a>>,
    /// Opens the log of a device again, on SIGHUP. Without it, SIGHUP ends the server.
    pub reopen_log: Option<Box<dyn Fn(u32) + 'a>>,
}

impl Helpers<'_> {
    pub(super) fn hangup(&self) -> Hangup {
        if self.reopen_log.is_some() { Hangup::IsApart } else { Hangup::Ends }
    }
}

/// Starts a process that stops a device.
pub type StopHelper<'a> = dyn Fn(u32) -> io::Result<Child> + 'a;

/// The device, the program, and the supervisor.
pub type BecomeNext<'a> = dyn Fn(u32, &Program, Option<u32>) -> io::Error + 'a;

/// Prepares the calling process, which has one thread, for serving devices on these backings.
pub(super) fn protect_server(backings: &[&Path]) {
    let own = [Path::new(RUN_DIR), Path::new(LOG_DIR)];
    protect(&[backings, &own].concat());
}

/// The wake-ups of the main thread, shared with lanes. Signals are blocked from here on.
pub(crate) fn ready(hangup: Hangup) -> Result<Arc<Wakeups>, SetupError> {
    let wakeups = Wakeups::new(hangup);
    wakeups.map(Arc::new).map_err(|errno| SetupError::new("cannot wait for signals", errno))
}

//! Processes, identified by a descriptor, since a process id can be reused.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::Child;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use rustix::process::{Pid, PidfdFlags, pidfd_open, pidfd_send_signal};

/// A process descriptor. The process exists, or has ended and was not reaped. Readable once it has
/// ended.
#[derive(Debug)]
pub struct PidFd(OwnedFd);

impl PidFd {
    /// The process that has this id now (Linux 5.3).
    ///
    /// # Errors
    /// `ESRCH` if there is none, `EMFILE` at the limit of open files.
    pub fn open(pid: u32) -> io::Result<Self> {
        let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
        let pid = pid.ok_or_else(|| io::Error::from_raw_os_error(libc::ESRCH))?;
        Ok(Self(pidfd_open(pid, PidfdFlags::empty())?))
    }

    /// A child of this process that it has not reaped.
    ///
    /// # Errors
    /// `EMFILE` at the limit of open files.
    pub fn of_child(child: &Child) -> io::Result<Self> {
        Ok(Self(pidfd_open(Pid::from_child(child), PidfdFlags::empty())?))
    }

    /// For a test: a process that does not end. It is none of the kernel's, so it needs no system
    /// call that a checker of memory may lack.
    #[cfg(test)]
    pub(crate) fn made_up() -> Self {
        use nix::sys::eventfd::EventFd;
        Self(EventFd::new().expect("an event descriptor").into())
    }

    /// Waits at most `timeout` for its end, and returns whether it has ended.
    #[must_use]
    pub fn has_ended(&self, timeout: Duration) -> bool {
        let mut fds = [PollFd::new(self.as_fd(), PollFlags::POLLIN)];
        let timeout = PollTimeout::try_from(timeout).unwrap_or(PollTimeout::MAX);
        matches!(poll(&mut fds, timeout), Ok(1..))
    }

    /// Sends a signal to this process. If it has ended, nothing happens.
    pub fn tell(&self, signal: Signal) {
        if let Some(signal) = rustix::process::Signal::from_named_raw(signal as i32) {
            // It can only fail because there is no such process any more.
            let _ = pidfd_send_signal(&self.0, signal);
        }
    }
}

impl AsFd for PidFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Watches for the end of another process.
#[derive(Debug)]
pub struct Watch(Option<PidFd>);

impl Watch {
    /// Watches a process. A process that does not exist counts as ended.
    #[must_use]
    pub fn on(pid: u32) -> Self {
        Self(PidFd::open(pid).ok())
    }

    /// Readable once the process has ended; `None` if it did not exist from the start.
    #[must_use]
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.0.as_ref().map(AsFd::as_fd)
    }

    /// Waits at most `timeout` for the end of the process, and returns whether it has ended.
    #[must_use]
    pub fn has_ended(&self, timeout: Duration) -> bool {
        self.0.as_ref().is_none_or(|process| process.has_ended(timeout))
    }
}

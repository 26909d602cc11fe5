//! Waits for signals that end the program.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use anyhow::Context;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

/// The signals, blocked in this thread and those that it starts.
#[derive(Debug)]
pub struct Interrupts(SignalFd);

impl Interrupts {
    /// Blocks them.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn new() -> anyhow::Result<Self> {
        let set: SigSet = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP].into_iter().collect();
        set.thread_block().context("cannot block signals")?;
        let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
        Ok(Self(SignalFd::with_flags(&set, flags).context("cannot wait for signals")?))
    }

    /// Waits until the other end of a socket is closed, or until a signal arrives, which it
    /// returns.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn wait(
        &self,
        socket: &UnixStream,
        limit: Option<Duration>,
    ) -> anyhow::Result<Option<i32>> {
        let timeout = match limit {
            Some(limit) => PollTimeout::try_from(limit)?,
            None => PollTimeout::NONE,
        };
        let mut fds = [
            PollFd::new(self.0.as_fd(), PollFlags::POLLIN),
            PollFd::new(socket.as_fd(), PollFlags::POLLIN),
        ];
        while let Err(error) = poll(&mut fds, timeout) {
            if error != Errno::EINTR {
                return Err(error).context("cannot wait");
            }
        }
        let signal = self.0.read_signal().context("cannot read signals")?;
        signal.map(|signal| i32::try_from(signal.ssi_signo)).transpose().map_err(Into::into)
    }

    /// Waits until the other end of a socket is closed, for at most `limit`. Ignores signals.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn wait_for_end(&self, socket: &UnixStream, limit: Duration) -> anyhow::Result<()> {
        let mut fds = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, PollTimeout::try_from(limit)?) {
            Ok(_) | Err(Errno::EINTR) => Ok(()),
            Err(error) => Err(error).context("cannot wait"),
        }
    }
}

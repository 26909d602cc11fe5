//! Signals as events: blocked in every thread, read from a descriptor by the main thread.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicI32, Ordering};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::unistd::Pid;
use uring_ext::Errno;

/// The event that woke the main thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wake {
    /// A signal that ends the server.
    Signal(Signal),
    /// SIGHUP, if it does not end the server; only [`Wakeups::wait_or_hangup`] reports it.
    Hangup,
    /// A lane has ended.
    LaneEnded,
    /// The driver has cancelled fetches of a lane: it delivers no more requests.
    Undelivered,
    /// A control request has come.
    ControlRequest,
    /// The other descriptor is readable.
    Other,
    /// The time is over.
    TimedOut,
}

/// The meaning of SIGHUP for a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hangup {
    /// The terminal is gone; the process ends.
    Ends,
    /// The process reopens its log, or rereads its configuration.
    IsApart,
}

/// The descriptors that the main thread waits on.
#[derive(Debug)]
pub struct Wakeups {
    signals: SignalFd,
    /// SIGHUP, if it does not end the process.
    hangup: Option<SignalFd>,
    /// The last signal that came; 0 if there was none.
    last: AtomicI32,
    lanes: EventFd,
    undelivered: EventFd,
    control_requests: EventFd,
}

impl Wakeups {
    /// Blocks the signals in this thread and in all threads that it starts later, so that no signal
    /// interrupts a control command.
    ///
    /// # Errors
    /// `EMFILE` at the limit of open files.
    pub fn new(hangup: Hangup) -> Result<Self, Errno> {
        let (signals, hangup) = match hangup {
            Hangup::Ends => (signals(&[Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP])?, None),
            Hangup::IsApart => {
                (signals(&[Signal::SIGINT, Signal::SIGTERM])?, Some(signals(&[Signal::SIGHUP])?))
            }
        };
        let [lanes, undelivered, control_requests] =
            [event_descriptor()?, event_descriptor()?, event_descriptor()?];
        let last = AtomicI32::new(0);
        Ok(Self { signals, hangup, last, lanes, undelivered, control_requests })
    }

    /// Whether SIGHUP has come since the last call, and does not end the process.
    pub(crate) fn take_hangup(&self) -> bool {
        let Some(hangup) = &self.hangup else { return false };
        let mut has_come = false;
        while let Ok(Some(_)) = hangup.read_signal() {
            has_come = true;
        }
        has_come
    }

    /// Reports that a lane has ended. Callable from any thread.
    pub fn lane_ended(&self) {
        // It can only fail at 2^64 - 1 ended lanes.
        let _ = self.lanes.write(1);
    }

    /// Reports that the driver has cancelled fetches. Callable from any thread.
    pub fn undelivered(&self) {
        let _ = self.undelivered.write(1);
    }

    /// Whether fetches were cancelled since the last call; clears this.
    pub(crate) fn take_undelivered(&self) -> bool {
        self.undelivered.read().is_ok()
    }

    /// Whether a lane has ended since the last call; clears this.
    pub(crate) fn take_lane_ended(&self) -> bool {
        self.lanes.read().is_ok()
    }

    /// Readable when a signal has come.
    pub(crate) fn signals(&self) -> BorrowedFd<'_> {
        self.signals.as_fd()
    }

    /// A signal that has come and was not read yet; this reads it.
    pub(crate) fn take_signal(&self) -> Option<Signal> {
        let info = self.signals.read_signal().ok()??;
        let number = i32::try_from(info.ssi_signo).unwrap_or(0);
        let signal = Signal::try_from(number).unwrap_or(Signal::SIGTERM);
        self.last.store(signal as i32, Ordering::Relaxed);
        Some(signal)
    }

    /// Has a signal that was taken come again, for the next wait.
    pub(crate) fn give_back(&self, signal: Signal) {
        // It can only fail for a signal or process that does not exist.
        let _ = kill(Pid::this(), signal);
    }

    /// The last signal that has come, whether it was read or not.
    pub(crate) fn last_signal(&self) -> Option<Signal> {
        while self.take_signal().is_some() {}
        Signal::try_from(self.last.load(Ordering::Relaxed)).ok()
    }

    /// Reports a control request. Callable from any thread.
    pub fn control_request(&self) {
        let _ = self.control_requests.write(1);
    }

    /// Waits for a signal, the end of a lane or a control request.
    pub fn wait(&self, timeout: PollTimeout) -> Wake {
        self.wait_for(None, false, timeout)
    }

    /// Waits for a signal, the end of a lane, a control request, or until another descriptor is
    /// readable.
    pub fn wait_or(&self, other: BorrowedFd<'_>, timeout: PollTimeout) -> Wake {
        self.wait_for(Some(other), false, timeout)
    }

    /// As [`Wakeups::wait_or`], and also for SIGHUP, which other waits leave pending.
    pub fn wait_or_hangup(&self, other: Option<BorrowedFd<'_>>, timeout: PollTimeout) -> Wake {
        self.wait_for(other, true, timeout)
    }

    fn wait_for(
        &self,
        other: Option<BorrowedFd<'_>>,
        heeds_hangup: bool,
        timeout: PollTimeout,
    ) -> Wake {
        let hangup = self.hangup.as_ref().filter(|_| heeds_hangup);
        loop {
            if let Some(signal) = self.take_signal() {
                return Wake::Signal(signal);
            }
            if self.take_lane_ended() {
                return Wake::LaneEnded;
            }
            if self.take_undelivered() {
                return Wake::Undelivered;
            }
            if self.control_requests.read().is_ok() {
                return Wake::ControlRequest;
            }
            if heeds_hangup && self.take_hangup() {
                return Wake::Hangup;
            }
            // Without another one, the same twice.
            let other = other.unwrap_or(self.signals.as_fd());
            let hangup = hangup.map_or(self.signals.as_fd(), AsFd::as_fd);
            let [lanes, undelivered, control_requests] =
                [&self.lanes, &self.undelivered, &self.control_requests].map(AsFd::as_fd);
            let mut fds =
                [self.signals.as_fd(), hangup, lanes, undelivered, control_requests, other]
                    .map(|fd| PollFd::new(fd, PollFlags::POLLIN));
            let ready = poll(&mut fds, timeout);
            let [own @ .., other] = fds.map(|fd| fd.any().unwrap_or(false));
            match ready {
                Ok(0) => return Wake::TimedOut,
                Ok(_) if other && own == [false; 5] => return Wake::Other,
                Ok(_) | Err(_) => {}
            }
        }
    }
}

/// Blocks signals in this thread and in all that it starts, and reads them from a descriptor.
fn signals(of: &[Signal]) -> Result<SignalFd, Errno> {
    let set: SigSet = of.iter().copied().collect();
    let errno = |errno| Errno::new(errno as i32);
    set.thread_block().map_err(errno)?;
    SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK).map_err(errno)
}

/// # Errors
/// `EMFILE` at the limit of open files.
pub(crate) fn event_descriptor() -> Result<EventFd, Errno> {
    let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
    EventFd::from_value_and_flags(0, flags).map_err(|errno| Errno::new(errno as i32))
}

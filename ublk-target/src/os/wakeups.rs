//! Signals as events: blocked in every thread, read from a descriptor by the main thread.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicI32, Ordering};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use uring_ext::Errno;

/// What woke the main thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wake {
    /// A signal that asks the server to end.
    Signal(Signal),
    /// SIGHUP, where it does not ask for the end; only [`Wakeups::wait_or_hangup`] says so.
    Hangup,
    /// A lane has ended.
    LaneEnded,
    /// The driver takes back fetches of a lane: it delivers no more.
    Undelivered,
    /// Somebody asks for something.
    ControlRequest,
    /// The other descriptor can be read.
    Other,
    /// Nothing within the time.
    TimedOut,
}

/// What SIGHUP means to a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hangup {
    /// Its terminal has gone, and it ends.
    Ends,
    /// It opens its log again, or reads its configuration again.
    IsApart,
}

/// The descriptors that the main thread waits on.
#[derive(Debug)]
pub struct Wakeups {
    signals: SignalFd,
    /// SIGHUP, where it does not ask for the end.
    hangup: Option<SignalFd>,
    /// The last signal that came; 0 if there was none.
    last: AtomicI32,
    lanes: EventFd,
    undelivered: EventFd,
    control_requests: EventFd,
}

impl Wakeups {
    /// Blocks the signals in this thread, and so in all threads that it starts from now on; a control
    /// command is then never interrupted half-way.
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

    /// Whether SIGHUP has come since the last look, and does not ask for the end.
    pub(crate) fn take_hangup(&self) -> bool {
        let Some(hangup) = &self.hangup else { return false };
        let mut has_come = false;
        while let Ok(Some(_)) = hangup.read_signal() {
            has_come = true;
        }
        has_come
    }

    /// Says that a lane has ended. Callable from any thread.
    pub fn lane_ended(&self) {
        // It can only fail at 2^64 - 1 ended lanes.
        let _ = self.lanes.write(1);
    }

    /// Says that the driver takes back fetches. Callable from any thread.
    pub fn undelivered(&self) {
        let _ = self.undelivered.write(1);
    }

    /// Whether fetches were taken back and nobody has looked; somebody has now.
    pub(crate) fn take_undelivered(&self) -> bool {
        self.undelivered.read().is_ok()
    }

    /// Whether the end of a lane has not been looked at yet; it has been now.
    pub(crate) fn take_lane_ended(&self) -> bool {
        self.lanes.read().is_ok()
    }

    /// Can be read when a signal has come.
    pub(crate) fn signals(&self) -> BorrowedFd<'_> {
        self.signals.as_fd()
    }

    /// A signal that has come and was not looked at yet; it has been now.
    pub(crate) fn take_signal(&self) -> Option<Signal> {
        let info = self.signals.read_signal().ok()??;
        let number = i32::try_from(info.ssi_signo).unwrap_or(0);
        let signal = Signal::try_from(number).unwrap_or(Signal::SIGTERM);
        self.last.store(signal as i32, Ordering::Relaxed);
        Some(signal)
    }

    /// The last signal that has ever come, whoever has looked at it.
    pub(crate) fn last_signal(&self) -> Option<Signal> {
        while self.take_signal().is_some() {}
        Signal::try_from(self.last.load(Ordering::Relaxed)).ok()
    }

    /// Says that somebody asks for something. Callable from any thread.
    pub fn control_request(&self) {
        let _ = self.control_requests.write(1);
    }

    /// Waits for a signal, the end of a lane or a control request.
    pub fn wait(&self, timeout: PollTimeout) -> Wake {
        self.wait_for(None, false, timeout)
    }

    /// Waits for a signal, the end of a lane, a control request, or until another descriptor can be read.
    pub fn wait_or(&self, other: BorrowedFd<'_>, timeout: PollTimeout) -> Wake {
        self.wait_for(Some(other), false, timeout)
    }

    /// As [`Wakeups::wait_or`], or until SIGHUP comes, which other waits leave for this one.
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

/// Blocks signals in this thread, and in all that it starts, to be read from a descriptor.
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

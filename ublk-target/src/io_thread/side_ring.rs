//! The second ring of a lane whose first ring polls. It takes what a polling ring refuses (flush,
//! `fallocate`, waiting for descriptors). The lane sleeps on it while there is nothing to poll for.

use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::time::Duration;

use nix::sys::eventfd::EventFd;
use ublk_engine::lane::LaneError;
use uring_ext::Errno;
use uring_ext::ring::{Cqe, Polling, Queues, Ring};
use uring_ext::sqe::{FixedFile, Sqe};

use crate::io_thread::setup::{RingNeeds, failed};
use crate::os::wakeups::event_descriptor;

/// The `user_data` of waiting for the bell. No event of a lane has this value.
const BELL: u64 = u64::MAX;

/// The ring, and the event descriptor (the bell) that the polling ring signals.
#[derive(Debug)]
pub(crate) struct SideRing {
    ring: Ring,
    bell: EventFd,
    bell_file: FixedFile,
}

impl SideRing {
    /// Makes a ring like the polling one. Its last fixed file is the bell.
    pub fn new(needs: &RingNeeds, wake: &EventFd) -> Result<Self, LaneError> {
        let bell = event_descriptor().map_err(failed("making an event descriptor"))?;
        let needs = RingNeeds { polling: Polling::Off, show_work: true, ..*needs };
        let mut ring = needs.make(wake)?;
        let bell_file = FixedFile(u32::from(needs.files) - 1);
        let set = ring.queues().set_files(bell_file, &[bell.as_fd().as_raw_fd()]);
        set.map_err(failed("registering files"))?;
        Ok(Self { ring, bell, bell_file })
    }

    /// The queues, for the thread that made the ring. `polling` is the lane's first ring.
    pub fn queues(&mut self, polling: &mut Queues<'_>) -> Result<SideQueues<'_>, LaneError> {
        let registered = polling.register_event(self.bell.as_fd());
        registered.map_err(failed("registering an event descriptor"))?;
        polling.signal(false);
        let (bell, bell_file) = (&self.bell, self.bell_file);
        Ok(SideQueues { queues: self.ring.queues(), bell, bell_file, is_watched: false })
    }
}

/// Submission and completion side.
pub(crate) struct SideQueues<'ring> {
    queues: Queues<'ring>,
    bell: &'ring EventFd,
    bell_file: FixedFile,
    /// The ring is waiting for the bell.
    is_watched: bool,
}

impl SideQueues<'_> {
    pub fn push(&mut self, sqes: &[Sqe]) -> Result<(), Errno> {
        self.queues.push(sqes)
    }

    /// See [`Queues::set_files`].
    pub fn set_files(&mut self, first: FixedFile, files: &[RawFd]) -> Result<(), Errno> {
        self.queues.set_files(first, files)
    }

    /// Submits to both rings and polls both once.
    pub fn poll(&mut self, polling: &mut Queues<'_>) -> Result<(), Errno> {
        polling.submit()?;
        if self.queues.has_queued() || self.queues.has_pending() {
            self.queues.submit()?;
        }
        Ok(())
    }

    /// Submits to both rings and sleeps until one has a completion, at most `limit`. No operation
    /// may be in flight that needs polling.
    pub fn sleep(
        &mut self,
        polling: &mut Queues<'_>,
        limit: Option<Duration>,
    ) -> Result<(), Errno> {
        if !self.is_watched {
            let sqe = Sqe::poll_readable(self.bell_file).user_data(BELL);
            self.queues.push(&[sqe])?;
            self.is_watched = true;
        }
        // Only the first item of pending work signals the bell. If nothing older is pending, the
        // next item signals it.
        polling.signal(true);
        polling.submit_and_settle()?;
        // If the kernel is short of memory, it has not taken all entries or done all work. The side
        // ring is not checked for pending work: the wait sees it, and ignores a stale mark of work
        // that is already done. Such a mark stays until there is new work.
        let slept = if polling.has_queued() || polling.has_pending() {
            self.queues.submit()
        } else {
            match limit {
                None => self.queues.submit_and_wait(),
                Some(limit) => self.queues.submit_and_wait_for(limit),
            }
        };
        polling.signal(false);
        // An unsignalled bell is no error.
        let _ = self.bell.read();
        slept?;
        polling.submit()
    }

    /// See [`Queues::sync`].
    pub fn sync(&mut self) {
        self.queues.sync();
    }

    /// See [`Queues::take`]. Completions of the bell are handled here.
    pub fn take(&mut self) -> Option<Cqe> {
        let cqe = self.queues.take()?;
        if cqe.user_data != BELL {
            return Some(cqe);
        }
        self.is_watched = false;
        self.queues.take()
    }
}

//! Holding the requests of a device back in all its lanes, and changing its target meanwhile.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use nix::sys::eventfd::EventFd;
use ublk_engine::lane::{Lane, LaneIo, Quorum};
use ublk_engine::target::AnyTarget;
use uring_ext::Errno;

use crate::os::wakeups::event_descriptor;

/// Tells control when all lanes that hold are quiet.
#[derive(Debug)]
pub struct QuietSignal {
    quorum: Quorum,
    complete: EventFd,
}

impl QuietSignal {
    /// For this number of lanes.
    ///
    /// # Errors
    /// `EMFILE` at the limit of open files.
    pub fn of(lanes: usize) -> Result<Arc<Self>, Errno> {
        Ok(Arc::new(Self { quorum: Quorum::of(lanes), complete: event_descriptor()? }))
    }

    /// Whether all lanes are quiet.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.quorum.is_complete()
    }

    fn arrive(&self) {
        if self.quorum.arrive() {
            // It can only fail at 2^64 - 1.
            let _ = self.complete.write(1);
        }
    }
}

/// Readable once all lanes are quiet.
impl AsFd for QuietSignal {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.complete.as_fd()
    }
}

/// A new target for a lane that is quiet. It carries the memory, so that the lane allocates and frees
/// nothing.
#[derive(Debug)]
pub struct TargetChange {
    /// The new target. After the change, the previous one.
    pub target: AnyTarget,
    /// For each layer of the new target, the layer of the previous one that it continues.
    pub kept: Box<[Option<usize>]>,
    /// The lane has the new target.
    pub is_made: bool,
}

/// The part of a station that is held.
#[derive(Debug, Default)]
pub(crate) struct Hold(Option<Arc<QuietSignal>>);

impl Hold {
    /// Begins no more requests. The signal gets a word when all others have ended.
    pub fn begin(&mut self, lane: &mut Lane<AnyTarget>, quiet: Arc<QuietSignal>) {
        lane.engine_mut().hold();
        self.0 = Some(quiet);
        self.check(lane);
    }

    /// Tells control once if the lane is quiet.
    pub fn check(&mut self, lane: &Lane<AnyTarget>) {
        if lane.engine().is_quiet() {
            if let Some(quiet) = self.0.take() {
                quiet.arrive();
            }
        }
    }

    /// Makes the change if there is one, and begins the requests that were held back. Returns the
    /// change for the caller to free.
    pub fn end(
        &mut self,
        lane: &mut Lane<AnyTarget>,
        io: &mut impl LaneIo,
        mut change: Option<Box<TargetChange>>,
    ) -> Option<Box<TargetChange>> {
        self.0 = None;
        if let Some(TargetChange { target, kept, is_made }) = change.as_deref_mut() {
            *is_made = lane.change_target(target, kept);
        }
        lane.release(io);
        change
    }
}

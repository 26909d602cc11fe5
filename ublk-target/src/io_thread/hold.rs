//! Holding the requests of a device back in all its lanes, and changing its target meanwhile.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use nix::sys::eventfd::EventFd;
use ublk_engine::lane::{Hold, Lane, LaneIo, Quiet, Quorum};
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
}

impl Quiet for QuietSignal {
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

/// Makes the change if there is one, and begins the requests that were held back. Returns the change
/// for the caller to free.
pub(crate) fn release(
    lane: &mut Lane<AnyTarget>,
    hold: &mut Hold<Arc<QuietSignal>>,
    io: &mut impl LaneIo,
    mut change: Option<Box<TargetChange>>,
) -> Option<Box<TargetChange>> {
    if let Some(TargetChange { target, kept, is_made }) = change.as_deref_mut() {
        *is_made = lane.change_target(target, kept);
    }
    hold.end(lane, io);
    change
}

//! Holding the requests of a device back in all its lanes, and changing its target meanwhile.

use std::cell::Cell;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::eventfd::EventFd;
use ublk_engine::lane::{Hold, Lane, LaneIo, Quiet, Quorum};
use ublk_engine::target::AnyTarget;
use uring_ext::Errno;

use crate::os::wakeups::event_descriptor;

/// Tells control when all lanes that hold are quiet, or one of them will never be.
#[derive(Debug)]
pub struct QuietSignal {
    quorum: Quorum,
    has_lost_one: AtomicBool,
    changed: EventFd,
}

/// What the lanes have told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Told {
    /// Some of them are not quiet yet.
    Nothing,
    /// All of them are quiet.
    AllQuiet,
    /// One of them has ended.
    OneEnded,
}

impl QuietSignal {
    /// For this number of lanes.
    ///
    /// # Errors
    /// `EMFILE` at the limit of open files.
    pub fn of(lanes: usize) -> Result<Arc<Self>, Errno> {
        let (quorum, changed) = (Quorum::of(lanes), event_descriptor()?);
        Ok(Arc::new(Self { quorum, has_lost_one: AtomicBool::new(false), changed }))
    }

    /// What the lanes have told so far.
    #[must_use]
    pub fn told(&self) -> Told {
        match (self.has_lost_one.load(Ordering::Acquire), self.quorum.is_complete()) {
            (true, _) => Told::OneEnded,
            (false, true) => Told::AllQuiet,
            (false, false) => Told::Nothing,
        }
    }

    fn wake(&self) {
        // It can only fail at 2^64 - 1.
        let _ = self.changed.write(1);
    }
}

/// A lane's part in a [`QuietSignal`]. If it is lost before the lane is quiet, with its message or with
/// its lane, that is told.
#[derive(Debug)]
pub struct LaneToken {
    signal: Arc<QuietSignal>,
    has_arrived: Cell<bool>,
}

impl LaneToken {
    /// A token for one lane.
    #[must_use]
    pub fn of(signal: &Arc<QuietSignal>) -> Self {
        Self { signal: Arc::clone(signal), has_arrived: Cell::new(false) }
    }
}

impl Quiet for LaneToken {
    fn arrive(&self) {
        self.has_arrived.set(true);
        if self.signal.quorum.arrive() {
            self.signal.wake();
        }
    }
}

impl Drop for LaneToken {
    fn drop(&mut self) {
        if !self.has_arrived.get() {
            self.signal.has_lost_one.store(true, Ordering::Release);
            self.signal.wake();
        }
    }
}

/// Readable once all lanes are quiet, or one has ended.
impl AsFd for QuietSignal {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.changed.as_fd()
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
    hold: &mut Hold<LaneToken>,
    io: &mut impl LaneIo,
    mut change: Option<Box<TargetChange>>,
) -> Option<Box<TargetChange>> {
    if let Some(TargetChange { target, kept, is_made }) = change.as_deref_mut() {
        *is_made = lane.change_target(target, kept);
    }
    hold.end(lane, io);
    change
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lane_that_is_lost_is_told_of_and_one_that_was_quiet_is_not() {
        let signal = QuietSignal::of(2).unwrap();
        let [one, other] = [LaneToken::of(&signal), LaneToken::of(&signal)];
        one.arrive();
        drop(one);
        assert_eq!(signal.told(), Told::Nothing);
        other.arrive();
        assert_eq!(signal.told(), Told::AllQuiet);
        drop(other);
        assert_eq!(signal.told(), Told::AllQuiet);

        let signal = QuietSignal::of(2).unwrap();
        LaneToken::of(&signal).arrive();
        // As with a message to a lane that has ended.
        drop(LaneToken::of(&signal));
        assert_eq!(signal.told(), Told::OneEnded);
        assert!(signal.changed.read().is_ok(), "control is woken");
    }
}

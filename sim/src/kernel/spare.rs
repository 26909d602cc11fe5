//! The spare buffer that queues of a ring share. The times when other queues hold it are random.

use super::Kernel;
use crate::draw::Draw as _;
use crate::fault::Fault;

/// The queue that holds the spare buffer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum SpareHolder {
    /// No queue.
    #[default]
    Nobody,
    /// The queue of the lane.
    Lane,
    /// Another queue holds it, or gets it first.
    Others,
}

impl Kernel {
    /// `LaneIo::take_spare`.
    ///
    /// # Panics
    /// If the lane holds it.
    pub(super) fn take_spare(&mut self) -> bool {
        if self.setup.table_range.spare.is_none() {
            return true;
        }
        assert_ne!(self.spare, SpareHolder::Lane, "the spare buffer is taken twice");
        if self.spare == SpareHolder::Nobody && self.rng.chance(300) {
            self.spare = SpareHolder::Others;
        }
        if self.spare == SpareHolder::Others {
            self.tally.note(Fault::SpareTaken);
            self.is_spare_wanted = true;
            return false;
        }
        self.spare = SpareHolder::Lane;
        true
    }

    /// `LaneIo::give_spare`.
    ///
    /// # Panics
    /// If the lane does not hold it.
    pub(super) fn give_spare(&mut self) {
        if self.setup.table_range.spare.is_some() {
            let holder = std::mem::take(&mut self.spare);
            assert_eq!(holder, SpareHolder::Lane, "the spare buffer is returned");
        }
    }

    /// The other queues return it. Returns whether the lane waits for it.
    pub(crate) fn others_give_spare(&mut self) -> bool {
        self.spare = SpareHolder::Nobody;
        std::mem::take(&mut self.is_spare_wanted)
    }
}

//! The spare buffer that queues of a ring share. When the others have it is a matter of chance.

use super::Kernel;
use crate::fault::Fault;

/// Which queue has the spare buffer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum SpareHolder {
    /// None.
    #[default]
    Nobody,
    /// The lane's.
    Lane,
    /// Another one, or another one is to have it first.
    Others,
}

impl Kernel {
    /// `LaneIo::take_spare`.
    ///
    /// # Panics
    /// If the lane has it.
    pub(super) fn take_spare(&mut self) -> bool {
        if self.setup.place.spare.is_none() {
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
    /// If the lane does not have it.
    pub(super) fn give_spare(&mut self) {
        if self.setup.place.spare.is_some() {
            let holder = std::mem::take(&mut self.spare);
            assert_eq!(holder, SpareHolder::Lane, "the spare buffer is given back");
        }
    }

    /// The other queues give it back. Says whether the lane waits for it.
    pub(crate) fn others_give_spare(&mut self) -> bool {
        self.spare = SpareHolder::Nobody;
        std::mem::take(&mut self.is_spare_wanted)
    }
}

//! Which of several lanes have reached a point that all of them must reach.

use std::sync::atomic::{AtomicUsize, Ordering};

/// Counts the lanes of one or more devices that have become quiet. A lane that has arrived stays
/// quiet until it is released, so once the last lane has arrived, all of them are quiet at the same
/// time.
#[derive(Debug)]
pub struct Quorum {
    missing: AtomicUsize,
}

impl Quorum {
    /// Waits for this number of lanes.
    #[must_use]
    pub const fn of(lanes: usize) -> Self {
        Self { missing: AtomicUsize::new(lanes) }
    }

    /// A lane has arrived. Returns whether it is the last. Everything that the lanes did before they
    /// arrived happens before [`Quorum::is_complete`] returns true.
    ///
    /// Each lane may call this once.
    pub fn arrive(&self) -> bool {
        self.missing.fetch_sub(1, Ordering::AcqRel) == 1
    }

    /// Whether all lanes have arrived.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.missing.load(Ordering::Acquire) == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_lane_completes_it() {
        let quorum = Quorum::of(3);
        assert_eq!([quorum.arrive(), quorum.is_complete()], [false, false]);
        assert_eq!([quorum.arrive(), quorum.is_complete()], [false, false]);
        assert_eq!([quorum.arrive(), quorum.is_complete()], [true, true]);
    }
}

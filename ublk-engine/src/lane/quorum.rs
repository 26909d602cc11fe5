//! Which of several lanes have reached a point that all of them must reach.

// The model checker compiles this file with atomics of its own (`tests/lanes.rs`).
use super::atomic::{AtomicUsize, Ordering};

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
    #[allow(clippy::missing_const_for_fn, reason = "the model checker's atomics are not const")]
    pub fn of(lanes: usize) -> Self {
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

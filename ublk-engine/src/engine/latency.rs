//! Latencies of requests by stage. Measured only on demand.

use hdrhistogram::Histogram;

use super::{Engine, Port};
use crate::plan::Planner;
use crate::request::RequestKind;

/// The stages of a request's life, in order, and the total. *queue*: from when its delivery was
/// reaped until the engine started it. *plan*: until its first operation was issued, including
/// getting the buffer. *backing*: until its last operation completed, including continuations and
/// retries. *commit*: until its answer was passed to the driver, including giving the buffer back.
/// If getting the buffer and giving it back are in one chain with the operation, they count as
/// *backing*.
pub const STAGES: [&str; 5] = ["queue", "plan", "backing", "commit", "total"];

/// When a request passed from one stage to the next, in nanoseconds of the caller's clock. All are
/// 0 while latencies are not measured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stamps {
    /// Its delivery was reaped.
    pub reaped: u64,
    /// The engine started it.
    pub begun: u64,
    /// Its first operation was issued.
    pub issued: u64,
    /// Its last operation completed.
    pub done: u64,
}

/// The range of the histograms. Values outside count as the nearest bound.
const LOWEST_NS: u64 = 100;
const HIGHEST_NS: u64 = 100_000_000_000;

/// Histograms of latencies in nanoseconds, by kind of request and stage.
#[derive(Clone, Debug)]
pub struct Recorder {
    histograms: Box<[[Histogram<u32>; STAGES.len()]; RequestKind::NAMES.len()]>,
}

impl Default for Recorder {
    fn default() -> Self {
        Self::new()
    }
}

impl Recorder {
    /// Empty histograms. Allocates all the memory that they will need.
    ///
    /// # Panics
    /// Never: the bounds are valid constants.
    #[must_use]
    pub fn new() -> Self {
        let empty = || Histogram::new_with_bounds(LOWEST_NS, HIGHEST_NS, 2);
        let empty = || empty().unwrap_or_else(|error| panic!("bounds of a histogram: {error}"));
        let of_kind = || std::array::from_fn(|_| empty());
        Self { histograms: Box::new(std::array::from_fn(|_| of_kind())) }
    }

    /// Records a request that was answered at `committed`. Ignores a request that was delivered
    /// before measuring began, since it has no stamps.
    pub fn record(&mut self, kind: RequestKind, stamps: Stamps, committed: u64) {
        if stamps.reaped == 0 {
            return;
        }
        // A request without operations goes from planning directly to its answer.
        let issued = if stamps.issued == 0 { stamps.done } else { stamps.issued };
        let ends = [stamps.begun, issued, stamps.done, committed];
        let histograms = &mut self.histograms[kind.index()];
        let mut start = stamps.reaped;
        for (histogram, end) in histograms.iter_mut().zip(ends) {
            histogram.saturating_record(end.saturating_sub(start).max(LOWEST_NS));
            start = end;
        }
        let total = committed.saturating_sub(stamps.reaped).max(LOWEST_NS);
        histograms[STAGES.len() - 1].saturating_record(total);
    }

    /// The histogram of a kind ([`RequestKind::index`]) and a stage ([`STAGES`]).
    #[must_use]
    pub fn histogram(&self, kind: usize, stage: usize) -> &Histogram<u32> {
        &self.histograms[kind][stage]
    }

    /// Whether nothing is recorded.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.histograms.iter().flatten().all(Histogram::is_empty)
    }

    /// Removes everything that was recorded.
    pub fn clear(&mut self) {
        for histogram in self.histograms.iter_mut().flatten().filter(|each| !each.is_empty()) {
            histogram.reset();
        }
    }

    /// Adds everything that another recorder has recorded.
    pub fn add(&mut self, other: &Self) {
        for (mine, other) in
            self.histograms.iter_mut().flatten().zip(other.histograms.iter().flatten())
        {
            // This cannot fail, since the bounds are the same.
            let _ = mine.add(other);
        }
    }
}

impl<P: Planner> Engine<P> {
    /// Starts or stops measuring latencies. Returns the previous recorder.
    pub fn measure(&mut self, recorder: Option<Box<Recorder>>) -> Option<Box<Recorder>> {
        let before = std::mem::replace(&mut self.recorder, recorder);
        self.choose_path();
        before
    }

    /// The recorder of latencies, while they are measured.
    pub fn recorder(&self) -> Option<&Recorder> {
        self.recorder.as_deref()
    }

    pub(super) fn stamps(&self, port: &mut impl Port) -> Stamps {
        if self.recorder.is_none() {
            return Stamps::default();
        }
        Stamps { reaped: self.now, begun: port.now(), ..Stamps::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stages_add_up_to_the_total() {
        let mut recorder = Recorder::new();
        let stamps = Stamps { reaped: 1000, begun: 2000, issued: 5000, done: 105_000 };
        recorder.record(RequestKind::Read, stamps, 112_000);
        let expected = [1000, 3000, 100_000, 7000, 111_000];
        for (stage, expected) in expected.into_iter().enumerate() {
            let histogram = recorder.histogram(0, stage);
            assert_eq!(histogram.len(), 1);
            assert!(histogram.equivalent(histogram.max(), expected), "{}", STAGES[stage]);
        }
        assert!(recorder.histogram(1, 0).is_empty(), "other kinds have their own");
    }

    #[test]
    fn what_was_not_stamped_is_left_out() {
        let mut recorder = Recorder::new();
        recorder.record(RequestKind::Read, Stamps::default(), 5000);
        assert!(recorder.histogram(0, 4).is_empty());
        // A flush that needs no operation.
        let stamps = Stamps { reaped: 1000, begun: 2000, issued: 0, done: 3000 };
        recorder.record(RequestKind::Flush, stamps, 4000);
        assert_eq!(
            recorder.histogram(2, 2).max(),
            recorder.histogram(2, 2).highest_equivalent(LOWEST_NS)
        );
    }

    #[test]
    fn what_intervals_recorded_is_added() {
        let mut interval = Recorder::new();
        let mut all = Recorder::new();
        let stamps = Stamps { reaped: 1000, begun: 2000, issued: 3000, done: 4000 };
        for (committed, expected) in [(9000, 8000), (5000, 4000)] {
            interval.record(RequestKind::Read, stamps, committed);
            let total = interval.histogram(0, 4);
            assert_eq!(total.len(), 1);
            assert!(total.equivalent(total.max(), expected), "what was before is forgotten");
            all.add(&interval);
            interval.clear();
            assert!(interval.is_empty());
        }
        let total = all.histogram(0, 4);
        assert_eq!(total.len(), 2);
        assert!(total.equivalent(total.max(), 8000) && total.equivalent(total.min(), 4000));
    }
}

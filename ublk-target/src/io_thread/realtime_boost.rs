//! The real-time boost: whether a lane that shares its only CPU with clients runs before them.
//!
//! At equal priority, the client sleeps after each request and the lane sleeps after each answer;
//! both are woken again. At queue depth 1 this is most of a request's cost. With real-time
//! priority, the lane answers before the client sleeps. But then it serves one request at a time.
//! With many requests in flight, batches cost less. A boosted lane cannot tell the two cases apart,
//! so from time to time it returns to normal priority, and counts.

/// The number of waits at normal priority before each decision.
const EQUAL_FOR: u32 = 64;
/// The number of waits at real-time priority after a decision for it.
const FIRST_FOR: u32 = 1024;

/// Whether the lane has real-time priority, and whether requests come one by one.
#[derive(Debug)]
pub struct RealtimeBoost {
    is_first: bool,
    /// Waits until the next decision.
    until: u32,
    /// Since the last decision, some wait began with more than one operation in flight.
    are_several: bool,
}

impl Default for RealtimeBoost {
    fn default() -> Self {
        Self { is_first: false, until: EQUAL_FOR, are_several: false }
    }
}

impl RealtimeBoost {
    /// Records a wait, with so many operations in flight at its start. Returns whether to use
    /// real-time priority from now on, if that changes.
    pub fn waited(&mut self, in_flight: usize) -> Option<bool> {
        self.are_several |= in_flight > 1;
        self.until -= 1;
        if self.until > 0 {
            return None;
        }
        let is_first = !self.is_first && !self.are_several;
        let changes = is_first != self.is_first;
        let until = if is_first { FIRST_FOR } else { EQUAL_FOR };
        *self = Self { is_first, until, are_several: false };
        changes.then_some(is_first)
    }

    /// Whether the lane has real-time priority.
    #[must_use]
    pub const fn is_first(&self) -> bool {
        self.is_first
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The number of these waits at real-time priority.
    fn first_of(waits: u32, in_flight: impl Fn(bool, u32) -> usize) -> u32 {
        let mut boost = RealtimeBoost::default();
        let mut first = 0;
        for wait in 0..waits {
            let was_first = boost.is_first();
            first += u32::from(was_first);
            let change = boost.waited(in_flight(was_first, wait));
            assert_eq!(change.unwrap_or(was_first), boost.is_first());
            assert!(change != Some(was_first), "what does not change is not told");
        }
        first
    }

    /// Deliveries and operations alternate. A boosted lane gets them one by one at any depth.
    fn at_depth(depth: usize) -> impl Fn(bool, u32) -> usize {
        move |is_first, wait| {
            if wait % 2 == 0 {
                0
            } else if is_first {
                1
            } else {
                depth
            }
        }
    }

    #[test]
    fn it_goes_first_while_requests_come_one_by_one() {
        let waits = 100 * (EQUAL_FOR + FIRST_FOR);
        for (depth, first) in [(1, 100 * FIRST_FOR), (2, 0), (3, 0), (32, 0)] {
            assert_eq!(first_of(waits, at_depth(depth)), first, "{depth}");
        }
    }

    #[test]
    fn it_soon_finds_out_that_requests_come_otherwise() {
        let (until, waits) = (10_000, 100_000);
        let in_flight =
            |is_first, wait| at_depth(if wait < until { 1 } else { 32 })(is_first, wait);
        let more = first_of(waits, in_flight) - first_of(until, in_flight);
        assert!(more <= FIRST_FOR, "{more} waits went by");
    }
}

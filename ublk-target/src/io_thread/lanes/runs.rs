//! Allocates ranges of numbers: the entries of a ring's tables.

use std::ops::Range;

/// Free ranges of the numbers from 0 to a limit.
#[derive(Debug)]
pub(crate) struct Runs {
    /// Free ranges in order; no two of them are adjacent.
    free: Vec<Range<u32>>,
}

impl Runs {
    pub fn new(numbers: Range<u32>) -> Self {
        Self { free: vec![numbers] }
    }

    /// Takes the first free range of this length.
    pub fn take(&mut self, len: u32) -> Option<Range<u32>> {
        let at = self.free.iter().position(|free| free.end - free.start >= len)?;
        let free = &mut self.free[at];
        let taken = free.start..free.start + len;
        free.start = taken.end;
        if free.start == free.end {
            self.free.remove(at);
        }
        Some(taken)
    }

    /// Takes the last free number.
    pub fn take_last(&mut self) -> Option<u32> {
        let free = self.free.last_mut()?;
        free.end -= 1;
        let taken = free.end;
        if free.start == free.end {
            self.free.pop();
        }
        Some(taken)
    }

    /// Whether [`Runs::take`] would succeed.
    pub fn has(&self, len: u32) -> bool {
        self.free.iter().any(|free| free.end - free.start >= len)
    }

    /// Returns a range.
    pub fn give_back(&mut self, run: Range<u32>) {
        if run.start == run.end {
            return;
        }
        let at = self.free.partition_point(|free| free.start < run.start);
        self.free.insert(at, run);
        if at + 1 < self.free.len() && self.free[at].end == self.free[at + 1].start {
            self.free[at].end = self.free.remove(at + 1).end;
        }
        if at > 0 && self.free[at - 1].end == self.free[at].start {
            self.free[at - 1].end = self.free.remove(at).end;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_first_run_that_fits_is_taken() {
        let mut runs = Runs::new(1..11);
        let [a, b, c] = [3, 3, 3].map(|len| runs.take(len).unwrap());
        assert_eq!([&a, &b, &c], [&(1..4), &(4..7), &(7..10)]);
        assert!(!runs.has(2) && runs.take(2).is_none());
        runs.give_back(b);
        assert_eq!(runs.take(2), Some(4..6));
        runs.give_back(a);
        assert_eq!(runs.take(4), None, "5 numbers are free, but apart");
    }

    #[test]
    fn the_last_number_is_taken_off_the_end() {
        let mut runs = Runs::new(1..4);
        assert_eq!(runs.take_last(), Some(3));
        assert_eq!(runs.take(2), Some(1..3));
        assert_eq!(runs.take_last(), None);
        runs.give_back(1..2);
        assert_eq!((runs.take_last(), runs.take_last()), (Some(1), None));
    }

    proptest! {
        /// No number is allocated twice, and at the end all numbers are one range again.
        #[test]
        fn runs_do_not_overlap(steps in prop::collection::vec((0_u32..9, any::<prop::sample::Index>()), 0..200)) {
            let mut runs = Runs::new(0..40);
            let mut held: Vec<Range<u32>> = Vec::new();
            for (len, which) in steps {
                if len == 0 {
                    if !held.is_empty() {
                        runs.give_back(held.swap_remove(which.index(held.len())));
                    }
                    continue;
                }
                let could = runs.has(len);
                let taken = runs.take(len);
                prop_assert_eq!(taken.is_some(), could);
                if let Some(run) = taken {
                    prop_assert_eq!(run.end - run.start, len);
                    prop_assert!(run.end <= 40);
                    prop_assert!(held.iter().all(|it| it.end <= run.start || run.end <= it.start));
                    held.push(run);
                }
            }
            held.into_iter().for_each(|run| runs.give_back(run));
            prop_assert_eq!(runs.free, vec![0..40]);
        }
    }
}

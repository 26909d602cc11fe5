//! Which guests run at the same time: as many as the machine has processors for, so that none of
//! them has to share its own.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use crate::config::Group;
use crate::guest::TestCase;

/// The tests that are left, and the processors that are free.
#[derive(Debug)]
pub struct Schedule {
    inner: Mutex<Inner>,
    /// A guest has gone.
    freed: Condvar,
}

#[derive(Debug)]
struct Inner {
    queues: Vec<Queue>,
    free: u32,
}

/// A group's tests.
#[derive(Debug)]
struct Queue {
    group: &'static Group,
    processors: u32,
    tests: VecDeque<&'static TestCase>,
    count: usize,
    guests: u32,
}

/// The right to run a guest of a group; its processors are free again when it goes.
#[derive(Debug)]
pub struct Claim<'a> {
    schedule: &'a Schedule,
    queue: usize,
    /// What the guest is for.
    pub group: &'static Group,
}

impl Schedule {
    /// Tests by group, in the order of the groups; those of a group keep their order.
    pub fn new(groups: &'static [Group], tests: &[&'static TestCase], processors: u32) -> Self {
        let queue = |group: &'static Group| {
            let tests: VecDeque<_> =
                tests.iter().copied().filter(|test| test.group == group.name).collect();
            let (processors, count) = (group.processors.min(processors), tests.len());
            Queue { group, processors, tests, count, guests: 0 }
        };
        let queues = groups.iter().map(queue).collect();
        let inner = Inner { queues, free: processors };
        Self { inner: Mutex::new(inner), freed: Condvar::new() }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until there are tests for another guest and processors for it. `None` when there are no
    /// more tests to begin.
    pub fn claim(&self) -> Option<Claim<'_>> {
        let mut inner = self.inner();
        loop {
            if inner.queues.iter().all(|queue| queue.tests.is_empty()) {
                return None;
            }
            if let Some(queue) = inner.next() {
                let group = inner.begin(queue);
                return Some(Claim { schedule: self, queue, group });
            }
            inner = self.freed.wait(inner).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Inner {
    /// The first group that a guest can be booted for now.
    fn next(&self) -> Option<usize> {
        let may = |queue: &Queue| {
            // A boot for one test more would take longer than the test.
            let is_worth_it = match queue.guests {
                0 => !queue.tests.is_empty(),
                guests => guests < queue.group.guests && queue.tests.len() > 1,
            };
            is_worth_it && queue.processors <= self.free
        };
        self.queues.iter().position(may)
    }

    fn begin(&mut self, queue: usize) -> &'static Group {
        let queue = &mut self.queues[queue];
        queue.guests += 1;
        self.free -= queue.processors;
        queue.group
    }
}

impl Claim<'_> {
    /// The group's next test, how many came before it, and how many there are.
    pub fn next(&self) -> Option<(&'static TestCase, usize, usize)> {
        let mut inner = self.schedule.inner();
        let queue = &mut inner.queues[self.queue];
        let before = queue.count - queue.tests.len();
        queue.tests.pop_front().map(|test| (test, before, queue.count))
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        let mut inner = self.schedule.inner();
        let queue = &mut inner.queues[self.queue];
        queue.guests -= 1;
        let processors = queue.processors;
        inner.free += processors;
        self.schedule.freed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::VmConfig;
    use crate::guest::Outcome;

    const fn group(name: &'static str, guests: u32, processors: u32) -> Group {
        Group { name, about: "", config: VmConfig::default, guests, processors }
    }

    const GROUPS: &[Group] = &[group("wide", 1, 2), group("many", 2, 1), group("one", 1, 1)];

    const fn test(name: &'static str, group: &'static str) -> TestCase {
        TestCase::guest(name, group, |_| Ok(Outcome::Pass))
    }

    const TESTS: &[TestCase] = &[
        test("m1", "many"),
        test("w1", "wide"),
        test("m2", "many"),
        test("o1", "one"),
        test("m3", "many"),
        test("m4", "many"),
    ];

    fn schedule(processors: u32) -> Schedule {
        let tests: Vec<_> = TESTS.iter().collect();
        Schedule::new(GROUPS, &tests, processors)
    }

    /// What the claim runs next.
    fn next(claim: &Claim) -> Option<&'static str> {
        claim.next().map(|(test, ..)| test.name)
    }

    #[test]
    fn guests_share_the_processors() {
        let schedule = schedule(2);
        let wide = schedule.claim().unwrap();
        assert_eq!((wide.group.name, schedule.inner().next()), ("wide", None), "none is free");
        assert_eq!((next(&wide), next(&wide)), (Some("w1"), None));
        drop(wide);
        let first = schedule.claim().unwrap();
        assert_eq!((first.group.name, next(&first)), ("many", Some("m1")));
        let second = schedule.claim().unwrap();
        assert_eq!((second.group.name, next(&second)), ("many", Some("m2")));
        assert_eq!(schedule.inner().next(), None, "both processors are taken");
        drop(second);
        assert_eq!(next(&first), Some("m3"));
        // Not a second guest for its last test.
        let one = schedule.claim().unwrap();
        assert_eq!((one.group.name, next(&one)), ("one", Some("o1")));
        assert_eq!(
            first.next().map(|(test, before, of)| (test.name, before, of)),
            Some(("m4", 3, 4))
        );
        drop((first, one));
        assert!(schedule.claim().is_none());
    }

    #[test]
    fn one_processor_runs_all_one_after_the_other() {
        let schedule = schedule(1);
        let mut order = Vec::new();
        while let Some(claim) = schedule.claim() {
            assert_eq!(schedule.inner().free, 0);
            order.extend(std::iter::from_fn(|| next(&claim)));
        }
        assert_eq!(order, ["w1", "m1", "m2", "m3", "m4", "o1"]);
    }

    #[test]
    fn who_waits_is_woken_when_a_guest_goes() {
        let schedule = schedule(2);
        let wide = schedule.claim().unwrap();
        next(&wide);
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| schedule.claim().map(|claim| claim.group.name));
            drop(wide);
            assert_eq!(waiting.join().unwrap(), Some("many"));
        });
    }
}

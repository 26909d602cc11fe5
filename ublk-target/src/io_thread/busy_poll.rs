//! Busy polling: whether a lane polls for completions before it sleeps. It decides by the length of
//! its last waits, so users need not choose.

use std::ops::RangeInclusive;

use crate::config::busy_wait::BusyWait;

/// Averages are fixed-point numbers with this many fraction bits.
const POINT: u32 = 8;
/// The weight of one wait in an average, as a power of two.
const WEIGHT: u32 = 3;
/// With more operations than this in flight, on average, the backing stays busy while the lane
/// falls asleep and wakes up. The CPU is then more useful to others.
const FEW: u64 = 1 << POINT;
/// After this many waits, the lane checks how often it was preempted.
const LOOK_EVERY: u32 = 64;
/// If it was preempted more often than this, another thread needs the CPU.
const TAKEN_OFTEN: u64 = 8;
/// The number of waits for which the lane then does not poll. It doubles each time that the lane is
/// preempted again at once: two threads may just have met on one CPU, or another thread may need it
/// for long.
const LEAVE_FOR: RangeInclusive<u32> = 64..=4096;

/// Statistics of the last waits of a lane.
#[derive(Debug)]
pub struct BusyPoll {
    /// The limit of a poll in nanoseconds; 0 for a lane that always sleeps.
    limit: u64,
    /// Average length of waits in nanoseconds.
    wait: u64,
    /// Average number of operations in flight at the start of a wait, fixed-point.
    in_flight: u64,
    /// Waits that remain without polling.
    leave: u32,
    /// The number of waits without polling after the next preemption.
    leave_next: u32,
    /// Waits until the next check for preemption.
    until_look: u32,
    /// The preemption count at the last check.
    taken: Option<u64>,
}

impl BusyPoll {
    /// For a lane that may run on this many CPUs. On a single CPU it would starve its clients by
    /// polling.
    #[must_use]
    pub fn new(busy_wait: BusyWait, processors: usize) -> Self {
        let limit = busy_wait.limit().filter(|_| processors > 1);
        let limit = limit.map_or(0, |it| u64::try_from(it.as_nanos()).unwrap_or(u64::MAX));
        Self {
            limit,
            // Begins with the averages of an idle lane.
            wait: limit.saturating_mul(4),
            in_flight: FEW,
            leave: 0,
            leave_next: *LEAVE_FOR.start(),
            until_look: LOOK_EVERY,
            taken: None,
        }
    }

    /// Whether the lane ever polls.
    #[must_use]
    pub const fn looks(&self) -> bool {
        self.limit > 0
    }

    /// Whether the length of the next wait must be measured.
    #[must_use]
    pub const fn is_timed(&self) -> bool {
        self.limit > 0 && self.in_flight <= FEW
    }

    /// The time to poll for completions before the next sleep, in nanoseconds; 0 for not at all.
    #[must_use]
    pub const fn look_for(&self) -> u64 {
        let is_worth_it = self.wait <= self.limit / 2 && self.in_flight <= FEW && self.leave == 0;
        if is_worth_it { self.limit } else { 0 }
    }

    /// Records a wait of so many nanoseconds (`None` if not measured), with so many operations in
    /// flight at its start. `taken` returns how often this thread has been preempted in its life.
    pub fn waited(&mut self, ns: Option<u64>, in_flight: usize, taken: impl FnOnce() -> u64) {
        if let Some(ns) = ns {
            // One long pause must not dominate the average.
            let ns = ns.min(self.limit.saturating_mul(4));
            self.wait = self.wait - (self.wait >> WEIGHT) + (ns >> WEIGHT);
        }
        let in_flight = u64::try_from(in_flight.min(1 << 16)).unwrap_or(0) << POINT;
        self.in_flight = self.in_flight - (self.in_flight >> WEIGHT) + (in_flight >> WEIGHT);
        self.leave = self.leave.saturating_sub(1);
        if self.look_for() == 0 {
            return;
        }
        self.until_look -= 1;
        if self.until_look == 0 {
            self.until_look = LOOK_EVERY;
            let taken = taken();
            match self.taken.replace(taken) {
                None => {}
                Some(before) if taken.saturating_sub(before) > TAKEN_OFTEN => {
                    self.leave = self.leave_next;
                    self.leave_next = (2 * self.leave_next).min(*LEAVE_FOR.end());
                    self.taken = None;
                }
                Some(_) => self.leave_next = *LEAVE_FOR.start(),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const LIMIT: u64 = 200_000;

    fn busy_poll() -> BusyPoll {
        BusyPoll::new(BusyWait::Auto, 2)
    }

    fn wait(busy_poll: &mut BusyPoll, times: u32, ns: u64, in_flight: usize) {
        for _ in 0..times {
            busy_poll.waited(Some(ns), in_flight, || 0);
        }
    }

    #[test]
    fn short_waits_are_looked_through_and_long_ones_slept_through() {
        let table = [
            ("one by one, at once", 20_000, 1, true),
            ("one by one, each after a while", LIMIT * 2 / 5, 1, true),
            ("rather rare", LIMIT, 1, false),
            ("rare", 10 * LIMIT, 1, false),
            ("many at once", 20_000, 20, false),
        ];
        for (name, ns, in_flight, looks) in table {
            let mut busy_poll = busy_poll();
            assert_eq!(busy_poll.look_for(), 0, "{name}: a lane that begins sleeps");
            wait(&mut busy_poll, 100, ns, in_flight);
            assert_eq!(busy_poll.look_for() > 0, looks, "{name}");
        }
    }

    #[test]
    fn an_idle_lane_sleeps_from_its_second_wait_on() {
        let mut busy_poll = busy_poll();
        wait(&mut busy_poll, 100, 20_000, 1);
        wait(&mut busy_poll, 2, 3_600_000_000_000, 1);
        assert_eq!(busy_poll.look_for(), 0);
        wait(&mut busy_poll, 20, 20_000, 1);
        assert!(busy_poll.look_for() > 0, "it looks again");
    }

    #[test]
    fn a_lane_with_one_cpu_or_without_busy_wait_sleeps() {
        for (busy_wait, processors) in [(BusyWait::Auto, 1), (BusyWait::Off, 64)] {
            let mut busy_poll = BusyPoll::new(busy_wait, processors);
            wait(&mut busy_poll, 100, 0, 1);
            assert!(
                !busy_poll.looks() && !busy_poll.is_timed() && busy_poll.look_for() == 0,
                "{busy_wait:?}"
            );
        }
        let mut busy_poll = BusyPoll::new(BusyWait::Limit(Duration::from_millis(1)), 2);
        wait(&mut busy_poll, 100, LIMIT, 1);
        assert!(busy_poll.look_for() == 1_000_000);
    }

    #[test]
    fn the_processor_is_left_to_those_who_need_it() {
        let (mut busy_poll, mut taken) = (busy_poll(), 0);
        let mut look = |busy_poll: &mut BusyPoll, waits, takes| {
            let mut looked = 0;
            for _ in 0..waits {
                looked += u32::from(busy_poll.look_for() > 0);
                taken += takes;
                busy_poll.waited(Some(20_000), 1, || taken);
            }
            looked
        };
        let looked = look(&mut busy_poll, 100_000, 1);
        assert!((1..5000).contains(&looked), "{looked}");
        let end = *LEAVE_FOR.end();
        let looked = look(&mut busy_poll, 2 * end, 0);
        assert!(looked >= end - 2 * LOOK_EVERY, "it looks again: {looked}");
        let (once, then) = (look(&mut busy_poll, 3 * LOOK_EVERY, 1), look(&mut busy_poll, 1000, 0));
        assert!(once + then > 900, "having met somebody once it soon looks again: {once} {then}");
    }
}

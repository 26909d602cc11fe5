//! A bounded wait for a condition: the only way to wait in the control path.
//!
//! A wait checks its condition when a descriptor wakes it, and otherwise at an interval, since the
//! kernel does not report many events. During a long wait it reports what it waits for.

use std::fmt::{self, Display};
use std::ops::ControlFlow;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;

use crate::os::wakeups::Wakeups;

/// A wait. It may be used for several conditions, one after the other, which share its limit.
#[must_use = "nothing is waited for before `until`"]
pub struct Wait<'a> {
    began: Instant,
    schedule: Schedule,
    interval: Duration,
    wakeups: Option<&'a Wakeups>,
    progress: Option<Box<Progress<'a>>>,
}

/// Called with what the wait is for, and how long it has taken.
type Progress<'a> = dyn FnMut(&dyn Display, Duration) + 'a;

/// A condition that did not become true.
#[derive(Debug, PartialEq, Eq)]
pub struct Unmet<R> {
    /// What the wait was for, or the last error of the condition.
    pub reason: R,
    /// How long the wait took.
    pub waited: Duration,
    /// The signal that ended the wait; `None` if it reached its limit.
    pub signal: Option<Signal>,
}

/// Words that are made only if they are shown.
pub struct Words<F>(pub F);

impl<F: Fn() -> String> Display for Words<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&(self.0)())
    }
}

impl<'a> Wait<'a> {
    /// Waits at most this long in total, from now on.
    pub fn at_most(limit: Duration) -> Self {
        let schedule = Schedule { limit: Some(limit), next_report: None, report_interval: None };
        Self {
            began: Instant::now(),
            schedule,
            interval: Duration::MAX,
            wakeups: None,
            progress: None,
        }
    }

    /// Waits without a limit.
    pub fn endless() -> Self {
        let mut wait = Self::at_most(Duration::MAX);
        wait.schedule.limit = None;
        wait
    }

    /// Counts the time from this instant on.
    pub fn since(mut self, began: Instant) -> Self {
        self.began = began;
        self
    }

    /// Checks again after this interval. Without it, only a descriptor or a signal wakes the wait.
    pub fn every(mut self, interval: Duration) -> Self {
        self.interval = interval;
        self
    }

    /// A signal ends the wait. Other wake-ups stay for later waits.
    pub fn or_signal(mut self, wakeups: &'a Wakeups) -> Self {
        self.wakeups = Some(wakeups);
        self
    }

    /// Reports once, after this time.
    pub fn reporting_once(
        mut self,
        after: Duration,
        progress: impl FnMut(&dyn Display, Duration) + 'a,
    ) -> Self {
        self.schedule.next_report = Some(after);
        self.progress = Some(Box::new(progress));
        self
    }

    /// As [`Wait::reporting_once`], and again after each further `then`.
    pub fn reporting(
        mut self,
        after: Duration,
        then: Duration,
        progress: impl FnMut(&dyn Display, Duration) + 'a,
    ) -> Self {
        self.schedule.report_interval = Some(then);
        self.reporting_once(after, progress)
    }

    /// How long it has taken so far.
    #[must_use]
    pub fn waited(&self) -> Duration {
        self.began.elapsed()
    }

    /// Checks until the condition is met. It breaks with a value, or continues with the reason why
    /// it is not met.
    ///
    /// # Errors
    /// [`Unmet`] at the limit, or after a signal. The wait can continue then.
    pub fn until<T, R: Display>(
        &mut self,
        look: impl FnMut() -> ControlFlow<T, R>,
    ) -> Result<T, Unmet<R>> {
        self.until_or(None, look)
    }

    /// As [`Wait::until`], but also checks as soon as the descriptor is readable. The condition
    /// must handle what makes it readable, or the wait spins.
    ///
    /// # Errors
    /// As [`Wait::until`].
    pub fn until_or<T, R: Display>(
        &mut self,
        fd: Option<BorrowedFd<'_>>,
        mut look: impl FnMut() -> ControlFlow<T, R>,
    ) -> Result<T, Unmet<R>> {
        loop {
            let reason = match look() {
                ControlFlow::Break(value) => return Ok(value),
                ControlFlow::Continue(reason) => reason,
            };
            let waited = self.waited();
            let signal = self.wakeups.and_then(Wakeups::take_signal);
            if signal.is_some() || self.schedule.is_over(waited) {
                return Err(Unmet { reason, waited, signal });
            }
            if self.schedule.is_report_due(waited) {
                if let Some(progress) = &mut self.progress {
                    progress(&reason, waited);
                }
            }
            self.rest(self.schedule.time_to_event(waited).min(self.interval), fd);
        }
    }

    fn rest(&self, time: Duration, fd: Option<BorrowedFd<'_>>) {
        let signals = self.wakeups.map(Wakeups::signals);
        let fds = [fd, signals].into_iter().flatten();
        let mut fds: Vec<_> = fds.map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
        // Rounded up to the next millisecond, so that the end is due when the pause is over. A
        // signal ends the pause early.
        let time =
            if time.is_zero() { time } else { time.saturating_add(JUST_UNDER_A_MILLISECOND) };
        let _ = poll(&mut fds, PollTimeout::try_from(time).unwrap_or(PollTimeout::MAX));
    }
}

const JUST_UNDER_A_MILLISECOND: Duration = Duration::from_nanos(999_999);

/// The end of a wait, and its next report. All times count from its start.
#[derive(Clone, Copy, Debug)]
struct Schedule {
    limit: Option<Duration>,
    next_report: Option<Duration>,
    report_interval: Option<Duration>,
}

impl Schedule {
    fn is_over(&self, waited: Duration) -> bool {
        self.limit.is_some_and(|limit| waited >= limit)
    }

    /// Whether to report now. Missed reports are dropped.
    fn is_report_due(&mut self, waited: Duration) -> bool {
        let Some(due) = self.next_report.filter(|due| waited >= *due) else { return false };
        self.next_report = self.report_interval.map(|interval| {
            let mut next = due + interval;
            if next <= waited {
                next = waited + interval;
            }
            next
        });
        true
    }

    /// The time until the next report or the end.
    fn time_to_event(&self, waited: Duration) -> Duration {
        let due = self.limit.into_iter().chain(self.next_report).min();
        due.map_or(Duration::MAX, |due| due.saturating_sub(waited))
    }
}

#[cfg(test)]
mod tests {
    use std::cell::{Cell, RefCell};
    use std::io::Read;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use nix::sys::signal::raise;

    use super::*;
    use crate::os::wakeups::Hangup;

    const fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    /// With a clock that steps: the times of the reports, and of the end.
    #[test]
    fn words_and_end_come_in_time() {
        let schedule =
            |limit, next_report, report_interval| Schedule { limit, next_report, report_interval };
        type Case = (&'static str, Schedule, u64, &'static [u64], Option<u64>);
        let table: [Case; 7] = [
            ("never tells", schedule(Some(s(5)), None, None), 1, &[], Some(5)),
            ("tells at once", schedule(Some(s(3)), Some(s(0)), None), 1, &[0], Some(3)),
            ("tells once", schedule(Some(s(9)), Some(s(2)), None), 1, &[2], Some(9)),
            (
                "tells again",
                schedule(Some(s(30)), Some(s(2)), Some(s(10))),
                1,
                &[2, 12, 22],
                Some(30),
            ),
            (
                "is looked at seldom",
                schedule(Some(s(30)), Some(s(2)), Some(s(2))),
                7,
                &[7, 14, 21, 28],
                Some(35),
            ),
            ("has no limit", schedule(None, Some(s(10)), Some(s(10))), 5, &[10, 20, 30, 40], None),
            ("has no time", schedule(Some(s(0)), Some(s(0)), None), 1, &[], Some(0)),
        ];
        for (name, mut schedule, step, words, over) in table {
            let (mut said, mut now) = (Vec::new(), 0);
            while now <= 40 && !schedule.is_over(s(now)) {
                if schedule.is_report_due(s(now)) {
                    said.push(now);
                }
                now += step;
            }
            assert_eq!(said, words, "{name}");
            assert_eq!((now <= 40).then_some(now), over, "{name}");
        }
    }

    #[test]
    fn nothing_is_slept_through() {
        let schedule = |limit, next_report| Schedule { limit, next_report, report_interval: None };
        let table = [
            (schedule(None, None), 3, Duration::MAX),
            (schedule(Some(s(10)), None), 3, s(7)),
            (schedule(Some(s(10)), Some(s(5))), 3, s(2)),
            (schedule(Some(s(10)), Some(s(50))), 3, s(7)),
            (schedule(Some(s(10)), None), 12, s(0)),
        ];
        for (schedule, waited, rest) in table {
            assert_eq!(schedule.time_to_event(s(waited)), rest, "{schedule:?}");
        }
    }

    #[test]
    fn a_condition_is_looked_at_until_it_holds() {
        let mut left = 3;
        let value = Wait::at_most(s(60)).every(Duration::ZERO).until(|| {
            left -= 1;
            if left == 0 { ControlFlow::Break(7) } else { ControlFlow::Continue("it") }
        });
        assert_eq!(value, Ok(7));
        // A condition that is met needs no time.
        let held = Wait::at_most(Duration::ZERO).until(|| ControlFlow::<_, &str>::Break(8));
        assert_eq!(held, Ok(8));
    }

    #[test]
    fn at_the_limit_the_last_reason_is_known() {
        let (looks, limit) = (Cell::new(0), Duration::from_millis(20));
        let told = RefCell::new(Vec::new());
        let mut wait = Wait::at_most(limit).every(Duration::from_millis(1)).reporting(
            Duration::from_millis(5),
            s(60),
            |what, waited| told.borrow_mut().push((what.to_string(), waited)),
        );
        let unmet = wait.until(|| {
            looks.set(looks.get() + 1);
            ControlFlow::<(), _>::Continue(format!("look {}", looks.get()))
        });
        let unmet = unmet.unwrap_err();
        assert_eq!((unmet.reason, unmet.signal), (format!("look {}", looks.get()), None));
        assert!(unmet.waited >= limit, "{:?}", unmet.waited);
        // The next condition of the same wait has no time left.
        let next = wait.until(|| ControlFlow::<(), _>::Continue(Words(|| "more".to_owned())));
        assert_eq!(next.unwrap_err().reason.to_string(), "more");
        drop(wait);
        let told = told.into_inner();
        assert_eq!(told.len(), 1, "{told:?}");
        assert!(told[0].1 >= Duration::from_millis(5) && told[0].0.starts_with("look "));
    }

    #[test]
    fn a_signal_ends_it_and_it_can_go_on() {
        let wakeups = Wakeups::new(Hangup::Ends).unwrap();
        wakeups.lane_ended();
        let mut wait = Wait::endless().or_signal(&wakeups);
        raise(Signal::SIGTERM).unwrap();
        let unmet = wait.until(|| ControlFlow::<(), _>::Continue("it")).unwrap_err();
        assert_eq!((unmet.reason, unmet.signal), ("it", Some(Signal::SIGTERM)));
        assert!(wakeups.take_lane_ended(), "that was not for this wait");
        assert_eq!(wait.until(|| ControlFlow::<_, &str>::Break(1)), Ok(1));
    }

    #[test]
    fn a_descriptor_wakes_it() {
        let (here, there) = UnixStream::pair().unwrap();
        here.set_nonblocking(true).unwrap();
        let other = std::thread::spawn(move || drop(there));
        // Without an interval it would be checked once.
        let look = || match (&here).read(&mut [0]) {
            Ok(count) => ControlFlow::Break(count),
            Err(error) => ControlFlow::Continue(error),
        };
        assert_eq!(Wait::at_most(s(600)).until_or(Some(here.as_fd()), look).unwrap(), 0);
        other.join().unwrap();
    }
}

//! Counts results and prints each on its line. Several threads report at the same time.

use std::process::ExitCode;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::ui;

/// How many of the slowest are named at the end.
const SLOWEST: usize = 10;

/// How something ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ending {
    /// Well.
    Passed,
    /// With a reason, and details to be shown below it.
    Failed(String, String),
    /// It was not run, for this reason.
    Skipped(String),
}

impl From<anyhow::Error> for Ending {
    fn from(error: anyhow::Error) -> Self {
        let text = format!("{error:#}");
        let (reason, details) = text.split_once('\n').unwrap_or((&text, ""));
        Self::Failed(reason.to_owned(), details.to_owned())
    }
}

/// The results so far.
#[derive(Debug)]
pub struct Report {
    counted: Mutex<Counted>,
    fail_fast: bool,
    began: Instant,
    print: fn(&str),
}

#[derive(Debug, Default)]
struct Counted {
    passed: u32,
    failed: u32,
    skipped: u32,
    /// What was timed, in the order in which it ended.
    times: Vec<(String, Duration)>,
    /// Groups of guests, and how long each boot took.
    boots: Vec<(&'static str, Duration)>,
}

impl Report {
    /// Nothing yet.
    pub fn new(fail_fast: bool) -> Self {
        Self { counted: Mutex::default(), fail_fast, began: Instant::now(), print: ui::out }
    }

    fn counted(&self) -> MutexGuard<'_, Counted> {
        self.counted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts and prints one result, and whatever figures belong to it.
    pub fn add(&self, name: &str, ending: &Ending, took: Option<Duration>, figures: &[String]) {
        // Held while printing, so that the lines of a result stay together.
        let mut counted = self.counted();
        match ending {
            Ending::Passed => counted.passed += 1,
            Ending::Failed(..) => counted.failed += 1,
            Ending::Skipped(_) => counted.skipped += 1,
        }
        counted.times.extend(took.map(|took| (name.to_owned(), took)));
        let figures = figures.iter().map(|line| format!("     | {line}"));
        for line in lines(name, ending, took).into_iter().chain(figures) {
            (self.print)(&line);
        }
    }

    /// Runs one check with its name as the status, then counts it.
    pub fn check(&self, name: &str, check: impl FnOnce() -> Ending) {
        if self.stopped() {
            return;
        }
        ui::status(&format!("running: {name}"));
        let started = Instant::now();
        let ending = check();
        self.add(name, &ending, Some(started.elapsed()), &[]);
    }

    /// Notes how long something took that is no test of its own.
    pub fn time(&self, what: &str, took: Duration) {
        self.counted().times.push((what.to_owned(), took));
    }

    /// Notes the boot of a guest.
    pub fn boot(&self, group: &'static str, took: Duration) {
        self.counted().boots.push((group, took));
    }

    /// All results.
    pub fn count(&self) -> u32 {
        let counted = self.counted();
        counted.passed + counted.failed + counted.skipped
    }

    /// Nothing more is to be run.
    pub fn stopped(&self) -> bool {
        self.fail_fast && self.counted().failed > 0
    }

    /// Prints where the time went.
    pub fn print_times(&self) {
        let (slowest, boots) = {
            let counted = self.counted();
            (slowest(&counted.times), boots(&counted.boots))
        };
        if slowest.is_empty() {
            return;
        }
        (self.print)(&format!("slowest of {:.0} s:", self.began.elapsed().as_secs_f64()));
        slowest.iter().for_each(|line| (self.print)(line));
        boots.iter().for_each(|line| (self.print)(line));
    }

    /// Prints the last line.
    pub fn finish(self) -> ExitCode {
        let Counted { passed, failed, skipped, .. } = *self.counted();
        (self.print)(&format!("{passed} passed, {failed} failed, {skipped} skipped"));
        if failed > 0 { ExitCode::FAILURE } else { ExitCode::SUCCESS }
    }
}

/// A line for each of the slowest, slowest first.
fn slowest(times: &[(String, Duration)]) -> Vec<String> {
    let mut times: Vec<_> = times.iter().collect();
    times.sort_by_key(|(_, took)| std::cmp::Reverse(*took));
    let line = |(name, took): &(String, Duration)| format!("{:8.1} s  {name}", took.as_secs_f64());
    times.into_iter().take(SLOWEST).map(line).collect()
}

/// A line for the boots of each group, in the order of their first ones.
fn boots(boots: &[(&'static str, Duration)]) -> Vec<String> {
    let mut groups: Vec<(&str, Vec<String>)> = Vec::new();
    for (group, took) in boots {
        let seconds = format!("{:.1} s", took.as_secs_f64());
        match groups.iter_mut().find(|(name, _)| name == group) {
            Some((_, all)) => all.push(seconds),
            None => groups.push((group, vec![seconds])),
        }
    }
    groups.into_iter().map(|(group, all)| format!("boots of {group}: {}", all.join(", "))).collect()
}

fn lines(name: &str, ending: &Ending, took: Option<Duration>) -> Vec<String> {
    let time = took.map_or(String::new(), |took| format!(" ({:.1} s)", took.as_secs_f64()));
    match ending {
        Ending::Passed => vec![format!("ok   {name}{time}")],
        Ending::Skipped(reason) => vec![format!("skip {name}: {reason}")],
        Ending::Failed(reason, details) => {
            let mut lines = vec![format!("FAIL {name}: {reason}{time}")];
            lines.extend(details.trim_end().lines().map(|line| format!("     | {line}")));
            lines
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_result_has_its_line() {
        let second = Some(Duration::from_millis(1230));
        assert_eq!(lines("a", &Ending::Passed, second), ["ok   a (1.2 s)"]);
        assert_eq!(lines("a", &Ending::Skipped("why".into()), second), ["skip a: why"]);
        let failed = Ending::Failed("bad".into(), "one\ntwo\n".into());
        assert_eq!(lines("a", &failed, None), ["FAIL a: bad", "     | one", "     | two"]);
    }

    #[test]
    fn failing_fast_stops_after_the_first_failure() {
        let report = Report { print: |_| (), ..Report::new(true) };
        report.add("a", &Ending::Passed, None, &[]);
        assert!(!report.stopped());
        report.add("b", &Ending::Failed("x".into(), String::new()), None, &[]);
        assert!(report.stopped());
        report.check("c", || panic!("must not run"));
        assert_eq!(report.count(), 2);
        assert_eq!(report.finish(), ExitCode::FAILURE);
    }

    #[test]
    fn the_slowest_and_all_boots_are_named() {
        let second = Duration::from_secs(1);
        let times: Vec<_> = (1..=12).map(|n| (format!("test {n}"), second * n)).collect();
        let named = slowest(&times);
        assert_eq!((named.len(), named[0].as_str()), (10, "    12.0 s  test 12"));
        assert_eq!(named[9], "     3.0 s  test 3");
        let all = [("default", second * 9), ("stable", second * 7), ("default", second * 11)];
        assert_eq!(boots(&all), ["boots of default: 9.0 s, 11.0 s", "boots of stable: 7.0 s"]);
    }
}

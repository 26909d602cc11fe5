//! Counts results and prints each on its line.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use crate::ui;

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
        Self::Failed(format!("{error:#}"), String::new())
    }
}

/// The results so far.
#[derive(Debug)]
pub struct Report {
    passed: u32,
    failed: u32,
    skipped: u32,
    fail_fast: bool,
    print: fn(&str),
}

impl Report {
    /// Nothing yet.
    pub fn new(fail_fast: bool) -> Self {
        Self { passed: 0, failed: 0, skipped: 0, fail_fast, print: ui::out }
    }

    /// Counts and prints one result.
    pub fn add(&mut self, name: &str, ending: &Ending, took: Option<Duration>) {
        match ending {
            Ending::Passed => self.passed += 1,
            Ending::Failed(..) => self.failed += 1,
            Ending::Skipped(_) => self.skipped += 1,
        }
        for line in lines(name, ending, took) {
            (self.print)(&line);
        }
    }

    /// Runs one check with its name as the status, then counts it.
    pub fn check(&mut self, name: &str, check: impl FnOnce() -> Ending) {
        if self.stopped() {
            return;
        }
        ui::status(&format!("running: {name}"));
        let started = Instant::now();
        let ending = check();
        self.add(name, &ending, Some(started.elapsed()));
    }

    /// All results.
    pub fn count(&self) -> u32 {
        self.passed + self.failed + self.skipped
    }

    /// Nothing more is to be run.
    pub fn stopped(&self) -> bool {
        self.fail_fast && self.failed > 0
    }

    /// Prints the last line.
    pub fn finish(self) -> ExitCode {
        let Self { passed, failed, skipped, print, .. } = self;
        print(&format!("{passed} passed, {failed} failed, {skipped} skipped"));
        if failed > 0 { ExitCode::FAILURE } else { ExitCode::SUCCESS }
    }
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
        let mut report = Report { print: |_| (), ..Report::new(true) };
        report.add("a", &Ending::Passed, None);
        assert!(!report.stopped());
        report.add("b", &Ending::Failed("x".into(), String::new()), None);
        assert!(report.stopped());
        report.check("c", || panic!("must not run"));
        assert_eq!(report.count(), 2);
        assert_eq!(report.finish(), ExitCode::FAILURE);
    }
}

//! `vm test`: runs all checks and tests, and counts them.

mod guests;
mod host;
mod memory;
mod report;
mod rust_version;
mod schedule;
mod versions;

use std::process::ExitCode;
use std::thread;

use anyhow::{Result, bail, ensure};

use crate::cleanup;
use crate::guest;
use crate::ui;

use report::Report;

/// What to run.
#[derive(Debug, Clone)]
pub struct Selection {
    /// Only what has this in its name.
    pub filter: Option<String>,
    /// Checks and tests on this machine.
    pub host: bool,
    /// Tests with a guest.
    pub guest: bool,
    /// Longer guest tests.
    pub long: bool,
    /// Stop at the first failure.
    pub fail_fast: bool,
}

impl Selection {
    fn takes(&self, name: &str) -> bool {
        self.filter.as_ref().is_none_or(|filter| name.contains(filter.as_str()))
    }

    /// The filter is the full name of a guest test: no need to look further.
    fn names_guest_test(&self) -> bool {
        self.filter.as_ref().is_some_and(|filter| guest::all().any(|test| test.name == filter))
    }

    /// The filter is the full name of a check.
    fn names_check(&self) -> bool {
        let is_named = |name: &str| self.filter.as_deref() == Some(name);
        is_named(versions::NAME) || host::checks().any(is_named)
    }

    fn takes_guest_test(&self, name: &str) -> bool {
        if self.names_guest_test() {
            return self.filter.as_deref() == Some(name);
        }
        self.takes(name)
    }
}

/// Runs what is selected, on the host and in guests at the same time; the last line printed is the
/// count. What keeps tests from being run at all ends the program.
///
/// # Errors
/// When nothing is selected.
pub fn run(selection: &Selection) -> Result<ExitCode> {
    let report = Report::new(selection.fail_fast);
    let or_end = |ended: Result<()>| ended.unwrap_or_else(|error| cleanup::fail(&error));
    // The threads live as long as the programs that they start, as `cleanup::command` demands.
    thread::scope(|scope| {
        if selection.guest {
            scope.spawn(|| or_end(guests::run(selection, &report)));
        }
        if selection.host && !selection.names_guest_test() {
            if selection.takes(rust_version::NAME) {
                scope.spawn(|| rust_version::run(&report));
            }
            or_end(host::run(selection, &report));
        }
    });
    report.print_times();
    versions::check(selection, &report);
    ensure!(report.count() > 0, "no test has `{}` in its name", filter_text(selection));
    Ok(report.finish())
}

/// Prints the names of what is selected.
///
/// # Errors
/// When nothing is selected or the host's tests cannot be built.
pub fn list(selection: &Selection) -> Result<ExitCode> {
    let mut names = Vec::new();
    if selection.host && !selection.names_guest_test() {
        names.extend(host::names(selection)?);
    }
    if selection.guest {
        let tests = guest::all().filter(|test| selection.takes_guest_test(test.name));
        names.extend(tests.map(|test| format!("{} (guest, group {})", test.name, test.group)));
    }
    names.extend(selection.takes(versions::NAME).then(|| versions::NAME.to_owned()));
    if names.is_empty() {
        bail!("no test has `{}` in its name", filter_text(selection));
    }
    for name in names {
        ui::out(&name);
    }
    Ok(ExitCode::SUCCESS)
}

fn filter_text(selection: &Selection) -> &str {
    selection.filter.as_deref().unwrap_or("")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn selection(filter: Option<&str>) -> Selection {
        Selection {
            filter: filter.map(String::from),
            host: true,
            guest: true,
            long: false,
            fail_fast: false,
        }
    }

    #[test]
    fn a_full_name_selects_one_test_and_a_part_all_that_have_it() {
        let name = guest::all().next().unwrap().name;
        let whole = selection(Some(name));
        assert!(whole.names_guest_test() && whole.takes_guest_test(name));
        assert!(!whole.takes_guest_test(&format!("{name}_more")));
        let part = selection(Some("harness_"));
        assert!(!part.names_guest_test() && part.takes_guest_test(name));
        assert!(selection(None).takes("anything"));
        assert!(!selection(Some("x")).takes("y"));
    }
}

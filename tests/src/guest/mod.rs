//! Tests that run in the guest. Each is an entry of [`TABLES`]; the host reads
//! the tables to list tests and to boot the right VM, the guest's program
//! `guest-tests` runs them one by one.
//!
//! To add a test, write a function and an entry in its module's table; to add
//! a module, name its table in [`TABLES`].

pub mod direct;
pub mod dm;
pub mod drives;
pub mod fio;
pub mod losetup;
pub mod nbd;
pub mod netlink;
pub mod nvmet;
pub mod pressure;
pub mod prober;
pub mod process;
mod selftest;
pub(crate) mod ublk;
pub mod udev;
pub mod volatile;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};

use crate::hosted::HostCtx;

/// Exit code by which `guest-tests` says "skipped"; the reason is the last
/// line on its standard output.
pub const SKIP_EXIT_CODE: u8 = 77;

/// Variable that is set to 1 when the user asked for long tests.
pub const LONG_VARIABLE: &str = "UBLK_VM_LONG";

/// Variable with the seed of tests that draw lots, to repeat what one of them has found.
pub const SEED_VARIABLE: &str = "UBLK_VM_SEED";

/// How a line begins, on a test's standard output, that is shown with its result even if it passes.
pub const FIGURE: &str = "figure: ";

/// How a test that did not fail ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// It did all that it is for.
    Pass,
    /// It could not, for this reason.
    Skip(String),
}

/// Where a test's code runs.
#[derive(Clone, Copy, Debug)]
pub enum Code {
    /// In the guest, as a program of its own.
    Guest(fn(&Ctx) -> Result<Outcome>),
    /// On the host, which drives the guest: for tests of boots, power cuts and
    /// the harness itself.
    Host(fn(&mut HostCtx) -> Result<Outcome>),
}

/// One test.
#[derive(Clone, Copy, Debug)]
pub struct TestCase {
    /// Its name, unique, made of words with underscores.
    pub name: &'static str,
    /// The VM it needs, one of [`crate::config::GROUPS`].
    pub group: &'static str,
    /// Wall time after which it is killed, for emulated guests.
    pub timeout: Duration,
    /// The test itself.
    pub code: Code,
    /// Texts in the kernel log that do not count against it.
    pub allow_in_log: &'static [&'static str],
    /// Texts that the check of the kernel log must find, or the test fails.
    pub expect_in_log: &'static [&'static str],
    /// Texts that the check for leaks must find, or the test fails; any other
    /// leak fails it too.
    pub expect_leaks: &'static [&'static str],
}

impl TestCase {
    /// A test in the guest with a timeout of two minutes.
    pub const fn guest(
        name: &'static str,
        group: &'static str,
        code: fn(&Ctx) -> Result<Outcome>,
    ) -> Self {
        Self::new(name, group, Code::Guest(code))
    }

    /// A test on the host with a timeout of two minutes.
    pub const fn host(
        name: &'static str,
        group: &'static str,
        code: fn(&mut HostCtx) -> Result<Outcome>,
    ) -> Self {
        Self::new(name, group, Code::Host(code))
    }

    const fn new(name: &'static str, group: &'static str, code: Code) -> Self {
        Self {
            name,
            group,
            timeout: Duration::from_secs(120),
            code,
            allow_in_log: &[],
            expect_in_log: &[],
            expect_leaks: &[],
        }
    }

    /// Lets texts in the kernel log pass.
    pub const fn allow_in_log(mut self, texts: &'static [&'static str]) -> Self {
        self.allow_in_log = texts;
        self
    }

    /// Demands texts in the kernel log that count as trouble.
    pub const fn expect_in_log(mut self, texts: &'static [&'static str]) -> Self {
        self.expect_in_log = texts;
        self
    }

    /// Demands that these things are found left behind.
    pub const fn expect_leaks(mut self, texts: &'static [&'static str]) -> Self {
        self.expect_leaks = texts;
        self
    }

    /// Gives it another timeout, in seconds.
    pub const fn seconds(mut self, seconds: u64) -> Self {
        self.timeout = Duration::from_secs(seconds);
        self
    }
}

/// The tables of tests, one a module.
pub const TABLES: &[&[TestCase]] = &[selftest::TESTS, crate::hosted::TESTS];

/// All tests, in the order of the tables.
pub fn all() -> impl Iterator<Item = &'static TestCase> {
    TABLES.iter().chain(ublk::TABLES).flat_map(|table| table.iter())
}

/// What a test in the guest gets.
#[derive(Debug)]
pub struct Ctx {
    /// The user asked for long tests.
    pub long: bool,
    /// What the lots are drawn from; tests that do so print it.
    pub seed: u64,
    directory: PathBuf,
}

impl Ctx {
    /// A directory of the test's own, empty and removed afterwards.
    pub fn directory(&self) -> &Path {
        &self.directory
    }
}

/// Runs one test, in the guest.
///
/// # Errors
/// What the test says, or that there is no such test.
pub fn run(name: &str) -> Result<Outcome> {
    let test = all().find(|test| test.name == name);
    let test = test.with_context(|| format!("no test named {name}"))?;
    let Code::Guest(code) = test.code else {
        bail!("{name} is to be run on the host");
    };
    let directory = tempfile::Builder::new().prefix("test-").tempdir()?;
    let long = std::env::var(LONG_VARIABLE).is_ok_and(|value| value == "1");
    let seed = match std::env::var(SEED_VARIABLE) {
        Ok(seed) => seed.parse().with_context(|| format!("{SEED_VARIABLE}: {seed}"))?,
        // Six digits are enough to be different, and can be typed.
        Err(_) => SystemTime::now().duration_since(UNIX_EPOCH)?.subsec_micros().into(),
    };
    code(&Ctx { long, seed, directory: directory.path().to_owned() })
}

/// Waits until `condition` gives something, asking every few milliseconds.
///
/// # Errors
/// Names `what` when `limit` is over, or the condition's own error at once.
pub fn wait_for<T>(
    what: &str,
    limit: Duration,
    mut condition: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(value) = condition().with_context(|| format!("waiting for {what}"))? {
            return Ok(value);
        }
        if Instant::now() >= deadline {
            bail!("waited {} s in vain for {what}", limit.as_secs());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_groups_exist() {
        let names: Vec<_> = all().map(|test| test.name).collect();
        for (n, test) in all().enumerate() {
            assert!(!names[n + 1..].contains(&test.name), "{} is there twice", test.name);
            assert!(crate::config::group(test.group).is_some(), "group of {}", test.name);
        }
        assert!(names.len() > 5);
    }

    #[test]
    fn waiting_ends_with_a_value_an_error_or_the_limit() {
        let mut count = 0;
        let third = wait_for("three", Duration::from_secs(60), || {
            count += 1;
            Ok((count == 3).then_some(count))
        });
        assert_eq!(third.unwrap(), 3);
        let error = wait_for::<()>("it", Duration::ZERO, || Ok(None)).unwrap_err();
        assert_eq!(error.to_string(), "waited 0 s in vain for it");
        let error = wait_for::<()>("it", Duration::MAX / 4, || bail!("no")).unwrap_err();
        assert_eq!(format!("{error:#}"), "waiting for it: no");
    }

    #[test]
    fn tests_of_the_host_do_not_run_in_the_guest() {
        assert!(run("no_such_test").is_err());
        let hosted = all().find(|test| matches!(test.code, Code::Host(_))).unwrap();
        assert!(run(hosted.name).unwrap_err().to_string().contains("on the host"));
    }
}

//! Checks and tests that run on this machine.

use std::ffi::OsString;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::time::Instant;

use anyhow::{Context, Result};
use nix::sys::signal::Signal;

use super::Selection;
use super::report::{Ending, Report};
use super::{memory, rust_version};
use crate::cleanup::{self, Group};
use crate::guest::LONG_VARIABLE;
use crate::image;
use crate::libtest::{Parser, TestResult, Verdict};
use crate::{paths, ui};

/// A check that is one command.
struct Check {
    name: &'static str,
    /// Arguments of cargo.
    args: &'static [&'static str],
    env: &'static [(&'static str, &'static str)],
    /// A program without which the check is skipped.
    needs: &'static str,
}

/// Name of the check that the tests are compiled.
const TESTS_BUILD: &str = "check_tests_build";

const CHECKS: &[Check] = &[
    Check {
        name: "check_formatting",
        args: &["fmt", "--all", "--check"],
        env: &[],
        needs: "cargo-fmt",
    },
    Check {
        name: "check_lints",
        args: &["clippy", "--workspace", "--all-targets", "--quiet", "--", "-D", "warnings"],
        env: &[],
        needs: "cargo-clippy",
    },
    Check {
        name: "check_docs",
        args: &["doc", "--workspace", "--no-deps", "--quiet"],
        env: &[("RUSTDOCFLAGS", "-D warnings")],
        needs: "cargo",
    },
    Check {
        name: "check_dependencies",
        args: &["deny", "check", "bans", "licenses", "sources"],
        env: &[],
        needs: "cargo-deny",
    },
];

/// The names of all checks.
pub fn checks() -> impl Iterator<Item = &'static str> {
    let single = CHECKS.iter().map(|check| check.name);
    single.chain([TESTS_BUILD, rust_version::NAME, memory::NAME])
}

/// Runs the selected checks and tests.
///
/// # Errors
/// When cargo cannot be started.
pub fn run(selection: &Selection, report: &Report) -> Result<()> {
    for check in CHECKS.iter().filter(|check| selection.takes(check.name)) {
        report.check(check.name, || run_check(check));
    }
    if report.stopped() {
        return Ok(());
    }
    let mut built = Ending::Passed;
    if selection.takes(TESTS_BUILD) {
        report.check(TESTS_BUILD, || {
            built = cargo(&["test", "--workspace", "--no-run", "--quiet"], &[]);
            built.clone()
        });
    }
    if built != Ending::Passed || report.stopped() {
        return Ok(());
    }
    if !selection.names_check() {
        run_tests(selection, report)?;
    }
    if selection.takes(memory::NAME) {
        memory::run(selection.long, report);
    }
    Ok(())
}

fn run_check(check: &Check) -> Ending {
    if !installed(check.needs) {
        return Ending::Skipped(format!("{} is not installed", check.needs));
    }
    cargo(check.args, check.env)
}

/// Programs are in `PATH`, or beside cargo.
pub fn installed(program: &str) -> bool {
    paths::program(program).is_some()
        || paths::cargo().parent().is_some_and(|directory| directory.join(program).is_file())
}

fn cargo_command(args: &[&str]) -> Command {
    let mut command = cleanup::command(paths::cargo(), Signal::SIGTERM);
    command.args(args).current_dir(paths::workspace()).stdin(Stdio::null());
    command
}

/// A program's end and all that it printed.
pub struct Ran {
    pub status: ExitStatus,
    pub text: String,
}

/// A command, run in the workspace, whose output and errors are one stream. It leaves the
/// processors to the guests, whose clocks go on while they wait.
pub fn one_stream(program: &Path) -> Command {
    let mut shell = cleanup::command("sh", Signal::SIGTERM);
    shell.args(["-c", r#"exec nice -n 10 "$0" "$@" 2>&1"#]).arg(program);
    shell.current_dir(paths::workspace()).stdin(Stdio::null()).stdout(Stdio::piped());
    shell
}

/// Runs a command of [`one_stream`].
///
/// # Errors
/// When it cannot be started.
pub fn run_to_end(command: &mut Command) -> Result<Ran> {
    let mut group = Group::spawn(command, Signal::SIGTERM)?;
    let stdout = group.child().stdout.take().context("a program's output")?;
    let mut bytes = Vec::new();
    BufReader::new(stdout).read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes).into_owned();
    Ok(Ran { status: group.wait()?, text })
}

/// Runs cargo; its output is shown if it fails.
fn cargo(args: &[&str], env: &[(&str, &str)]) -> Ending {
    match run_to_end(one_stream(&paths::cargo()).args(args).envs(env.iter().copied())) {
        Ok(ran) if ran.status.success() => Ending::Passed,
        Ok(ran) => Ending::Failed(format!("`cargo {}` failed", args.join(" ")), ran.text),
        Err(error) => error.into(),
    }
}

/// The variable by which tests find the kernel's headers, if they are installed. Tests that need
/// them are marked as ignored, for those who run `cargo test`.
pub fn kernel_headers() -> Option<(&'static str, OsString)> {
    let image = image::ensure_image().ok()?;
    Some(("UBLK_UAPI_HEADERS", image.headers().into()))
}

fn run_tests(selection: &Selection, report: &Report) -> Result<()> {
    let mut args = vec!["test", "--workspace", "--no-fail-fast", "--"];
    args.extend(selection.filter.as_deref());
    let headers = kernel_headers();
    if headers.is_some() {
        args.push("--include-ignored");
    }
    // One stream, for the order of binaries' names and their tests.
    let mut command = one_stream(&paths::cargo());
    command.args(&args).envs(headers);
    command.envs(selection.long.then_some((LONG_VARIABLE, "1")));
    let started = Instant::now();
    let mut group = Group::spawn(&mut command, Signal::SIGTERM)?;
    let stdout = group.child().stdout.take().context("cargo's output")?;
    let mut parser = Parser::default();
    let mut text = String::new();
    for line in BufReader::new(stdout).lines() {
        let line = line?;
        if let Some(result) = parser.line(&line) {
            ui::status(&format!("running: {}", result.name));
        }
        text.push_str(&line);
        text.push('\n');
    }
    let status = group.wait()?;
    let results = parser.finish();
    let failures = results.iter().any(|r| matches!(r.verdict, Verdict::Failed(_)));
    for result in results {
        add(report, result);
    }
    if !status.success() && !failures {
        let reason = format!("`cargo {}` ended with {status}", args.join(" "));
        report.add("check_host_tests", &Ending::Failed(reason, text), None, &[]);
    }
    report.time("the host's tests", started.elapsed());
    Ok(())
}

/// Counts the result of a test of this machine.
pub fn add(report: &Report, result: TestResult) {
    let ending = match result.verdict {
        Verdict::Passed => Ending::Passed,
        Verdict::Ignored(reason) if reason.is_empty() => Ending::Skipped("marked #[ignore]".into()),
        Verdict::Ignored(reason) => Ending::Skipped(reason),
        Verdict::Failed(output) => {
            let reason = output
                .lines()
                .skip_while(|line| !line.contains("panicked at"))
                .nth(1)
                .or_else(|| output.lines().find(|line| !line.trim().is_empty()))
                .unwrap_or("failed");
            Ending::Failed(reason.to_owned(), output.clone())
        }
    };
    report.add(&result.name, &ending, None, &[]);
}

/// The names of checks and tests.
///
/// # Errors
/// When the tests cannot be built.
pub fn names(selection: &Selection) -> Result<Vec<String>> {
    let mut names: Vec<String> = checks().map(String::from).collect();
    names.retain(|name| selection.takes(name));
    let mut command = cargo_command(&["test", "--workspace", "--quiet", "--"]);
    if let Some(filter) = &selection.filter {
        command.arg(filter);
    }
    command.arg("--list").stdout(Stdio::piped());
    let mut group = Group::spawn(&mut command, Signal::SIGTERM)?;
    let stdout = group.child().stdout.take().context("cargo's output")?;
    for line in BufReader::new(stdout).lines() {
        if let Some(name) = line?.strip_suffix(": test") {
            names.push(name.to_owned());
        }
    }
    anyhow::ensure!(group.wait()?.success(), "the tests do not build");
    Ok(names)
}

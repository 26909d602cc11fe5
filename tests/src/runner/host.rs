//! Checks and tests that run on this machine.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result};
use nix::sys::signal::Signal;

use super::Selection;
use super::report::{Ending, Report};
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

/// Runs the selected checks and tests.
///
/// # Errors
/// When cargo cannot be started.
pub fn run(selection: &Selection, report: &mut Report) -> Result<()> {
    for check in CHECKS.iter().filter(|check| selection.takes(check.name)) {
        report.check(check.name, || run_check(check));
    }
    if report.stopped() {
        return Ok(());
    }
    let mut built = Ending::Passed;
    if selection.takes("check_tests_build") {
        report.check("check_tests_build", || {
            built = cargo(&["test", "--workspace", "--no-run", "--quiet"], &[]);
            built.clone()
        });
    }
    if built == Ending::Passed && !report.stopped() {
        run_tests(selection, report)?;
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
fn installed(program: &str) -> bool {
    paths::program(program).is_some()
        || paths::cargo().parent().is_some_and(|directory| directory.join(program).is_file())
}

fn cargo_command(args: &[&str]) -> Command {
    let mut command = cleanup::command(paths::cargo(), Signal::SIGTERM);
    command.args(args).current_dir(paths::workspace()).stdin(Stdio::null());
    command
}

/// Runs cargo; its output is shown if it fails.
fn cargo(args: &[&str], env: &[(&str, &str)]) -> Ending {
    let started = || -> Result<(bool, String)> {
        let mut shell = cleanup::command("sh", Signal::SIGTERM);
        shell.args(["-c", r#"exec "$0" "$@" 2>&1"#]).arg(paths::cargo()).args(args);
        shell.envs(env.iter().copied()).current_dir(paths::workspace());
        shell.stdin(Stdio::null()).stdout(Stdio::piped());
        let mut group = Group::spawn(&mut shell, Signal::SIGTERM)?;
        let stdout = group.child().stdout.take().context("cargo's output")?;
        let text = std::io::read_to_string(stdout)?;
        Ok((group.wait()?.success(), text))
    };
    match started() {
        Ok((true, _)) => Ending::Passed,
        Ok((false, text)) => {
            let reason = format!("`cargo {}` failed", args.join(" "));
            Ending::Failed(reason, text)
        }
        Err(error) => Ending::Failed(format!("{error:#}"), String::new()),
    }
}

fn run_tests(selection: &Selection, report: &mut Report) -> Result<()> {
    let mut args = vec!["test", "--workspace", "--no-fail-fast", "--"];
    args.extend(selection.filter.as_deref());
    // Tests that need the kernel's headers are marked as ignored, for those who run `cargo test`.
    let headers = image::ensure_image().map(|image| image.headers());
    if headers.is_ok() {
        args.push("--include-ignored");
    }
    let mut shell = cleanup::command("sh", Signal::SIGTERM);
    // One stream, for the order of binaries' names and their tests.
    shell.args(["-c", r#"exec "$0" "$@" 2>&1"#]).arg(paths::cargo()).args(&args);
    shell.envs(headers.ok().map(|headers| ("UBLK_UAPI_HEADERS", headers)));
    shell.envs(selection.long.then_some((LONG_VARIABLE, "1")));
    shell.current_dir(paths::workspace()).stdin(Stdio::null()).stdout(Stdio::piped());
    let started = Instant::now();
    let mut group = Group::spawn(&mut shell, Signal::SIGTERM)?;
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
        report.add("check_host_tests", &Ending::Failed(reason, text), Some(started.elapsed()));
    }
    Ok(())
}

fn add(report: &mut Report, result: TestResult) {
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
    report.add(&result.name, &ending, None);
}

/// The names of checks and tests.
///
/// # Errors
/// When the tests cannot be built.
pub fn names(selection: &Selection) -> Result<Vec<String>> {
    let mut names: Vec<String> = CHECKS.iter().map(|check| check.name.to_owned()).collect();
    names.push("check_tests_build".into());
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

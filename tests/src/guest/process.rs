//! Runs programs in tests.

use std::process::{Command, Output, Stdio};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// What a program printed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Printed {
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
}

/// Runs a program that has to succeed.
///
/// # Errors
/// When it cannot be started or its exit code is not 0; the message holds all
/// that it printed.
pub fn run(argv: &[&str]) -> Result<Printed> {
    run_for_code(argv, 0)
}

/// Runs a program that has to exit with `code`.
///
/// # Errors
/// When it cannot be started or ends otherwise.
pub fn run_for_code(argv: &[&str], code: i32) -> Result<Printed> {
    let output = output(argv)?;
    let printed = Printed {
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    };
    if output.status.code() == Some(code) {
        return Ok(printed);
    }
    bail!(
        "`{}` ended with {} instead of exit code {code}\n{}{}",
        argv.join(" "),
        output.status,
        printed.stdout,
        printed.stderr
    )
}

/// Sends a signal to a process.
///
/// # Errors
/// When there is no such process.
pub fn signal(pid: u32, signal: Signal) -> Result<()> {
    let sent = kill(Pid::from_raw(i32::try_from(pid)?), signal);
    sent.with_context(|| format!("{signal} to {pid}"))
}

fn output(argv: &[&str]) -> Result<Output> {
    let (program, arguments) = argv.split_first().context("no program given")?;
    Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("start {program}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_are_asserted() {
        assert_eq!(run(&["echo", "hi"]).unwrap().stdout, "hi\n");
        assert_eq!(run_for_code(&["sh", "-c", "echo x >&2; exit 3"], 3).unwrap().stderr, "x\n");
        let error = run(&["sh", "-c", "echo why; exit 3"]).unwrap_err().to_string();
        assert!(error.contains("exit status: 3") && error.contains("why"), "{error}");
        assert!(run(&["/no/such/program"]).is_err());
    }
}

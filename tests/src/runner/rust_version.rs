//! The check that the workspace is compiled by the oldest Rust that it promises, which is Debian
//! stable's: programs, libraries, tests, examples and benches.

use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use super::host;
use super::report::{Ending, Report};
use crate::{paths, rust_root};

/// Name of the check.
pub const NAME: &str = "check_rust_version";

/// `rust-version` of the workspace.
const PROMISED: &str = env!("CARGO_PKG_RUST_VERSION");

const CHECK: &[&str] =
    &["check", "--workspace", "--all-targets", "--locked", "--quiet", "--message-format=short"];

/// Makes the check: with the compiler at hand if it is that old, else in a root that has it.
pub fn run(report: &Report) {
    report.check(NAME, || check().unwrap_or_else(Ending::from));
}

fn check() -> Result<Ending> {
    let mut command = host::one_stream(&paths::cargo());
    if !is_promised(&version_of(Command::new("rustc"))?) {
        let root = rust_root::ensure_root()?;
        let found = version_of(root.command("rustc")?)?;
        if !is_promised(&found) {
            bail!("Cargo.toml promises Rust {PROMISED}, and the release has {found}");
        }
        command = root.command("cargo")?;
    }
    let ran = host::run_to_end(command.args(CHECK).stdout(Stdio::piped()))?;
    if ran.status.success() {
        return Ok(Ending::Passed);
    }
    let reason = format!("the workspace is not compiled by Rust {PROMISED}");
    Ok(Ending::Failed(reason, ran.text))
}

/// The second word of `rustc 1.85.1 (4eb161250 2025-03-15)`.
fn version_of(mut rustc: Command) -> Result<String> {
    let output = rustc.arg("--version").output().context("start rustc")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let version = text.split(' ').nth(1).map(str::to_owned);
    version.with_context(|| {
        let complaint = String::from_utf8_lossy(&output.stderr).into_owned() + &text;
        format!("rustc does not say its version: {}", complaint.trim())
    })
}

/// Whether a compiler is of the promised minor version.
fn is_promised(version: &str) -> bool {
    version.strip_prefix(PROMISED).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_promised_minor_version_will_do() {
        let cases = [("", true), (".0", true), (".1", true), ("0.1", false), ("-nightly", false)];
        for (rest, is) in cases {
            assert_eq!(is_promised(&format!("{PROMISED}{rest}")), is, "{PROMISED}{rest}");
        }
        assert!(!is_promised("1.1") && !is_promised(""));
    }
}

//! The check of memory: the workspace's tests and programs under valgrind, which sees the use of
//! uninitialised, freed and foreign memory, wrong frees, and memory that is lost.
//!
//! It follows the instructions of the process. What the kernel does with an address in an SQE it
//! does not see: that nothing is freed which the kernel may still use is for tests to show, and
//! memory that only a ring operation has filled counts as uninitialised (mapped memory does not).
//!
//! Miri sees more (aliasing, provenance) but knows no io_uring; where the toolchain has it:
//! `cargo +nightly miri test -p bufreg`.

use std::ffi::OsString;
use std::path::Path;

use anyhow::{Context, Result};

use super::host::{self, Ran};
use super::report::{Ending, Report};
use crate::artifact::{self, Artifact};
use crate::libtest::{Parser, TestResult, Verdict};
use crate::{paths, ui};

/// Name of the check.
pub const NAME: &str = "check_memory";

/// The program that checks.
const CHECKER: &str = "valgrind";

const OPTIONS: &[&str] = &[
    "--quiet",
    "--leak-check=full",
    "--show-leak-kinds=definite",
    "--errors-for-leak-kinds=definite",
    "--vgdb=no", // or each run makes named pipes for a debugger
    // One thread runs at a time. Without this, a thread that never sleeps keeps the others waiting.
    "--fair-sched=try",
];

/// What the checker exits with if it found something.
const FOUND: i32 = 97;

/// A program that is run.
struct Program {
    /// `bin` or `example`.
    kind: &'static str,
    name: &'static str,
    args: &'static [&'static str],
    long_args: &'static [&'static str],
    /// What the checker must say of it; it must say nothing if this is empty.
    fault: &'static str,
}

/// The first shows that silence about the others means something.
const PROGRAMS: &[Program] = &[
    Program {
        kind: "example",
        name: "memory_fault",
        args: &[],
        long_args: &[],
        fault: "Invalid read",
    },
    Program {
        kind: "bin",
        name: "sim",
        args: &["--seeds", "6"],
        long_args: &["--seeds", "40"],
        fault: "",
    },
];

/// Folders of the packages whose tests are run.
const PACKAGES: &[&str] = &["bufreg", "uring-ext", "ublk-engine", "ublk-target", "sim"];

/// Everything is some thirty times slower than without the checker, hence fewer cases and seeds.
const COUNTS: &[(&str, &str)] = &[("PROPTEST_CASES", "16"), ("UBLK_SIM_SEEDS", "6")];
const LONG_COUNTS: &[(&str, &str)] = &[("PROPTEST_CASES", "64"), ("UBLK_SIM_SEEDS", "40")];

/// Makes the check; tests that say that they cannot run are counted as skipped.
pub fn run(long: bool, report: &Report) {
    let mut skipped = Vec::new();
    report.check(NAME, || {
        if !host::installed(CHECKER) {
            return Ending::Skipped(format!("{CHECKER} is not installed"));
        }
        match check(long) {
            Ok(tests) => skipped = tests,
            Err(ending) => return ending,
        }
        Ending::Passed
    });
    for mut test in skipped {
        test.name = format!("{NAME}: {}", test.name);
        host::add(report, test);
    }
}

/// Runs everything; returns the tests that were skipped, or the first failure.
fn check(long: bool) -> Result<Vec<TestResult>, Ending> {
    let targets = PROGRAMS.iter().flat_map(|p| [format!("--{}", p.kind), p.name.to_owned()]);
    let built = build(&["build"], targets)?;
    for program in PROGRAMS {
        let is_it = |built: &&Artifact| built.kind == program.kind && built.name == program.name;
        let artifact = built.iter().find(is_it);
        let artifact = artifact.with_context(|| format!("cargo did not build {}", program.name))?;
        let args = if long { program.long_args } else { program.args };
        judge_program(program, &execute(artifact, args, &[])?)?;
    }

    // The same build as that of the tests, whose features other packages have a part in.
    let built = build(&["test", "--no-run"], [])?;
    let headers = host::kernel_headers();
    // Lanes wait in `io_uring_enter(2)`, during which the checker (3.19) lets no other thread run:
    // they would wait for ever.
    let mut args = vec!["--skip", "io_thread::lanes::tests"];
    // Nor process descriptors (before 3.21).
    args.extend(["--skip", "partitions::tests::a_process_is_awaited"]);
    args.extend(["--skip", "upgrade::tests::a_program_that_is_asked"]);
    // The model checker has stacks of its own, which this checker takes for faults.
    args.extend(["--skip", "all_lanes_are_quiet"]);
    args.extend(headers.is_some().then_some("--include-ignored"));
    let mut variables: Vec<(&str, OsString)> = headers.into_iter().collect();
    let counts = if long { LONG_COUNTS } else { COUNTS };
    variables.extend(counts.iter().map(|(name, count)| (*name, OsString::from(count))));
    let mut skipped = Vec::new();
    for package in PACKAGES {
        let directory = paths::workspace().join(package);
        let tests: Vec<_> = built.iter().filter(|a| a.is_test && a.package == directory).collect();
        if tests.is_empty() {
            return Err(failed(format!("cargo built no tests of {package}"), ""));
        }
        for test in tests {
            skipped.extend(judge_tests(&test.executable, &execute(test, &args, &variables)?)?);
        }
    }
    Ok(skipped)
}

fn build(
    command: &[&str],
    targets: impl IntoIterator<Item = String>,
) -> Result<Vec<Artifact>, Ending> {
    let mut cargo = host::one_stream(&paths::cargo());
    cargo.args(command).args(["--workspace", "--quiet"]);
    cargo.args(["--message-format", "json-render-diagnostics"]).args(targets);
    let ran = host::run_to_end(&mut cargo)?;
    if !ran.status.success() {
        let text: Vec<_> = ran.text.lines().filter(|line| !line.starts_with('{')).collect();
        return Err(failed("the build failed".into(), &text.join("\n")));
    }
    Ok(artifact::read(ran.text.as_bytes()).context("read what cargo says")?)
}

fn execute(artifact: &Artifact, args: &[&str], variables: &[(&str, OsString)]) -> Result<Ran> {
    ui::status(&format!("running: {NAME} of {}", artifact.name));
    let mut command = host::one_stream(CHECKER.as_ref());
    command.args(OPTIONS).arg(format!("--error-exitcode={FOUND}"));
    command.arg(&artifact.executable).args(args);
    // What cargo gives to the tests that it runs.
    command.current_dir(&artifact.package).env("CARGO_MANIFEST_DIR", &artifact.package);
    command.envs(variables.iter().map(|(name, value)| (name, value)));
    host::run_to_end(&mut command)
}

fn judge_program(program: &Program, ran: &Ran) -> Result<(), Ending> {
    let name = program.name;
    let reason = match (program.fault, ran.status.code()) {
        ("", Some(0)) => return Ok(()),
        ("", Some(FOUND)) => format!("{CHECKER} found a fault in {name}"),
        ("", _) => format!("{name} ended with {}", ran.status),
        (fault, Some(FOUND)) if ran.text.contains(fault) => return Ok(()),
        _ => format!("{CHECKER} does not see the deliberate fault of {name}"),
    };
    Err(failed(reason, &ran.text))
}

/// Takes the output of a test binary; returns the tests that it skipped.
fn judge_tests(executable: &Path, ran: &Ran) -> Result<Vec<TestResult>, Ending> {
    let mut parser = Parser::default();
    parser.line(&format!("Running ({})", executable.display()));
    for line in ran.text.lines() {
        parser.line(line);
    }
    let mut results = parser.finish();
    let is_failed = |result: &TestResult| matches!(result.verdict, Verdict::Failed(_));
    let name = executable.file_name().unwrap_or_default().to_string_lossy();
    let reason = match ran.status.code() {
        Some(0) if !results.iter().any(is_failed) => {
            results.retain(|result| matches!(result.verdict, Verdict::Ignored(_)));
            return Ok(results);
        }
        Some(FOUND) => format!("{CHECKER} found a fault in {name}"),
        _ => format!("{name} ended with {} under {CHECKER}", ran.status),
    };
    let is_of_use = |line: &&str| !line.ends_with(" ... ok");
    let text: Vec<_> = ran.text.lines().filter(is_of_use).collect();
    Err(failed(reason, &text.join("\n")))
}

fn failed(reason: String, details: &str) -> Ending {
    Ending::Failed(reason, details.to_owned())
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;
    use std::process::ExitStatus;

    use super::*;

    const INVALID_READ: &str = "==7== Invalid read of size 1\n==7==    at 0x1: main (fault.rs:9)\n";

    fn ran(code: i32, text: &str) -> Ran {
        Ran { status: ExitStatus::from_raw(code << 8), text: text.into() }
    }

    fn reason<T>(result: Result<T, Ending>) -> Option<String> {
        match result.err()? {
            Ending::Failed(reason, _) => Some(reason),
            Ending::Passed | Ending::Skipped(_) => None,
        }
    }

    #[test]
    fn a_fault_must_be_seen_where_one_is_and_nowhere_else() {
        let leak = "==7== 8 bytes in 1 blocks are definitely lost in loss record 1 of 1\n";
        for (fault, code, text, expected) in [
            ("Invalid read", 97, INVALID_READ, None),
            ("Invalid read", 0, "0\n", Some("valgrind does not see the deliberate fault of it")),
            (
                "Invalid read",
                0,
                INVALID_READ,
                Some("valgrind does not see the deliberate fault of it"),
            ),
            ("Invalid read", 97, leak, Some("valgrind does not see the deliberate fault of it")),
            ("", 0, "fine\n", None),
            ("", 97, leak, Some("valgrind found a fault in it")),
            ("", 1, "", Some("it ended with exit status: 1")),
        ] {
            let program = Program { kind: "bin", name: "it", args: &[], long_args: &[], fault };
            let judged = reason(judge_program(&program, &ran(code, text)));
            assert_eq!(judged.as_deref(), expected, "{fault} {code} {text}");
        }
    }

    #[test]
    fn tests_pass_fail_or_are_named_as_skipped() {
        let executable = Path::new("/t/deps/ublk_target-00ff");
        let output = "\nrunning 2 tests\ntest a ... ok\ntest b ... ignored, no ring\n\n\
             test result: ok. 1 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out\n";
        let skipped = judge_tests(executable, &ran(0, output)).unwrap();
        let names: Vec<_> = skipped.iter().map(|result| result.name.as_str()).collect();
        assert_eq!(names, ["ublk_target: b"]);

        for (code, text, expected) in [
            (97, output, "valgrind found a fault in ublk_target-00ff"),
            (101, output, "ublk_target-00ff ended with exit status: 101 under valgrind"),
            (0, "running 2 tests\n", "ublk_target-00ff ended with exit status: 0 under valgrind"),
        ] {
            let judged = reason(judge_tests(executable, &ran(code, text)));
            assert_eq!(judged.as_deref(), Some(expected), "{code} {text}");
        }
        let Err(Ending::Failed(_, details)) =
            judge_tests(executable, &ran(97, &format!("test a ... ok\n{INVALID_READ}")))
        else {
            panic!("not failed")
        };
        assert_eq!(details, INVALID_READ.trim_end());
    }

    #[test]
    fn the_first_program_has_a_fault_and_the_others_have_none() {
        assert!(!PROGRAMS[0].fault.is_empty());
        assert!(PROGRAMS[1..].iter().all(|program| program.fault.is_empty()));
    }
}

//! The guest's part: `bench-guest prepare` and `bench-guest ROW [--quick]`.

use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};

use super::column::{COLUMNS, Column};
use super::profile::guest::{self as profile, PROFILE};
use super::results::Cell;
use super::row::{Requests, Row, Subject, row_named};
use super::stack::{self, Stack};
use crate::guest::fio::{self, Report};
use crate::guest::process;
use crate::guest::udev::QuietUdev;

/// Loads the drivers, and prints versions.
pub const PREPARE: &str = "prepare";
/// Fewer requests.
pub const QUICK: &str = "--quick";
/// Runs of which a cell is the median.
pub const RUNS: usize = 3;
/// One takes a nanosecond.
pub const INSTRUCTIONS_A_MILLISECOND: u64 = 1_000_000;

/// Prints a cell a line as JSON; why there are no more goes to standard error.
pub fn in_guest() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let result = match arguments[..] {
        [PREPARE] => prepare(),
        [name] => row(name, false),
        [name, QUICK] => row(name, true),
        [PROFILE, row, column, times] => profile::in_guest(row, column, times),
        _ => Err(anyhow::anyhow!("a row is to be named")),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn prepare() -> Result<()> {
    stack::load_drivers()?;
    for argv in [["fio", "--version"], ["ublk-target", "--version"]] {
        println!("{}", process::run(&argv)?.stdout.trim());
    }
    Ok(())
}

fn row(name: &str, quick: bool) -> Result<()> {
    let row = row_named(name).with_context(|| format!("there is no row {name}"))?;
    let scratch = tempfile::tempdir()?;
    for column in &COLUMNS {
        let cell = cell(row, column, quick, scratch.path()).context(column.title.join(" "))?;
        let mut out = std::io::stdout().lock();
        writeln!(out, "{}", serde_json::to_string(&cell)?)?;
        out.flush()?;
    }
    Ok(())
}

fn cell(row: &Row, column: &Column, quick: bool, scratch: &Path) -> Result<Cell> {
    let stack = Stack::make(row.subject, column)?;
    let runs = measure(&stack, row.subject, column, quick, scratch);
    let removed = stack.remove();
    let cell = Cell { column: column.name.into(), runs: runs? };
    removed.map(|()| cell)
}

fn measure(
    stack: &Stack,
    subject: Subject,
    column: &Column,
    quick: bool,
    scratch: &Path,
) -> Result<Vec<u32>> {
    let options = options(stack, subject, column, column.requests(quick))?;
    let _quiet = QuietUdev::new()?;
    (0..RUNS).map(|_| instructions(&fio::run_in(scratch, &options)?, column, quick)).collect()
}

/// Options of fio for a run.
pub(super) fn options(
    stack: &Stack,
    subject: Subject,
    column: &Column,
    requests: u64,
) -> Result<Vec<String>> {
    let offset = match subject {
        Subject::DmStripe(requests) | Subject::Stripe(requests) => {
            column.chunk_and_offset(requests).1
        }
        Subject::Raw
        | Subject::DmLinear
        | Subject::KernelLoop
        | Subject::RublkLoop
        | Subject::Null
        | Subject::Loop(_)
        | Subject::Layered(_)
        | Subject::RawMany(_)
        | Subject::Fleet(_)
        | Subject::Linear => column.chunk_and_offset(Requests::Within).1,
    };
    Ok(column.options(&stack.path()?, offset, requests))
}

/// Instructions for each request of a run.
fn instructions(report: &Report, column: &Column, quick: bool) -> Result<u32> {
    let (read, write) = (report.read, report.write);
    let (done, wanted) = (read.requests + write.requests, column.requests(quick));
    ensure!(done == wanted, "fio made {done} requests instead of {wanted}");
    let milliseconds = read.runtime_ms + write.runtime_ms; // one of them is 0
    ensure!(milliseconds > 0, "fio saw no time pass");
    Ok(u32::try_from((milliseconds * INSTRUCTIONS_A_MILLISECOND + done / 2) / done)?)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::guest::fio::Direction;

    #[test]
    fn time_is_instructions() {
        let column = &COLUMNS[0];
        let requests = column.requests(true);
        let some = Direction { requests, runtime_ms: 100, ..Direction::default() };
        let none = Direction::default();
        let (longest_request, longest_sync) = (Duration::ZERO, Duration::ZERO);
        let report = |read, write| Report {
            read,
            write,
            trim: none,
            longest_request,
            longest_sync,
            error: 0,
        };
        // 10^8 instructions, 4096 requests.
        assert_eq!(requests, 4096);
        for report in [report(some, none), report(none, some)] {
            assert_eq!(instructions(&report, column, true).unwrap(), 24_414);
        }
        let too_many = instructions(&report(some, some), column, true).unwrap_err();
        assert_eq!(too_many.to_string(), "fio made 8192 requests instead of 4096");
        let at_once = report(Direction { runtime_ms: 0, ..some }, none);
        assert!(instructions(&at_once, column, true).is_err());
    }
}

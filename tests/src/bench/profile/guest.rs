//! The guest's part: a load on a device, and where programs and the kernel's functions are.

use std::fs;

use anyhow::{Context, Result, ensure};

use crate::bench::column::COLUMNS;
use crate::bench::guest::options;
use crate::bench::row::row_named;
use crate::bench::stack::{RUBLK, Stack};
use crate::guest::fio;
use crate::guest::udev::QuietUdev;

/// `bench-guest profile ROW LOAD TIMES`.
pub const PROFILE: &str = "profile";
/// Programs whose functions are told apart.
pub const PROGRAMS: [&str; 2] = ["ublk-target", RUBLK];

/// Makes so many times the load's requests and prints, a line each: `program NAME START END` of servers, and
/// `kernel ADDRESS NAME` of functions, with addresses in hexadecimal.
pub fn in_guest(row: &str, column: &str, times: &str) -> Result<()> {
    let row = row_named(row).with_context(|| format!("there is no row {row}"))?;
    let column = COLUMNS.iter().find(|it| it.name == column).context("there is no such load")?;
    let scratch = tempfile::tempdir()?;
    let stack = Stack::make(row.subject, column)?;
    let requests = times.parse::<u64>()? * column.requests;
    let options = options(&stack, row.subject, column, requests)?;
    let quiet = QuietUdev::new()?;
    servers()?.iter().for_each(|server| println!("{server}"));
    let report = fio::run_in(scratch.path(), &options)?;
    let done = report.read.requests + report.write.requests;
    ensure!(done == requests, "fio made {done} requests");
    drop(quiet);
    stack.remove()?;
    for line in fs::read_to_string("/proc/kallsyms")?.lines() {
        // Address, type, name, and the module's if it is in one.
        let mut words = line.split_whitespace();
        if let (Some(address), Some("t" | "T" | "w" | "W"), Some(name)) =
            (words.next(), words.next(), words.next())
        {
            println!("kernel {address} {name}");
        }
    }
    Ok(())
}

/// Where the programs of servers are mapped. All servers of a program are at different places.
fn servers() -> Result<Vec<String>> {
    let mut servers = Vec::new();
    for process in fs::read_dir("/proc")? {
        let directory = process?.path();
        // Not a process, or one that has just ended.
        let Ok(name) = fs::read_to_string(directory.join("comm")) else { continue };
        let Some(name) = PROGRAMS.iter().find(|program| **program == name.trim()) else { continue };
        let maps = fs::read_to_string(directory.join("maps"))?;
        let own = maps.lines().filter(|line| line.ends_with(&format!("/{name}")));
        let ranges: Vec<_> =
            own.filter_map(|line| line.split(' ').next()?.split_once('-')).collect();
        if let (Some((start, _)), Some((_, end))) = (ranges.first(), ranges.last()) {
            servers.push(format!("program {name} {start} {end}"));
        }
    }
    Ok(servers)
}

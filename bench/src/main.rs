//! The command line of `ublk-bench`.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use ublk_bench::{compare, explain, report, table};

/// Compares ublk-target with other ways to serve a block device.
#[derive(Debug, Parser)]
#[command(name = "ublk-bench", version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Make a page of the results of a run
    Report(report::cli::Arguments),
    /// Show the results of a run as tables
    Table(table::cli::Arguments),
    /// Show what changed from one run to another, and whether it is more than noise
    Compare(compare::cli::Arguments),
    /// Show where the time of one I/O goes, stage by stage
    Explain(explain::cli::Arguments),
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Report(arguments) => report::cli::run(&arguments),
        Command::Table(arguments) => table::cli::run(&arguments),
        Command::Compare(arguments) => compare::cli::run(&arguments),
        Command::Explain(arguments) => explain::cli::run(&arguments),
    };
    result.unwrap_or_else(|error| {
        eprintln!("ublk-bench: {error:#}");
        ExitCode::FAILURE
    })
}

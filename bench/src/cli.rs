//! The command line. Every error is one line: what failed, why, what to do.

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::run::{self, RunArgs};
use crate::{compare, explain, report, table};

/// Measures block devices side by side: a backing, the kernel's own drivers on it, and ublk servers
/// with and without a copy.
#[derive(Debug, Parser)]
#[command(name = "ublk-bench", version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Measure a backing and the devices on it, interleaved and repeated
    #[command(after_help = run::args::HELP)]
    Run(RunArgs),
    /// Write the results of a run as one HTML page that needs no network
    Report(report::cli::Arguments),
    /// Show the results of a run as tables
    Table(table::cli::Arguments),
    /// Show what changed between two runs, and whether it is more than noise
    Compare(compare::cli::Arguments),
    /// Show where the time of one I/O goes, stage by stage
    Explain(explain::cli::Arguments),
}

/// Parses the arguments and runs the command.
pub fn run() -> ExitCode {
    let done = match &Cli::parse().command {
        Command::Run(args) => run::run(args),
        Command::Report(args) => report::cli::run(args),
        Command::Table(args) => table::cli::run(args),
        Command::Compare(args) => compare::cli::run(args),
        Command::Explain(args) => explain::cli::run(args),
    };
    done.unwrap_or_else(|error| {
        eprintln!("ublk-bench: {error:#}");
        ExitCode::FAILURE
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}

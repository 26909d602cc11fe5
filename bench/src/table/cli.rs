//! The subcommand `table`.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;

use crate::output::print;
use crate::summary::check::read;

/// Arguments of `table`.
#[derive(Debug, Args)]
pub struct Arguments {
    /// A results file of `run`
    #[arg(value_name = "RESULTS.json")]
    results: PathBuf,
    /// Width in columns [default: that of the terminal, else 100]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(40..=1000))]
    width: Option<u16>,
}

/// Prints the tables.
///
/// # Errors
/// One line, if the file cannot be read.
pub fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let results = read(&arguments.results)?;
    let width = arguments.width.map_or_else(terminal_width, usize::from);
    print(&super::text(&results, width)?)?;
    Ok(ExitCode::SUCCESS)
}

/// The width for standard output in columns: that of the terminal, if it is one.
#[must_use]
pub fn terminal_width() -> usize {
    let size = rustix::termios::tcgetwinsize(std::io::stdout());
    let columns = size.map_or(0, |size| usize::from(size.ws_col));
    if columns < 40 { super::WIDTH } else { columns }
}

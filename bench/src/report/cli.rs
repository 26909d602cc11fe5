//! The subcommand `report`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use clap::Args;

use crate::output::print;
use crate::summary::check::read;

/// Arguments of `report`.
#[derive(Debug, Args)]
pub struct Arguments {
    /// A file that `run` has written
    #[arg(value_name = "RESULTS.json")]
    results: PathBuf,
    /// Where to write the page; `-` is standard output [default: beside the results]
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
}

/// Writes the page.
///
/// # Errors
/// In a line, when a file cannot be read or written.
pub fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let page = super::html(&read(&arguments.results)?)?;
    let output = arguments.output.clone();
    let output = output.unwrap_or_else(|| arguments.results.with_extension("html"));
    if output == Path::new("-") {
        print(&page)?;
    } else {
        fs::write(&output, page).with_context(|| format!("cannot write {}", output.display()))?;
        print(&format!("{}\n", output.display()))?;
    }
    Ok(ExitCode::SUCCESS)
}

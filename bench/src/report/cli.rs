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
    /// A results file of `run`
    #[arg(value_name = "RESULTS.json")]
    results: PathBuf,
    /// Where to write the page; `-` is standard output [default: beside the results]
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
}

/// Writes the page.
///
/// # Errors
/// One line, if a file cannot be read or written.
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample::results;

    #[test]
    fn the_page_is_beside_the_results_or_where_it_is_wanted() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("run.v2.json");
        fs::write(&path, serde_json::to_vec(&results(1, 3)).unwrap()).unwrap();
        run(&Arguments { results: path.clone(), output: None }).unwrap();
        let beside = fs::read_to_string(directory.path().join("run.v2.html")).unwrap();
        let elsewhere = directory.path().join("x");
        run(&Arguments { results: path.clone(), output: Some(elsewhere.clone()) }).unwrap();
        assert_eq!(fs::read_to_string(elsewhere).unwrap(), beside);
        let nowhere = Some(directory.path().join("no/x"));
        let said = run(&Arguments { results: path, output: nowhere }).unwrap_err().to_string();
        assert!(said.starts_with("cannot write "), "{said}");
    }
}

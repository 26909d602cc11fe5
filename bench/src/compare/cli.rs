//! The subcommand `compare`.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;

use super::{Options, Verdict, compare, show};
use crate::output::print;
use crate::summary::check::read;
use crate::table::cli::terminal_width;

/// Arguments of `compare`.
#[derive(Debug, Args)]
pub struct Arguments {
    /// A file that `run` has written: what was
    #[arg(value_name = "A.json")]
    before: PathBuf,
    /// Another one: what is
    #[arg(value_name = "B.json")]
    after: PathBuf,
    /// Compare the figures themselves, not their part of the raw backing's
    #[arg(long)]
    absolute: bool,
    /// The least change that counts, in percent
    #[arg(long, value_name = "PERCENT", default_value = "1", value_parser = percent)]
    least: f64,
    /// Exit with 3 if anything is worse
    #[arg(long)]
    fail_on_regression: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Exit code of `--fail-on-regression`.
pub const WORSE: u8 = 3;

fn percent(text: &str) -> Result<f64, String> {
    let percent = text.parse().ok().filter(|percent| (0.0..=1000.0).contains(percent));
    percent.ok_or_else(|| "not a percentage from 0 to 1000".to_owned())
}

/// Compares and prints.
///
/// # Errors
/// In a line, when a file cannot be read.
pub fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let (before, after) = (read(&arguments.before)?, read(&arguments.after)?);
    let options = Options { absolute: arguments.absolute, threshold: arguments.least / 100.0 };
    let comparison = compare(&before, &after, options)?;
    let text = if arguments.json {
        serde_json::to_string_pretty(&comparison)? + "\n"
    } else {
        show::text(&comparison, &before, terminal_width())
    };
    print(&text)?;
    let regressed = arguments.fail_on_regression && comparison.count(Verdict::Worse) > 0;
    Ok(if regressed { ExitCode::from(WORSE) } else { ExitCode::SUCCESS })
}

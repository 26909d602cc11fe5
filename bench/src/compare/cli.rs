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
    /// A results file of `run`: before the change
    #[arg(value_name = "A.json")]
    before: PathBuf,
    /// Another one: after the change
    #[arg(value_name = "B.json")]
    after: PathBuf,
    /// Compare the figures themselves, not their ratios to the raw backing
    #[arg(long)]
    absolute: bool,
    /// The smallest change that counts, in percent
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
/// One line, if a file cannot be read.
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

#[cfg(test)]
mod tests {
    use std::path::Path;

    use clap::Parser;

    use super::*;
    use crate::results::Results;
    use crate::sample::results;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        arguments: Arguments,
    }

    fn write(directory: &Path, name: &str, results: &Results) -> String {
        let path = directory.join(name);
        std::fs::write(&path, serde_json::to_vec(results).unwrap()).unwrap();
        path.to_str().unwrap().to_owned()
    }

    fn code(argv: &[&str]) -> anyhow::Result<ExitCode> {
        let cli = Cli::try_parse_from([&["compare"], argv].concat()).unwrap();
        run(&cli.arguments)
    }

    #[test]
    fn only_a_regression_that_is_asked_about_fails() {
        let directory = tempfile::tempdir().unwrap();
        let before = write(directory.path(), "a.json", &results(1, 9));
        let mut slower = results(2, 9);
        let ours = slower.samples.iter_mut().filter(|sample| sample.subject == "fused");
        ours.for_each(|sample| sample.iops *= 0.7);
        let after = write(directory.path(), "b.json", &slower);
        let fail = "--fail-on-regression";
        for (argv, expected) in [
            (vec![before.as_str(), &after], ExitCode::SUCCESS),
            (vec![&before, &after, fail], ExitCode::from(WORSE)),
            (vec![&before, &after, fail, "--json"], ExitCode::from(WORSE)),
            (vec![&before, &after, fail, "--least", "50"], ExitCode::SUCCESS),
            (vec![&before, &before, fail], ExitCode::SUCCESS),
        ] {
            assert_eq!(code(&argv).unwrap(), expected, "{argv:?}");
        }
    }

    #[test]
    fn files_of_other_formats_are_refused() {
        let directory = tempfile::tempdir().unwrap();
        let good = write(directory.path(), "a.json", &results(1, 2));
        let other = Results { format: 99, ..results(1, 2) };
        let other = write(directory.path(), "b.json", &other);
        for argv in [[&good, &other], [&other, &good]] {
            let said = code(&argv.map(String::as_str)).unwrap_err().to_string();
            assert!(said.contains("b.json has format 99") && !said.contains('\n'), "{said}");
        }
    }
}

//! `vm bench`: instructions per request, and throughput, of rivals and of ublk-target, side by side.

mod column;
mod guest;
mod host;
mod many;
mod profile;
mod ratios;
mod report;
mod results;
mod row;
mod rublk;
mod stack;
mod throughput;

use std::path::Path;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result};
use clap::Args;
use clap::builder::PossibleValuesParser;

use crate::{paths, payload, shell, ui};
use column::COLUMNS;
pub use guest::in_guest;
use host::Bench;
use results::{Results, RowResult};
use row::{ROWS, Row, Subject};
use throughput::Throughput;

/// The directory of the tables, below the workspace.
const DIRECTORY: &str = "docs/bench";
const NAME: &str = "instructions";

/// The file name of the throughput results.
const THROUGHPUT: &str = "throughput";

/// Options of the measurement.
#[derive(Debug, Clone, Default, Args)]
pub struct BenchArgs {
    /// Only count instructions
    #[arg(long, conflicts_with = "throughput")]
    pub instructions: bool,
    /// Only measure throughput
    #[arg(long)]
    pub throughput: bool,
    /// Count the instructions of these rows only, and write no files
    #[arg(long, value_name = "ROWS", value_delimiter = ',', value_parser = names(), conflicts_with = "throughput")]
    pub only: Vec<String>,
    /// Use an eighth of the requests, or one round, and write no files: the figures are coarse
    #[arg(long)]
    pub quick: bool,
    /// Only show the cost of each function per request
    #[arg(long, value_name = "ROW", value_parser = names(), conflicts_with_all = ["only", "quick", "instructions", "throughput"])]
    pub profile: Option<String>,
    /// With --profile: the load
    #[arg(long, value_name = "LOAD", value_parser = loads(), default_value = "qd32")]
    pub load: String,
}

fn names() -> PossibleValuesParser {
    PossibleValuesParser::new(ROWS.iter().map(|row| row.name))
}

fn loads() -> PossibleValuesParser {
    PossibleValuesParser::new(COLUMNS.iter().map(|column| column.name))
}

impl BenchArgs {
    fn counts_instructions(&self) -> bool {
        !self.throughput
    }

    /// Rows are rows of instructions.
    fn measures_throughput(&self) -> bool {
        !self.instructions && self.only.is_empty()
    }
}

/// Measures, prints the results, and writes them to `docs/bench` if they are complete.
///
/// # Errors
/// If a guest cannot be made, or throughput cannot be measured. A failed row is reported in its
/// place, and by the exit code.
pub fn run(args: &BenchArgs) -> Result<ExitCode> {
    if let Some(row) = &args.profile {
        return profile::run(row, &args.load);
    }
    let rows = row::chosen(&args.only);
    let wants_rublk = rows.iter().any(|row| row.subject == Subject::RublkLoop);
    let rublk = (wants_rublk || args.measures_throughput()).then(rublk::ensure_built);
    let (rublk, without_rublk) = match rublk {
        Some(Ok(program)) => (vec![program], None),
        Some(Err(error)) => (Vec::new(), Some(format!("it could not be built: {error:#}"))),
        None => (Vec::new(), None),
    };
    let (image, _directory, payload) = shell::prepare(&payload::BENCH, &rublk)?;
    let directory = paths::workspace().join(DIRECTORY);
    let mut code = ExitCode::SUCCESS;
    if args.counts_instructions() {
        let mut bench = Bench::new(image.clone(), payload.clone(), args.quick);
        let results = measure(&mut bench, &rows, without_rublk.as_deref())?;
        bench.finish()?;
        report::summary(&results).iter().for_each(|line| ui::out(line));
        if args.only.is_empty() && !args.quick {
            let files = [("md", report::document(&results)), ("json", results.json()?)];
            write(&directory, NAME, &files)?;
        }
        if results.rows.iter().any(|result| result.failure.is_some()) {
            code = ExitCode::FAILURE;
        }
    }
    if args.measures_throughput() {
        let Throughput { json, html } =
            throughput::measure(&image, &payload, args.quick.then_some(1))?;
        if !args.quick {
            write(&directory, THROUGHPUT, &[("json", json), ("html", html)])?;
        }
    }
    Ok(code)
}

fn measure(bench: &mut Bench, rows: &[&Row], without_rublk: Option<&str>) -> Result<Results> {
    bench.boot()?;
    ui::out("Instructions for each request, the load generator's included:");
    report::heading().iter().for_each(|line| ui::out(line));
    let mut results = Results { unit: "instructions per request", ..Results::default() };
    for row in rows {
        let result = match without_rublk {
            Some(why) if row.subject == Subject::RublkLoop => {
                RowResult { row: row.name, cells: Vec::new(), failure: Some(why.to_owned()) }
            }
            _ => bench.measure(row),
        };
        report::figures(&result).iter().for_each(|line| ui::out(line));
        results.rows.push(result);
    }
    [results.kernel, results.fio, results.ublk_target] = bench.versions.clone().unwrap_or_default();
    results.rublk = rublk::VERSION.into();
    results.qemu = qemu_version().context("the emulator's version")?;
    Ok(results)
}

/// `QEMU emulator version 7.2.22 (Debian …)`, without what follows.
fn qemu_version() -> Result<String> {
    let output = Command::new("qemu-system-x86_64").arg("--version").output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let line = text.lines().next().unwrap_or_default();
    Ok(line.replace("emulator version ", ""))
}

fn write(directory: &Path, name: &str, files: &[(&str, String)]) -> Result<()> {
    std::fs::create_dir_all(directory)?;
    for (extension, text) in files {
        let path = directory.join(format!("{name}.{extension}"));
        std::fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
        ui::out(&format!("Written: {DIRECTORY}/{name}.{extension}"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_files_are_written() {
        let scratch = tempfile::tempdir().unwrap();
        let directory = scratch.path().join("docs/bench");
        let results = results::tests::flat(&[("raw", 7249)]);
        let files = [("md", report::document(&results)), ("json", results.json().unwrap())];
        write(&directory, NAME, &files).unwrap();
        let read = |name: &str| std::fs::read_to_string(directory.join(name)).unwrap();
        assert!(read("instructions.md").contains("| null_blk itself | 7,249 |"));
        let json: serde_json::Value = serde_json::from_str(&read("instructions.json")).unwrap();
        assert_eq!(json["rows"][0]["cells"][3]["runs"][0], 7249);
    }

    #[test]
    fn rows_are_named_on_the_command_line() {
        use clap::Parser;
        #[derive(Parser)]
        struct Cli {
            #[command(flatten)]
            args: BenchArgs,
        }
        let args = Cli::try_parse_from(["x", "--only", "raw,loop", "--quick"]).unwrap().args;
        assert_eq!(args.only, ["raw", "loop"]);
        assert!(args.quick && args.counts_instructions() && !args.measures_throughput());
        assert!(Cli::try_parse_from(["x", "--only", "rew"]).is_err());
        for (words, instructions, throughput) in [
            (["x"].as_slice(), true, true),
            (&["x", "--instructions"], true, false),
            (&["x", "--throughput", "--quick"], false, true),
        ] {
            let args = Cli::try_parse_from(words).unwrap().args;
            let parts = (args.counts_instructions(), args.measures_throughput());
            assert_eq!(parts, (instructions, throughput), "{words:?}");
        }
        assert!(Cli::try_parse_from(["x", "--throughput", "--instructions"]).is_err());
    }
}

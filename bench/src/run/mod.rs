//! `ublk-bench run`: measures a backing and the devices on it, interleaved and repeated.
//!
//! In each round, each load is measured on all subjects one after the other. Each device exists for
//! one measurement: the servers and device-mapper claim the backing exclusively, so there can be
//! only one device at a time. And the closer in time the compared measurements are, the less a
//! drift of the machine or the drive affects them.

pub mod args;
mod backing;
mod commands;
mod cpu;
mod device_maker;
mod fio;
mod load;
mod machine;
mod made_device;
mod output;
mod programs;
mod progress;
mod record;
mod rounds;
mod subject;

use std::io::IsTerminal;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Result, bail, ensure};
use jiff::Timestamp;
use ublk_engine::units::Bytes;

use crate::output::print;
use crate::results::{FORMAT, Family, Method, Results, Subject};
use crate::table;
pub use args::RunArgs;
use backing::CheckedBacking;
use commands::{Commands, Interrupted};
use device_maker::DeviceMaker;
use output::Output;
use programs::{Programs, ensure_tools, version};
use record::Record;
use rounds::Rounds;
use subject::{Maker, SubjectKind};

/// Measures, and writes the results.
pub fn run(args: &RunArgs) -> Result<ExitCode> {
    ensure!(nix::unistd::geteuid().is_root(), "devices are root's; run as root");
    match prepare_and_measure(args) {
        Ok(code) => Ok(code),
        Err(error) => match error.downcast_ref::<Interrupted>() {
            Some(Interrupted(signal)) => {
                eprintln!("ublk-bench: {error:#}");
                // The exit code that a shell reports for a program that a signal has ended.
                let code = u8::try_from(128 + *signal as i32).unwrap_or(u8::MAX);
                Ok(ExitCode::from(code))
            }
            None => Err(error),
        },
    }
}

fn prepare_and_measure(args: &RunArgs) -> Result<ExitCode> {
    let (began, now) = (Instant::now(), Timestamp::now());
    let commands = Commands::new()?;
    commands.hear_signals()?;
    let settings = args.profile.settings();
    let kinds = args.selection().chosen();
    let loads = load::chosen(&args.loads, settings.only_essential, !args.read_only);
    ensure!(!loads.is_empty(), "--read-only leaves none of the loads; choose some that only read");
    tools(&kinds)?;
    let programs = Programs::look(args, &commands)?;
    let record = take_over(&commands, &programs, &args.backing)?;
    let backing = backing::examine(&args.backing, args.span, settings.span, !args.read_only)?;
    let output = Output::new(&args.output, now)?;
    let sample = args.sample.unwrap_or(settings.sample);
    let rounds = args.rounds.unwrap_or(settings.rounds);
    let samples = kinds.len() * loads.len() * usize::try_from(rounds)?;
    consent(args, &backing, args::estimate(samples, sample), &commands)?;

    let results = Results {
        format: FORMAT,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        arguments: std::env::args_os().skip(1).map(|it| it.to_string_lossy().into()).collect(),
        began_s: SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs(),
        took_s: 0.0,
        machine: machine::describe(&commands),
        backing: backing.described.clone(),
        method: Method {
            profile: settings.name.to_owned(),
            rounds,
            sample_s: sample.as_secs_f64(),
            warm_up_s: args::warm_up(sample).as_secs_f64(),
        },
        subjects: described_all(&kinds, &programs, &commands),
        loads: loads.iter().map(load::LoadKind::described).collect(),
        samples: Vec::new(),
        incomplete: None,
    };
    let device_maker =
        DeviceMaker { commands, programs, backing, read_only: args.read_only, record };
    let warm_up = args::warm_up(sample);
    let (device_maker, output) = (&device_maker, &output);
    let rounds = Rounds { device_maker, output, kinds, sample, warm_up, began, results };
    measure(rounds, args.read_only)
}

/// Measures, and saves the results however it ends.
fn measure(mut rounds: Rounds<'_>, read_only: bool) -> Result<ExitCode> {
    let mut steps = || {
        rounds.try_out()?;
        if !read_only {
            rounds.precondition()?;
        }
        rounds.measure()
    };
    let measured = steps();
    if rounds.results.samples.is_empty() && measured.is_err() {
        return measured.map(|_| ExitCode::FAILURE);
    }
    rounds.save(measured.as_ref().err().map(|error| format!("{error:#}")))?;
    let shown = show(rounds.output, &rounds.results);
    let is_whole = measured?;
    shown?;
    Ok(if is_whole { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Prints the tables, and writes the page.
fn show(output: &Output, results: &Results) -> Result<()> {
    print(&table::text(results, table::cli::terminal_width())?)?;
    output.write_page(results)?;
    eprintln!("Written: {} and {}", output.json().display(), output.html().display());
    Ok(())
}

/// Fails if a program is missing that one of these subjects needs.
fn tools(kinds: &[SubjectKind]) -> Result<()> {
    let needs = |maker| kinds.iter().any(|kind| kind.maker == maker);
    let mut tools = Vec::new();
    tools.extend(needs(Maker::DmLinear).then_some(("dmsetup", "dmsetup")));
    tools.extend(needs(Maker::KernelLoop).then_some(("losetup", "mount")));
    ensure_tools(&tools)
}

/// Ensures that this is the only run, and removes the device that a killed run has left.
fn take_over(commands: &Commands, programs: &Programs, backing: &Path) -> Result<Record> {
    let (record, left) = Record::open(Path::new(record::PATH))?;
    if let Some(left) = left {
        if device_maker::remove_leftover(commands, programs, &record, &left)? {
            eprintln!("removed {}, which a run that was killed has left", left.path());
        }
        device_maker::wait_for_backing(backing);
    }
    Ok(record)
}

/// Asks whether the backing may be overwritten, if the run would do so.
fn consent(
    args: &RunArgs,
    backing: &CheckedBacking,
    time: Duration,
    commands: &Commands,
) -> Result<()> {
    if args.read_only || args.yes {
        return Ok(());
    }
    let (named, span) = (args.backing.display(), Bytes(backing.described.span_bytes));
    let what = format!("the first {span} of {named} would be overwritten");
    if !(std::io::stdin().is_terminal() && std::io::stderr().is_terminal()) {
        bail!("{what}; say --yes if that may be, or --read-only");
    }
    let also = match named.to_string() == backing.path {
        true => String::new(),
        false => format!(", that is {}", backing.path),
    };
    let time = progress::words(time);
    eprintln!("The first {span} of {named}{also} will be overwritten. It takes about {time}.");
    eprint!("Type its name to go on: ");
    let answer = commands.read_line()?;
    ensure!(answer.trim() == named.to_string(), "not confirmed; {named} is not touched");
    Ok(())
}

fn described_all(kinds: &[SubjectKind], programs: &Programs, commands: &Commands) -> Vec<Subject> {
    let [ours, rublk] = [programs.ublk_target(), programs.rublk()]
        .map(|program| program.ok().and_then(|program| version(commands, program)));
    let version = |kind: &SubjectKind| match kind.family() {
        Family::Raw | Family::Kernel => None,
        Family::Rublk => rublk.clone(),
        Family::Ours => ours.clone(),
    };
    kinds.iter().map(|kind| described(kind, version(kind))).collect()
}

/// The description of a subject in results.
fn described(kind: &SubjectKind, version: Option<String>) -> Subject {
    Subject {
        name: kind.name.to_owned(),
        title: kind.title.to_owned(),
        family: kind.family(),
        version,
        command: kind.command(),
        skipped: None,
    }
}

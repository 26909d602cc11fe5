//! `sim`: plays many seeds, and prints their speed and the faults they have seen.
//!
//! Prints a seed that fails a check, with the command that replays it.

mod report;

use std::ops::Range;
use std::process::ExitCode;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use clap::Parser;
use ublk_sim::campaign::{Campaign, Failure, play_lanes, play_stack};
use ublk_sim::setup::Hostility;
use ublk_sim::{DEFAULT_STEPS, Options};

/// Runs the engine of ublk-target on a simulated kernel.
#[derive(Debug, Parser)]
#[command(name = "sim", version)]
struct Arguments {
    /// How many seeds to run.
    #[arg(long, default_value_t = 1000)]
    seeds: u64,
    /// The first seed.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Run only the first seed.
    #[arg(long)]
    only: bool,
    /// Steps of a seed before new requests stop.
    #[arg(long, default_value_t = DEFAULT_STEPS)]
    steps: u32,
    /// Which faults the kernel injects.
    #[arg(long, value_enum, default_value_t = Hostility::Mixed)]
    faults: Hostility,
    /// Run stacked devices on a kernel without faults and with few workers instead.
    #[arg(long, conflicts_with_all = ["faults", "json"])]
    stacks: bool,
    /// Run several lanes of one device instead, whose planner is changed in all of them at once.
    #[arg(long, conflicts_with_all = ["stacks", "json"])]
    lanes: bool,
    /// Print every step.
    #[arg(long)]
    trace: bool,
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
}

/// After this many seeds, every fault must have been seen.
const ENOUGH: u64 = 1000;
/// The interval between progress messages.
const PROGRESS: Duration = Duration::from_secs(10);
/// The time limit of a step, which usually takes a microsecond.
const STEP_LIMIT: Duration = Duration::from_millis(10);
const LEAST_LIMIT: Duration = Duration::from_secs(30);

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let options =
        Options { steps: arguments.steps, hostility: arguments.faults, trace: arguments.trace };
    if !arguments.trace {
        // The message is printed with the seed.
        std::panic::set_hook(Box::new(|_| {}));
    }
    let count = if arguments.only { 1 } else { arguments.seeds };
    if arguments.stacks {
        return stacks(arguments.seed..arguments.seed.saturating_add(count), &options);
    }
    if arguments.lanes {
        return lanes(arguments.seed..arguments.seed.saturating_add(count), &options);
    }
    let mut campaign = Campaign::default();
    let watchdog = watch(options, arguments.json);
    let (start, mut last_progress) = (Instant::now(), Instant::now());
    for seed in arguments.seed..arguments.seed.saturating_add(count) {
        // Sending fails only if the watchdog has ended the process.
        let _ = watchdog.send(seed);
        if let Err(failure) = campaign.play(seed, &options) {
            report::failure(&failure, &options, arguments.json);
            return ExitCode::FAILURE;
        }
        if last_progress.elapsed() > PROGRESS {
            eprintln!("{} of {count} seeds, {} requests", campaign.seeds, campaign.total.requests);
            last_progress = Instant::now();
        }
    }
    let elapsed = start.elapsed();
    if arguments.json {
        report::json(&campaign, elapsed);
    } else {
        report::table(&campaign, elapsed);
    }
    let complete = arguments.faults == Hostility::None
        || campaign.seeds < ENOUGH
        || report::nothing_unseen(&campaign);
    if complete { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Plays stacks. They need no watchdog, since their number of steps is bounded.
fn stacks(seeds: Range<u64>, options: &Options) -> ExitCode {
    let (mut requests, mut waits) = (0, 0);
    let count = seeds.end - seeds.start;
    for seed in seeds {
        match play_stack(seed, options) {
            Ok(outcome) => {
                requests += outcome.requests;
                waits += outcome.missed + outcome.punted;
            }
            Err(Failure { seed, message }) => {
                eprintln!("seed {seed} failed: {message}");
                eprintln!("replay with `cargo sim --stacks --seed {seed} --only --trace`");
                return ExitCode::FAILURE;
            }
        }
    }
    println!("{count} stacks: {requests} requests, {waits} waits for a worker or a tag");
    ExitCode::SUCCESS
}

fn lanes(seeds: Range<u64>, options: &Options) -> ExitCode {
    let (mut requests, mut changes, mut held_back, mut given_up) = (0, 0, 0, 0);
    let count = seeds.end - seeds.start;
    for seed in seeds {
        match play_lanes(seed, options) {
            Ok(outcome) => {
                requests += outcome.requests;
                changes += outcome.changes;
                held_back += outcome.held_back;
                given_up += outcome.given_up;
            }
            Err(Failure { seed, message }) => {
                eprintln!("seed {seed} failed: {message}");
                eprintln!("replay with `cargo sim --lanes --seed {seed} --only --trace`");
                return ExitCode::FAILURE;
            }
        }
    }
    println!(
        "{count} devices: {requests} requests, {held_back} held back, {changes} changes in all lanes, \
         {given_up} given up"
    );
    ExitCode::SUCCESS
}

/// Starts a watchdog. It ends the process if a seed is not followed by the next one in time: an
/// endless loop of the engine is a failure too.
fn watch(options: Options, json: bool) -> Sender<u64> {
    let (sender, seeds) = channel();
    let limit = LEAST_LIMIT.max(STEP_LIMIT * options.steps);
    std::thread::spawn(move || {
        let Ok(mut seed) = seeds.recv() else { return };
        loop {
            match seeds.recv_timeout(limit) {
                Ok(next) => seed = next,
                Err(RecvTimeoutError::Disconnected) => return,
                Err(RecvTimeoutError::Timeout) => {
                    let message = format!("a step has not ended after {limit:?}");
                    report::failure(&Failure { seed, message }, &options, json);
                    std::process::exit(1);
                }
            }
        }
    });
    sender
}

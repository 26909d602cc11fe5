//! Kill storms: SIGKILL again and again, at random instants, under a load that is verified.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use nix::sys::signal::Signal;
use rand::{RngExt as _, SeedableRng as _};
use rand_xoshiro::SplitMix64;
use serde_json::Value;

use super::{PATIENCE, RUN_DIR, SOUND, end, look, processes};
use crate::config::DEFAULT;
use crate::guest::prober::{Prober, Read, Sleeper};
use crate::guest::ublk::device::{Device, fresh_drives, text};
use crate::guest::ublk::stats::reports::{number, report};
use crate::guest::{Ctx, FIGURE, Outcome, TestCase, fio, process, wait_for};

pub const TESTS: &[TestCase] = &[
    storm("death_kill_storm_on_a_loop_fused", |ctx| run(ctx, 11, &["loop", "--lend", "fused"], 1)),
    storm("death_kill_storm_on_a_loop_slot", |ctx| run(ctx, 22, &["loop", "--lend", "slot"], 1)),
    storm("death_kill_storm_on_a_loop_by_passthrough", |ctx| {
        run(ctx, 33, &["loop", "--passthru"], 1)
    }),
    storm("death_kill_storm_on_a_stripe", |ctx| run(ctx, 44, &["stripe", "-q", "2"], 2)),
];

const fn storm(name: &'static str, run: fn(&Ctx) -> Result<Outcome>) -> TestCase {
    TestCase::guest(name, DEFAULT, run).seconds(900)
}

/// The blocks of fio's are before this, those of the prober after it.
const PROBED: u64 = 900 << 20;
/// Servers in a row that are killed before. The supervisor gives up after 10, and its pauses
/// double.
const YOUNG: u32 = 3;

/// One kill, or two.
#[derive(Clone, Copy, Debug)]
struct Blow {
    /// After the first I/O that the server has done.
    pause: Duration,
    /// The next server is killed, too.
    second: Option<Second>,
}

/// When the server is killed that was to take a dead one's place.
#[derive(Clone, Copy, Debug)]
enum Second {
    /// So long after it has been started.
    Started(Duration),
    /// So long after its state file is there, which is a moment before the device is live.
    Live(Duration),
}

struct Schedule {
    rng: SplitMix64,
    young: u32,
}

impl Schedule {
    fn between(&mut self, from_ms: u64, to_ms: u64) -> Duration {
        Duration::from_micros(self.rng.random_range(from_ms * 1000..to_ms * 1000))
    }

    fn next(&mut self, number: u32) -> Blow {
        let must_be_sound = self.young >= YOUNG;
        let pause = if must_be_sound { self.between(1300, 1500) } else { self.between(100, 1500) };
        let second = match number % 5 {
            _ if must_be_sound => None,
            1 => Some(Second::Live(self.between(0, 40))),
            3 => Some(Second::Started(self.between(0, 120))),
            _ => None,
        };
        self.young = if pause >= SOUND { 0 } else { self.young + 1 };
        self.young += u32::from(second.is_some());
        Blow { pause, second }
    }
}

/// What has come of a kill.
#[derive(Clone, Copy, Debug)]
struct Recovery {
    /// From (the last) SIGKILL until the first read of the prober that the new server has done.
    took: Duration,
    /// How many servers in a row the supervisor had seen fail; from two on it makes a pause.
    young: u32,
    kills: u32,
}

fn run(ctx: &Ctx, seed: u64, arguments: &[&str], width: u32) -> Result<Outcome> {
    let drives = fresh_drives(width)?;
    let paths: Vec<_> = drives.iter().map(|drive| drive.path()).collect();
    let mut arguments = arguments.to_vec();
    for path in &paths {
        arguments.extend(["-f", text(path)?]);
    }
    arguments.extend(["--on-death", "reissue", "--supervise"]);
    let mut device = Device::add(&arguments)?;
    let supervisor = device.described.supervisor;
    ensure!(supervisor.is_some(), "{device:?}");
    let load = Load::start(ctx, &device)?;
    let prober = Prober::start(device.path()?, PROBED)?;
    prober.first_after(Instant::now())?;
    let sleeper = Sleeper::start()?;

    let goal = if ctx.long { 56 } else { 6 };
    println!("{FIGURE}seed {seed}");
    let mut schedule = Schedule { rng: SplitMix64::seed_from_u64(seed), young: 0 };
    let (mut recoveries, mut kills, mut number) = (Vec::new(), 0, 0);
    while kills < goal {
        let blow = schedule.next(number);
        let recovery = strike(&device, &prober, blow, schedule.young)
            .with_context(|| format!("{blow:?} after {kills} kills: {:?}", look(&device)))?;
        println!("{blow:?}: {recovery:?}");
        kills += recovery.kills;
        recoveries.push(recovery);
        number += 1;
    }

    let rounds = load.end()?;
    let (reads, overslept) = (prober.end()?, sleeper.end()?);
    device.described = look(&device)?;
    ensure!(device.described.state == "LIVE", "{device:?}");
    ensure!(device.described.supervisor == supervisor, "{device:?}");
    let idle = wait_for("all slots to be given back", PATIENCE, || {
        let idle = report(&device)?;
        Ok((number_of(&idle, "lent")? == 0).then_some(idle))
    })?;
    for what in ["borrowed", "quarantined", "leaked"] {
        ensure!(number_of(&idle, what)? == 0, "{what}: {}", idle["total"]);
    }
    let log = format!("/var/log/ublk-target/{}.log", device.id());
    let log = std::fs::read_to_string(&log).context(log)?;
    end(device)?;
    print_figures(kills, &rounds, &recoveries, &reads);
    println!("{FIGURE}a thread that only sleeps overslept by {} ms", overslept.as_millis());
    print_phases(&log);
    Ok(Outcome::Pass)
}

fn number_of(report: &Value, slots: &str) -> Result<u64> {
    number(report, &format!("/total/slots/{slots}"))
}

/// Kills the server as planned, and waits until the next one has done I/O.
fn strike(device: &Device, prober: &Prober, blow: Blow, young: u32) -> Result<Recovery> {
    let old = recorded_server(device.described.id)?;
    thread::sleep(blow.pause);
    let mut killed = Instant::now();
    process::signal(old, Signal::SIGKILL)?;
    let (mut dead, mut kills) = (old, 1);
    if let Some(second) = blow.second {
        let pause = match second {
            Second::Started(pause) => {
                dead = wait_for("a server that recovers", PATIENCE, || {
                    recovering_server(device, old)
                })?;
                pause
            }
            Second::Live(pause) => {
                dead = await_other_server(device.described.id, &[old])?;
                pause
            }
        };
        thread::sleep(pause);
        killed = Instant::now();
        process::signal(dead, Signal::SIGKILL)?;
        kills = 2;
    }
    // The second one may not have come so far as to write its state file.
    await_other_server(device.described.id, &[old, dead])?;
    let took = prober.first_after(Instant::now())? - killed;
    Ok(Recovery { took, young, kills })
}

fn await_other_server(id: u32, dead: &[u32]) -> Result<u32> {
    wait_for("another server", PATIENCE, || {
        Ok(Some(recorded_server(id)?).filter(|pid| !dead.contains(pid)))
    })
}

/// The server of the state file, which is cheaper to look at than `list`.
fn recorded_server(id: u32) -> Result<u32> {
    let path = format!("{RUN_DIR}/{id}.json");
    let record: Value = serde_json::from_str(&std::fs::read_to_string(&path).context(path)?)?;
    let pid = record["pid"].as_u64().context("no pid")?;
    Ok(u32::try_from(pid)?)
}

/// A server that is about to take the place of `old`.
fn recovering_server(device: &Device, old: u32) -> Result<Option<u32>> {
    let arguments = format!(" recover -n {} --role server", device.id());
    let is_it = |(pid, line): &(u32, String)| *pid != old && line.contains(&arguments);
    Ok(processes()?.into_iter().find(is_it).map(|(pid, _)| pid))
}

/// fio in rounds, each of which writes and then verifies.
struct Load {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<Vec<fio::Report>>>,
}

impl Load {
    fn start(ctx: &Ctx, device: &Device) -> Result<Self> {
        let directory: PathBuf = ctx.directory().to_owned();
        let filename = format!("filename={}", device.path()?);
        let stop = Arc::new(AtomicBool::new(false));
        let thread = {
            let stop = Arc::clone(&stop);
            let rounds = move || {
                let mut rounds = Vec::new();
                while !stop.load(Ordering::Relaxed) {
                    rounds.push(round(&directory, &filename, rounds.len())?);
                }
                Ok(rounds)
            };
            thread::Builder::new().name("load".into()).spawn(rounds)?
        };
        Ok(Self { stop, thread })
    }

    fn end(self) -> Result<Vec<fio::Report>> {
        self.stop.store(true, Ordering::Relaxed);
        let rounds = self.thread.join().map_err(|_| anyhow!("the load has panicked"))?;
        rounds.context("fio")
    }
}

fn round(directory: &Path, filename: &str, number: usize) -> Result<fio::Report> {
    // Small requests, or such as are split and cross chunks.
    let (block, size) = if number % 2 == 0 { ("bs=4k", 32) } else { ("bsrange=4k-64k", 64) };
    let options = [
        filename,
        "rw=randwrite",
        block,
        &format!("size={size}m"),
        "iodepth=64",
        "ioengine=io_uring",
        "direct=1",
        "verify=crc32c",
        "verify_fatal=1",
        &format!("randseed={number}"),
    ];
    let report = fio::run_in(directory, &options)?;
    ensure!(report.write.requests > 0 && report.read.requests > 0, "nothing was done");
    Ok(report)
}

fn print_figures(kills: u32, rounds: &[fio::Report], recoveries: &[Recovery], reads: &[Read]) {
    let requests: u64 = rounds.iter().map(|it| it.read.requests + it.write.requests).sum();
    let longest = rounds.iter().map(|it| it.longest_request).max().unwrap_or_default();
    println!(
        "{FIGURE}{kills} kills; fio: {} rounds, {requests} requests, no error and no mismatch, the \
         longest took {} ms",
        rounds.len(),
        longest.as_millis()
    );
    let stall = reads.iter().map(|read| read.ended - read.began).max().unwrap_or_default();
    println!("{FIGURE}longest of {} reads of the prober: {} ms", reads.len(), stall.as_millis());
    let distribution = |what: &str, is_of_it: &dyn Fn(&Recovery) -> bool| {
        let mut times: Vec<_> =
            recoveries.iter().filter(|it| is_of_it(it)).map(|it| it.took.as_millis()).collect();
        times.sort_unstable();
        let at = |percent: usize| times.get((times.len() * percent / 100).min(times.len() - 1));
        if let (Some(half), Some(most), Some(max)) = (at(50), at(90), times.last()) {
            println!(
                "{FIGURE}SIGKILL to the first I/O, {what}: {} recoveries, median {half} ms, p90 \
                 {most} ms, max {max} ms",
                times.len()
            );
        }
    };
    if let Some(slowest) = recoveries.iter().max_by_key(|it| it.took) {
        println!("{FIGURE}the slowest recovery: {slowest:?}");
    }
    distribution("at once", &|it| it.young <= 1);
    distribution("after a pause of the supervisor's", &|it| it.young > 1);
}

/// What the servers say of how long each part of a recovery took.
fn print_phases(log: &str) {
    let mut phases: Vec<Vec<u64>> = Vec::new();
    let mut slowest = (0, "");
    for (_, line) in log.lines().filter_map(|line| line.split_once("] recovered: ")) {
        let words = line.split(|c: char| !c.is_ascii_digit());
        let times: Vec<u64> = words.filter_map(|word| word.parse().ok()).collect();
        slowest = slowest.max((times.iter().sum(), line));
        phases.resize(phases.len().max(times.len()), Vec::new());
        times.iter().zip(&mut phases).for_each(|(ms, phase)| phase.push(*ms));
    }
    let names = [
        "until the dead one's device was free",
        "to open the backings",
        "to be protected",
        "to start the lanes",
        "to be live",
    ];
    for (name, times) in names.iter().zip(&mut phases) {
        times.sort_unstable();
        let (half, max) = (times[times.len() / 2], times[times.len() - 1]);
        println!("{FIGURE}of {} servers {name}: median {half} ms, max {max} ms", times.len());
    }
    println!("{FIGURE}the slowest server: {}", slowest.1);
}

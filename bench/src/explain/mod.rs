//! `explain`: where the time of one I/O goes, stage by stage.
//!
//! A client reads blocks one at a time while the kernel's trace points tell when the request was
//! handed to the ublk driver and to the drive, when each was done with it, and when the threads of
//! server and client ran. What lies between these moments are the stages; they add up to the
//! whole of each read. The server's own measurement of the same reads stands beside it.

pub mod cli;
mod device;
mod interrupt;
mod load;
pub mod show;
pub mod stages;
pub mod trace;
mod tracefs;

use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, anyhow, bail, ensure};
use serde::Serialize;
use ublk_target::stats::client::Client;
use ublk_target::stats::protocol::Latency;

use crate::summary::estimate::number;
use device::Device;
use interrupt::Interrupts;
use load::Load;
use stages::{Cause, Division, Parties, Read, Stage, divide};
use tracefs::Instance;

/// Reads before those that count: the first ones find caches and clocks cold.
const WARM_UP: usize = 100;
/// Trace buffer of each processor for a read, in bytes: more than its events take.
const TRACE_BYTES_PER_READ: usize = 2048;
/// How long a read may take to end after an interruption.
const PATIENCE: Duration = Duration::from_secs(2);

/// What to explain.
#[derive(Debug, Clone)]
pub struct Options {
    /// The ublk device.
    pub device: PathBuf,
    /// How many reads.
    pub reads: usize,
    /// Bytes of a read: a multiple of the device's block size.
    pub block_bytes: u64,
    /// How long to read at most.
    pub limit: Duration,
}

/// How it ended.
#[derive(Debug)]
pub enum Outcome {
    /// With an explanation.
    Explained(Explanation),
    /// By this signal.
    Interrupted(i32),
}

/// Where the time of reads went.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Explanation {
    /// The device.
    pub device: PathBuf,
    /// Its lend mode.
    pub lend: String,
    /// Bytes of a read.
    pub block_bytes: u64,
    /// Reads that count.
    pub reads: usize,
    /// Reads whose events did not fit together, and which do not count.
    pub left_out: usize,
    /// The whole of a read.
    pub whole: Times,
    /// Its stages, in order; their means add up to that of the whole.
    pub stages: Vec<StageTimes>,
    /// What the server has measured itself; empty if it does not tell.
    pub server: Vec<ServerStage>,
}

/// How long something took, in nanoseconds; the trace is exact to 1000.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Times {
    /// The median.
    pub median_ns: u64,
    /// What 99 of 100 do not exceed.
    pub p99_ns: u64,
    /// The mean.
    pub mean_ns: f64,
}

/// A stage.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct StageTimes {
    /// [`Stage::name`].
    pub stage: &'static str,
    /// [`Stage::title`].
    pub title: &'static str,
    /// Its part of the whole, from 0 to 1: of the mean, since only means add up.
    pub share: f64,
    /// How long it took.
    #[serde(flatten)]
    pub times: Times,
}

/// A stage within the server, by its own clock.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ServerStage {
    /// As `ublk-target stats` names it.
    pub stage: String,
    /// The median in nanoseconds.
    pub median_ns: u64,
    /// The mean in nanoseconds.
    pub mean_ns: u64,
}

/// Reads from a device while the kernel traces it. Nothing is written, and no trace is left.
///
/// # Errors
/// In a line: what is missing, or what fails.
pub fn explain(options: &Options) -> anyhow::Result<Outcome> {
    if !nix::unistd::geteuid().is_root() {
        bail!("tracing needs root: run it as root");
    }
    // Before all else, so that the trace is removed whenever they come.
    let interrupts = Interrupts::new()?;
    let device = Device::find(&options.device)?;
    let block = device.block_bytes;
    ensure!(
        options.block_bytes > 0 && options.block_bytes % block == 0,
        "{} has blocks of {block} bytes: reads must be a multiple of them",
        device.path.display()
    );
    let load = Load::open(&device.path, options.block_bytes)?;
    let kib = (options.reads + WARM_UP) * TRACE_BYTES_PER_READ / 1024;
    let instance = Instance::new(u32::try_from(kib)?)?;
    let own_view = ServerView::start(device.described.id);
    let (reads, client) = match traced(&instance, &device, load, options, &interrupts)? {
        Traced::Read(reads, client) => (reads, client),
        Traced::Interrupted(signal) => return Ok(Outcome::Interrupted(signal)),
    };
    let server = own_view.map(ServerView::finish).unwrap_or_default();
    let (text, dropped) = instance.finish()?;
    let trace = trace::parse(&text);
    ensure!(!dropped && !trace.lost, "the kernel lost events of the trace; use fewer --reads");
    let parties = Parties {
        device: device.number,
        sectors: options.block_bytes / 512,
        backings: device.backings,
        server: device.server,
        client,
    };
    let division = divide(&reads, &trace.events, &parties);
    explanation(options, device.described.lend, &division, server).map(Outcome::Explained)
}

/// What came of the load.
enum Traced {
    /// The reads, and the thread that did them.
    Read(Vec<Read>, u32),
    /// A signal.
    Interrupted(i32),
}

/// Runs the load in a thread of its own, which has the kernel wait for the device, while this one
/// waits for signals too.
fn traced(
    instance: &Instance,
    device: &Device,
    load: Load,
    options: &Options,
    interrupts: &Interrupts,
) -> anyhow::Result<Traced> {
    let stop = Arc::new(AtomicBool::new(false));
    let (ended, its_end) = UnixStream::pair()?;
    let (tell, told) = channel();
    let (go, gone) = channel();
    let client = Reader { load, options: options.clone(), stop: Arc::clone(&stop) };
    let running: JoinHandle<_> = thread::Builder::new()
        .name("ublk-bench-read".into())
        .spawn(move || client.run(&tell, &gone, its_end))?;
    let thread: u32 = told.recv().context("the reading thread did not start")?;
    let disks: Vec<_> = device.backings.iter().copied().chain([device.number]).collect();
    instance.record_disks(&disks)?;
    let threads: Vec<_> = device.server.iter().copied().chain([thread]).collect();
    instance.record_threads(&threads)?;
    instance.start()?;
    // It waits for this, so it is there.
    let _ = go.send(());
    if let Some(signal) = interrupts.wait(&ended, None)? {
        stop.store(true, Ordering::Relaxed);
        // A read that does not end is left to the kernel.
        interrupts.wait_for_end(&ended, PATIENCE)?;
        return Ok(Traced::Interrupted(signal));
    }
    let reads = running.join().map_err(|_| anyhow!("the reading thread panicked"))??;
    Ok(Traced::Read(reads, thread))
}

/// The thread that reads.
struct Reader {
    load: Load,
    options: Options,
    stop: Arc<AtomicBool>,
}

impl Reader {
    /// Says which thread it is, waits for the start, and reads. Whoever has the other end of `_end`
    /// sees when it is done, however that comes about.
    fn run(
        mut self,
        tell: &Sender<u32>,
        start: &Receiver<()>,
        _end: UnixStream,
    ) -> anyhow::Result<Vec<Read>> {
        let thread = u32::try_from(nix::unistd::gettid().as_raw())?;
        if tell.send(thread).is_err() || start.recv().is_err() {
            return Ok(Vec::new());
        }
        self.load.run(WARM_UP, self.options.limit / 2, &self.stop)?;
        self.load.run(self.options.reads, self.options.limit, &self.stop)
    }
}

/// The server's own measurement, which it makes while somebody looks.
struct ServerView(Client);

impl ServerView {
    /// `None` where there is none to be had: another program's server, or an old one.
    fn start(id: u32) -> Option<Self> {
        let mut client = Client::connect(id).ok()?;
        client.snapshot(true, false).ok()?;
        Some(Self(client))
    }

    fn finish(mut self) -> Vec<ServerStage> {
        let latencies = self.0.snapshot(true, false).map(|snapshot| snapshot.latencies);
        let reads = latencies.unwrap_or_default().into_iter().filter(|each| each.kind == "read");
        let stage = |Latency { stage, p50_ns, mean_ns, .. }| ServerStage {
            stage,
            median_ns: p50_ns,
            mean_ns,
        };
        reads.map(stage).collect()
    }
}

/// Sums the reads up.
fn explanation(
    options: &Options,
    lend: String,
    division: &Division,
    server: Vec<ServerStage>,
) -> anyhow::Result<Explanation> {
    let left_out = division.left_out;
    let wholes: Vec<u64> = division.reads.iter().map(|stages| stages.iter().sum()).collect();
    let Some(whole) = Times::of(wholes) else {
        bail!(
            "the trace does not show the requests of {left_out} reads; is {} a partition, or does \
             its driver not tell of them?",
            options.device.display()
        );
    };
    let stage = |(index, stage): (usize, &Stage)| {
        let times = Times::of(division.reads.iter().map(|stages| stages[index]).collect())?;
        let share = if whole.mean_ns > 0.0 { times.mean_ns / whole.mean_ns } else { 0.0 };
        Some(StageTimes { stage: stage.name(), title: stage.title(), share, times })
    };
    Ok(Explanation {
        device: options.device.clone(),
        lend,
        block_bytes: options.block_bytes,
        reads: division.reads.len(),
        left_out,
        whole,
        stages: division.stages.iter().enumerate().filter_map(stage).collect(),
        server,
    })
}

impl Times {
    /// Of figures in microseconds; `None` if there are none.
    fn of(mut figures_us: Vec<u64>) -> Option<Self> {
        figures_us.sort_unstable();
        let last = figures_us.len().checked_sub(1)?;
        let total: u64 = figures_us.iter().sum();
        Some(Self {
            median_ns: figures_us[last / 2] * 1000,
            p99_ns: figures_us[(figures_us.len() * 99).div_ceil(100) - 1] * 1000,
            mean_ns: total as f64 * 1000.0 / number(figures_us.len()),
        })
    }
}

impl Explanation {
    /// What the time is spent on, the greatest part first.
    #[must_use]
    pub fn causes(&self) -> Vec<(Cause, f64)> {
        let mut causes: Vec<(Cause, f64)> = Vec::new();
        let all = stages::WITH_DRIVE.iter().chain(&stages::WITHOUT_DRIVE);
        for times in &self.stages {
            let Some(stage) = all.clone().find(|stage| stage.name() == times.stage) else {
                continue;
            };
            match causes.iter_mut().find(|(cause, _)| *cause == stage.cause()) {
                Some((_, share)) => *share += times.share,
                None => causes.push((stage.cause(), times.share)),
            }
        }
        causes.sort_by(|one, other| other.1.total_cmp(&one.1));
        causes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options() -> Options {
        let limit = Duration::from_secs(1);
        Options { device: "/dev/ublkb0".into(), reads: 3, block_bytes: 4096, limit }
    }

    pub(super) fn explained() -> Explanation {
        let reads = vec![
            vec![10, 15, 15, 60, 22, 8, 30, 40],
            vec![11, 16, 15, 50, 22, 8, 30, 40],
            vec![12, 15, 18, 900, 25, 9, 35, 41],
        ];
        let division = Division { stages: &stages::WITH_DRIVE, reads, left_out: 1 };
        let server = vec![
            ServerStage { stage: "plan".into(), median_ns: 2100, mean_ns: 2300 },
            ServerStage { stage: "total".into(), median_ns: 99_000, mean_ns: 120_000 },
        ];
        explanation(&options(), "fused".into(), &division, server).unwrap()
    }

    #[test]
    fn means_and_shares_add_up() {
        let explained = explained();
        let means: f64 = explained.stages.iter().map(|stage| stage.times.mean_ns).sum();
        assert!((means - explained.whole.mean_ns).abs() < 1e-6);
        let shares: f64 = explained.stages.iter().map(|stage| stage.share).sum();
        assert!((shares - 1.0).abs() < 1e-9);
        assert_eq!((explained.reads, explained.left_out), (3, 1));
        assert_eq!(explained.whole.median_ns, 200_000);
        let drive = &explained.stages[3];
        assert_eq!(
            (drive.stage, drive.times.median_ns, drive.times.p99_ns),
            ("drive", 60_000, 900_000)
        );
    }

    #[test]
    fn causes_are_ordered_by_their_shares() {
        let causes = explained().causes();
        let order: Vec<_> = causes.iter().map(|(cause, _)| *cause).collect();
        assert_eq!(order, [Cause::Drive, Cause::Scheduler, Cause::Client, Cause::Server]);
        assert!((causes.iter().map(|(_, share)| share).sum::<f64>() - 1.0).abs() < 1e-9);
    }

    #[test]
    fn a_trace_without_requests_is_told_of() {
        let nothing = Division { stages: &stages::WITHOUT_DRIVE, reads: Vec::new(), left_out: 7 };
        let said = explanation(&options(), String::new(), &nothing, Vec::new()).unwrap_err();
        assert!(said.to_string().contains("of 7 reads"), "{said}");
    }
}

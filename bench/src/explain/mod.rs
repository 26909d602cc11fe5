//! `explain`: where the time of one I/O goes, stage by stage.
//!
//! A client reads blocks one at a time while the kernel's trace points tell when the request was
//! handed to the ublk driver and to the drive, when each was done with it, and when the threads of
//! server and client ran. What lies between these moments are the stages; they add up to the
//! whole of each read. The server's own measurement of the same reads stands beside it.

pub mod cli;
mod device;
pub mod explanation;
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
use ublk_target::socket::client::Client;
use ublk_target::socket::protocol::Latency;

use device::Device;
use explanation::{Explanation, ServerStage};
use interrupt::Interrupts;
use load::Load;
use stages::{Parties, Read, divide};
use tracefs::Instance;

/// Reads before those that count: the first ones find caches and clocks cold.
const WARM_UP: usize = 100;
/// Trace buffer of each processor for a read, in bytes: more than its events take.
const TRACE_BYTES_PER_READ: usize = 1024;
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
    ensure!(
        options.block_bytes <= device.most_bytes,
        "{} takes requests of at most {} bytes: longer reads become several",
        device.path.display(),
        device.most_bytes
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
    Explanation::of(options, device.described.lend, &division, server).map(Outcome::Explained)
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
    /// `None` where it is unavailable: another program's server, or an old one.
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

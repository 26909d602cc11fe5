//! `explain`: where the time of one I/O goes, stage by stage.
//!
//! A client reads blocks one at a time. The kernel's trace points record when the request was
//! passed to the ublk driver and to the drive, when each completed it, and when the threads of
//! server and client ran. The stages are the intervals between these events; they add up to the
//! duration of each read. The server's own measurement of the same reads is shown too.

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

/// Reads before the measurement, to warm up caches and CPU clocks.
const WARM_UP: usize = 100;
/// Trace buffer of each processor for a read, in bytes: more than its events need.
const TRACE_BYTES_PER_READ: usize = 1024;
/// How long to wait for a read to end after a signal.
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
    /// The maximum duration.
    pub limit: Duration,
}

/// The outcome of `explain`.
#[derive(Debug)]
pub enum Outcome {
    /// An explanation.
    Explained(Explanation),
    /// This signal arrived.
    Interrupted(i32),
}

/// Reads from a device while the kernel traces it. Writes nothing, and removes the trace.
///
/// # Errors
/// In a line: what is missing, or what fails.
pub fn explain(options: &Options) -> anyhow::Result<Outcome> {
    if !nix::unistd::geteuid().is_root() {
        bail!("tracing needs root: run it as root");
    }
    // First of all, so that the trace is removed whenever a signal arrives.
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

/// The outcome of the load.
enum Traced {
    /// The reads, and the thread that did them.
    Read(Vec<Read>, u32),
    /// A signal.
    Interrupted(i32),
}

/// Runs the load in a separate thread, which waits for the device, while this thread also waits for
/// signals.
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
    // The thread waits for this, so sending cannot fail.
    let _ = go.send(());
    if let Some(signal) = interrupts.wait(&ended, None)? {
        stop.store(true, Ordering::Relaxed);
        // If a read does not end, the thread is abandoned.
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
    /// Reports its thread id, waits for the start, and reads. Dropping `_end` shows the other
    /// thread that this one has ended, for whatever reason.
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

/// The server's own measurement, which runs while this client is connected.
struct ServerView(Client);

impl ServerView {
    /// `None` if it is unavailable: the server is another program, or an old version.
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

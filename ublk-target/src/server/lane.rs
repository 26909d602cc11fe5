//! The lane's thread: one ring that serves a queue.
//!
//! The loop is: submit and wait, reap a bounded batch, let the engine decide, push what it
//! decided. Nothing in it allocates, locks, logs or blocks.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::sys::eventfd::EventFd;
use ublk_engine::engine::{EngineConfig, EngineStats};
use ublk_engine::lane::fault::{Faults, Injected};
use ublk_engine::lane::{Handled, Lane, LaneError, LaneIo, PortConfig, TableRange, backing_file};
use ublk_engine::plan::WINDOW_OPS;
use ublk_engine::target::AnyTarget;
use uring_ext::Errno;
use uring_ext::iod::IoDescArray;
use uring_ext::nvme::Ranges;
use uring_ext::pool::BufferPool;
use uring_ext::ring::{Polling, Ring, RingSetup};

use super::busy_poll::BusyWait;
use super::clock::{coarse_now, precise_now};
use super::idle_policy::{IdlePolicy, may_look};
use super::io_lane::IoLane;
use super::message::LaneMessage;
use super::ring_io::{Parts, RingIo};
use super::side_ring::SideRing;
use super::signals::Wakeups;
use crate::backing::Backing;

/// Completions taken at a time, so that submissions are never held up for long.
pub(super) const REAP_BATCH: usize = 64;

/// Everything that a lane needs to serve its queue.
#[derive(Clone, Debug)]
pub struct LaneConfig {
    /// What its engine is made for.
    pub engine: EngineConfig,
    /// Issue operations from a lane of their own.
    pub io_lane: bool,
    /// How completions of operations are found.
    pub polling: Polling,
    /// Whether to look for completions for a while before sleeping.
    pub busy_wait: BusyWait,
    /// Faults that a test asked for.
    pub faults: Option<Faults>,
    /// Bytes of each of the server's buffers.
    pub buffer_bytes: u32,
    /// The mapping policy.
    pub target: AnyTarget,
    /// The device's character node.
    pub cdev: Arc<File>,
    /// The backings, in the order of their index.
    pub backings: Arc<[Backing]>,
    /// CPUs that the lane may run on; empty for any.
    pub cpus: Vec<usize>,
    /// Written to after a message was sent.
    pub wake: Arc<EventFd>,
    /// Told when the driver takes fetches back.
    pub wakeups: Arc<Wakeups>,
}

/// What a lane did in its life.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LaneReport {
    /// The engine's counters.
    pub stats: EngineStats,
    /// Operations that met a fault which a test asked for.
    pub injected: Injected,
    /// Slots that were still lent at the end, and nothing answered for them.
    pub leaks: Vec<String>,
    /// Slots whose fate was not known at the end; the end of the ring settles it.
    pub quarantined: u32,
}

/// Serves a queue until the device is stopped. All tags have been handed to the driver when
/// `ready` is sent `Ok`.
///
/// # Errors
/// [`LaneError`]. An error before readiness is also sent to `ready`.
pub fn serve(
    config: &LaneConfig,
    inbox: Receiver<LaneMessage>,
    ready: &SyncSender<Result<(), LaneError>>,
) -> Result<LaneReport, LaneError> {
    prepare_thread(config);
    let refuse = |error| {
        // The receiver may have given up on another lane's error.
        let _ = ready.send(Err(error));
        error
    };
    let (mut ring, mut side, parts) = set_up(config).map_err(refuse)?;
    let mut queues = ring.queues();
    let side = side.as_mut().map(|side| side.queues(&mut queues)).transpose().map_err(refuse)?;
    let io = RingIo { queues, side, parts };
    let mut thread = LaneThread {
        lane: new_lane(config, io),
        wake: Arc::clone(&config.wake),
        inbox,
        is_draining: false,
        is_undelivered: false,
        idle_policy: IdlePolicy::new(busy_wait(config)),
    };
    thread.lane.fetch_all();
    thread.lane.watch(wake_file(config));
    thread.lane.before_submit();
    let fetched = thread.lane.io().submit().and_then(|()| thread.lane.check());
    let _ = ready.send(fetched);
    fetched?;
    thread.run(config)
}

fn new_lane<'ring>(config: &LaneConfig, io: RingIo<'ring>) -> Lane<AnyTarget, RingIo<'ring>> {
    let port = PortConfig {
        routes: config.backings.iter().map(Backing::route).collect(),
        polled: config.polling != Polling::Off,
        faults: config.faults,
        place: TableRange::default(),
    };
    Lane::new(config.target.clone(), config.engine, port, io)
}

/// Starts a thread that serves requests. Should it panic, the process ends: what the thread had in hand
/// nobody else can answer, and the driver only learns from the end of the process that there is no
/// server any more. The device then fares as after any death of its server.
///
/// # Errors
/// `EAGAIN` at the limit of threads.
pub(super) fn spawn_lane<T: Send + 'static>(
    name: String,
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    let guarded = move || {
        // The panic has been reported by now.
        catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| {
            log::error!("a lane has panicked, which ends the server");
            std::process::abort()
        })
    };
    std::thread::Builder::new().name(name).spawn(guarded)
}

/// Properties of any lane's thread. None of them is vital, so a failure is logged and no more.
pub(super) fn prepare_lane_thread() {
    // Allocations that this thread causes in the kernel must not wait for writeback, which may
    // need this thread (`prctl(2)`, Linux 5.6).
    if let Err(errno) = uring_ext::task::set_io_flusher() {
        log::warn!("a lane: PR_SET_IO_FLUSHER: {errno}");
    }
}

/// Properties of the thread of a queue.
pub(super) fn prepare_thread(config: &LaneConfig) {
    prepare_lane_thread();
    let mut set = nix::sched::CpuSet::new();
    let known = config.cpus.iter().filter(|cpu| set.set(**cpu).is_ok()).count();
    if known > 0 {
        if let Err(errno) = nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &set) {
            log::warn!("lane {}: cannot set its CPUs: {errno}", config.engine.queue.qid.0);
        }
    }
}

pub(super) fn failed(doing: &'static str) -> impl Fn(Errno) -> LaneError {
    move |errno| LaneError::Setup { doing, errno }
}

fn set_up(config: &LaneConfig) -> Result<(Ring, Option<SideRing>, Parts), LaneError> {
    let polling = config.polling;
    let show_work = may_look(busy_wait(config));
    let setup = RingSetup { polling, show_work, ..RingSetup::default() };
    let ring = make_ring(config, &[config.wake.as_fd().as_raw_fd()], setup)?;
    let side = (polling != Polling::Off).then(|| SideRing::new(config)).transpose()?;
    let pool = match config.engine.slots.buffers() {
        0 => None,
        count => Some(
            BufferPool::new(count, config.buffer_bytes).map_err(failed("allocating buffers"))?,
        ),
    };
    let iods = IoDescArray::map(&config.cdev, config.engine.queue.qid.0, config.engine.queue.depth)
        .map_err(failed("mapping the request descriptors"))?;
    // The buffer table belongs to the ring that issues the operations.
    let io_lane = if config.io_lane {
        Some(IoLane::start(config, pool, entries_in_flight(config), ring.as_raw_fd())?)
    } else {
        register_buffers(config, &ring, pool)?;
        None
    };
    let ranges = if has_namespace(config) {
        // One for each place of the table of operations in flight.
        let places = usize::from(config.engine.queue.depth) * WINDOW_OPS;
        let places = u16::try_from(places).unwrap_or(u16::MAX);
        Some(Ranges::new(places).map_err(failed("allocating ranges"))?)
    } else {
        None
    };
    log::debug!("lane {}: ring {:?}, {polling:?}", config.engine.queue.qid.0, ring.mode());
    let (qid, cdev) = (config.engine.queue.qid.0, Arc::clone(&config.cdev));
    let backings = Arc::clone(&config.backings);
    Ok((ring, side, Parts { qid, iods, pool, ranges, cdev, io_lane, backings }))
}

fn has_namespace(config: &LaneConfig) -> bool {
    config.backings.iter().any(|backing| backing.route().is_namespace())
}

/// A commit, and a full window with its cancelling, of every tag.
fn entries_in_flight(config: &LaneConfig) -> usize {
    usize::from(config.engine.queue.depth) * (2 * WINDOW_OPS + 2)
}

/// A ring with the device, the backings and some more files as its fixed files. Its queues never
/// overflow.
pub(super) fn make_ring(
    config: &LaneConfig,
    last_files: &[RawFd],
    setup: RingSetup,
) -> Result<Ring, LaneError> {
    let depth = u32::from(config.engine.queue.depth);
    let completions = u32::try_from(entries_in_flight(config)).unwrap_or(u32::MAX);
    // A chain has three entries.
    let setup = RingSetup {
        sq_entries: 3 * depth,
        cq_entries: completions + 8,
        mixed_sizes: has_namespace(config),
        ..setup
    };
    let mut ring = Ring::new(&setup).map_err(failed("making the ring"))?;
    let backings = config.backings.iter().map(AsRawFd::as_raw_fd);
    let files: Vec<_> = std::iter::once(config.cdev.as_raw_fd())
        .chain(backings)
        .chain(last_files.iter().copied())
        .collect();
    ring.register_files(&files).map_err(failed("registering files"))?;
    Ok(ring)
}

/// The fixed file behind the backings.
fn wake_file(config: &LaneConfig) -> uring_ext::sqe::FixedFile {
    backing_file(u16::try_from(config.backings.len()).unwrap_or(u16::MAX))
}

/// Registers the buffer table: empty slots, and behind them the buffers of the server.
pub(super) fn register_buffers(
    config: &LaneConfig,
    ring: &Ring,
    pool: Option<BufferPool>,
) -> Result<(), LaneError> {
    let lent = config.engine.slots.lent;
    match pool {
        None => ring.register_slots(lent.into()),
        Some(pool) => ring.register_slots_and_pool(lent, &pool),
    }
    .map_err(failed("registering the buffer table"))
}

/// The lane's thread: its loop, and the messages of others.
struct LaneThread<'ring> {
    lane: Lane<AnyTarget, RingIo<'ring>>,
    wake: Arc<EventFd>,
    inbox: Receiver<LaneMessage>,
    is_draining: bool,
    is_undelivered: bool,
    idle_policy: IdlePolicy,
}

impl LaneThread<'_> {
    fn run(mut self, config: &LaneConfig) -> Result<LaneReport, LaneError> {
        while !self.lane.engine().is_finished() {
            self.lane.before_submit();
            let is_idle = self.is_draining && self.is_idle();
            let engine = self.lane.engine();
            let patience = if is_idle { Some(Duration::ZERO) } else { engine.patience() };
            let transfers = engine.transfers_in_flight();
            let look_for = if is_idle { 0 } else { self.idle_policy.look_for() };
            if look_for == 0 || !self.lane.io().submit_and_look(look_for)? {
                self.lane.io().submit_and_wait(patience, transfers)?;
            }
            self.idle_policy.ended(transfers);
            let mut reaped = 0;
            loop {
                let count = self.reap(config);
                reaped += count;
                if count < REAP_BATCH {
                    break;
                }
            }
            self.lane.check()?;
            if self.lane.engine().has_ended_tags() && !self.is_undelivered {
                self.is_undelivered = true;
                config.wakeups.undelivered();
            }
            // All deliveries that were under way have been seen: there was a submission after the
            // driver had stopped delivering, and it has brought nothing.
            if is_idle && reaped == 0 {
                break;
            }
        }
        Ok(LaneReport::of(&self.lane))
    }

    /// Deals with a bounded batch of completions; returns how many there were.
    fn reap(&mut self, config: &LaneConfig) -> usize {
        self.lane.io().look();
        let now = self.now();
        self.lane.set_now(now);
        let mut count = 0;
        while count < REAP_BATCH {
            let Some(cqe) = self.lane.io().take() else { break };
            count += 1;
            match self.lane.handle(cqe) {
                Handled::Done => {}
                Handled::Wake => self.read_messages(config),
                Handled::Told => self.take_told(),
            }
        }
        self.lane.io().look();
        count
    }

    /// Whether no request is in hand and every commit is on its way.
    fn is_idle(&self) -> bool {
        self.lane.engine().holdings().requests == 0 && self.lane.backlog() == 0
    }

    /// While nobody measures, coarse time does: it costs no system call and no clock read.
    fn now(&self) -> u64 {
        let coarse = self.lane.engine().recorder().is_none();
        if coarse { coarse_now() } else { precise_now() }
    }

    /// Deals with completions of the I/O lane.
    fn take_told(&mut self) {
        while let Some(cqe) = self.lane.io().parts.io_lane.as_mut().and_then(IoLane::reap) {
            self.lane.handle(cqe);
        }
    }

    fn read_messages(&mut self, config: &LaneConfig) {
        // Nothing to read is no error: the descriptor only wakes.
        let _ = self.wake.read();
        self.lane.watch(wake_file(config));
        // The I/O lane wakes its lane so when its ring has failed.
        self.take_told();
        while let Ok(message) = self.inbox.try_recv() {
            self.is_draining |= attend(&mut self.lane, message);
        }
    }
}

/// Does what a message asks for; whether that is to come to an end.
pub(super) fn attend<Io: LaneIo>(lane: &mut Lane<AnyTarget, Io>, message: LaneMessage) -> bool {
    match message {
        LaneMessage::Snapshot { mut snapshot, reply } => {
            snapshot.take(lane.engine(), lane.injected(), precise_now());
            // Whoever asked may have gone.
            let _ = reply.try_send(snapshot);
        }
        LaneMessage::Measure { recorder, reply } => {
            // The old one is freed by whoever sent the new one.
            let _ = reply.try_send(lane.engine_mut().measure(recorder));
        }
        LaneMessage::CancelAll => lane.cancel_all(),
        LaneMessage::Grow { target, size, reply } => {
            let change = |own: &mut AnyTarget| own.replace_innermost(&target);
            lane.engine_mut().grow(size, change);
            let _ = reply.try_send(());
        }
        LaneMessage::Drain => return true,
    }
    false
}

impl LaneReport {
    /// What a lane has done until now.
    pub(super) fn of<Io>(lane: &Lane<AnyTarget, Io>) -> Self {
        let engine = lane.engine();
        Self {
            stats: *engine.stats(),
            injected: lane.injected(),
            leaks: engine.leaks().map(|leak| leak.to_string()).collect(),
            quarantined: engine.registry().counts().quarantined,
        }
    }
}

/// How the lane may wait. One whose ring polls has its own way.
fn busy_wait(config: &LaneConfig) -> BusyWait {
    if config.polling == Polling::Off { config.busy_wait } else { BusyWait::Off }
}

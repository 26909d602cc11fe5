//! The lane's thread: one ring that serves a queue.
//!
//! The loop is: submit and wait, reap a bounded batch, let the engine decide, push what it
//! decided. Nothing in it allocates, locks, logs or blocks.

use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender};
use std::time::Duration;

use nix::sys::eventfd::EventFd;
use ublk_engine::lane::{Handled, Lane, LaneError, LaneIo, PortConfig, TableRange, backing_file};
use ublk_engine::plan::WINDOW_OPS;
use ublk_engine::target::AnyTarget;
use uring_ext::iod::IoDescArray;
use uring_ext::nvme::Ranges;
use uring_ext::pool::BufferPool;
use uring_ext::ring::{Polling, Ring, RingSetup};

use crate::backing::Backing;
use crate::config::busy_wait::BusyWait;
use crate::io_thread::idle_policy::{IdlePolicy, may_look};
use crate::io_thread::io_lane::IoLane;
use crate::io_thread::message::LaneMessage;
use crate::io_thread::ring_io::{Parts, RingIo};
use crate::io_thread::setup::{
    LaneConfig, LaneReport, entries_in_flight, failed, has_namespace, make_ring, register_buffers,
};
use crate::io_thread::side_ring::SideRing;
use crate::io_thread::thread::{REAP_BATCH, prepare_thread};
use crate::os::clock::{coarse_now, precise_now};

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

/// The fixed file behind the backings.
fn wake_file(config: &LaneConfig) -> uring_ext::sqe::FixedFile {
    backing_file(u16::try_from(config.backings.len()).unwrap_or(u16::MAX))
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
pub(crate) fn attend<Io: LaneIo>(lane: &mut Lane<AnyTarget, Io>, message: LaneMessage) -> bool {
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
        LaneMessage::Grow { base, size, reply } => {
            let change = |own: &mut AnyTarget| own.replace_base(&base);
            lane.engine_mut().grow(size, change);
            let _ = reply.try_send(());
        }
        LaneMessage::Drain => return true,
    }
    false
}

fn busy_wait(config: &LaneConfig) -> BusyWait {
    if config.polling == Polling::Off { config.busy_wait } else { BusyWait::Off }
}

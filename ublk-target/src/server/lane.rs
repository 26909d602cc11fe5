//! The lane: one thread and one ring that serve a queue.
//!
//! The loop is: submit and wait, reap a bounded batch, let the engine decide, push what it
//! decided. Nothing in it allocates, locks, logs or blocks.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::mpsc::SyncSender;

use bufreg::SlotIndex;
use uring_ext::iod::IoDescArray;
use uring_ext::pool::BufferPool;
use uring_ext::ring::{Cqe, Queues, Ring};
use uring_ext::sqe::{Delivery, FixedBuffer, FixedFile, Sqe};
use uring_ext::{Errno, sys};

use crate::backing::{Backing, DiscardCall};
use crate::engine::{Engine, EngineStats, OpKey, Port, QueueIdentity};
use crate::lend::LendMode;
use crate::plan::{Op, OpKind, WINDOW_OPS};
use crate::target::AnyTarget;
use crate::units::Tag;

/// Completions taken at a time, so that submissions are never held up for long.
const REAP_BATCH: usize = 64;

/// Everything that a lane needs to serve its queue.
#[derive(Clone, Debug)]
pub struct LaneConfig {
    /// The queue.
    pub queue: QueueIdentity,
    /// How the device lends.
    pub lend: LendMode,
    /// Bytes of a request's buffer.
    pub buffer_bytes: u32,
    /// The mapping policy.
    pub target: AnyTarget,
    /// The device's character node.
    pub cdev: Arc<File>,
    /// The backings, in the order of their index.
    pub backings: Arc<[Backing]>,
    /// CPUs that the lane may run on; empty for any.
    pub cpus: Vec<usize>,
}

/// Why a lane could not serve, or stopped serving.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LaneError {
    /// Part of the set-up failed.
    #[error("{doing}: {errno}")]
    Setup {
        /// What was tried.
        doing: &'static str,
        /// Why it failed.
        errno: Errno,
    },
    /// A fetch or commit was refused while the device was live.
    #[error("the driver refused tag {} ({errno})", tag.0)]
    Refused {
        /// The tag.
        tag: Tag,
        /// Why.
        errno: Errno,
    },
    /// The ring does not work any more.
    #[error("the ring failed: {0}")]
    Ring(Errno),
}

/// What a lane did in its life.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LaneReport {
    /// The engine's counters.
    pub stats: EngineStats,
    /// Slots that were still lent at the end.
    pub leaked_slots: usize,
}

/// Serves a queue until the device is stopped. All tags have been handed to the driver when
/// `ready` is sent `Ok`.
///
/// # Errors
/// [`LaneError`]. An error before readiness is also sent to `ready`.
pub fn serve(
    config: &LaneConfig,
    ready: &SyncSender<Result<(), LaneError>>,
) -> Result<LaneReport, LaneError> {
    prepare_thread(config);
    let set_up = set_up(config);
    let (mut ring, iods, pool) = match set_up {
        Ok(parts) => parts,
        Err(error) => {
            // The receiver may have given up on another lane's error.
            let _ = ready.send(Err(error));
            return Err(error);
        }
    };
    let port = RingPort {
        queues: ring.queues(),
        qid: config.queue.qid.0,
        lend: config.lend,
        pool,
        discards: config.backings.iter().map(Backing::discard_call).collect(),
        first_auto_slot: first_auto_slot(config.queue.depth),
        failure: None,
    };
    let engine = Engine::new(config.target, config.queue);
    let mut lane = Lane { engine, port, iods, depth: config.queue.depth, refused: None };
    if let Err(error) = lane.fetch_all() {
        let _ = ready.send(Err(error));
        return Err(error);
    }
    let _ = ready.send(Ok(()));
    lane.run()
}

/// Properties of the thread. None of them is vital, so a failure is logged and no more.
fn prepare_thread(config: &LaneConfig) {
    // Allocations that this thread causes in the kernel must not wait for writeback, which may
    // need this thread (`prctl(2)`, Linux 5.6).
    if let Err(errno) = uring_ext::task::set_io_flusher() {
        log::warn!("lane {}: PR_SET_IO_FLUSHER: {errno}", config.queue.qid.0);
    }
    let mut set = nix::sched::CpuSet::new();
    let known = config.cpus.iter().filter(|cpu| set.set(**cpu).is_ok()).count();
    if known > 0 {
        if let Err(errno) = nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &set) {
            log::warn!("lane {}: cannot set its CPUs: {errno}", config.queue.qid.0);
        }
    }
}

/// The slot that tag 0 is automatically registered in: 0, unless the environment asks for a fault,
/// to test what happens when the driver cannot register: then a slot beyond the table.
fn first_auto_slot(depth: u16) -> u16 {
    match std::env::var_os("UBLK_TARGET_FAULT") {
        Some(fault) if fault == "auto-register" => depth,
        Some(_) | None => 0,
    }
}

type Parts = (Ring, IoDescArray, Option<BufferPool>);

fn set_up(config: &LaneConfig) -> Result<Parts, LaneError> {
    let failed = |doing| move |errno| LaneError::Setup { doing, errno };
    let depth = u32::from(config.queue.depth);
    // Room for a commit and a full window of every tag: the queues never overflow.
    let window = u32::try_from(WINDOW_OPS).unwrap_or(u32::MAX);
    let ring = Ring::new(2 * depth, depth * (window + 2)).map_err(failed("making the ring"))?;
    let backings = config.backings.iter().map(AsRawFd::as_raw_fd);
    let files: Vec<_> = std::iter::once(config.cdev.as_raw_fd()).chain(backings).collect();
    ring.register_files(&files).map_err(failed("registering files"))?;
    let pool = match config.lend {
        LendMode::Fused => {
            ring.register_slots(depth).map_err(failed("registering the buffer table"))?;
            None
        }
        LendMode::Copy => {
            let pool = BufferPool::new(config.queue.depth, config.buffer_bytes)
                .map_err(failed("allocating buffers"))?;
            ring.register_pool(&pool).map_err(failed("registering buffers"))?;
            Some(pool)
        }
    };
    let iods = IoDescArray::map(&config.cdev, config.queue.qid.0, config.queue.depth)
        .map_err(failed("mapping the request descriptors"))?;
    log::debug!("lane {}: ring {:?}", config.queue.qid.0, ring.mode());
    Ok((ring, iods, pool))
}

struct Lane<'ring> {
    engine: Engine<AnyTarget>,
    port: RingPort<'ring>,
    iods: IoDescArray,
    depth: u16,
    refused: Option<LaneError>,
}

impl Lane<'_> {
    fn fetch_all(&mut self) -> Result<(), LaneError> {
        for tag in 0..self.depth {
            self.port.fetch(Tag(tag));
        }
        self.port.queues.submit().map_err(LaneError::Ring)?;
        self.port.failure.map_or(Ok(()), |errno| Err(LaneError::Ring(errno)))
    }

    fn run(mut self) -> Result<LaneReport, LaneError> {
        let mut batch = [Cqe::default(); REAP_BATCH];
        while !self.engine.is_finished() {
            self.port.queues.submit_and_wait().map_err(LaneError::Ring)?;
            loop {
                let count = self.port.queues.reap(&mut batch);
                let now = monotonic_seconds();
                for cqe in &batch[..count] {
                    self.dispatch(*cqe, now);
                }
                if count < batch.len() {
                    break;
                }
            }
            if let Some(errno) = self.port.failure {
                return Err(LaneError::Ring(errno));
            }
            // A tag that the driver does not take back would hang its client for ever; the end
            // of the lane ends the device instead.
            if let Some(refused) = self.refused {
                return Err(refused);
            }
        }
        Ok(LaneReport {
            stats: *self.engine.stats(),
            leaked_slots: self.engine.registry().lent().count(),
        })
    }

    fn dispatch(&mut self, cqe: Cqe, now: u64) {
        match Event::decode(cqe.user_data) {
            Event::Fetched(tag) => match Errno::from_result(cqe.res) {
                Ok(_) => {
                    let iod = self.iods.get(tag.0);
                    self.engine.delivered(tag, iod, now, &mut self.port);
                }
                Err(errno) => {
                    if errno != Errno::ENODEV {
                        self.refused.get_or_insert(LaneError::Refused { tag, errno });
                    }
                    self.engine.fetch_ended(tag);
                }
            },
            Event::Op(key) => self.engine.completed(key, cqe.res, &mut self.port),
            Event::Registered(tag) => self.engine.registered(tag, cqe.res, &mut self.port),
            Event::Unregistered(tag) => self.engine.unregistered(tag, cqe.res, &mut self.port),
        }
    }
}

/// Coarse time for the age of leases: it costs no system call and no clock read.
fn monotonic_seconds() -> u64 {
    let clock = nix::time::ClockId::CLOCK_MONOTONIC_COARSE;
    let now = nix::time::clock_gettime(clock).map_or(0, |now| now.tv_sec());
    u64::try_from(now).unwrap_or(0)
}

/// What a completion is about, as its `user_data` carries it: the kind in the top byte; below it
/// a tag, or an operation's place (24 bits) and serial (32 bits).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Event {
    Fetched(Tag),
    Op(OpKey),
    Registered(Tag),
    Unregistered(Tag),
}

const KIND_SHIFT: u32 = 56;

impl Event {
    fn encode(self) -> u64 {
        let (kind, payload) = match self {
            Self::Fetched(tag) => (0, u64::from(tag.0)),
            Self::Op(key) => (1, (u64::from(key.place) << 32) | u64::from(key.serial)),
            Self::Registered(tag) => (2, u64::from(tag.0)),
            Self::Unregistered(tag) => (3, u64::from(tag.0)),
        };
        (kind << KIND_SHIFT) | payload
    }

    fn decode(user_data: u64) -> Self {
        let [kind, p2, p1, p0, s3, s2, s1, s0] = user_data.to_be_bytes();
        let tag = Tag(u16::from_be_bytes([s1, s0]));
        match kind {
            0 => Self::Fetched(tag),
            2 => Self::Registered(tag),
            3 => Self::Unregistered(tag),
            // Only `encode` makes user data; what else came would be a stale operation.
            _ => Self::Op(OpKey {
                place: u32::from_be_bytes([0, p2, p1, p0]),
                serial: u32::from_be_bytes([s3, s2, s1, s0]),
            }),
        }
    }
}

/// The engine's decisions as entries of the ring.
struct RingPort<'ring> {
    queues: Queues<'ring>,
    qid: u16,
    lend: LendMode,
    pool: Option<BufferPool>,
    discards: Box<[DiscardCall]>,
    first_auto_slot: u16,
    /// The first error of a push: the ring is unusable and the lane ends.
    failure: Option<Errno>,
}

/// The character device is the first fixed file, the backings follow.
const CDEV: FixedFile = FixedFile(0);

impl RingPort<'_> {
    fn delivery(&self, tag: Tag) -> Delivery {
        match (self.lend, &self.pool) {
            (LendMode::Copy, Some(pool)) => Delivery::Copy(pool.addr(tag.0, 0)),
            (LendMode::Fused | LendMode::Copy, _) => {
                Delivery::AutoRegister { slot: self.first_auto_slot + tag.0 }
            }
        }
    }

    fn fetch(&mut self, tag: Tag) {
        let sqe = Sqe::fetch(CDEV, self.qid, tag.0, self.delivery(tag));
        self.push(sqe, Event::Fetched(tag));
    }

    fn buffer(&self, slot: SlotIndex, offset: u32) -> FixedBuffer {
        match &self.pool {
            Some(pool) => FixedBuffer::Pool { slot: slot.0, addr: pool.addr(slot.0, offset) },
            None => FixedBuffer::Lent { slot: slot.0, offset },
        }
    }

    fn push(&mut self, sqe: Sqe, event: Event) {
        if let Err((_, errno)) = self.queues.push(sqe.user_data(event.encode())) {
            self.failure.get_or_insert(errno);
        }
    }
}

impl Port for RingPort<'_> {
    fn commit(&mut self, tag: Tag, result: i32) {
        let sqe = Sqe::commit_and_fetch(CDEV, self.qid, tag.0, result, self.delivery(tag));
        self.push(sqe, Event::Fetched(tag));
    }

    fn register(&mut self, tag: Tag, slot: SlotIndex) {
        let sqe = Sqe::register_buffer(CDEV, self.qid, tag.0, slot.0);
        self.push(sqe, Event::Registered(tag));
    }

    fn unregister(&mut self, tag: Tag, slot: SlotIndex) {
        let sqe = Sqe::unregister_buffer(CDEV, self.qid, tag.0, slot.0);
        self.push(sqe, Event::Unregistered(tag));
    }

    fn submit(&mut self, key: OpKey, op: &Op, slot: Option<SlotIndex>) {
        let index = usize::from(op.backing.0);
        let file = FixedFile(u32::from(op.backing.0) + 1);
        // The block layer keeps requests far below 4 GiB.
        let len = u32::try_from(op.len).unwrap_or(u32::MAX);
        let buffer = self.buffer(slot.unwrap_or(SlotIndex(0)), op.buf_offset);
        let sqe = match op.kind {
            OpKind::Read => Sqe::read_fixed(file, buffer, len, op.offset),
            OpKind::Write { fua } => Sqe::write_fixed(file, buffer, len, op.offset, fua),
            OpKind::Flush => Sqe::datasync(file),
            OpKind::Discard => match self.discards[index] {
                DiscardCall::BlockCommand => Sqe::discard(file, op.offset, op.len),
                DiscardCall::PunchHole => Sqe::fallocate(file, PUNCH, op.offset, op.len),
            },
            OpKind::WriteZeroes { may_unmap: true } => {
                Sqe::fallocate(file, PUNCH, op.offset, op.len)
            }
            OpKind::WriteZeroes { may_unmap: false } => {
                Sqe::fallocate(file, ZERO, op.offset, op.len)
            }
        };
        self.push(sqe, Event::Op(key));
    }
}

/// Gives space back; reads as zeros afterwards. On block devices: write zeroes with unmapping.
const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
/// Keeps the space; reads as zeros afterwards. On block devices: write zeroes without unmapping.
const ZERO: i32 = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;

/// The length of a request is below 4 GiB: the driver's sector count of a read or write is
/// bounded by its greatest buffer.
const _: () = assert!(sys::UBLK_IO_BUF_BITS < 32);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_survive_the_kernel() {
        let events = [
            Event::Fetched(Tag(4095)),
            Event::Registered(Tag(0)),
            Event::Unregistered(Tag(65535)),
            Event::Op(OpKey { place: 0, serial: 0 }),
            Event::Op(OpKey { place: (1 << 24) - 1, serial: u32::MAX }),
        ];
        for event in events {
            assert_eq!(Event::decode(event.encode()), event);
        }
    }

    #[test]
    fn places_fit_the_user_data() {
        assert!(sys::UBLK_MAX_QUEUE_DEPTH as usize * WINDOW_OPS < 1 << 24);
    }
}

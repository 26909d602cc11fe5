//! The lane without its thread: the engine, its port to a ring, and the meaning of completions.
//!
//! Its whole access to the kernel is [`LaneIo`], so it runs the same on real rings and in the
//! simulator.

pub mod event;
pub mod fault;
mod hold;
mod port;
mod quorum;
mod table_range;

use std::sync::atomic;

pub use hold::{Hold, Quiet};
pub use port::PortConfig;
pub use quorum::Quorum;
pub use table_range::{TableRange, backing_file};

use uring_ext::Errno;
use uring_ext::iod::IoDesc;
use uring_ext::nvme::{Namespace, Outcome, RangeAddr};
use uring_ext::pool::{Direction, PoolAddr};
use uring_ext::ring::Cqe;
use uring_ext::sqe::Sqe;

use crate::engine::{Engine, EngineConfig};
use crate::plan::{BackingIndex, Planner};
use crate::target::AnyTarget;
use crate::units::Tag;
use event::{Common, Event};
use fault::Injected;
use port::{PortState, RingPort};

/// The ring for an entry. All of these are one ring, unless the lane polls or has an I/O lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RingRole {
    /// The ring that fetches and commits.
    Fetch,
    /// The ring with the buffer table, which issues operations.
    Io,
    /// The ring for entries that a polling ring refuses; the lane sleeps on it. It is the first
    /// ring if that does not poll.
    Side,
}

/// The lane's access to the kernel. None of the calls may block.
pub trait LaneIo {
    /// Queues entries for submission, all or none.
    ///
    /// # Errors
    /// `EBUSY` if there is no room now; anything else means that the ring is unusable.
    fn push(&mut self, role: RingRole, sqes: &[Sqe]) -> Result<(), Errno>;
    /// The descriptor of a delivered request.
    fn iod(&self, tag: Tag) -> IoDesc;
    /// Copies bytes `from..to` of a delivered request to or from a pool buffer. Returns the number
    /// of bytes copied, or a negated error number.
    fn copy(&mut self, tag: Tag, buffer: u16, direction: Direction, from: u32, to: u32) -> i32;
    /// The address of a byte in a pool buffer.
    fn pool_addr(&self, buffer: u16, offset: u32) -> PoolAddr;
    /// Keeps the range of a deallocation while its operation is in flight. `place` is the
    /// operation's entry in the table of operations in flight.
    fn range(&mut self, place: u16, namespace: Namespace, offset: u64, len: u64) -> RangeAddr;
    /// Whether a backing is a block device with fewer than `end` bytes now. Called only after an
    /// error.
    fn has_shrunk(&mut self, backing: BackingIndex, end: u64) -> bool {
        let _ = (backing, end);
        false
    }
    /// Takes the spare buffer that the queues of a ring share. `false` if another queue has it or
    /// asked before. [`Lane::serve_waiting`] is called when it is this queue's turn.
    fn take_spare(&mut self) -> bool {
        true
    }
    /// Returns the spare buffer.
    fn give_spare(&mut self) {}
    /// Nanoseconds of the monotonic clock.
    fn now(&mut self) -> u64;
}

/// Why a lane could not serve, or stopped serving.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LaneError {
    /// Part of the set-up failed.
    #[error("{doing}: {errno}")]
    Setup {
        /// The failed step.
        doing: &'static str,
        /// The error of the step.
        errno: Errno,
    },
    /// The driver refused a fetch or commit while the device was live.
    #[error("the driver refused tag {} ({errno})", tag.0)]
    Refused {
        /// The tag.
        tag: Tag,
        /// The error.
        errno: Errno,
    },
    /// The ring does not work any more.
    #[error("the ring failed: {0}")]
    Ring(Errno),
}

/// The engine of a queue, its port, and the meaning of completions. Each call passes in the kernel
/// side, since a ring may serve many queues.
pub struct Lane<P> {
    engine: Engine<P>,
    port: PortState,
    common: Common,
    refused: Option<LaneError>,
}

impl Lane<AnyTarget> {
    /// Exchanges the target for another one, if the lane is quiet. Layer *n* of the new target
    /// continues layer `kept[n]` of the present one. Returns whether it was done.
    pub fn change_target(&mut self, target: &mut AnyTarget, kept: &[Option<usize>]) -> bool {
        target.continue_from(self.engine.planner(), kept);
        self.engine.exchange_planner(target).is_ok()
    }
}

impl<P: Planner> Lane<P> {
    /// A lane that has not fetched yet.
    pub fn new(planner: P, config: EngineConfig, port: PortConfig) -> Self {
        let port = PortState::new(&config, port);
        let common = Common::of(config.incarnation);
        Self { engine: Engine::new(planner, config), port, common, refused: None }
    }

    /// The engine.
    pub fn engine(&self) -> &Engine<P> {
        &self.engine
    }

    /// The number of operations that met an injected test fault.
    pub fn injected(&self) -> Injected {
        self.port.faults.map_or_else(Injected::default, |faults| faults.injected())
    }

    /// Gives all tags to the driver, with the next submission.
    pub fn fetch_all(&mut self, io: &mut impl LaneIo) {
        self.engine.fetch_all(&mut RingPort { state: &mut self.port, io });
    }

    /// Sets the time in nanoseconds of the monotonic clock, before completions are handled.
    pub fn set_now(&mut self, now: u64) {
        self.engine.set_now(now);
    }

    /// Handles a completion of the queue.
    pub fn handle(&mut self, cqe: Cqe, io: &mut impl LaneIo) {
        if !self.handle_common(cqe, io) {
            self.handle_other(cqe, io);
        }
    }

    /// Handles a completion if it is a delivery, or the end of an operation on a file, of this
    /// queue. Returns false for all others, which may belong to another queue of the ring.
    #[inline(always)]
    pub fn handle_common(&mut self, cqe: Cqe, io: &mut impl LaneIo) -> bool {
        let (engine, mut port) = (&mut self.engine, RingPort { state: &mut self.port, io });
        if let Some(key) = self.common.op(cqe.user_data) {
            engine.completed(key, cqe.res, &mut port);
            return true;
        }
        match self.common.fetched(cqe.user_data) {
            Some(key) if cqe.res >= 0 && key.tag.0 < engine.config().queue.depth => {
                let iod = port.io.iod(key.tag);
                engine.delivered(key, iod, &mut port);
                true
            }
            Some(_) | None => false,
        }
    }

    /// Handles all other completions of the queue.
    #[inline(never)]
    pub fn handle_other(&mut self, Cqe { user_data, res }: Cqe, io: &mut impl LaneIo) {
        let (engine, mut port) = (&mut self.engine, RingPort { state: &mut self.port, io });
        let port = &mut port;
        let Some(event) = Event::decode(user_data, engine.config().incarnation) else {
            return engine.note_stale();
        };
        match event {
            Event::Fetched(key) => match Errno::from_result(res) {
                // A tag that does not exist has no descriptor.
                Ok(_) => engine.note_stale(),
                Err(errno) => {
                    if engine.fetch_ended(key) && errno != Errno::ENODEV {
                        self.refused.get_or_insert(LaneError::Refused { tag: key.tag, errno });
                    }
                }
            },
            Event::Registered(key) => engine.registered(key, res, port),
            Event::Unregistered(key) => engine.unregistered(key, res, port),
            // The operation's own completion shows the effect.
            Event::Cancelled => {}
            // These events belong to the thread, and have its own incarnation.
            Event::Wake | Event::Notified | Event::Unsent => engine.note_stale(),
            Event::Op(key) => engine.completed(key, res, port),
            Event::Command(key) => match port.outcome(engine.backing_of(key), res) {
                // A command is carried out as a whole or not at all.
                Outcome::Done => {
                    let res = engine.whole(key);
                    engine.completed(key, res, port);
                }
                Outcome::Failed(errno) => engine.completed(key, errno.negated(), port),
                Outcome::Again { errno, pause_ns } => {
                    engine.asked_again(key, errno, pause_ns, port);
                }
            },
            Event::Injected(key) => engine.completed(key, Errno::EAGAIN.negated(), port),
        }
    }

    /// Call this before each submission. It begins the requests whose time has come, pushes the
    /// entries that had no room, and checks deadlines.
    pub fn before_submit(&mut self, io: &mut impl LaneIo) {
        let mut port = RingPort { state: &mut self.port, io };
        if self.engine.config().deadline.is_some() {
            self.engine.check_deadlines(&mut port);
        }
        self.engine.begin_throttled(&mut port);
        port.drain_backlog();
    }

    /// Continues requests that wait for the spare buffer, after another queue has returned it.
    pub fn serve_waiting(&mut self, io: &mut impl LaneIo) {
        self.engine.spare_returned(&mut RingPort { state: &mut self.port, io });
    }

    /// The error that must end the lane, if any.
    ///
    /// # Errors
    /// [`LaneError::Ring`] if the ring is unusable. [`LaneError::Refused`] if the driver refuses to
    /// take a tag back: its client would hang for ever, so the device has to end instead.
    pub fn check(&self) -> Result<(), LaneError> {
        self.port.failure.map_or(Ok(()), |errno| Err(LaneError::Ring(errno)))?;
        self.refused.map_or(Ok(()), Err)
    }

    /// Whether the lane must be handled before the next submission, apart from deadlines: the rings
    /// had no room or do not work, the driver has cancelled fetches, or requests wait for their time.
    #[inline(always)]
    pub fn needs_attention(&self) -> bool {
        self.port.is_held_up || self.engine.has_ended_tags() || self.engine.has_throttled()
    }

    /// How often the rings had no room for an entry.
    pub fn backlog(&self) -> usize {
        self.port.backlog()
    }

    /// Begins the requests that were held back, with the new planner of the engine if it has one.
    pub fn release(&mut self, io: &mut impl LaneIo) {
        self.engine.release(&mut RingPort { state: &mut self.port, io });
    }

    /// Whether requests may wait for a time. If not, those that wait begin.
    pub fn set_throttling(&mut self, is_on: bool, io: &mut impl LaneIo) {
        self.engine.set_throttling(is_on, &mut RingPort { state: &mut self.port, io });
    }

    /// Cancels all operations in flight.
    pub fn cancel_all(&mut self, io: &mut impl LaneIo) {
        self.engine.cancel_all(&mut RingPort { state: &mut self.port, io });
    }

    /// The engine, for measuring latencies and for holding requests back.
    pub fn engine_mut(&mut self) -> &mut Engine<P> {
        &mut self.engine
    }
}

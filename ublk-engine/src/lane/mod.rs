//! The lane without its thread: the engine, its port to a ring, and what completions mean.
//!
//! All that it asks of the kernel goes through [`LaneIo`], so it runs the same on real rings and
//! under the simulator.

pub mod event;
pub mod fault;
mod port;
mod table_range;

pub use port::PortConfig;
pub use table_range::{TableRange, backing_file};

use uring_ext::Errno;
use uring_ext::iod::IoDesc;
use uring_ext::nvme::{Namespace, Outcome, RangeAddr};
use uring_ext::pool::{Direction, PoolAddr};
use uring_ext::ring::Cqe;
use uring_ext::sqe::Sqe;

use crate::engine::{Engine, EngineConfig};
use crate::plan::{BackingIndex, Planner};
use crate::units::Tag;
use event::{Common, Event};
use fault::Injected;
use port::{PortState, RingPort};

/// Which ring an entry is for. They are the same one unless the lane issues its operations from a
/// lane of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RingRole {
    /// The ring that fetches and commits.
    Fetch,
    /// The ring with the buffer table, which issues operations.
    Io,
    /// A ring that takes what a polling one refuses, and wakes the lane: the first one, where that
    /// does not poll.
    Side,
}

/// What a lane asks of the kernel. None of it may block.
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
    /// Writes down the range of a deallocation, for the time that its operation is in flight in a
    /// place.
    fn range(&mut self, place: u16, namespace: Namespace, offset: u64, len: u64) -> RangeAddr;
    /// Whether a backing is a block device that has fewer than `end` bytes by now: asked only after an
    /// error.
    fn has_shrunk(&mut self, backing: BackingIndex, end: u64) -> bool {
        let _ = (backing, end);
        false
    }
    /// Takes the spare buffer that the queues of a ring share; `false` if another queue has it or
    /// asked for it before. [`Lane::serve_waiting`] is called when it is this queue's turn.
    fn take_spare(&mut self) -> bool {
        true
    }
    /// Gives the spare buffer back.
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

/// The engine of a queue, its port, and the meaning of completions. The kernel side is passed in at
/// each call: the ring may serve many queues.
pub struct Lane<P> {
    engine: Engine<P>,
    port: PortState,
    common: Common,
    refused: Option<LaneError>,
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

    /// How many operations have met a fault that a test asked for.
    pub fn injected(&self) -> Injected {
        self.port.faults.map_or_else(Injected::default, |faults| faults.injected())
    }

    /// Hands all tags to the driver, with the next submission.
    pub fn fetch_all(&mut self, io: &mut impl LaneIo) {
        self.engine.fetch_all(&mut RingPort { state: &mut self.port, io });
    }

    /// Tells the time, in nanoseconds of the monotonic clock, before completions are handled.
    pub fn set_now(&mut self, now: u64) {
        self.engine.set_now(now);
    }

    /// Deals with a completion of the queue.
    #[inline(always)]
    pub fn handle(&mut self, cqe: Cqe, io: &mut impl LaneIo) {
        let (engine, mut port) = (&mut self.engine, RingPort { state: &mut self.port, io });
        if let Some(key) = self.common.op(cqe.user_data) {
            return engine.completed(key, cqe.res, &mut port);
        }
        match self.common.fetched(cqe.user_data) {
            Some(key) if cqe.res >= 0 && key.tag.0 < engine.config().queue.depth => {
                let iod = port.io.iod(key.tag);
                engine.delivered(key, iod, &mut port);
            }
            Some(_) | None => self.handle_other(cqe, io),
        }
    }

    /// Deals with what is neither a delivery nor the end of an operation on a file.
    #[inline(never)]
    fn handle_other(&mut self, Cqe { user_data, res }: Cqe, io: &mut impl LaneIo) {
        let (engine, mut port) = (&mut self.engine, RingPort { state: &mut self.port, io });
        let port = &mut port;
        let Some(event) = Event::decode(user_data, engine.config().incarnation) else {
            return engine.note_stale();
        };
        match event {
            Event::Fetched(key) => match Errno::from_result(res) {
                // There is no descriptor of a tag that does not exist.
                Ok(_) => engine.note_stale(),
                Err(errno) => {
                    if engine.fetch_ended(key) && errno != Errno::ENODEV {
                        self.refused.get_or_insert(LaneError::Refused { tag: key.tag, errno });
                    }
                }
            },
            Event::Registered(key) => engine.registered(key, res, port),
            Event::Unregistered(key) => engine.unregistered(key, res, port),
            // What it achieved shows in the operation's own completion.
            Event::Cancelled => {}
            // These are the thread's, and carry its own number.
            Event::Wake | Event::Told | Event::Unsent => engine.note_stale(),
            Event::Op(key) => engine.completed(key, res, port),
            Event::Command(key) => match port.outcome(engine.backing_of(key), res) {
                // Commands are carried out as a whole or not at all.
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

    /// Before each submission: pushes what there was no room for, and looks after deadlines.
    pub fn before_submit(&mut self, io: &mut impl LaneIo) {
        let mut port = RingPort { state: &mut self.port, io };
        if self.engine.config().deadline.is_some() {
            self.engine.check_deadlines(&mut port);
        }
        port.drain_backlog();
    }

    /// Goes on with requests that wait for the spare buffer, which another queue has given back.
    pub fn serve_waiting(&mut self, io: &mut impl LaneIo) {
        self.engine.spare_returned(&mut RingPort { state: &mut self.port, io });
    }

    /// Why the lane must not go on.
    ///
    /// # Errors
    /// [`LaneError::Ring`] if the ring is unusable. [`LaneError::Refused`] if the driver does not
    /// take a tag back: that would hang its client for ever, so the device has to end instead.
    pub fn check(&self) -> Result<(), LaneError> {
        self.port.failure.map_or(Ok(()), |errno| Err(LaneError::Ring(errno)))?;
        self.refused.map_or(Ok(()), Err)
    }

    /// Whether there is something to do for the lane before the next submission, beside deadlines:
    /// the rings had no room, do not work, or the driver has taken fetches back.
    #[inline(always)]
    pub fn needs_attention(&self) -> bool {
        self.port.is_held_up || self.engine.has_ended_tags()
    }

    /// How many entries the rings had no room for.
    pub fn backlog(&self) -> usize {
        self.port.backlog()
    }

    /// Cancels all operations in flight.
    pub fn cancel_all(&mut self, io: &mut impl LaneIo) {
        self.engine.cancel_all(&mut RingPort { state: &mut self.port, io });
    }

    /// The engine, to measure latencies.
    pub fn engine_mut(&mut self) -> &mut Engine<P> {
        &mut self.engine
    }
}

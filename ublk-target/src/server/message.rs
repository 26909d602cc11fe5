//! Messages to lanes: control asks, the lane answers between two batches.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel};

use bufreg::{Borrower, Lent, SlotIndex};
use nix::sys::eventfd::{EfdFlags, EventFd};
use uring_ext::Errno;

use crate::engine::{Engine, EngineStats, Holdings, Recorder};
use crate::lane::fault::Injected;
use crate::plan::{Op, Planner};
use crate::units::{Qid, Tag};

/// What a lane is asked for. Memory for the answer comes with the question, so that the lane
/// allocates none.
#[derive(Debug)]
pub enum LaneMessage {
    /// Fill in what is known now.
    Snapshot {
        /// To be filled in.
        snapshot: Box<LaneSnapshot>,
        /// Takes it back.
        reply: SyncSender<Box<LaneSnapshot>>,
    },
    /// Begin or end the measuring of latencies.
    Measure {
        /// Where to, or `None` to end.
        recorder: Option<Box<Recorder>>,
        /// Takes the recorder used until then.
        reply: SyncSender<Option<Box<Recorder>>>,
    },
    /// Cancel all operations in flight.
    CancelAll,
}

/// An operation that borrows a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BorrowingOp {
    /// The slot.
    pub slot: SlotIndex,
    /// By which the registry knows it.
    pub label: Borrower,
    /// The tag that it works for, and what it does, while it is in flight.
    pub op: Option<(Tag, Op)>,
}

/// What is known of a lane at one instant.
#[derive(Clone, Debug)]
pub struct LaneSnapshot {
    /// The queue.
    pub qid: Qid,
    /// Nanoseconds of the monotonic clock.
    pub at: u64,
    /// Counters since the start.
    pub stats: EngineStats,
    /// What is in hand.
    pub holdings: Option<Holdings>,
    /// Lent slots, as many as there is room for.
    pub lent: Vec<Lent>,
    /// The operations that borrow them.
    pub borrowers: Vec<BorrowingOp>,
    /// Latencies since measuring began.
    pub recorder: Recorder,
    /// Operations that met a fault which a test asked for.
    pub injected: Injected,
}

impl LaneSnapshot {
    /// An empty one with room for the lent slots of `depth` tags.
    #[must_use]
    pub fn new(qid: Qid, depth: u16) -> Self {
        let depth = usize::from(depth);
        Self {
            qid,
            at: 0,
            stats: EngineStats::default(),
            holdings: None,
            lent: Vec::with_capacity(2 * depth),
            borrowers: Vec::with_capacity(depth * crate::plan::WINDOW_OPS),
            recorder: Recorder::new(),
            injected: Injected::default(),
        }
    }

    /// Fills it in, without allocating.
    pub(super) fn take<P: Planner>(&mut self, engine: &Engine<P>, injected: Injected, at: u64) {
        self.at = at;
        self.stats = *engine.stats();
        self.holdings = Some(engine.holdings());
        self.injected = injected;
        let registry = engine.registry();
        self.lent.clear();
        self.borrowers.clear();
        for lent in registry.lent().take(self.lent.capacity()) {
            self.lent.push(lent);
            let room = self.borrowers.capacity() - self.borrowers.len();
            self.borrowers.extend(
                registry.borrowers(lent.slot).take(room).map(|label| BorrowingOp {
                    slot: lent.slot,
                    label,
                    op: engine.borrower(label),
                }),
            );
        }
        if let Some(recorder) = engine.recorder() {
            self.recorder.copy_from(recorder);
        }
    }
}

/// How others talk to a lane.
#[derive(Clone, Debug)]
pub struct LaneHandle {
    /// The queue.
    pub qid: Qid,
    /// Number of its tags.
    pub depth: u16,
    messages: Sender<LaneMessage>,
    wake: Arc<EventFd>,
}

impl LaneHandle {
    /// A handle, and the lane's end of it.
    ///
    /// # Errors
    /// `EMFILE` at the limit of open files.
    pub fn new(qid: Qid, depth: u16) -> Result<(Self, Receiver<LaneMessage>, Arc<EventFd>), Errno> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let wake =
            EventFd::from_value_and_flags(0, flags).map_err(|errno| Errno::new(errno as i32))?;
        let wake = Arc::new(wake);
        let (messages, inbox) = channel();
        let handle = Self { qid, depth, messages, wake: Arc::clone(&wake) };
        Ok((handle, inbox, wake))
    }

    /// Sends a message; `false` if the lane has ended.
    pub fn send(&self, message: LaneMessage) -> bool {
        self.messages.send(message).is_ok() && self.wake.write(1).is_ok()
    }
}

//! Messages to lanes: control asks, the lane answers between two batches.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel};

use bufreg::{Borrower, Leak, Lent, MAX_BORROWS, SlotIndex};
use nix::sys::eventfd::EventFd;
use ublk_engine::engine::{Engine, EngineStats, Holdings, Recorder};
use ublk_engine::lane::fault::Injected;
use ublk_engine::lane::{Lane, LaneIo};
use ublk_engine::plan::{Op, Planner, WINDOW_OPS};
use ublk_engine::target::{AnyTarget, BaseTarget};
use ublk_engine::units::{Qid, Tag};

use crate::os::clock::precise_now;

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
    /// Begin or end the measuring of latencies, or go on with an empty recorder: what was recorded
    /// is handed over, not copied.
    Measure {
        /// Where to, or `None` to end.
        recorder: Option<Box<Recorder>>,
        /// Takes the recorder used until then.
        reply: SyncSender<Option<Box<Recorder>>>,
    },
    /// Cancel all operations in flight.
    CancelAll,
    /// Serve a longer device.
    Grow {
        /// The target of that size below all layers.
        base: Box<BaseTarget>,
        /// Bytes of the device.
        size: u64,
        /// Told when it is done.
        reply: SyncSender<()>,
    },
    /// Come to an end once no request is in hand. The driver delivers no more, but for what is
    /// under way already.
    Drain,
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

/// How many leaked slots a snapshot names. There should be none at all.
pub const NAMED_LEAKS: usize = 16;

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
    /// Lent slots that nothing answers for, the first [`NAMED_LEAKS`].
    pub leaks: Vec<Leak>,
    /// The operations that borrow those slots.
    pub borrowers: Vec<BorrowingOp>,
    /// Operations that met a fault which a test asked for.
    pub injected: Injected,
}

impl LaneSnapshot {
    /// An empty one with room for `slots` lent slots. With room for none, only leaks are named.
    #[must_use]
    pub fn new(qid: Qid, slots: usize) -> Self {
        Self {
            qid,
            at: 0,
            stats: EngineStats::default(),
            holdings: None,
            lent: Vec::with_capacity(slots),
            leaks: Vec::with_capacity(NAMED_LEAKS),
            borrowers: Vec::with_capacity(slots * WINDOW_OPS + NAMED_LEAKS * MAX_BORROWS as usize),
            injected: Injected::default(),
        }
    }

    /// Fills it in, without allocating.
    pub(crate) fn take<P: Planner>(&mut self, engine: &Engine<P>, injected: Injected, at: u64) {
        let holdings = engine.holdings();
        self.at = at;
        self.stats = *engine.stats();
        self.holdings = Some(holdings);
        self.injected = injected;
        self.lent.clear();
        self.leaks.clear();
        self.borrowers.clear();
        for lent in engine.registry().lent().take(self.lent.capacity()) {
            self.lent.push(lent);
            self.name_borrowers(engine, lent.slot);
        }
        // The search compares every lent slot with every tag.
        if holdings.leaked > 0 {
            self.name_leaks(engine);
        }
    }

    fn name_leaks<P: Planner>(&mut self, engine: &Engine<P>) {
        for leak in engine.leaks().take(self.leaks.capacity()) {
            self.leaks.push(leak);
            if !self.lent.iter().any(|lent| lent.slot == leak.lent.slot) {
                self.name_borrowers(engine, leak.lent.slot);
            }
        }
    }

    fn name_borrowers<P: Planner>(&mut self, engine: &Engine<P>, slot: SlotIndex) {
        let room = self.borrowers.capacity() - self.borrowers.len();
        let borrowers = engine.registry().borrowers(slot).take(room);
        self.borrowers.extend(borrowers.map(|label| BorrowingOp {
            slot,
            label,
            op: engine.borrower(label),
        }));
    }
}

/// Does what a message asks for. Returns whether the lane is to come to an end.
pub(crate) fn attend(
    lane: &mut Lane<AnyTarget>,
    io: &mut impl LaneIo,
    message: LaneMessage,
) -> bool {
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
        LaneMessage::CancelAll => lane.cancel_all(io),
        LaneMessage::Grow { base, size, reply } => {
            let change = |own: &mut AnyTarget| own.replace_base(&base);
            lane.engine_mut().grow(size, change);
            let _ = reply.try_send(());
        }
        LaneMessage::Drain => return true,
    }
    false
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
    /// A handle of a queue whose lane is woken by `wake`, and the lane's end of it.
    pub(crate) fn new(qid: Qid, depth: u16, wake: &Arc<EventFd>) -> (Self, Receiver<LaneMessage>) {
        let (messages, inbox) = channel();
        (Self { qid, depth, messages, wake: Arc::clone(wake) }, inbox)
    }

    /// Sends a message; `false` if the lane has ended.
    pub fn send(&self, message: LaneMessage) -> bool {
        self.messages.send(message).is_ok() && self.wake.write(1).is_ok()
    }
}

//! Messages to lanes: control asks, and the lane answers between two batches.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel};

use bufreg::{Borrower, Leak, Lent, MAX_BORROWS, SlotIndex};
use nix::sys::eventfd::EventFd;
use ublk_engine::engine::{BegunRequest, Engine, EngineStats, Holdings, Recorder};
use ublk_engine::lane::fault::Injected;
use ublk_engine::lane::{Hold, Lane, LaneIo};
use ublk_engine::plan::{Op, Planner, WINDOW_OPS};
use ublk_engine::target::{AnyTarget, BaseTarget};
use ublk_engine::units::{Qid, Tag};

use crate::io_thread::hold::{LaneToken, TargetChange, release};
use crate::os::clock::precise_now;

/// A request to a lane. It carries the memory for the answer, so that the lane allocates nothing.
#[derive(Debug)]
pub enum LaneMessage {
    /// Fill in a snapshot.
    Snapshot {
        /// The snapshot to fill in.
        snapshot: Box<LaneSnapshot>,
        /// Takes the snapshot back.
        reply: SyncSender<Box<LaneSnapshot>>,
    },
    /// Begin or end the measuring of latencies, or continue with an empty recorder. The old
    /// recorder is passed back, not copied.
    Measure {
        /// The new recorder, or `None` to end.
        recorder: Option<Box<Recorder>>,
        /// Takes the old recorder.
        reply: SyncSender<Option<Box<Recorder>>>,
    },
    /// Cancel all operations in flight.
    CancelAll,
    /// Let requests wait for their time, or begin those that wait and let none wait.
    SetThrottling {
        /// Whether they may wait.
        is_on: bool,
    },
    /// Serve a device that has grown.
    Grow {
        /// The target of that size, without layers.
        base: Box<BaseTarget>,
        /// The new size of the device in bytes.
        size: u64,
        /// Notified when it is done.
        reply: SyncSender<()>,
    },
    /// Begin no more requests.
    Hold {
        /// Gets a word when all requests that have begun have ended.
        quiet: LaneToken,
    },
    /// Name the request that a lane that holds waits for.
    OldestBegun {
        /// Gets the request; none if the lane is quiet.
        reply: SyncSender<(Qid, Option<BegunRequest>)>,
    },
    /// Begin the requests that were held back.
    Release {
        /// A new target to begin them with. Only if the lane is quiet.
        change: Option<Box<TargetChange>>,
        /// Takes the change back.
        reply: SyncSender<Option<Box<TargetChange>>>,
    },
    /// End once no request is open. The driver delivers no more, except requests in transit.
    Drain,
}

/// An operation that borrows a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BorrowingOp {
    /// The slot.
    pub slot: SlotIndex,
    /// The key of the borrow in the registry.
    pub label: Borrower,
    /// The tag that it works for and its kind, while it is in flight.
    pub op: Option<(Tag, Op)>,
}

/// The maximum number of leaked slots that a snapshot names. There should be none.
pub const NAMED_LEAKS: usize = 16;

/// The state of a lane at one instant.
#[derive(Clone, Debug)]
pub struct LaneSnapshot {
    /// The queue.
    pub qid: Qid,
    /// Nanoseconds of the monotonic clock.
    pub at: u64,
    /// Counters since the start.
    pub stats: EngineStats,
    /// Open requests and operations.
    pub holdings: Option<Holdings>,
    /// Lent slots, as many as fit.
    pub lent: Vec<Lent>,
    /// Lent slots without an owner, the first [`NAMED_LEAKS`].
    pub leaks: Vec<Leak>,
    /// The operations that borrow those slots.
    pub borrowers: Vec<BorrowingOp>,
    /// Operations that met an injected test fault.
    pub injected: Injected,
}

impl LaneSnapshot {
    /// An empty snapshot with room for `slots` lent slots. Without room, it names leaks only.
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

    /// Fills in the snapshot without allocating.
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

/// Carries out a message. Returns whether the lane must end.
pub(crate) fn attend(
    lane: &mut Lane<AnyTarget>,
    hold: &mut Hold<LaneToken>,
    io: &mut impl LaneIo,
    message: LaneMessage,
) -> bool {
    match message {
        LaneMessage::Snapshot { mut snapshot, reply } => {
            snapshot.take(lane.engine(), lane.injected(), precise_now());
            // The sender may be gone.
            let _ = reply.try_send(snapshot);
        }
        LaneMessage::Measure { recorder, reply } => {
            // The sender frees the old recorder.
            let _ = reply.try_send(lane.engine_mut().measure(recorder));
        }
        LaneMessage::CancelAll => lane.cancel_all(io),
        LaneMessage::Grow { base, size, reply } => {
            let change = |own: &mut AnyTarget| own.replace_base(&base);
            lane.engine_mut().grow(size, change);
            let _ = reply.try_send(());
        }
        LaneMessage::Hold { quiet } => hold.begin(lane, quiet),
        LaneMessage::OldestBegun { reply } => {
            let qid = lane.engine().config().queue.qid;
            let _ = reply.try_send((qid, lane.engine_mut().oldest_begun()));
        }
        LaneMessage::Release { change, reply } => {
            let _ = reply.try_send(release(lane, hold, io, change));
        }
        LaneMessage::SetThrottling { is_on } => lane.set_throttling(is_on, io),
        LaneMessage::Drain => {
            lane.set_throttling(false, io);
            return true;
        }
    }
    false
}

/// The handle by which others talk to a lane.
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
    /// A handle of a queue whose lane is woken by `wake`, and the lane's end of the channel.
    pub(crate) fn new(qid: Qid, depth: u16, wake: &Arc<EventFd>) -> (Self, Receiver<LaneMessage>) {
        let (messages, inbox) = channel();
        (Self { qid, depth, messages, wake: Arc::clone(wake) }, inbox)
    }

    /// Sends a message. Returns `false` if the lane has ended.
    pub fn send(&self, message: LaneMessage) -> bool {
        self.messages.send(message).is_ok() && self.wake.write(1).is_ok()
    }
}

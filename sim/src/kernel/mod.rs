//! The kernel: the ublk driver, a ring with its buffer table, backings, and the clients.
//!
//! It does what the engine's entries say, as their bytes say it, and nothing that the real kernel
//! could not do; but it does it in the order, at the time and with the results that a random
//! number chooses. What the engine must never ask for is a panic here.

mod ask;
pub mod backing;
mod copy;
mod death;
mod driver;
mod flight;
mod operation;
mod oracle;
mod part;
mod ring;
mod snapshot;
mod table;
mod verdict;

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;

use bufreg::Incarnation;
use rand_xoshiro::SplitMix64;
use rand_xoshiro::rand_core::SeedableRng as _;
use ublk_engine::lane::{LaneIo, RingRole};
use ublk_engine::target::FaultTarget;
use ublk_engine::units::Tag;
use uring_ext::Errno;
use uring_ext::iod::IoDesc;
use uring_ext::nvme::{Namespace, RangeAddr};
use uring_ext::pool::{Direction, PoolAddr};
use uring_ext::ring::Cqe;
use uring_ext::sqe::Sqe;

use crate::MAX_REQUEST;
use crate::command::Range;
use crate::draw::Draw as _;
use crate::entry::Entry;
use crate::fault::{Fault, Tally};
use crate::mapping::Mapping;
use crate::pool::{self, Addresses};
use crate::setup::Setup;
use crate::trace::Trace;
pub use ask::Ask;
use backing::Backing;
pub use driver::{Phase, TagModel};
pub use flight::Flight;
use oracle::Oracle;
pub use part::{Ended, Part, Wanted, Workers};
pub use table::Buffer;
pub use verdict::Blame;

/// The queue that is served.
pub const QID: u16 = 3;

/// A completion that the engine has not handled yet.
#[derive(Clone, Copy, Debug)]
pub struct Posted {
    /// The completion.
    pub cqe: Cqe,
    /// The entry that it belongs to, if that was an operation.
    pub of: Option<Entry>,
}

/// The simulated kernel.
#[derive(Debug)]
pub struct Kernel {
    /// Decides.
    pub rng: SplitMix64,
    /// What the seed chose.
    pub setup: Setup,
    /// What has happened.
    pub tally: Tally,
    /// What has happened, in order.
    pub trace: Trace,
    /// Nanoseconds.
    pub now: u64,
    /// The time that the lane was told last.
    pub told: u64,
    /// The life of the server that owns the ring.
    pub incarnation: Incarnation,
    /// Pushed and not yet submitted, by ring. The second ring is used only if operations are
    /// issued from a lane of their own.
    pub queues: [VecDeque<Entry>; 2],
    /// Submitted and not started: waiting for a worker, or for the link before.
    pub queued: Vec<Flight>,
    /// Started.
    pub running: Vec<Flight>,
    /// Completed and not yet reaped.
    pub posted: Vec<Posted>,
    /// The ring's buffer table.
    pub table: Vec<Option<Buffer>>,
    /// Ranges that the lane has written down, by place.
    pub ranges: Vec<Range>,
    /// The tags.
    pub tags: Vec<TagModel>,
    /// Why pushes fail, once the ring is broken.
    pub broken: Option<Errno>,
    /// The lane has been told so.
    pub breakage_told: bool,
    /// Entries wait in the lane, which the kernel does not see.
    pub backlogged: bool,
    /// When the lane had a backlog last.
    pub busy_at: u64,
    /// The lane has been told that a commit was refused.
    pub refused: bool,
    /// No requests come any more.
    pub closing: bool,
    /// The device is being stopped.
    pub stopping: bool,
    /// Short results are dealt with as the driver would, and are no failure: to see what it makes
    /// of them.
    pub bears_short: bool,
    /// Requests that were answered.
    pub answered: u64,
    /// Requests that were answered with success.
    pub succeeded: u64,
    /// Requests that were failed since their server had died.
    pub failed_at_death: u64,
    /// Requests that the clients have asked for, those that were reissued counted once.
    pub asked: u64,
    backings: Vec<Backing>,
    pool: Vec<Box<[u8]>>,
    addresses: Addresses,
    oracle: Oracle,
    /// What it is in a stack of devices, if it is in one.
    pub part: Option<Part>,
    /// Decides as the planner's faults do, which depend on the requests only.
    pub(crate) shadow: Option<FaultTarget<Mapping>>,
}

impl Kernel {
    /// The kernel of a seed.
    #[must_use]
    pub fn new(seed: u64, setup: Setup, trace: Trace) -> Self {
        let null = setup.mapping.is_null();
        let mut backings: Vec<_> =
            setup.backings.iter().map(|bytes| Backing::new(*bytes, null)).collect();
        let buffer = || vec![0; MAX_REQUEST as usize].into_boxed_slice();
        let pool = (0..setup.slots.buffers()).map(|_| buffer()).collect();
        let mut oracle = Oracle::new(setup.geometry.size, null);
        if setup.mapping.snapshot().is_some() {
            let first = snapshot::first_contents(setup.geometry.size);
            oracle.begin_with(&first);
            backings[0].begin_with(&first);
        }
        let (depth, capacity) = (setup.depth, setup.slots.capacity());
        let mut kernel = Self {
            rng: SplitMix64::seed_from_u64(seed),
            setup,
            tally: Tally::default(),
            trace,
            now: 1_000_000,
            told: 0,
            incarnation: Incarnation(u32::try_from(seed & 0xffff).unwrap_or(0)),
            queues: [VecDeque::with_capacity(64), VecDeque::with_capacity(64)],
            queued: Vec::with_capacity(64),
            running: Vec::with_capacity(64),
            posted: Vec::with_capacity(128),
            table: vec![None; usize::from(capacity)],
            ranges: Vec::new(),
            tags: (0..depth).map(|_| TagModel::new()).collect(),
            broken: None,
            breakage_told: false,
            backlogged: false,
            busy_at: 0,
            refused: false,
            closing: false,
            stopping: false,
            bears_short: false,
            answered: 0,
            succeeded: 0,
            failed_at_death: 0,
            asked: 0,
            backings,
            pool,
            addresses: Addresses::of_process(),
            oracle,
            part: None,
            shadow: None,
        };
        kernel.fill_table();
        kernel.begin_shadow();
        kernel
    }

    /// Whether nothing is under way: no request is open, but for those whose buffer is stuck. Or,
    /// if somebody is in a hurry, no request is still to be delivered.
    #[must_use]
    pub fn is_quiet(&self, in_a_hurry: bool) -> bool {
        let is_settled = |model: &TagModel| match model.phase {
            Phase::NotFetched => false,
            Phase::Waiting => model.ask.is_none(),
            Phase::Serving => in_a_hurry && !model.refused,
            Phase::Committed => in_a_hurry || model.blame.stuck != 0,
            Phase::Ended => true,
        };
        let rings =
            self.pushed().count() + self.queued.len() + self.running.len() + self.posted.len();
        self.tags.iter().all(is_settled) && (in_a_hurry || rings == 0 && !self.backlogged)
    }

    /// The planner is a new one.
    pub(crate) fn begin_shadow(&mut self) {
        self.shadow = self.setup.mapping.faults().cloned();
    }

    /// The engine is about to plan a tag's request.
    pub(crate) fn decide(&mut self, tag: u16) {
        let model = &mut self.tags[usize::from(tag)];
        let request = model.ask.and_then(|ask| ask.request);
        if let Some((shadow, request)) = self.shadow.as_ref().zip(request) {
            let decision = shadow.decide(&request);
            model.blame.decision = decision;
            self.trace.note(|| format!("decision on tag {tag}: {decision:?}"));
        }
    }

    /// Everything is about to be cancelled.
    pub fn cancel_by_hand(&mut self) {
        self.tally.note(Fault::CancelAll);
        for model in &mut self.tags {
            model.blame.cancelled_by_hand = true;
        }
    }

    /// The lane writes down a range. Nobody may be about to read what was there.
    fn set_range(&mut self, range: Range) {
        self.ranges.retain(|other| other.addr != range.addr);
        self.ranges.push(range);
    }

    /// Draws whether a fault happens; counts it if so.
    fn strikes(&mut self, fault: Fault) -> bool {
        let strikes = self.rng.chance(self.setup.rate(fault));
        if strikes {
            self.tally.note(fault);
        }
        strikes
    }
}

/// The lane's view of the kernel.
#[derive(Clone, Debug)]
pub struct SimIo(pub Rc<RefCell<Kernel>>);

impl LaneIo for SimIo {
    fn push(&mut self, role: RingRole, sqes: &[Sqe]) -> Result<(), Errno> {
        self.0.borrow_mut().push(role, sqes)
    }

    fn iod(&self, tag: Tag) -> IoDesc {
        let kernel = self.0.borrow();
        assert!(tag.index() < kernel.tags.len(), "descriptor of tag {}", tag.0);
        kernel.tags[tag.index()].iod
    }

    fn copy(&mut self, tag: Tag, buffer: u16, direction: Direction, from: u32, to: u32) -> i32 {
        self.0.borrow_mut().user_copy(tag.0, buffer, direction, from, to)
    }

    fn pool_addr(&self, buffer: u16, offset: u32) -> PoolAddr {
        let kernel = self.0.borrow();
        assert!(buffer < kernel.setup.slots.buffers(), "pool buffer {buffer}");
        kernel.addresses.of(buffer, offset)
    }

    fn range(&mut self, place: u16, namespace: Namespace, offset: u64, len: u64) -> RangeAddr {
        let addr = pool::range(place, namespace, offset, len);
        self.0.borrow_mut().set_range(Range { addr: addr.get(), at: offset, len });
        addr
    }

    fn now(&mut self) -> u64 {
        let mut kernel = self.0.borrow_mut();
        kernel.now += 50;
        kernel.now
    }
}

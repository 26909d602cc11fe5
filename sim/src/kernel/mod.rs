//! The kernel: the ublk driver, a ring with its buffer table, backings, and the clients.
//!
//! It decodes the engine's entries and does only what the real kernel could do, but in a random
//! order, at random times and with random results. It panics on anything that the engine must never
//! ask for.

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
mod spare;
mod table;
mod verdict;

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;

use bufreg::Incarnation;
use rand_xoshiro::SplitMix64;
use rand_xoshiro::rand_core::SeedableRng as _;
use ublk_engine::lane::{LaneIo, RingRole};
use ublk_engine::target::{Decision, FaultLayer};
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
use crate::pool::{self, Addresses};
use crate::setup::Setup;
use crate::trace::Trace;
pub use ask::Ask;
use backing::Backing;
pub use driver::{Phase, TagModel};
pub use flight::Flight;
use oracle::Oracle;
pub use part::{EndedRequest, PendingRequest, StackPart, Workers};
pub(crate) use spare::SpareHolder;
pub use table::Buffer;
pub use verdict::RequestFaults;

/// The queue that is served.
pub const QID: u16 = 3;

/// A completion that the engine has not handled yet.
#[derive(Clone, Copy, Debug)]
pub struct Posted {
    /// The completion.
    pub cqe: Cqe,
    /// Its entry, if that was an operation.
    pub of: Option<Entry>,
}

/// The simulated kernel.
#[derive(Debug)]
pub struct Kernel {
    /// The source of all random decisions.
    pub rng: SplitMix64,
    /// The configuration that the seed chose.
    pub setup: Setup,
    /// The faults that have happened.
    pub tally: Tally,
    /// The events in order.
    pub trace: Trace,
    /// The time in nanoseconds.
    pub now: u64,
    /// The time that the lane was last given.
    pub lane_time: u64,
    /// The incarnation of the server that owns the ring.
    pub incarnation: Incarnation,
    /// Entries that were pushed and not yet submitted, by ring. The second ring is used only with
    /// an I/O lane.
    pub queues: [VecDeque<Entry>; 2],
    /// Submitted and not started: waiting for a worker or for the previous entry of a chain.
    pub queued: Vec<Flight>,
    /// Started.
    pub running: Vec<Flight>,
    /// Completed and not yet reaped.
    pub posted: Vec<Posted>,
    /// The ring's buffer table.
    pub table: Vec<Option<Buffer>>,
    /// Ranges that the lane has stored, by index.
    pub ranges: Vec<Range>,
    /// The tags.
    pub tags: Vec<TagModel>,
    /// Why pushes fail, once the ring is broken.
    pub broken: Option<Errno>,
    /// The lane has seen the error.
    pub breakage_reported: bool,
    /// Entries wait in the lane's backlog, where the kernel does not see them.
    pub backlogged: bool,
    /// When the lane last had a backlog.
    pub busy_at: u64,
    /// The lane has seen that a commit was refused.
    pub refused: bool,
    /// No more requests come.
    pub closing: bool,
    /// The device is being stopped.
    pub stopping: bool,
    /// Short results are no failure and are handled as by the driver. For tests of the driver's
    /// model.
    pub allows_short: bool,
    /// Requests that were answered.
    pub answered: u64,
    /// Requests that were answered with success.
    pub succeeded: u64,
    /// Requests that failed because their server had died.
    pub failed_at_death: u64,
    /// Requests of the clients. Reissued requests count once.
    pub asked: u64,
    backings: Vec<Backing>,
    pool: Vec<Box<[u8]>>,
    addresses: Addresses,
    oracle: Oracle,
    /// The holder of the spare buffer that the queues share.
    pub(crate) spare: SpareHolder,
    /// The lane waits for the spare buffer.
    is_spare_wanted: bool,
    /// Its part in a stack of devices, if it is in one.
    pub part: Option<StackPart>,
    /// Make the same decisions as the planner's layers, since they depend only on the requests.
    pub(crate) shadow: Vec<FaultLayer>,
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
            lane_time: 0,
            incarnation: Incarnation(u32::try_from(seed & 0xffff).unwrap_or(0)),
            queues: [VecDeque::with_capacity(64), VecDeque::with_capacity(64)],
            queued: Vec::with_capacity(64),
            running: Vec::with_capacity(64),
            posted: Vec::with_capacity(128),
            table: vec![None; usize::from(capacity)],
            ranges: Vec::new(),
            tags: (0..depth).map(|_| TagModel::new()).collect(),
            broken: None,
            breakage_reported: false,
            backlogged: false,
            busy_at: 0,
            refused: false,
            closing: false,
            stopping: false,
            allows_short: false,
            answered: 0,
            succeeded: 0,
            failed_at_death: 0,
            asked: 0,
            backings,
            pool,
            addresses: Addresses::of_process(),
            oracle,
            spare: SpareHolder::Nobody,
            is_spare_wanted: false,
            part: None,
            shadow: Vec::new(),
        };
        kernel.fill_table();
        kernel.begin_shadow();
        kernel
    }

    /// Whether no request is open, except those with a stuck buffer. With `in_a_hurry`: whether no
    /// request is still to be delivered.
    #[must_use]
    pub fn is_quiet(&self, in_a_hurry: bool) -> bool {
        let is_settled = |model: &TagModel| match model.phase {
            Phase::NotFetched => false,
            Phase::Waiting => model.ask.is_none(),
            Phase::Serving => in_a_hurry && !model.refused,
            Phase::Committed => in_a_hurry || model.faults_met.stuck != 0,
            Phase::Ended => true,
        };
        let rings =
            self.pushed().count() + self.queued.len() + self.running.len() + self.posted.len();
        self.tags.iter().all(is_settled) && (in_a_hurry || rings == 0 && !self.backlogged)
    }

    /// Starts with a new planner.
    pub(crate) fn begin_shadow(&mut self) {
        self.shadow = self.setup.mapping.faults().to_vec();
    }

    /// Records what the fault target decides for a tag's request, which the engine is about to
    /// plan.
    pub(crate) fn decide(&mut self, tag: u16) {
        let model = &mut self.tags[usize::from(tag)];
        let request = model.ask.and_then(|ask| ask.request);
        if let Some(request) = request.filter(|_| !self.shadow.is_empty()) {
            let mut decision = Decision::default();
            for layer in &self.shadow {
                let Decision { delay_ns, error, short } = layer.decide(&request);
                decision.delay_ns += delay_ns;
                (decision.error, decision.short) = (error, decision.short.or(short));
                // The layers below do not see the request.
                if error.is_some() {
                    break;
                }
            }
            model.faults_met.decision = decision;
            self.trace.note(|| format!("decision on tag {tag}: {decision:?}"));
        }
    }

    /// Records that all operations are about to be cancelled.
    pub fn cancel_by_hand(&mut self) {
        self.tally.note(Fault::CancelAll);
        for model in &mut self.tags {
            model.faults_met.cancelled_by_hand = true;
        }
    }

    /// Records a range that the lane stores. No operation may still use the range that it
    /// overwrites.
    fn set_range(&mut self, range: Range) {
        self.ranges.retain(|other| other.addr != range.addr);
        self.ranges.push(range);
    }

    /// Draws whether a fault happens, and counts it.
    fn strikes(&mut self, fault: Fault) -> bool {
        let strikes = self.rng.chance(self.setup.rate(fault));
        if strikes {
            self.tally.note(fault);
        }
        strikes
    }
}

/// The kernel as the lane's I/O.
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

    fn range(&mut self, index: u16, namespace: Namespace, offset: u64, len: u64) -> RangeAddr {
        let addr = pool::range(index, namespace, offset, len);
        self.0.borrow_mut().set_range(Range { addr: addr.get(), at: offset, len });
        addr
    }

    fn take_spare(&mut self) -> bool {
        self.0.borrow_mut().take_spare()
    }

    fn give_spare(&mut self) {
        self.0.borrow_mut().give_spare();
    }

    fn now(&mut self) -> u64 {
        let mut kernel = self.0.borrow_mut();
        kernel.now += 50;
        kernel.now
    }
}

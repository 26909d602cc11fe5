//! The engine: a sans-I/O state machine that carries out the requests of a queue.
//!
//! Its input is events (a request was delivered, an operation or a registration completed); its
//! output is calls of a [`Port`]. The engine knows no ring, no clock and no file, so it runs
//! unchanged on the simulated kernel of its tests.
//!
//! It guarantees:
//!
//! * Every delivered request is committed exactly once, after all its operations have completed and
//!   its buffer has no borrows.
//! * A success is the whole request: a read or write that is committed with success has moved every
//!   byte of the request, and there is no [`Answer`] for fewer. Short transfers are continued. A
//!   transfer that cannot be continued is an error, unless the planner has an alternative or
//!   ignores it.
//! * The first error of a request is its answer, and no further operations of it are issued.
//! * The planner is notified once when a request that it has accepted settles. A deferred request
//!   holds nothing but the buffer that the driver has delivered, and there is always a request that
//!   it waits for.
//! * While it holds, no new request begins, and every request that has begun goes on to its end.
//! * A request that waits for a time holds nothing else that others need, and the planner has not
//!   accepted it.
//! * Retries are bounded. A stale completion changes nothing and is counted.
//! * A descriptor with an unknown operation, or that does not fit the device, is refused and
//!   counted.
//! * It allocates nothing after construction: everything that a tag's request can need exists from
//!   the start.

mod answer;
mod chain;
mod config;
mod deadline;
mod fast_path;
mod hold;
mod inflight;
mod issue;
mod key;
mod latency;
mod lending;
mod planning;
mod scratch;
mod stats;
mod tag;
mod throttle;

pub use answer::Answer;
pub use config::{EngineConfig, QueueIdentity, SlotChoice, SlotTable};
pub use hold::BegunRequest;
pub use key::{OpKey, TagKey};
pub use latency::{Recorder, STAGES, Stamps};
pub use stats::EngineStats;

use std::collections::VecDeque;

use bufreg::{Borrower, Counts, Leak, Registry, SlotIndex};
use uring_ext::iod::IoDesc;
use uring_ext::nvme;
use uring_ext::pool::Direction;
use uring_ext::{Errno, sys};

use crate::plan::{BackingIndex, Op, OpKind, Planner};
use crate::request::{Refusal, Request};
use crate::units::Tag;
use inflight::{Cancel, InFlight, InFlightTable, Progress};
pub use planning::MAX_SUBSTITUTES;
use tag::{Phase, TagState};
use throttle::Throttled;

/// How often an operation or a registration is retried after `EAGAIN`, `EINTR` or `ENOMEM` without
/// progress.
pub const MAX_RETRIES: u8 = 16;

/// The engine's output. None of these may block.
pub trait Port {
    /// Passes a tag to the driver for the first time. In fused mode, the driver registers the
    /// buffer of its request in `slot`.
    fn fetch(&mut self, key: TagKey, slot: SlotIndex);
    /// Completes the tag's request and fetches the next one.
    fn commit(&mut self, key: TagKey, answer: Answer, slot: SlotIndex);
    /// Registers the buffer of the tag's request in a slot.
    fn register(&mut self, key: TagKey, slot: SlotIndex);
    /// Removes the buffer of the tag's request from a slot.
    fn unregister(&mut self, key: TagKey, slot: SlotIndex);
    /// Issues an operation. `slot` has its bytes, if it moves any. A delay completes with `-ETIME`
    /// when its time is over.
    fn submit(&mut self, key: OpKey, op: &Op, slot: Option<SlotIndex>);
    /// Registers the buffer of the tag's request, issues an operation that uses it, and unregisters
    /// the buffer. Each step starts when the previous one has completed, even if it failed. The
    /// registration has a completion only if it fails.
    fn submit_chain(&mut self, tag: TagKey, slot: SlotIndex, key: OpKey, op: &Op);
    /// Copies bytes `from..to` between the tag's request and a buffer of the pool, synchronously.
    /// Returns the number of bytes copied, or a negated error number.
    fn copy(&mut self, tag: Tag, slot: SlotIndex, direction: Direction, from: u32, to: u32) -> i32;
    /// The error that the device's users see for an operation that has failed.
    fn explain(&mut self, op: &Op, errno: Errno) -> Errno {
        let _ = op;
        errno
    }
    /// Requests the cancellation of an operation.
    fn cancel(&mut self, key: OpKey, op: &Op);
    /// Takes the spare buffer, if queues share one. `false` if it is in use; the engine then calls
    /// again after [`Engine::spare_returned`].
    fn take_spare(&mut self) -> bool {
        true
    }
    /// Returns the spare buffer.
    fn give_spare(&mut self) {}
    /// The monotonic clock in nanoseconds. Called only while latencies are measured.
    fn now(&mut self) -> u64;
}

/// The open requests and lent slots of an engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Holdings {
    /// Requests that were delivered and not yet committed.
    pub requests: usize,
    /// The registry's slots by state.
    pub slots: Counts,
    /// Lent slots for which the engine holds no lease.
    pub leaked: usize,
}

/// The state machine of one queue.
#[derive(Debug)]
pub struct Engine<P> {
    planner: P,
    config: EngineConfig,
    registry: Registry,
    tags: Box<[TagState]>,
    inflight: InFlightTable,
    /// Tags that wait for a buffer of the pool, in order.
    waiting: VecDeque<Tag>,
    /// Tags that the planner has deferred until another request has settled, in order.
    deferred: VecDeque<Tag>,
    /// Requests delivered since [`Engine::hold`], in order.
    held_back: VecDeque<Tag>,
    /// New requests are held back.
    is_holding: bool,
    /// Requests that wait for their time.
    throttled: Throttled,
    /// A request has settled, and the planner has not been asked about `deferred` since.
    settled: bool,
    /// Tags with no further deliveries.
    ended: u16,
    now: u64,
    /// The slot of tag 0 while requests may take the fast path.
    fast_path_slots: Option<SlotIndex>,
    recorder: Option<Box<Recorder>>,
    stats: EngineStats,
}

impl<P: Planner> Engine<P> {
    /// An engine without requests. Call [`Engine::fetch_all`] next.
    pub fn new(planner: P, config: EngineConfig) -> Self {
        let depth = usize::from(config.queue.depth);
        Self {
            planner,
            config,
            registry: Registry::new(config.slots.capacity(), config.incarnation),
            tags: (0..depth).map(|_| TagState::new()).collect(),
            inflight: InFlightTable::new(config.queue.depth),
            waiting: VecDeque::with_capacity(depth),
            deferred: VecDeque::with_capacity(depth),
            held_back: VecDeque::with_capacity(depth),
            is_holding: false,
            throttled: Throttled::with_capacity(depth),
            settled: false,
            ended: 0,
            now: 0,
            fast_path_slots: config.fast_path_slots(),
            recorder: None,
            stats: EngineStats::default(),
        }
    }

    /// Sets the time, in nanoseconds of a monotonic clock. Ages and deadlines depend on it.
    pub fn set_now(&mut self, now: u64) {
        self.now = now;
    }

    /// Passes all tags to the driver.
    pub fn fetch_all(&mut self, port: &mut impl Port) {
        for tag in 0..self.config.queue.depth {
            let tag = Tag(tag);
            let seq = self.tags[tag.index()].seq;
            port.fetch(TagKey { tag, seq }, self.tag_slot(tag));
        }
    }

    /// Handles the delivery of a request.
    #[inline(always)]
    pub fn delivered(&mut self, key: TagKey, iod: IoDesc, port: &mut impl Port) {
        if !self.deliver_fast(key, iod, port) {
            self.deliver(key, iod, port);
        }
    }

    #[inline(never)]
    fn deliver(&mut self, key: TagKey, iod: IoDesc, port: &mut impl Port) {
        if !self.believes(key) {
            return;
        }
        let tag = key.tag;
        if self.tags[tag.index()].phase != Phase::WithDriver {
            // Two deliveries without a commit in between would be a bug of the driver or of the
            // engine.
            self.stats.unexpected += 1;
            return;
        }
        // Before a request that came later.
        self.begin_throttled(port);
        self.settle_quarantine(tag);
        let request = match Request::decode(iod, &self.config.geometry) {
            Ok(request) => request,
            Err(refusal) => return self.refuse(tag, refusal, port),
        };
        self.stats.requests[request.kind.index()] += 1;
        self.stats.bytes[request.kind.index()] += request.len;
        let stamps = self.stamps(port);
        let state = &mut self.tags[tag.index()];
        state.run.renew(request, iod.has(sys::UBLK_IO_F_NEED_REG_BUF), self.now, stamps);
        if self.is_holding {
            return self.hold_back(tag);
        }
        self.begin(tag, port);
        self.serve_deferred(port);
    }

    /// Handles the end of a tag's fetch: the driver will deliver no more requests of the tag.
    /// Returns false if the completion is stale: the tag's current fetch is another one, or the
    /// engine has its request.
    pub fn fetch_ended(&mut self, key: TagKey) -> bool {
        if !self.believes(key) {
            return false;
        }
        let state = &mut self.tags[key.tag.index()];
        if state.phase != Phase::WithDriver {
            self.stats.unexpected += 1;
            return false;
        }
        state.phase = Phase::Ended;
        self.ended += 1;
        true
    }

    /// Handles the completion of an operation with `res`.
    #[inline(always)]
    pub fn completed(&mut self, key: OpKey, res: i32, port: &mut impl Port) {
        if !self.complete_fast(key, res, port) {
            self.complete(key, res, None, port);
            self.serve_waiting(port);
        }
        self.serve_deferred(port);
    }

    /// Handles the failure of an operation with `errno` that may succeed if it is issued again
    /// after `pause_ns` nanoseconds. Retries it at most [`nvme::MAX_RETRIES`] times.
    pub fn asked_again(&mut self, key: OpKey, errno: Errno, pause_ns: u64, port: &mut impl Port) {
        if !self.complete_fast(key, errno.negated(), port) {
            self.complete(key, errno.negated(), Some(pause_ns), port);
            self.serve_waiting(port);
        }
        self.serve_deferred(port);
    }

    /// With `pause_ns`, a failed operation may be retried.
    #[inline(never)]
    fn complete(&mut self, key: OpKey, res: i32, pause_ns: Option<u64>, port: &mut impl Port) {
        let Some(op) = self.inflight.get_mut(key) else {
            self.stats.stale += 1;
            return;
        };
        let cancelled = op.cancel != Cancel::No;
        let has_paused = std::mem::take(&mut op.pause_ns) > 0;
        let outcome = match Errno::from_result(res) {
            Ok(moved) => op.advance(moved),
            Err(Errno::ETIME) if has_paused => Progress::Again,
            Err(Errno::ETIME) if op.op.kind == OpKind::Delay => Progress::Done,
            Err(_) if cancelled => Progress::Failed(Errno::ETIMEDOUT),
            Err(errno) if pause_ns.is_some() && op.retries >= nvme::MAX_RETRIES => {
                Progress::Failed(errno)
            }
            Err(_) if pause_ns.is_some() => {
                op.retries += 1;
                op.pause_ns = pause_ns.unwrap_or(0);
                self.stats.retries += 1;
                Progress::Again
            }
            Err(errno) if is_transient(errno) && op.retries < MAX_RETRIES => {
                op.retries += 1;
                self.stats.retries += 1;
                Progress::Again
            }
            Err(errno) => Progress::Failed(port.explain(&op.op, errno)),
        };
        let outcome = match outcome {
            // The rest was cancelled.
            Progress::Again if cancelled => Progress::Failed(Errno::ETIMEDOUT),
            Progress::Again | Progress::Done | Progress::Failed(_) => outcome,
        };
        let (tag, pauses) = (op.tag, op.pause_ns > 0);
        if outcome == Progress::Again && res > 0 {
            self.stats.partial += 1;
        }
        let state = &mut self.tags[tag.index()];
        if state.phase != Phase::Running {
            self.stats.unexpected += 1;
            return;
        }
        let run = &mut state.run;
        if outcome == Progress::Again && run.chain.is_none() && !run.failed() {
            return if pauses { self.pause(key, port) } else { self.submit_again(key, port) };
        }
        let Some(ended) = self.inflight.remove(key) else { return };
        run.pending -= 1;
        let chained = run.chain.as_mut().map(|chain| chain.operation = Some((outcome, ended)));
        if let Some(borrow) = ended.borrow {
            if self.registry.give_back(borrow).is_err() {
                self.stats.unexpected += 1;
            }
        }
        match chained {
            Some(()) => self.end_chain(tag, port),
            None => {
                if let Progress::Failed(errno) = outcome {
                    self.op_failed(tag, &ended, errno, port);
                }
                self.proceed(tag, port);
            }
        }
    }

    /// The result for [`Engine::completed`] if the operation was carried out as it was issued.
    pub fn whole(&mut self, key: OpKey) -> i32 {
        let fast_path = self.fast_path_tag(key).map(|state| state.fast_path.request.len);
        let asked = |it: &InFlight| it.asked(self.tags[it.tag.index()].run.at_first);
        let len = fast_path.or_else(|| self.inflight.get(key).map(asked));
        let len = len.unwrap_or(0);
        i32::try_from(len).unwrap_or(i32::MAX)
    }

    /// The backing of an operation in flight.
    pub fn backing_of(&self, key: OpKey) -> Option<BackingIndex> {
        let fast_path = self.fast_path_tag(key).map(|state| state.fast_path.position.backing);
        fast_path.or_else(|| self.inflight.get(key).map(|it| it.op.backing))
    }

    /// How many reads and writes are in flight.
    pub fn transfers_in_flight(&self) -> usize {
        self.inflight.transfers()
    }

    /// Whether all tags have ended: nothing is in flight, and no more events will come.
    pub fn is_finished(&self) -> bool {
        self.ended == self.config.queue.depth
    }

    /// Whether the fetches of any tags have ended.
    pub fn has_ended_tags(&self) -> bool {
        self.ended > 0
    }

    /// Counts a completion that belongs to no engine of this incarnation.
    pub fn note_stale(&mut self) {
        self.stats.stale += 1;
    }

    /// Counters since construction.
    pub fn stats(&self) -> &EngineStats {
        &self.stats
    }

    /// Its configuration.
    pub fn config(&self) -> &EngineConfig {
        &self.config
    }

    /// The registry of this queue's buffers.
    pub fn registry(&self) -> &Registry {
        &self.registry
    }

    /// The open requests and lent slots. Scans every tag and slot, so it is not for the data path.
    pub fn holdings(&self) -> Holdings {
        let slots = self.registry.counts();
        let held = self.tags.iter().flat_map(TagState::lease_keys).count();
        let lent = usize::try_from(slots.capacity - slots.free).unwrap_or(usize::MAX);
        Holdings {
            requests: self.tags.iter().filter(|state| state.is_open()).count(),
            slots,
            leaked: lent.saturating_sub(held),
        }
    }

    /// Lent slots for which the engine holds no lease. There must be none. Ages are in nanoseconds.
    pub fn leaks(&self) -> impl Iterator<Item = Leak> + '_ {
        self.registry.leaks(self.now, |key| {
            self.tags.iter().flat_map(TagState::lease_keys).any(|held| held == key)
        })
    }

    /// Whether the engine has a request of this tag: delivered, and not committed yet.
    pub fn has_request(&self, tag: Tag) -> bool {
        self.tags.get(tag.index()).is_some_and(TagState::is_open)
    }

    /// The tag and operation with this identifier in the registry, while it is in flight.
    pub fn borrower(&self, borrower: Borrower) -> Option<(Tag, Op)> {
        let key = OpKey::of_borrower(borrower);
        let fast_path = self.fast_path_tag(key).map(|state| {
            let op = Op::all_of(&state.fast_path.request, state.fast_path.position);
            (InFlightTable::tag_of(key), op)
        });
        fast_path.or_else(|| self.inflight.get(key).map(|inflight| (inflight.tag, inflight.op)))
    }

    /// Whether the key is that of the tag's last command. Counts the completion as stale if not.
    /// The tag may not exist, since the key comes from a completion.
    fn believes(&mut self, key: TagKey) -> bool {
        let current = self.tags.get(key.tag.index()).is_some_and(|state| state.seq == key.seq);
        self.stats.stale += u64::from(!current);
        current
    }

    /// The key of the tag's next command. Completions of earlier ones are stale from now on.
    fn next_seq(&mut self, tag: Tag) -> TagKey {
        let seq = &mut self.tags[tag.index()].seq;
        *seq = seq.wrapping_add(1);
        TagKey { tag, seq: *seq }
    }

    fn refuse(&mut self, tag: Tag, refusal: Refusal, port: &mut impl Port) {
        match refusal {
            Refusal::Unknown(_) => self.stats.refused_unknown += 1,
            Refusal::Malformed => self.stats.refused_malformed += 1,
        }
        self.commit(tag, Err(refusal.errno()), port);
    }

    /// Continues a request without operations in flight: its next stage, its next window, or its
    /// end.
    fn proceed(&mut self, tag: Tag, port: &mut impl Port) {
        loop {
            let TagState { phase, run, plan, .. } = &mut self.tags[tag.index()];
            if *phase != Phase::Running || run.pending > 0 {
                return;
            }
            if plan.has_directives() && !run.failed() {
                self.apply_directives(tag, port);
                continue;
            }
            if run.failed() || run.is_complete(plan) {
                return self.finish(tag, port);
            }
            if run.window_done(plan) {
                run.next_window(plan);
                self.plan_next(tag);
            } else if let Err(errno) = self.issue_stage(tag, port) {
                self.tags[tag.index()].run.fail(errno);
            }
        }
    }

    fn commit(&mut self, tag: Tag, result: Result<Answer, Errno>, port: &mut impl Port) {
        let TagState { phase, run, .. } = &mut self.tags[tag.index()];
        *phase = Phase::WithDriver;
        if std::mem::take(&mut run.accepted) {
            self.planner.settled(run.request(), result.map(drop));
            self.settled = true;
        }
        self.stats.commits += 1;
        self.stats.failed += u64::from(result.is_err());
        let answer = result.unwrap_or_else(Answer::failed);
        let slot = self.tag_slot(tag);
        port.commit(self.next_seq(tag), answer, slot);
    }
}

fn deadline_of(limit: Option<u64>, now: u64) -> u64 {
    limit.map_or(u64::MAX, |limit| now.saturating_add(limit))
}

const fn is_transient(errno: Errno) -> bool {
    matches!(errno, Errno::EAGAIN | Errno::EINTR | Errno::ENOMEM)
}

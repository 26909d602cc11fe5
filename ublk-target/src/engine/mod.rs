//! The engine: a sans-I/O state machine that carries requests out, one a lane.
//!
//! Events go in (a request was delivered, an operation completed, a registration was answered);
//! decisions come out through a [`Port`]. The engine knows no ring, no clock and no file, so it
//! runs unchanged under the simulated kernel of its tests.
//!
//! What it guarantees:
//!
//! * Every delivered request is committed exactly once, and only when all its operations have
//!   completed and its buffer has no borrow left.
//! * A read or write that commits success has moved every byte. Short transfers are continued;
//!   what cannot be continued is an error.
//! * The first error of a request is its answer; no further operation of it is issued.
//! * Retries are bounded. A completion that belongs to nothing in flight changes nothing and is
//!   counted.
//! * After construction it allocates nothing: all that a tag's request can need is there from
//!   the start.

mod inflight;
#[cfg(test)]
mod simulator;
mod stats;
mod tag;

pub use inflight::OpKey;
pub use stats::EngineStats;

use bufreg::{Owner, Registry, SlotIndex};
use uring_ext::iod::IoDesc;
use uring_ext::{Errno, sys};

use crate::plan::{Op, Plan, Planner};
use crate::request::Request;
use crate::units::{Qid, Tag};
use inflight::{InFlight, InFlightTable};
use tag::{Run, TagState};

/// How often an operation is tried again after `EAGAIN` or `EINTR`, without progress in between.
const MAX_RETRIES: u8 = 16;

/// Where the engine's decisions go. None of these may block.
pub trait Port {
    /// Completes the tag's request with `result` (bytes, or a negated error number) and asks for
    /// the next one.
    fn commit(&mut self, tag: Tag, result: i32);
    /// Registers the buffer of the tag's request in a slot.
    fn register(&mut self, tag: Tag, slot: SlotIndex);
    /// Takes the buffer of the tag's request out of a slot.
    fn unregister(&mut self, tag: Tag, slot: SlotIndex);
    /// Issues an operation. `slot` is where its bytes are, if it has any.
    fn submit(&mut self, key: OpKey, op: &Op, slot: Option<SlotIndex>);
}

/// The device and queue that an engine serves.
#[derive(Clone, Copy, Debug)]
pub struct QueueIdentity {
    /// Device id.
    pub device: u32,
    /// Queue of the device.
    pub qid: Qid,
    /// Number of tags.
    pub depth: u16,
}

/// The state machine of one queue.
#[derive(Debug)]
pub struct Engine<P> {
    planner: P,
    queue: QueueIdentity,
    registry: Registry,
    tags: Box<[TagState]>,
    plans: Box<[Plan]>,
    inflight: InFlightTable,
    /// Tags that the driver will not deliver to again.
    ended: u16,
    stats: EngineStats,
}

impl<P: Planner> Engine<P> {
    /// An engine whose tags are all with the driver. Tag *n* uses slot *n*.
    pub fn new(planner: P, queue: QueueIdentity) -> Self {
        let depth = usize::from(queue.depth);
        Self {
            planner,
            queue,
            registry: Registry::new(queue.depth),
            tags: (0..depth).map(|_| TagState::WithDriver).collect(),
            plans: (0..depth).map(|_| Plan::default()).collect(),
            inflight: InFlightTable::new(queue.depth),
            ended: 0,
            stats: EngineStats::default(),
        }
    }

    /// The driver delivered a request for `tag`. `now` is kept as the time of lending.
    pub fn delivered(&mut self, tag: Tag, iod: IoDesc, now: u64, port: &mut impl Port) {
        if !matches!(self.tags[tag.index()], TagState::WithDriver) {
            // Two deliveries without a commit in between would be a bug of the driver or ours.
            self.stats.unexpected += 1;
            return;
        }
        self.stats.requests += 1;
        let request = match Request::decode(iod) {
            Ok(request) => request,
            Err(errno) => return self.commit(tag, Err(errno), port),
        };
        if !request.has_data() {
            return self.run(tag, Run::new(request, None), port);
        }
        let owner = Owner { device: self.queue.device, qid: self.queue.qid.0, tag: tag.0 };
        let Ok(lease) = self.registry.reserve(SlotIndex(tag.0), owner, now) else {
            // The slot's fate is unknown, so nothing may use it; the request is answered.
            self.stats.unexpected += 1;
            return self.commit(tag, Err(Errno::EIO), port);
        };
        if iod.has(sys::UBLK_IO_F_NEED_REG_BUF) {
            self.stats.need_reg_buf += 1;
            port.register(tag, lease.slot());
            self.tags[tag.index()] = TagState::Registering { lease, request, tries: 0 };
            return;
        }
        let lease = self.registry.activate(lease);
        self.run(tag, Run::new(request, Some(lease)), port);
    }

    /// The driver will deliver nothing more for `tag`.
    pub fn fetch_ended(&mut self, tag: Tag) {
        match self.tags[tag.index()] {
            TagState::WithDriver => {
                self.tags[tag.index()] = TagState::Ended;
                self.ended += 1;
            }
            TagState::Ended
            | TagState::Registering { .. }
            | TagState::Running(_)
            | TagState::Unregistering { .. } => self.stats.unexpected += 1,
        }
    }

    /// The answer to [`Port::register`].
    pub fn registered(&mut self, tag: Tag, res: i32, port: &mut impl Port) {
        let state = &mut self.tags[tag.index()];
        let registering = state.take_if(|state| matches!(state, TagState::Registering { .. }));
        let Some(TagState::Registering { lease, request, tries }) = registering else {
            self.stats.unexpected += 1;
            return;
        };
        match Errno::from_result(res) {
            Ok(_) => {
                let lease = self.registry.activate(lease);
                self.run(tag, Run::registered(request, lease), port);
            }
            Err(errno) if is_transient(errno) && tries < MAX_RETRIES => {
                self.stats.retries += 1;
                port.register(tag, lease.slot());
                *state = TagState::Registering { lease, request, tries: tries + 1 };
            }
            Err(errno) => {
                self.registry.cancel(lease);
                self.commit(tag, Err(errno), port);
            }
        }
    }

    /// The answer to [`Port::unregister`].
    pub fn unregistered(&mut self, tag: Tag, res: i32, port: &mut impl Port) {
        let unregistering =
            self.tags[tag.index()].take_if(|state| matches!(state, TagState::Unregistering { .. }));
        let Some(TagState::Unregistering { lease, result }) = unregistering else {
            self.stats.unexpected += 1;
            return;
        };
        if res < 0 {
            // The driver keeps the request until its buffer is gone, which the end of the ring
            // ensures. The commit is right in any case.
            self.stats.failed_unregistrations += 1;
        }
        self.registry.release(lease);
        self.commit(tag, result, port);
    }

    /// An operation completed with `res`.
    pub fn completed(&mut self, key: OpKey, res: i32, port: &mut impl Port) {
        let Some(op) = self.inflight.get_mut(key) else {
            self.stats.stale += 1;
            return;
        };
        let outcome = match Errno::from_result(res) {
            Ok(moved) => op.advance(moved),
            Err(errno) if is_transient(errno) && op.retries < MAX_RETRIES => {
                op.retries += 1;
                self.stats.retries += 1;
                Progress::Again
            }
            // An error that means "try again" would be taken as such by some who see it.
            Err(Errno::EAGAIN | Errno::EINTR) => Progress::Failed(Errno::EIO),
            Err(errno) => Progress::Failed(errno),
        };
        let tag = op.tag;
        if matches!(outcome, Progress::Again) && !self.running(tag).is_some_and(|run| run.failed())
        {
            if res > 0 {
                self.stats.short += 1;
            }
            let (key, op, borrow) = self.inflight.renew(key);
            return port.submit(key, &op, borrow.map(|borrow| borrow.slot()));
        }
        let Some(done) = self.inflight.remove(key) else { return };
        if let Some(borrow) = done.borrow {
            if self.registry.give_back(borrow).is_err() {
                self.stats.stale += 1;
            }
        }
        let Some(run) = self.running(tag) else {
            self.stats.unexpected += 1;
            return;
        };
        run.pending -= 1;
        if let Progress::Failed(errno) = outcome {
            run.fail(errno);
        }
        self.proceed(tag, port);
    }

    /// Whether all tags have ended: nothing is in flight and nothing will come.
    pub fn is_finished(&self) -> bool {
        self.ended == self.queue.depth
    }

    /// Counters since construction.
    pub fn stats(&self) -> &EngineStats {
        &self.stats
    }

    /// The registry of this queue's buffers.
    pub fn registry(&self) -> &Registry {
        &self.registry
    }

    fn running(&mut self, tag: Tag) -> Option<&mut Run> {
        match &mut self.tags[tag.index()] {
            TagState::Running(run) => Some(run),
            TagState::WithDriver
            | TagState::Registering { .. }
            | TagState::Unregistering { .. }
            | TagState::Ended => None,
        }
    }

    fn run(&mut self, tag: Tag, run: Run, port: &mut impl Port) {
        self.plans[tag.index()].clear();
        self.tags[tag.index()] = TagState::Running(run);
        self.proceed(tag, port);
    }

    /// Goes on with a request once it has nothing in flight: its next stage, its next window, or
    /// its end.
    fn proceed(&mut self, tag: Tag, port: &mut impl Port) {
        loop {
            let TagState::Running(run) = &mut self.tags[tag.index()] else { return };
            let plan = &mut self.plans[tag.index()];
            if run.pending > 0 {
                return;
            }
            if run.failed() || run.is_complete(plan) {
                return self.finish(tag, port);
            }
            let advanced = if run.window_done(plan) {
                run.next_window(plan);
                plan_window(&self.planner, run, plan)
            } else {
                self.issue_stage(tag, port)
            };
            if let (Err(errno), Some(run)) = (advanced, self.running(tag)) {
                run.fail(errno);
            }
        }
    }

    /// Issues the operations of the next stage of the window.
    fn issue_stage(&mut self, tag: Tag, port: &mut impl Port) -> Result<(), Errno> {
        let plan = &self.plans[tag.index()];
        let TagState::Running(run) = &mut self.tags[tag.index()] else { return Ok(()) };
        let Some((stage, _)) = plan.op(run.next_op) else { return Ok(()) };
        while let Some((_, op)) = plan.op(run.next_op).filter(|(of, _)| *of == stage) {
            let borrow = match &run.lease {
                Some(lease) if op.has_data() => {
                    Some(self.registry.borrow(lease).map_err(|_| Errno::EIO)?)
                }
                None if op.has_data() => return Err(Errno::EINVAL),
                Some(_) | None => None,
            };
            let entry = InFlight { tag, op, borrow, retries: 0 };
            let Some(key) = self.inflight.insert(entry) else {
                // The table holds a window for every tag, so this is a bug; the borrow goes back.
                if let Some(borrow) = borrow {
                    let _ = self.registry.give_back(borrow);
                }
                self.stats.unexpected += 1;
                return Err(Errno::EIO);
            };
            run.next_op += 1;
            run.pending += 1;
            self.stats.ops += 1;
            port.submit(key, &op, borrow.map(|borrow| borrow.slot()));
        }
        Ok(())
    }

    /// Ends a request: gives the buffer back and commits.
    fn finish(&mut self, tag: Tag, port: &mut impl Port) {
        let running = self.tags[tag.index()].take_if(|state| matches!(state, TagState::Running(_)));
        let Some(TagState::Running(run)) = running else { return };
        let result = run.result();
        let explicit = run.explicitly_registered;
        let Some(lease) = run.lease else { return self.commit(tag, result, port) };
        match self.registry.retire(lease) {
            Ok(lease) if explicit => {
                port.unregister(tag, lease.slot());
                self.tags[tag.index()] = TagState::Unregistering { lease, result };
            }
            Ok(lease) => {
                // The commit itself makes the driver take the buffer back.
                self.registry.release(lease);
                self.commit(tag, result, port);
            }
            Err(still_borrowed) => {
                // Unreachable while `pending` counts right: never give a borrowed buffer back.
                self.stats.unexpected += 1;
                self.tags[tag.index()] =
                    TagState::Running(Run { lease: Some(still_borrowed.lease), ..run });
            }
        }
    }

    fn commit(&mut self, tag: Tag, result: Result<i32, Errno>, port: &mut impl Port) {
        self.tags[tag.index()] = TagState::WithDriver;
        let result = match result {
            Ok(bytes) => bytes,
            Err(errno) => {
                self.stats.failed += 1;
                errno.negated()
            }
        };
        port.commit(tag, result);
    }
}

/// Plans the next window of a request.
fn plan_window(planner: &impl Planner, run: &Run, plan: &mut Plan) -> Result<(), Errno> {
    planner.plan(&run.request, run.covered, plan)?;
    // A planner that makes no progress would go round for ever.
    if plan.covered() == 0 && run.request.len > 0 { Err(Errno::EIO) } else { Ok(()) }
}

/// What a completion means for its operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Progress {
    /// All of it is done.
    Done,
    /// The rest, or all of it again, is to be issued.
    Again,
    /// It will not be done.
    Failed(Errno),
}

const fn is_transient(errno: Errno) -> bool {
    matches!(errno, Errno::EAGAIN | Errno::EINTR | Errno::ENOMEM)
}

//! The fast path. It serves requests with a buffer that the driver has lent and a single operation
//! that succeeds as a whole. Most requests are like that. They avoid the cost of the general path,
//! and their state is contiguous. All other requests take the general path, which continues from
//! the same state.

use bufreg::SlotIndex;
use uring_ext::iod::IoDesc;
use uring_ext::sys;

use super::answer::Answer;
use super::inflight::{Cancel, InFlight, InFlightTable};
use super::key::{OpKey, TagKey};
use super::latency::Stamps;
use super::tag::{FastPath, Held, Phase, TagState};
use super::{Engine, EngineConfig, Port, SlotChoice};
use crate::lend::LendMode;
use crate::plan::{Op, Planner};
use crate::request::Request;
use crate::units::Tag;

impl EngineConfig {
    /// The slot of tag 0, if the driver lends each tag's buffer in a separate slot and there are no
    /// deadlines.
    pub(super) fn fast_path_slots(&self) -> Option<SlotIndex> {
        match (self.lend, self.slots.choice, self.deadline) {
            (LendMode::Fused, SlotChoice::From(first), None) => Some(SlotIndex(first)),
            (_, SlotChoice::From(_) | SlotChoice::AnyFree, _) => None,
        }
    }
}

impl<P: Planner> Engine<P> {
    /// Starts a request and issues its operation. Returns false and changes nothing if it cannot
    /// take the fast path.
    #[inline(always)]
    pub(super) fn deliver_fast(&mut self, key: TagKey, iod: IoDesc, port: &mut impl Port) -> bool {
        let Some(SlotIndex(first)) = self.fast_path_slots else { return false };
        let owner = self.owner(key.tag);
        let Some(state) = self.tags.get_mut(key.tag.index()) else { return false };
        let is_expected = state.seq == key.seq && state.phase == Phase::WithDriver;
        if !is_expected || iod.has(sys::UBLK_IO_F_NEED_REG_BUF) {
            return false;
        }
        let Ok(request) = Request::decode(iod, &self.config.geometry) else { return false };
        let Some(position) = self.planner.single(&request) else { return false };
        let op_key = self.inflight.first_key(key.tag);
        let slot = SlotIndex(first + key.tag.0);
        // The slot is not free if it is in quarantine.
        let lent = self.registry.lend(slot, owner, self.now, op_key.borrower());
        let Ok(lease) = lent else { return false };
        self.inflight.begin_fast();
        state.phase = Phase::FastPath;
        state.fast_path = FastPath { lease: Some(lease), serial: op_key.serial, request, position };
        self.stats.requests[request.kind.index()] += 1;
        self.stats.bytes[request.kind.index()] += request.len;
        self.stats.ops += 1;
        port.submit(op_key, &Op::all_of(&request, position), Some(slot));
        true
    }

    /// Ends a request if its operation has moved all its bytes. Returns false if there is more to
    /// do, or the operation did not take the fast path.
    #[inline(always)]
    pub(super) fn complete_fast(&mut self, key: OpKey, res: i32, port: &mut impl Port) -> bool {
        let tag = InFlightTable::tag_of(key);
        let Some(state) = self.tags.get_mut(tag.index()) else { return false };
        if !state.is_on_fast_path(key) {
            return false;
        }
        let request = state.fast_path.request;
        let whole = Answer::of_transfer(&request, res);
        let Some(answer) = whole.filter(|_| self.fast_path_slots.is_some()) else {
            self.leave_fast_path(tag);
            return false;
        };
        let Some(lease) = state.fast_path.lease.take() else { return false };
        let slot = lease.slot();
        self.registry.take_back(lease);
        self.inflight.end_fast();
        state.phase = Phase::WithDriver;
        state.seq = state.seq.wrapping_add(1);
        self.stats.commits += 1;
        let next = TagKey { tag, seq: state.seq };
        self.planner.settled(&request, Ok(()));
        port.commit(next, answer, slot);
        self.settled = !self.deferred.is_empty();
        true
    }

    /// Moves a request from the fast path to the general path.
    #[cold]
    pub(super) fn leave_fast_path(&mut self, tag: Tag) {
        let state = &mut self.tags[tag.index()];
        let FastPath { lease, serial, request, position } = &mut state.fast_path;
        let Some(lease) = lease.take() else { return };
        let delivered_at = self.registry.lent_since(&lease);
        let (lease, borrow) = self.registry.split(lease);
        let (op, borrow) = (Op::all_of(request, *position), Some(borrow));
        state.run.renew(*request, false, delivered_at, Stamps::default());
        state.run.accepted = true;
        state.run.held = Held::Active(lease);
        (state.run.next_op, state.run.pending) = (1, 1);
        state.plan.set_single(op);
        state.phase = Phase::Running;
        let inflight = InFlight {
            tag,
            op,
            moved: 0,
            borrow,
            retries: 0,
            pause_ns: 0,
            substitutes: 0,
            cancel: Cancel::No,
            deadline: u64::MAX,
        };
        self.inflight.end_fast();
        self.inflight.insert_fast(*serial, inflight);
    }

    /// Moves all requests to the general path.
    pub(super) fn leave_all_fast_paths(&mut self) {
        for tag in 0..self.config.queue.depth {
            if self.tags[usize::from(tag)].phase == Phase::FastPath {
                self.leave_fast_path(Tag(tag));
            }
        }
    }

    /// The state of the tag with this operation on the fast path.
    pub(super) fn fast_path_tag(&self, key: OpKey) -> Option<&TagState> {
        let state = self.tags.get(InFlightTable::tag_of(key).index())?;
        state.is_on_fast_path(key).then_some(state)
    }
}

impl TagState {
    /// Whether the key is that of an operation on the fast path.
    #[inline]
    fn is_on_fast_path(&self, key: OpKey) -> bool {
        let is_first = InFlightTable::is_first(key);
        self.phase == Phase::FastPath && is_first && self.fast_path.serial == key.serial
    }
}

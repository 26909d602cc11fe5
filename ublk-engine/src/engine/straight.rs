//! Requests that go straight: lent by the driver, one operation, done as a whole. Most do, so they
//! pay for nothing that others may need, and what is known of them is in one place. Whatever is
//! unusual goes the long way, which finds everything as if the request had come by it.

use bufreg::SlotIndex;
use uring_ext::iod::IoDesc;
use uring_ext::sys;

use super::answer::Answer;
use super::inflight::{Cancel, InFlight, InFlightTable};
use super::key::{OpKey, TagKey};
use super::latency::Stamps;
use super::tag::{Held, Phase, Straight, TagState};
use super::{Engine, EngineConfig, Port, SlotChoice};
use crate::lend::LendMode;
use crate::plan::{Op, Planner};
use crate::request::Request;
use crate::units::Tag;

impl EngineConfig {
    /// The slot of tag 0 if the driver lends each tag's buffer in a slot of its own, and nobody
    /// has asked for deadlines.
    pub(super) fn straight_slots(&self) -> Option<SlotIndex> {
        match (self.lend, self.slots.choice, self.deadline) {
            (LendMode::Fused, SlotChoice::From(first), None) => Some(SlotIndex(first)),
            (_, SlotChoice::From(_) | SlotChoice::AnyFree, _) => None,
        }
    }
}

impl<P: Planner> Engine<P> {
    /// Takes a request up and issues its operation. Returns false, and changes nothing, if it
    /// cannot go straight.
    #[inline(always)]
    pub(super) fn deliver_straight(
        &mut self,
        key: TagKey,
        iod: IoDesc,
        port: &mut impl Port,
    ) -> bool {
        let Some(SlotIndex(first)) = self.straight_slots else { return false };
        let owner = self.owner(key.tag);
        let Some(state) = self.tags.get_mut(key.tag.index()) else { return false };
        let is_expected = state.turn == key.turn && state.phase == Phase::WithDriver;
        if !is_expected || iod.has(sys::UBLK_IO_F_NEED_REG_BUF) {
            return false;
        }
        let Ok(request) = Request::decode(iod, &self.config.geometry) else { return false };
        let Some(place) = self.planner.single(&request) else { return false };
        let op_key = self.inflight.first_key(key.tag);
        let slot = SlotIndex(first + key.tag.0);
        // It is not free if it was in quarantine.
        let lent = self.registry.lend(slot, owner, self.now, op_key.borrower());
        let Ok(lease) = lent else { return false };
        self.inflight.begin_straight();
        state.phase = Phase::Straight;
        state.straight = Straight { lease: Some(lease), serial: op_key.serial, request, place };
        self.stats.requests[request.kind.index()] += 1;
        self.stats.bytes[request.kind.index()] += request.len;
        self.stats.ops += 1;
        port.submit(op_key, &Op::all_of(&request, place), Some(slot));
        true
    }

    /// Ends a request whose operation has moved all its bytes. Returns false if there is more to be
    /// done, or the operation is none that went straight.
    #[inline(always)]
    pub(super) fn complete_straight(&mut self, key: OpKey, res: i32, port: &mut impl Port) -> bool {
        let tag = InFlightTable::tag_of(key);
        let Some(state) = self.tags.get_mut(tag.index()) else { return false };
        if !state.goes_straight(key) {
            return false;
        }
        let request = state.straight.request;
        let whole = Answer::of_transfer(&request, res);
        let Some(answer) = whole.filter(|_| self.straight_slots.is_some()) else {
            self.leave_straight(tag);
            return false;
        };
        let Some(lease) = state.straight.lease.take() else { return false };
        let slot = lease.slot();
        self.registry.take_back(lease);
        self.inflight.end_straight();
        state.phase = Phase::WithDriver;
        state.turn = state.turn.wrapping_add(1);
        self.stats.commits += 1;
        let next = TagKey { tag, turn: state.turn };
        self.planner.settled(&request, Ok(()));
        port.commit(next, answer, slot);
        self.settled = !self.deferred.is_empty();
        true
    }

    /// Has a request that goes straight go on as any other.
    #[cold]
    pub(super) fn leave_straight(&mut self, tag: Tag) {
        let state = &mut self.tags[tag.index()];
        let Straight { lease, serial, request, place } = &mut state.straight;
        let Some(lease) = lease.take() else { return };
        let (lease, borrow) = self.registry.part(lease);
        let (op, borrow) = (Op::all_of(request, *place), Some(borrow));
        state.run.renew(*request, false, Stamps::default());
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
        self.inflight.end_straight();
        self.inflight.insert_straight(*serial, inflight);
    }

    /// Has all requests go on as any others.
    pub(super) fn leave_all_straight(&mut self) {
        for tag in 0..self.config.queue.depth {
            if self.tags[usize::from(tag)].phase == Phase::Straight {
                self.leave_straight(Tag(tag));
            }
        }
    }

    /// The tag of the operation that goes straight under a label of the registry.
    pub(super) fn straight_tag(&self, key: OpKey) -> Option<&TagState> {
        let state = self.tags.get(InFlightTable::tag_of(key).index())?;
        state.goes_straight(key).then_some(state)
    }
}

impl TagState {
    /// Whether the key is that of the operation of a request that goes straight.
    #[inline]
    fn goes_straight(&self, key: OpKey) -> bool {
        let is_first = InFlightTable::is_first(key);
        self.phase == Phase::Straight && is_first && self.straight.serial == key.serial
    }
}

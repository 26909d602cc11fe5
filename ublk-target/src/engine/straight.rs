//! Requests that go straight: lent by the driver, one operation, done as a whole. Most do, so they
//! pay for nothing that others may need. Whatever is unusual goes the long way, which finds
//! everything as if the request had come by it.

use uring_ext::iod::IoDesc;
use uring_ext::sys;

use super::inflight::{Cancel, InFlight};
use super::key::{OpKey, TagKey};
use super::latency::Stamps;
use super::tag::{Held, Phase, Way};
use super::{Engine, Port, SlotChoice, deadline_of};
use crate::lend::LendMode;
use crate::plan::Planner;
use crate::request::Request;

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
        let (LendMode::Fused, SlotChoice::From(_), None) =
            (self.config.lend, self.config.slots.choice, &self.recorder)
        else {
            return false;
        };
        if key.tag.0 >= self.config.queue.depth {
            return false;
        }
        let (slot, owner) = (self.tag_slot(key.tag), self.owner(key.tag));
        let state = &mut self.tags[key.tag.index()];
        let is_expected = state.turn == key.turn && state.phase == Phase::WithDriver;
        if !is_expected || iod.has(sys::UBLK_IO_F_NEED_REG_BUF) {
            return false;
        }
        let Ok(request) = Request::decode(iod, &self.config.geometry) else { return false };
        let Some(op) = self.planner.single(&request) else { return false };
        let Some(op_key) = self.inflight.next_key() else { return false };
        // It is not free if it was in quarantine, or the tag has a request.
        let lent = self.registry.lend(slot, owner, self.now, op_key.borrower());
        let Ok((lease, borrow)) = lent else { return false };
        state.phase = Phase::Running;
        state.plan.clear();
        // The window has room: it was empty.
        let _ = state.plan.push(op);
        let run = &mut state.run;
        run.renew(request, false, Stamps::default());
        run.accepted = true;
        run.held = Held::Active(lease);
        (run.next_op, run.pending) = (1, 1);
        self.stats.requests[request.kind.index()] += 1;
        self.stats.bytes[request.kind.index()] += request.len;
        self.stats.ops += 1;
        let deadline = deadline_of(self.config.deadline, self.now);
        let (moved, retries, substitutes, cancel) = (0, 0, 0, Cancel::No);
        let (tag, borrow) = (key.tag, Some(borrow));
        let inflight = InFlight { tag, op, moved, borrow, retries, substitutes, cancel, deadline };
        self.inflight.insert(inflight);
        port.submit(op_key, &op, Some(slot));
        true
    }

    /// Ends a request whose last operation has moved all its bytes. Returns false, and changes
    /// nothing, if there is more to be done.
    #[inline(always)]
    pub(super) fn complete_straight(&mut self, key: OpKey, res: i32, port: &mut impl Port) -> bool {
        let Some(&mut InFlight { tag, op, borrow, .. }) = self.inflight.get_mut(key) else {
            return false;
        };
        let is_whole = u64::try_from(res) == Ok(op.len) && op.has_data();
        let state = &mut self.tags[tag.index()];
        let run = &mut state.run;
        let is_last = state.phase == Phase::Running
            && run.pending == 1
            && run.is_complete(&state.plan)
            && !state.plan.is_marked();
        let is_plain = run.way == Way::Delivered
            && matches!(run.scratch, Held::Nothing)
            && self.recorder.is_none();
        let (true, true, true, Some(borrow)) = (is_whole, is_last, is_plain, borrow) else {
            return false;
        };
        let lease = match run.held.take() {
            Held::Active(lease) => lease,
            held @ (Held::Nothing
            | Held::Reserved(_)
            | Held::Retiring(_)
            | Held::Quarantined(_)) => {
                run.held = held;
                return false;
            }
        };
        if let Err(lease) = self.registry.take_back(lease, borrow) {
            run.held = Held::Active(lease);
            return false;
        }
        run.pending = 0;
        self.inflight.remove(key);
        self.answer(tag, port);
        true
    }
}

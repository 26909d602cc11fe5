//! Issuing operations. Each has its table entry and its borrow until it completes.

use bufreg::SlotIndex;
use uring_ext::Errno;

use super::inflight::{Cancel, InFlight};
use super::key::OpKey;
use super::tag::{Held, TagState};
use super::{Engine, Port, deadline_of};
use crate::plan::{Buffer, Op, OpKind, Planner};
use crate::units::Tag;

impl<P: Planner> Engine<P> {
    /// Issues the operations of the next stage of the window.
    pub(super) fn issue_stage(&mut self, tag: Tag, port: &mut impl Port) -> Result<(), Errno> {
        self.stamp_issue(tag, port);
        let TagState { run, plan, .. } = &self.tags[tag.index()];
        let Some((stage, _)) = plan.op(run.next_op) else { return Ok(()) };
        loop {
            let TagState { run, plan, .. } = &self.tags[tag.index()];
            let op = plan.op(run.next_op).filter(|(of, _)| *of == stage);
            let Some((_, op)) = op else { return Ok(()) };
            self.issue(tag, op, 0, port)?;
            self.tags[tag.index()].run.next_op += 1;
            self.stats.ops += 1;
        }
    }

    /// Issues an operation in addition to those of the window.
    #[cold]
    pub(super) fn issue_another(
        &mut self,
        tag: Tag,
        op: Op,
        substitutes: u8,
        port: &mut impl Port,
    ) -> Result<(), Errno> {
        self.issue(tag, op, substitutes, port)
    }

    /// Issues one operation, which replaces `substitutes` failed ones.
    #[inline(always)]
    pub(super) fn issue(
        &mut self,
        tag: Tag,
        op: Op,
        substitutes: u8,
        port: &mut impl Port,
    ) -> Result<(), Errno> {
        // The table has a window for every tag, so there is space.
        let key = self.inflight.next_key(tag).ok_or(Errno::EIO)?;
        if op.buffer() == Some(Buffer::Scratch) {
            self.hold_scratch(tag)?;
        }
        let run = &mut self.tags[tag.index()].run;
        let held = match op.buffer() {
            None => None,
            Some(Buffer::Request) => Some(&run.held),
            Some(Buffer::Scratch) => Some(&run.scratch),
        };
        let borrow = match held {
            None => None,
            Some(Held::Active(lease)) => {
                let borrow = self.registry.borrow(lease, key.borrower());
                Some(borrow.map_err(|_| Errno::EIO)?)
            }
            // An operation was considered lost and has completed after all.
            Some(Held::Quarantined(_)) => return Err(Errno::ETIMEDOUT),
            Some(Held::Nothing | Held::Reserved(_) | Held::Retiring(_)) => {
                return Err(Errno::EINVAL);
            }
        };
        let deadline = deadline_of(self.config.deadline, self.now);
        // The retries of a chain that is replaced by single entries.
        let is_delay = op.kind == OpKind::Delay;
        let retries = if is_delay { 0 } else { std::mem::take(&mut run.retries) };
        let (moved, pause_ns, cancel) = (0, 0, Cancel::No);
        let inflight =
            InFlight { tag, op, moved, borrow, retries, pause_ns, substitutes, cancel, deadline };
        self.inflight.insert(key, inflight);
        run.pending += 1;
        if op.len > run.at_first {
            self.submit_short(key, port);
        } else {
            port.submit(key, &op, borrow.map(|borrow| borrow.slot()));
        }
        Ok(())
    }

    /// Issues the rest of an operation.
    pub(super) fn submit_again(&mut self, key: OpKey, port: &mut impl Port) {
        let (key, inflight) = self.inflight.renew(key);
        if let Some(borrow) = inflight.borrow {
            if self.registry.relabel(borrow, key.borrower()).is_err() {
                self.stats.unexpected += 1;
            }
        }
        self.submit_short(key, port);
    }

    /// Issues an operation again after its pause.
    #[cold]
    pub(super) fn pause(&mut self, key: OpKey, port: &mut impl Port) {
        let (key, inflight) = self.inflight.renew(key);
        if let Some(borrow) = inflight.borrow {
            if self.registry.relabel(borrow, key.borrower()).is_err() {
                self.stats.unexpected += 1;
            }
        }
        self.stats.delays += 1;
        port.submit(key, &inflight.issued(), None);
    }

    /// Issues an operation, or only the first part of it if the planner limits that.
    #[cold]
    fn submit_short(&mut self, key: OpKey, port: &mut impl Port) {
        let (asked, slot) = self.shortened(key);
        port.submit(key, &asked, slot);
    }

    /// An operation in flight with the length to issue, and its slot.
    ///
    /// # Panics
    /// If the key is not live.
    #[cold]
    pub(super) fn shortened(&mut self, key: OpKey) -> (Op, Option<SlotIndex>) {
        let inflight = self.inflight.get(key).expect("an operation that is being issued");
        let (op, run) = (inflight.op, &mut self.tags[inflight.tag.index()].run);
        let len = inflight.asked(run.at_first);
        let is_first = len < op.len && !std::mem::replace(&mut run.is_short, true);
        self.stats.planned_short += u64::from(is_first);
        (Op { len, ..op }, inflight.borrow.map(|borrow| borrow.slot()))
    }

    pub(super) fn stamp_issue(&mut self, tag: Tag, port: &mut impl Port) {
        let stamps = &mut self.tags[tag.index()].run.stamps;
        if self.recorder.is_some() && stamps.issued == 0 {
            stamps.issued = port.now();
        }
    }
}

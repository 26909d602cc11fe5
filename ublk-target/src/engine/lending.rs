//! How a request comes to its buffer and gives it back, whatever the lend mode.

use bufreg::{Active, Lease, Owner, Reserved, Retiring, SlotIndex};
use uring_ext::Errno;
use uring_ext::pool::Direction;

use super::inflight::{Cancel, InFlight, Progress};
use super::tag::{Chain, Held, Run, TagState, Way};
use super::{Engine, MAX_RETRIES, Port, SlotChoice, TagKey, deadline_of, is_transient, running};
use crate::lend::LendMode;
use crate::plan::{Op, Planner};
use crate::request::RequestKind;
use crate::units::Tag;

impl<P: Planner> Engine<P> {
    /// The slot that the driver is told to register the tag's next buffer in, and the one that is
    /// the tag's own in the copy modes.
    pub(super) fn tag_slot(&self, tag: Tag) -> SlotIndex {
        match self.config.slots.choice {
            SlotChoice::From(first) => SlotIndex(first + tag.0),
            SlotChoice::AnyFree => SlotIndex(tag.0),
        }
    }

    /// Gets the request its buffer in the way of the lend mode.
    pub(super) fn lend(&mut self, tag: Tag, run: Run, need_reg_buf: bool, port: &mut impl Port) {
        match self.config.lend {
            LendMode::Fused if need_reg_buf => self.lend_registered(tag, run, port),
            LendMode::Fused | LendMode::Copy => self.lend_delivered(tag, run, port),
            LendMode::Slot => self.lend_registered(tag, run, port),
            LendMode::UserCopy => self.lend_copied(tag, run, port),
        }
    }

    fn lend_delivered(&mut self, tag: Tag, mut run: Run, port: &mut impl Port) {
        let Ok(lease) = self.registry.reserve(self.tag_slot(tag), self.owner(tag), self.now) else {
            // The driver has filled a slot that is in use: nothing may touch it. The request is
            // answered.
            self.stats.unexpected += 1;
            return self.commit(tag, Err(Errno::EIO), port);
        };
        run.held = Held::Active(self.registry.activate(lease));
        self.start(tag, run, port);
    }

    fn lend_registered(&mut self, tag: Tag, mut run: Run, port: &mut impl Port) {
        run.way = Way::Registered;
        let Some(lease) = self.reserve_for_registration(tag) else {
            // Only a quarantined slot is in the way; copying does without.
            return self.copy_instead(tag, run, Errno::EBUSY, port);
        };
        let single = self.plans[tag.index()].single(run.request.len);
        match single.filter(|_| self.config.lend == LendMode::Slot) {
            Some(op) => self.submit_chain(tag, run, lease, op, port),
            None => {
                port.register(self.next_turn(tag), lease.slot());
                self.tags[tag.index()] = TagState::Registering { run, lease };
            }
        }
    }

    fn reserve_for_registration(&mut self, tag: Tag) -> Option<Lease<Reserved>> {
        let owner = self.owner(tag);
        match self.config.slots.choice {
            SlotChoice::From(_) => self.registry.reserve(self.tag_slot(tag), owner, self.now).ok(),
            SlotChoice::AnyFree => {
                // The lowest comes first, and the pool is behind the slots for lent buffers.
                let lease = self.registry.reserve_any(owner, self.now).ok()?;
                if lease.slot().0 < self.config.slots.lent {
                    return Some(lease);
                }
                self.registry.cancel(lease);
                None
            }
        }
    }

    /// Register, operation and unregister in one submission.
    fn submit_chain(
        &mut self,
        tag: Tag,
        mut run: Run,
        lease: Lease<Reserved>,
        op: Op,
        port: &mut impl Port,
    ) {
        // The ring's order makes the registration precede the use.
        let lease = self.registry.activate(lease);
        let slot = lease.slot();
        let key = self.inflight.next_key();
        let borrow = key.and_then(|key| self.registry.borrow(&lease, key.borrower()).ok());
        let (Some(key), Some(borrow)) = (key, borrow) else {
            // The table holds a window for every tag, so it has room.
            self.stats.unexpected += 1;
            self.give_up(lease);
            return self.commit(tag, Err(Errno::EIO), port);
        };
        let deadline = deadline_of(self.config.deadline, self.now);
        let (borrow, cancel) = (Some(borrow), Cancel::No);
        let retries = run.retries;
        self.inflight.insert(InFlight { tag, op, borrow, retries, cancel, deadline });
        run.held = Held::Active(lease);
        run.chain = Some(Chain::default());
        run.next_op = 1;
        run.pending = 1;
        self.stats.ops += 1;
        self.tags[tag.index()] = TagState::Running(run);
        self.stamp_issue(tag, port);
        port.submit_chain(self.next_turn(tag), slot, key, &op);
    }

    /// The answer to [`Port::register`], or word that the registration of a chain has failed.
    pub fn registered(&mut self, key: TagKey, res: i32, port: &mut impl Port) {
        if !self.is_current(key) {
            self.stats.stale += 1;
            return;
        }
        let tag = key.tag;
        if let Some(chain) = running(&mut self.tags, tag).and_then(|run| run.chain.as_mut()) {
            match Errno::from_result(res) {
                Err(errno) if chain.registration.is_none() => chain.registration = Some(errno),
                Ok(_) | Err(_) => self.stats.unexpected += 1,
            }
            return;
        }
        let state = &mut self.tags[tag.index()];
        let registering = state.take_if(|state| matches!(state, TagState::Registering { .. }));
        let Some(TagState::Registering { mut run, lease }) = registering else {
            self.stats.unexpected += 1;
            return;
        };
        match Errno::from_result(res) {
            Ok(_) => {
                self.stats.registered += 1;
                run.tries = 0;
                run.held = Held::Active(self.registry.activate(lease));
                self.start(tag, run, port);
            }
            Err(errno) => {
                self.registry.cancel(lease);
                self.registration_failed(tag, run, errno, port);
            }
        }
        self.serve_waiting(port);
    }

    fn registration_failed(&mut self, tag: Tag, mut run: Run, errno: Errno, port: &mut impl Port) {
        if is_transient(errno) && run.tries < MAX_RETRIES {
            self.stats.retries += 1;
            run.tries += 1;
            return self.lend_registered(tag, run, port);
        }
        self.stats.failed_registrations += 1;
        self.copy_instead(tag, run, errno, port);
    }

    /// Copies what could not be lent, where the device has user copy.
    fn copy_instead(&mut self, tag: Tag, run: Run, errno: Errno, port: &mut impl Port) {
        if self.config.slots.pool == 0 {
            return self.commit(tag, Err(errno), port);
        }
        self.stats.copied += 1;
        self.lend_copied(tag, run, port);
    }

    /// Goes on once operation and unregistration of a chain have both been answered.
    pub(super) fn end_chain(&mut self, tag: Tag, port: &mut impl Port) {
        let is_over = |state: &TagState| match state {
            TagState::Running(run) => run
                .chain
                .is_some_and(|chain| chain.operation.is_some() && chain.unregistration.is_some()),
            TagState::WithDriver
            | TagState::Waiting(_)
            | TagState::Registering { .. }
            | TagState::Unregistering { .. }
            | TagState::Ended => false,
        };
        let over = self.tags[tag.index()].take_if(is_over);
        let Some(TagState::Running(mut run)) = over else { return };
        let Some(chain) = run.chain.take() else { return };
        let Some((outcome, ended)) = chain.operation else { return };
        let lease = match self.retire(&mut run) {
            Ok(Some(lease)) => lease,
            Ok(None) | Err(StillInUse) => {
                self.tags[tag.index()] = TagState::Running(run);
                return;
            }
        };
        if let Some(errno) = chain.registration {
            // The slot was never filled, so what became of the other two says nothing, and the
            // operation is yet to be issued.
            run.next_op = 0;
            self.registry.release(lease);
            return self.registration_failed(tag, run, errno, port);
        }
        self.stats.registered += 1;
        let unregistered = Errno::from_result(chain.unregistration.unwrap_or(0));
        match unregistered {
            Ok(_) => self.registry.release(lease),
            // Alone it may succeed; unless there is a rest, which is better copied.
            Err(errno) if is_transient(errno) && outcome != Progress::Again => {
                if let Progress::Failed(errno) = outcome {
                    run.fail(errno);
                }
                self.stats.retries += 1;
                run.tries = 0;
                return self.unregister(tag, run, lease, port);
            }
            Err(_) => self.quarantine(tag, lease),
        }
        match outcome {
            Progress::Again => {
                run.tries = 0;
                run.replan(&mut self.plans[tag.index()], ended);
                match unregistered {
                    Ok(_) => self.lend_registered(tag, run, port),
                    // A tag has one slot in quarantine at most, so that slots do not run out.
                    Err(errno) => self.copy_instead(tag, run, errno, port),
                }
            }
            Progress::Done => self.answer(tag, run, port),
            Progress::Failed(errno) => {
                run.fail(errno);
                self.answer(tag, run, port);
            }
        }
    }

    /// Copies through a buffer of the pool, or waits for one. Whoever waits holds nothing, and
    /// whoever has a buffer needs nothing else, so the wait ends.
    fn lend_copied(&mut self, tag: Tag, mut run: Run, port: &mut impl Port) {
        run.way = Way::Copied;
        let owner = self.owner(tag);
        let lease = match self.config.lend {
            LendMode::UserCopy => self.registry.reserve(self.tag_slot(tag), owner, self.now).ok(),
            LendMode::Fused | LendMode::Slot | LendMode::Copy => self.reserve_pooled(tag),
        };
        match lease {
            Some(lease) => self.copy_in(tag, run, lease, port),
            None => {
                self.stats.waited += 1;
                self.waiting.push_back(tag);
                self.tags[tag.index()] = TagState::Waiting(run);
            }
        }
    }

    fn reserve_pooled(&mut self, tag: Tag) -> Option<Lease<Reserved>> {
        let owner = self.owner(tag);
        let mut pool = self.config.slots.lent..self.config.slots.capacity();
        pool.find_map(|slot| self.registry.reserve(SlotIndex(slot), owner, self.now).ok())
    }

    /// Goes on with requests that wait for a buffer of the pool, as long as there is one.
    pub(super) fn serve_waiting(&mut self, port: &mut impl Port) {
        while let Some(tag) = self.waiting.front().copied() {
            let Some(lease) = self.reserve_pooled(tag) else { return };
            self.waiting.pop_front();
            let state = &mut self.tags[tag.index()];
            match state.take_if(|state| matches!(state, TagState::Waiting(_))) {
                Some(TagState::Waiting(run)) => self.copy_in(tag, run, lease, port),
                _ => {
                    self.stats.unexpected += 1;
                    self.registry.cancel(lease);
                }
            }
        }
    }

    fn copy_in(&mut self, tag: Tag, mut run: Run, lease: Lease<Reserved>, port: &mut impl Port) {
        let copied = match run.request.kind {
            RequestKind::Write { .. } => {
                self.copy(tag, &run, lease.slot(), Direction::FromRequest, port)
            }
            RequestKind::Read
            | RequestKind::Flush
            | RequestKind::Discard
            | RequestKind::WriteZeroes { .. } => Ok(()),
        };
        match copied {
            Ok(()) => {
                run.held = Held::Active(self.registry.activate(lease));
                self.start(tag, run, port);
            }
            Err(errno) => {
                self.registry.cancel(lease);
                self.commit(tag, Err(errno), port);
            }
        }
    }

    /// Copies all bytes of the request that go this way.
    fn copy(
        &mut self,
        tag: Tag,
        run: &Run,
        slot: SlotIndex,
        direction: Direction,
        port: &mut impl Port,
    ) -> Result<(), Errno> {
        let to = u32::try_from(run.request.len).map_err(|_| Errno::EINVAL)?;
        let (mut from, mut tries) = (run.copied_from, 0);
        while from < to {
            match Errno::from_result(port.copy(tag, slot, direction, from, to)) {
                Ok(copied) if copied > 0 && copied <= to - from => from += copied,
                Ok(_) => return Err(Errno::EIO),
                Err(errno) if is_transient(errno) && tries < MAX_RETRIES => {
                    self.stats.retries += 1;
                    tries += 1;
                }
                Err(errno) => return Err(errno),
            }
        }
        Ok(())
    }

    /// Ends a request that has nothing in flight: gives its buffer back, then answers.
    pub(super) fn finish(&mut self, tag: Tag, port: &mut impl Port) {
        let running = self.tags[tag.index()].take_if(|state| matches!(state, TagState::Running(_)));
        let Some(TagState::Running(mut run)) = running else { return };
        if self.recorder.is_some() {
            run.stamps.done = port.now();
        }
        let lease = match self.retire(&mut run) {
            Ok(Some(lease)) => lease,
            Ok(None) => return self.answer(tag, run, port),
            Err(StillInUse) => {
                self.tags[tag.index()] = TagState::Running(run);
                return;
            }
        };
        match run.way {
            // The commit itself makes the driver take the buffer back.
            Way::Delivered => self.registry.release(lease),
            Way::Registered => {
                run.tries = 0;
                return self.unregister(tag, run, lease, port);
            }
            Way::Copied => {
                if run.request.kind == RequestKind::Read && !run.failed() {
                    let copied = self.copy(tag, &run, lease.slot(), Direction::ToRequest, port);
                    if let Err(errno) = copied {
                        run.fail(errno);
                    }
                }
                self.registry.release(lease);
            }
        }
        self.answer(tag, run, port);
    }

    fn unregister(&mut self, tag: Tag, run: Run, lease: Lease<Retiring>, port: &mut impl Port) {
        port.unregister(self.next_turn(tag), lease.slot());
        self.tags[tag.index()] = TagState::Unregistering { run, lease };
    }

    /// The answer to [`Port::unregister`], alone or at the end of a chain.
    pub fn unregistered(&mut self, key: TagKey, res: i32, port: &mut impl Port) {
        if !self.is_current(key) {
            self.stats.stale += 1;
            return;
        }
        let tag = key.tag;
        if let Some(chain) = running(&mut self.tags, tag).and_then(|run| run.chain.as_mut()) {
            if chain.unregistration.is_some() {
                self.stats.unexpected += 1;
                return;
            }
            chain.unregistration = Some(res);
            self.end_chain(tag, port);
            return self.serve_waiting(port);
        }
        let unregistering =
            self.tags[tag.index()].take_if(|state| matches!(state, TagState::Unregistering { .. }));
        let Some(TagState::Unregistering { mut run, lease }) = unregistering else {
            self.stats.unexpected += 1;
            return;
        };
        match Errno::from_result(res) {
            Ok(_) => self.registry.release(lease),
            Err(errno) if is_transient(errno) && run.tries < MAX_RETRIES => {
                self.stats.retries += 1;
                run.tries += 1;
                return self.unregister(tag, run, lease, port);
            }
            Err(_) => self.quarantine(tag, lease),
        }
        self.answer(tag, run, port);
    }

    fn answer(&mut self, tag: Tag, mut run: Run, port: &mut impl Port) {
        if let Some(recorder) = &mut self.recorder {
            let now = port.now();
            if run.stamps.done == 0 {
                run.stamps.done = now;
            }
            recorder.record(run.request.kind, run.stamps, now);
        }
        self.commit(tag, run.result(), port);
    }

    /// Ends the borrowing of what the request holds, if it holds something.
    fn retire(&mut self, run: &mut Run) -> Result<Option<Lease<Retiring>>, StillInUse> {
        let held = match std::mem::replace(&mut run.held, Held::Nothing) {
            Held::Nothing => return Ok(None),
            Held::Active(lease) => match self.registry.retire(lease) {
                Ok(lease) => return Ok(Some(lease)),
                Err(still) => Held::Active(still.lease),
            },
            Held::Quarantined(lease) => match self.registry.settle(lease) {
                Ok(lease) => return Ok(Some(lease)),
                Err(still) => Held::Quarantined(still.lease),
            },
        };
        // Unreachable while `pending` counts right: a borrowed buffer is never given back.
        self.stats.unexpected += 1;
        run.held = held;
        Err(StillInUse)
    }

    fn give_up(&mut self, lease: Lease<Active>) {
        match self.registry.retire(lease) {
            Ok(lease) => self.registry.release(lease),
            Err(still) => drop(self.registry.quarantine(still.lease)),
        }
    }

    /// The kernel may still have the buffer in the slot, and the driver keeps the request until
    /// it is gone; so the tag's next request proves that it is.
    fn quarantine(&mut self, tag: Tag, lease: Lease<Retiring>) {
        self.stats.failed_unregistrations += 1;
        self.quarantined[tag.index()] = Some(self.registry.quarantine(lease));
    }

    /// A request of the tag was delivered, so the driver has ended the one before.
    pub(super) fn settle_quarantine(&mut self, tag: Tag) {
        let Some(lease) = self.quarantined[tag.index()].take() else { return };
        match self.registry.settle(lease) {
            Ok(lease) => self.registry.release(lease),
            Err(unsettled) => self.quarantined[tag.index()] = Some(unsettled.lease),
        }
    }

    fn owner(&self, tag: Tag) -> Owner {
        let queue = &self.config.queue;
        Owner { device: queue.device, qid: queue.qid.0, tag: tag.0 }
    }
}

/// An operation still borrows the buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct StillInUse;

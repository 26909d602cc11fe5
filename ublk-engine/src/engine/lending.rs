//! How a request gets its buffer and gives it back, in all lend modes.

use bufreg::{Lease, Owner, Registry, Reserved, Retiring, SlotIndex};
use uring_ext::Errno;
use uring_ext::pool::Direction;

use super::tag::{BufferPath, Held, Phase, Run, TagState};
use super::{Engine, EngineStats, MAX_RETRIES, Port, SlotChoice, TagKey, is_transient};
use crate::lend::LendMode;
use crate::plan::Planner;
use crate::request::RequestKind;
use crate::units::Tag;

impl<P: Planner> Engine<P> {
    /// The slot in which the driver registers the tag's next buffer. In the copy modes: the slot of
    /// the tag's own buffer.
    pub(super) fn tag_slot(&self, tag: Tag) -> SlotIndex {
        match self.config.slots.choice {
            SlotChoice::From(first) => SlotIndex(first + tag.0),
            SlotChoice::AnyFree => SlotIndex(tag.0),
        }
    }

    /// Gets the request's buffer, depending on the lend mode. While the request is deferred, it has
    /// only a buffer that the driver has delivered.
    #[inline(always)]
    pub(super) fn lend(&mut self, tag: Tag, port: &mut impl Port) {
        let TagState { run, plan, .. } = &self.tags[tag.index()];
        let (need_reg_buf, waits) = (run.need_reg_buf, !plan.is_accepting());
        let is_delivered = match self.config.lend {
            LendMode::Fused => !need_reg_buf,
            LendMode::Copy => true,
            LendMode::Slot | LendMode::UserCopy => false,
        };
        if is_delivered && matches!(run.held, Held::Nothing) {
            return self.lend_delivered(tag, port);
        }
        // It has held the delivered buffer since it was first planned.
        if is_delivered || waits {
            return self.proceed(tag, port);
        }
        if self.config.lend == LendMode::UserCopy {
            return self.lend_copied(tag, port);
        }
        self.stats.need_reg_buf += u64::from(need_reg_buf);
        self.lend_registered(tag, port);
    }

    pub(super) fn run(&mut self, tag: Tag) -> &mut Run {
        &mut self.tags[tag.index()].run
    }

    fn lend_delivered(&mut self, tag: Tag, port: &mut impl Port) {
        let Ok(lease) = self.registry.reserve(self.tag_slot(tag), self.owner(tag), self.now) else {
            // The driver has filled a slot that is in use, so nothing may use it. The request is
            // answered with an error.
            self.stats.unexpected += 1;
            return self.commit(tag, Err(Errno::EIO), port);
        };
        let lease = self.registry.activate(lease);
        self.run(tag).held = Held::Active(lease);
        self.proceed(tag, port);
    }

    pub(super) fn lend_registered(&mut self, tag: Tag, port: &mut impl Port) {
        self.run(tag).buffer_path = BufferPath::Registered;
        let Some(lease) = self.reserve_for_registration(tag) else {
            // Only a quarantined slot can be the reason. Copying does not need the slot.
            return self.copy_instead(tag, Errno::EBUSY, port);
        };
        let single = self.tags[tag.index()].plan.single();
        match single.filter(|_| self.config.lend == LendMode::Slot) {
            Some(op) => self.submit_chain(tag, lease, op, port),
            None => {
                port.register(self.next_seq(tag), lease.slot());
                let state = &mut self.tags[tag.index()];
                state.run.held = Held::Reserved(lease);
                state.phase = Phase::Registering;
            }
        }
    }

    fn reserve_for_registration(&mut self, tag: Tag) -> Option<Lease<Reserved>> {
        let owner = self.owner(tag);
        match self.config.slots.choice {
            SlotChoice::From(_) => self.registry.reserve(self.tag_slot(tag), owner, self.now).ok(),
            SlotChoice::AnyFree => {
                // The lowest free slot is taken first, and the pool comes after the slots for lent
                // buffers.
                let lease = self.registry.reserve_any(owner, self.now).ok()?;
                if lease.slot().0 < self.config.slots.lent {
                    return Some(lease);
                }
                self.registry.cancel(lease);
                None
            }
        }
    }

    /// The completion of [`Port::register`], or of the failed registration of a chain.
    pub fn registered(&mut self, key: TagKey, res: i32, port: &mut impl Port) {
        if self.believes(key) {
            self.on_registered(key, res, port);
            self.serve_deferred(port);
        }
    }

    fn on_registered(&mut self, key: TagKey, res: i32, port: &mut impl Port) {
        let tag = key.tag;
        let state = &mut self.tags[tag.index()];
        if let Some(chain) = state.chain() {
            match Errno::from_result(res) {
                Err(errno) if chain.registration.is_none() => chain.registration = Some(errno),
                Ok(_) | Err(_) => self.stats.unexpected += 1,
            }
            return;
        }
        let lease = match state.run.held.take() {
            Held::Reserved(lease) => lease,
            held @ (Held::Nothing | Held::Active(_) | Held::Retiring(_) | Held::Quarantined(_)) => {
                state.run.held = held;
                self.stats.unexpected += 1;
                return;
            }
        };
        state.phase = Phase::Running;
        match Errno::from_result(res) {
            Ok(_) => {
                self.stats.registered += 1;
                state.run.tries = 0;
                state.run.held = Held::Active(self.registry.activate(lease));
                self.proceed(tag, port);
            }
            Err(errno) => {
                self.registry.cancel(lease);
                self.registration_failed(tag, errno, port);
            }
        }
    }

    pub(super) fn registration_failed(&mut self, tag: Tag, errno: Errno, port: &mut impl Port) {
        let run = self.run(tag);
        if is_transient(errno) && run.tries < MAX_RETRIES {
            run.tries += 1;
            self.stats.retries += 1;
            return self.lend_registered(tag, port);
        }
        self.stats.failed_registrations += 1;
        self.copy_instead(tag, errno, port);
    }

    /// Copies the data of a buffer that could not be lent, if the device has user copy.
    pub(super) fn copy_instead(&mut self, tag: Tag, errno: Errno, port: &mut impl Port) {
        if self.config.slots.pool == 0 {
            return self.commit(tag, Err(errno), port);
        }
        self.stats.copied += 1;
        self.lend_copied(tag, port);
    }

    /// Copies through a buffer of the pool, or waits for one. A waiting request holds nothing, and
    /// a request with a buffer needs nothing else, so every wait ends.
    fn lend_copied(&mut self, tag: Tag, port: &mut impl Port) {
        self.run(tag).buffer_path = BufferPath::Copied;
        let owner = self.owner(tag);
        let lease = match self.config.lend {
            LendMode::UserCopy => self.registry.reserve(self.tag_slot(tag), owner, self.now).ok(),
            LendMode::Fused | LendMode::Slot | LendMode::Copy => self.reserve_spare(tag, port),
        };
        match lease {
            Some(lease) => self.copy_in(tag, lease, port),
            None => {
                self.stats.waited += 1;
                self.waiting.push_back(tag);
                self.tags[tag.index()].phase = Phase::Waiting;
            }
        }
    }

    /// A buffer of the pool for a request that could not be lent, if the queue has one free and,
    /// where queues share it, it is this queue's turn.
    fn reserve_spare(&mut self, tag: Tag, port: &mut impl Port) -> Option<Lease<Reserved>> {
        let owner = self.owner(tag);
        let slots = &self.config.slots;
        let mut pool = slots.lent..slots.lent.saturating_add(slots.pool);
        let lease =
            pool.find_map(|slot| self.registry.reserve(SlotIndex(slot), owner, self.now).ok())?;
        if port.take_spare() {
            return Some(lease);
        }
        self.registry.cancel(lease);
        None
    }

    fn give_spare(&self, port: &mut impl Port) {
        match self.config.lend {
            LendMode::Fused | LendMode::Slot => port.give_spare(),
            // Each tag has a buffer of its own.
            LendMode::UserCopy | LendMode::Copy => {}
        }
    }

    /// It is this queue's turn to [take](Port::take_spare) the spare buffer.
    pub fn spare_returned(&mut self, port: &mut impl Port) {
        self.serve_waiting(port);
        self.serve_deferred(port);
    }

    /// Continues requests that wait for a buffer of the pool, while there is a free one.
    #[inline]
    pub(super) fn serve_waiting(&mut self, port: &mut impl Port) {
        while let Some(tag) = self.waiting.front().copied() {
            let Some(lease) = self.reserve_spare(tag, port) else { return };
            self.waiting.pop_front();
            self.tags[tag.index()].phase = Phase::Running;
            self.copy_in(tag, lease, port);
        }
    }

    fn copy_in(&mut self, tag: Tag, lease: Lease<Reserved>, port: &mut impl Port) {
        let copied = match self.run(tag).request().kind {
            RequestKind::Write { .. } => self.copy(tag, lease.slot(), Direction::FromRequest, port),
            RequestKind::Read
            | RequestKind::Flush
            | RequestKind::Discard
            | RequestKind::WriteZeroes { .. } => Ok(()),
        };
        match copied {
            Ok(()) => {
                let lease = self.registry.activate(lease);
                self.run(tag).held = Held::Active(lease);
                self.proceed(tag, port);
            }
            Err(errno) => {
                self.registry.cancel(lease);
                self.give_spare(port);
                self.commit(tag, Err(errno), port);
            }
        }
    }

    /// Copies all bytes of the request that are not moved otherwise.
    fn copy(
        &mut self,
        tag: Tag,
        slot: SlotIndex,
        direction: Direction,
        port: &mut impl Port,
    ) -> Result<(), Errno> {
        let run = self.run(tag);
        let to = u32::try_from(run.request().len).map_err(|_| Errno::EINVAL)?;
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

    /// Ends a request without operations in flight: gives its buffer back, then answers.
    pub(super) fn finish(&mut self, tag: Tag, port: &mut impl Port) {
        if self.recorder.is_some() {
            self.run(tag).stamps.done = port.now();
        }
        if !matches!(self.run(tag).scratch, Held::Nothing) && self.drop_scratch(tag).is_err() {
            return;
        }
        let lease = match self.retire_held(tag) {
            Ok(Some(lease)) => lease,
            Ok(None) => return self.answer(tag, port),
            Err(StillInUse) => return,
        };
        let run = &mut self.tags[tag.index()].run;
        match run.buffer_path {
            // The driver takes the buffer back at the commit.
            BufferPath::Delivered => self.registry.release(lease),
            BufferPath::Registered => {
                run.tries = 0;
                return self.unregister(tag, lease, port);
            }
            BufferPath::Copied => {
                if run.request().kind == RequestKind::Read && !run.failed() {
                    let copied = self.copy(tag, lease.slot(), Direction::ToRequest, port);
                    if let Err(errno) = copied {
                        self.run(tag).fail(errno);
                    }
                }
                self.registry.release(lease);
                self.give_spare(port);
            }
        }
        self.answer(tag, port);
    }

    pub(super) fn unregister(&mut self, tag: Tag, lease: Lease<Retiring>, port: &mut impl Port) {
        port.unregister(self.next_seq(tag), lease.slot());
        let state = &mut self.tags[tag.index()];
        state.run.held = Held::Retiring(lease);
        state.phase = Phase::Unregistering;
    }

    /// The completion of [`Port::unregister`], or of the unregistration of a chain.
    pub fn unregistered(&mut self, key: TagKey, res: i32, port: &mut impl Port) {
        if self.believes(key) {
            self.on_unregistered(key, res, port);
            self.serve_deferred(port);
        }
    }

    fn on_unregistered(&mut self, key: TagKey, res: i32, port: &mut impl Port) {
        let tag = key.tag;
        let state = &mut self.tags[tag.index()];
        if let Some(chain) = state.chain() {
            if chain.unregistration.is_some() {
                self.stats.unexpected += 1;
                return;
            }
            chain.unregistration = Some(res);
            return self.end_chain(tag, port);
        }
        let lease = match state.run.held.take() {
            Held::Retiring(lease) => lease,
            held @ (Held::Nothing | Held::Active(_) | Held::Reserved(_) | Held::Quarantined(_)) => {
                state.run.held = held;
                self.stats.unexpected += 1;
                return;
            }
        };
        match Errno::from_result(res) {
            Ok(_) => self.registry.release(lease),
            Err(errno) if is_transient(errno) && state.run.tries < MAX_RETRIES => {
                state.run.tries += 1;
                self.stats.retries += 1;
                return self.unregister(tag, lease, port);
            }
            Err(_) => self.quarantine(tag, lease),
        }
        self.answer(tag, port);
    }

    pub(super) fn answer(&mut self, tag: Tag, port: &mut impl Port) {
        let run = &mut self.tags[tag.index()].run;
        if let Some(recorder) = &mut self.recorder {
            let now = port.now();
            if run.stamps.done == 0 {
                run.stamps.done = now;
            }
            recorder.record(run.request().kind, run.stamps, now);
        }
        let result = run.result();
        self.commit(tag, result, port);
    }

    /// Retires the lease of the request's slot, if it has one.
    #[inline]
    pub(super) fn retire_held(&mut self, tag: Tag) -> Result<Option<Lease<Retiring>>, StillInUse> {
        let held = &mut self.tags[tag.index()].run.held;
        retire(&mut self.registry, &mut self.stats, held)
    }

    /// The kernel may still have the buffer in the slot, and the driver keeps the request until it
    /// is removed. So the tag's next request proves that it was removed.
    pub(super) fn quarantine(&mut self, tag: Tag, lease: Lease<Retiring>) {
        self.stats.failed_unregistrations += 1;
        self.tags[tag.index()].quarantined = Some(self.registry.quarantine(lease));
    }

    /// Ends the quarantine of a tag's slot: its next request was delivered, so the driver has ended
    /// the previous one.
    #[inline]
    pub(super) fn settle_quarantine(&mut self, tag: Tag) {
        let state = &mut self.tags[tag.index()];
        let Some(lease) = state.quarantined.take() else { return };
        match self.registry.settle(lease) {
            Ok(lease) => self.registry.release(lease),
            Err(unsettled) => state.quarantined = Some(unsettled.lease),
        }
    }

    pub(super) fn owner(&self, tag: Tag) -> Owner {
        let queue = &self.config.queue;
        Owner { device: queue.device, qid: queue.qid.0, tag: tag.0 }
    }
}

/// Retires the lease that is held, if there is one.
#[inline]
pub(super) fn retire(
    registry: &mut Registry,
    stats: &mut EngineStats,
    held: &mut Held,
) -> Result<Option<Lease<Retiring>>, StillInUse> {
    *held = match held.take() {
        Held::Nothing => return Ok(None),
        Held::Active(lease) => match registry.retire(lease) {
            Ok(lease) => return Ok(Some(lease)),
            Err(still) => Held::Active(still.lease),
        },
        Held::Quarantined(lease) => match registry.settle(lease) {
            Ok(lease) => return Ok(Some(lease)),
            Err(still) => Held::Quarantined(still.lease),
        },
        held @ (Held::Reserved(_) | Held::Retiring(_)) => held,
    };
    // Unreachable if `pending` is right: a borrowed buffer is never given back.
    stats.unexpected += 1;
    Err(StillInUse)
}

/// An operation still borrows the buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct StillInUse;

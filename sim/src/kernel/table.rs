//! The ring's buffer table, and the references to a request's buffer.

use uring_ext::Errno;

use super::{Kernel, Phase};
use crate::draw::Draw as _;
use crate::fault::Fault;

/// The contents of a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Buffer {
    /// The buffer of a tag's request.
    Lent {
        /// The tag.
        tag: u16,
    },
    /// A buffer of the server.
    Pool {
        /// Its index in the pool.
        index: u16,
    },
}

impl Kernel {
    /// Clears the table, except for the buffers of the pool.
    pub(super) fn fill_table(&mut self) {
        let lent = self.setup.slots.lent;
        for slot in 0..self.table.len() {
            let pooled = u16::try_from(slot).unwrap_or(u16::MAX).checked_sub(lent);
            let buffer = pooled.map(|index| Buffer::Pool { index });
            if let Some(Buffer::Lent { tag }) = std::mem::replace(&mut self.table[slot], buffer) {
                self.put(tag);
            }
        }
    }

    /// Whether a slot has a scratch buffer.
    #[must_use]
    pub fn is_scratch(&self, slot: u16) -> bool {
        let slots = &self.setup.slots;
        (slots.lent + slots.pool..slots.capacity()).contains(&slot)
    }

    /// Puts the buffer of a tag's request into a slot.
    pub(super) fn insert(&mut self, tag: u16, slot: u16) -> Result<(), Errno> {
        match self.table.get_mut(usize::from(slot)) {
            None => Err(Errno::EINVAL),
            Some(Some(_)) => Err(Errno::EBUSY),
            Some(free) => {
                *free = Some(Buffer::Lent { tag });
                self.tags[usize::from(tag)].refs += 1;
                Ok(())
            }
        }
    }

    /// Removes a lent buffer from a slot. Returns its tag.
    pub(super) fn remove(&mut self, slot: u16) -> Option<u16> {
        let place = self.table.get_mut(usize::from(slot))?;
        let Some(Buffer::Lent { tag }) = *place else { return None };
        *place = None;
        self.put(tag);
        Some(tag)
    }

    /// `UBLK_U_IO_REGISTER_IO_BUF`.
    pub(super) fn register(&mut self, tag: u16, slot: u16) -> i32 {
        let model = &self.tags[usize::from(tag)];
        assert_eq!(model.phase, Phase::Serving, "registration without a request");
        assert!(model.has_data(), "registration of a request without data");
        let storm = model.faults_met.storm_register;
        let beyond = usize::from(slot) >= self.table.len();
        let fault = if storm {
            self.tally.note(Fault::RegisterStorm);
            Some(Errno::EAGAIN)
        } else if self.strikes(Fault::RegisterNoMem) {
            Some(self.rng.pick(&[Errno::ENOMEM, Errno::EAGAIN]))
        } else if self.strikes(Fault::RegisterBusy) {
            Some(Errno::EBUSY)
        } else if self.strikes(Fault::RegisterInvalid) {
            Some(Errno::EINVAL)
        } else if beyond {
            assert_eq!(self.setup.port_faults, Some("register"), "slot {slot} is beyond");
            Some(Errno::EINVAL)
        } else {
            None
        };
        let last_resort = self.setup.slots.pool > 0;
        let faults_met = &mut self.tags[usize::from(tag)].faults_met;
        if let Some(errno) = fault {
            faults_met.failed_registration(errno, last_resort);
            return errno.negated();
        }
        faults_met.registrations_in_a_row = 0;
        let inserted = self.insert(tag, slot);
        assert_eq!(inserted, Ok(()), "registration in slot {slot}");
        0
    }

    /// `UBLK_U_IO_UNREGISTER_IO_BUF`. `expect_empty`: its registration has failed.
    pub(super) fn unregister(&mut self, tag: u16, slot: u16, expect_empty: bool) -> i32 {
        let found = self.table.get(usize::from(slot)).copied().flatten();
        if found.is_none() && expect_empty {
            return Errno::EINVAL.negated();
        }
        assert_eq!(found, Some(Buffer::Lent { tag }), "unregistration of slot {slot}");
        let (failure, stays) = self.unregistration_failure(tag);
        if !stays {
            self.remove(slot);
        }
        let last_resort = self.setup.slots.pool > 0;
        let faults_met = &mut self.tags[usize::from(tag)].faults_met;
        let Some(errno) = failure else {
            faults_met.unregistrations_in_a_row = 0;
            faults_met.may_pass = false;
            faults_met.stuck &= !(1 << slot);
            return 0;
        };
        faults_met.stuck |= 1 << slot;
        faults_met.failed_unregistration(errno, last_resort);
        errno.negated()
    }

    /// The error of an unregistration, if it fails, and whether the buffer stays in its slot.
    fn unregistration_failure(&mut self, tag: u16) -> (Option<Errno>, bool) {
        if self.tags[usize::from(tag)].faults_met.storm_unregister {
            self.tally.note(Fault::UnregisterStorm);
            (Some(Errno::EAGAIN), true)
        } else if self.strikes(Fault::UnregisterAgain) {
            (Some(self.rng.pick(&[Errno::EAGAIN, Errno::ENOMEM, Errno::EINTR])), true)
        } else if self.strikes(Fault::UnregisterStuck) {
            (Some(self.rng.pick(&[Errno::EBUSY, Errno::EIO])), true)
        } else if self.strikes(Fault::UnregisterLies) {
            (Some(self.rng.pick(&[Errno::EINVAL, Errno::EIO])), false)
        } else {
            (None, false)
        }
    }

    /// Removes a buffer that the engine failed to remove from its slot.
    pub fn free_stuck_slot(&mut self) {
        let stuck = |buffer: &Option<Buffer>| match buffer {
            Some(Buffer::Lent { tag }) => {
                let model = &self.tags[usize::from(*tag)];
                model.phase == Phase::Committed && model.faults_met.stuck != 0
            }
            Some(Buffer::Pool { .. }) | None => false,
        };
        if let Some(slot) = self.table.iter().position(stuck) {
            self.remove(u16::try_from(slot).unwrap_or(u16::MAX));
        }
    }
}

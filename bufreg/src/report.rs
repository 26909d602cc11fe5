//! State and statistics of the registry.

use std::fmt;

use crate::identity::{Borrower, Generation, Owner, SlotIndex};
use crate::lease::MAX_BORROWS;

/// The state of a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SlotState {
    /// Not lent.
    Free,
    /// The request's buffer is being registered in it.
    Reserved,
    /// The request's buffer is in it, and operations may borrow it.
    Active,
    /// The buffer is being given back.
    Retiring,
    /// It is unknown whether the kernel still uses the buffer.
    Quarantined,
}

impl fmt::Display for SlotState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Free => "free",
            Self::Reserved => "reserved",
            Self::Active => "active",
            Self::Retiring => "retiring",
            Self::Quarantined => "quarantined",
        })
    }
}

/// A lent slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lent {
    /// The slot.
    pub slot: SlotIndex,
    /// Which lending of the slot this is.
    pub generation: Generation,
    /// The request that it is lent for.
    pub owner: Owner,
    /// When it was reserved, in the caller's unit of time.
    pub since: u64,
    /// Its state; never [`SlotState::Free`].
    pub state: SlotState,
    /// How many operations borrow it.
    pub borrows: u32,
}

impl fmt::Display for Lent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Owner { device, qid, tag } = self.owner;
        write!(f, "slot {} ({}) is lent for ", self.slot.0, self.state)?;
        write!(f, "device {device}, qid {qid}, tag {tag}")
    }
}

/// A lent slot with a lost lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leak {
    /// The slot and the request that it is lent for.
    pub lent: Lent,
    /// How long it has been lent, in the caller's unit of time. 0 if it was lent after `now`.
    pub age: u64,
    /// The operations that borrow it.
    pub borrowers: Borrowers,
}

impl fmt::Display for Leak {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}; its lease is lost; age {} (in the caller's unit)", self.lent, self.age)?;
        for (number, borrower) in self.borrowers.as_slice().iter().enumerate() {
            write!(f, "{} {borrower}", if number == 0 { "; borrowed by" } else { "," })?;
        }
        Ok(())
    }
}

/// The borrowers of one slot, in order of their index. Does not allocate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Borrowers {
    labels: [Borrower; MAX_BORROWS as usize],
    count: usize,
}

impl Borrowers {
    pub(crate) fn gather(borrowers: impl Iterator<Item = Borrower>) -> Self {
        let mut gathered = Self { labels: [Borrower(0); MAX_BORROWS as usize], count: 0 };
        for (label, borrower) in gathered.labels.iter_mut().zip(borrowers) {
            *label = borrower;
            gathered.count += 1;
        }
        gathered
    }

    /// The borrowers.
    #[must_use]
    pub fn as_slice(&self) -> &[Borrower] {
        &self.labels[..self.count]
    }
}

/// How many slots are in each state. `free`, `reserved`, `active`, `retiring` and `quarantined` add
/// up to `capacity`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// All slots.
    pub capacity: u32,
    /// Slots that are not lent.
    pub free: u32,
    /// Slots in which a buffer is being registered.
    pub reserved: u32,
    /// Slots that may be borrowed.
    pub active: u32,
    /// Slots with at least one borrow, active or quarantined.
    pub borrowed: u32,
    /// Borrows of all slots that are not given back.
    pub borrows: u32,
    /// Slots whose buffer is being given back.
    pub retiring: u32,
    /// Slots in quarantine.
    pub quarantined: u32,
}

impl Counts {
    /// Counts one more slot.
    pub(crate) const fn add(&mut self, state: SlotState, borrows: u32) {
        self.capacity += 1;
        match state {
            SlotState::Free => self.free += 1,
            SlotState::Reserved => self.reserved += 1,
            SlotState::Active => self.active += 1,
            SlotState::Retiring => self.retiring += 1,
            SlotState::Quarantined => self.quarantined += 1,
        }
        if borrows > 0 {
            self.borrowed += 1;
        }
        self.borrows += borrows;
    }
}

/// Counters since construction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Leases given out.
    pub reserved: u64,
    /// Leases that ended, by release or by cancellation.
    pub released: u64,
    /// Borrows given out.
    pub borrowed: u64,
    /// Borrows given back.
    pub given_back: u64,
    /// Leases put into quarantine.
    pub quarantined: u64,
    /// Leases that came out of quarantine.
    pub settled: u64,
    /// Borrows that were stale when given back or relabelled.
    pub stale: u64,
}

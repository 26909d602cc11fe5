//! Leases, typed by state, and borrows, which are plain data.

use std::marker::PhantomData;

use crate::identity::{Generation, Incarnation, LeaseKey, SlotIndex};
use crate::report::SlotState;

/// State of a lease while its buffer is being registered.
#[derive(Debug)]
pub enum Reserved {}
/// State of a lease with exactly one borrow, which the lease itself represents. No other operation
/// may borrow it.
#[derive(Debug)]
pub enum Sole {}
/// State of a lease that operations may borrow.
#[derive(Debug)]
pub enum Active {}
/// State of a lease while its buffer is being given back.
#[derive(Debug)]
pub enum Retiring {}
/// State of a lease while it is unknown whether the kernel still uses its buffer.
#[derive(Debug)]
pub enum Quarantined {}

/// Maps a lease's type parameter to the state of its slot. Not exported, so that no other states
/// exist.
pub trait LeaseState {
    /// The slot's state.
    const SLOT: SlotState;
}

impl LeaseState for Reserved {
    const SLOT: SlotState = SlotState::Reserved;
}
impl LeaseState for Sole {
    const SLOT: SlotState = SlotState::Active;
}
impl LeaseState for Active {
    const SLOT: SlotState = SlotState::Active;
}
impl LeaseState for Retiring {
    const SLOT: SlotState = SlotState::Retiring;
}
impl LeaseState for Quarantined {
    const SLOT: SlotState = SlotState::Quarantined;
}

/// The states from which a lease can be quarantined: [`Active`] and [`Retiring`]. Sealed.
pub trait Quarantinable: LeaseState {}

impl Quarantinable for Active {}
impl Quarantinable for Retiring {}

/// The right to use a slot while its request is open. Each lent slot has one lease. Losing the
/// lease does not free the slot.
#[derive(Debug)]
#[must_use = "a lost lease keeps its slot for ever"]
pub struct Lease<State> {
    key: LeaseKey,
    state: PhantomData<State>,
}

impl<State> Lease<State> {
    /// Only the registry makes leases, and only when it reserves a slot.
    pub(crate) const fn new(key: LeaseKey) -> Self {
        Self { key, state: PhantomData }
    }

    /// The slot.
    #[must_use]
    pub const fn slot(&self) -> SlotIndex {
        self.key.slot
    }

    /// Which lending of the slot this is.
    #[must_use]
    pub const fn generation(&self) -> Generation {
        self.key.generation
    }

    /// The lease's identifier, for tables and for [`Registry::leaks`](crate::Registry::leaks).
    #[must_use]
    pub const fn key(&self) -> LeaseKey {
        self.key
    }

    pub(crate) fn into_state<Next>(self) -> Lease<Next> {
        Lease::new(self.key)
    }
}

/// One operation's use of a lease. Plain data, since it passes through the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Borrow {
    pub(crate) incarnation: Incarnation,
    pub(crate) generation: Generation,
    /// How many borrows of the lease came before. Indices are reused, so this distinguishes the
    /// borrow from later ones with the same index.
    pub(crate) sequence: u32,
    pub(crate) slot: SlotIndex,
    pub(crate) index: BorrowIndex,
}

impl Borrow {
    /// The slot.
    #[must_use]
    pub const fn slot(&self) -> SlotIndex {
        self.slot
    }
}

/// How many operations may borrow one lease at a time.
pub const MAX_BORROWS: u32 = u16::BITS;

/// An index below [`MAX_BORROWS`] among the borrows of a slot, as its bit in [`BorrowSet`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct BorrowIndex(u16);

impl BorrowIndex {
    /// The lowest index.
    pub(crate) const FIRST: Self = Self(1);

    pub(crate) const fn position(self) -> usize {
        self.0.trailing_zeros() as usize
    }
}

/// The borrows of a slot that are not given back, by index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BorrowSet(u16);

impl BorrowSet {
    pub(crate) const NONE: Self = Self(0);
    /// The first index only.
    pub(crate) const FIRST: Self = Self(BorrowIndex::FIRST.0);

    /// The lowest unused index. Records with low indices share a cache line.
    pub(crate) const fn lowest_free(self) -> Option<BorrowIndex> {
        let lowest = !self.0 & self.0.wrapping_add(1);
        if lowest == 0 { None } else { Some(BorrowIndex(lowest)) }
    }

    pub(crate) const fn insert(&mut self, index: BorrowIndex) {
        self.0 |= index.0;
    }

    pub(crate) const fn remove(&mut self, index: BorrowIndex) {
        self.0 &= !index.0;
    }

    pub(crate) const fn contains(self, index: BorrowIndex) -> bool {
        self.0 & index.0 != 0
    }

    pub(crate) const fn count(self) -> u32 {
        self.0.count_ones()
    }

    /// In ascending order.
    pub(crate) fn iter(self) -> impl Iterator<Item = BorrowIndex> {
        (0..MAX_BORROWS)
            .map(|index| BorrowIndex(1 << index))
            .filter(move |index| self.contains(*index))
    }
}

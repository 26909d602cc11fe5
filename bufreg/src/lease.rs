//! What callers hold: leases, typed by state, and borrows, plain data.

use std::marker::PhantomData;

use crate::identity::{Generation, Incarnation, LeaseKey, SlotIndex};
use crate::report::SlotState;

/// State of a lease whose registration is under way.
#[derive(Debug)]
pub enum Reserved {}
/// State of a lease whose buffer one operation borrows, and no other may: the lease stands for
/// that borrow too.
#[derive(Debug)]
pub enum Sole {}
/// State of a lease whose buffer may be borrowed.
#[derive(Debug)]
pub enum Active {}
/// State of a lease whose buffer is on its way back.
#[derive(Debug)]
pub enum Retiring {}
/// State of a lease of which nobody knows whether the kernel still uses the buffer.
#[derive(Debug)]
pub enum Quarantined {}

/// What the slot's state is while its lease has a given type. Not exported, so that the states are
/// these.
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

/// The right to a slot while its request is open. One lease exists per lent slot; losing it does
/// not free the slot.
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

    /// The lease's name, for tables and for [`Registry::leaks`](crate::Registry::leaks).
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
    /// How many borrows the lease had had before. Places are used again; this tells the borrow
    /// from the later ones of its place.
    pub(crate) turn: u32,
    pub(crate) slot: SlotIndex,
    pub(crate) place: Place,
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

/// One of a slot's [`MAX_BORROWS`] places, as its bit in [`Places`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Place(u16);

impl Place {
    /// The lowest.
    pub(crate) const FIRST: Self = Self(1);

    pub(crate) const fn index(self) -> usize {
        self.0.trailing_zeros() as usize
    }
}

/// The places of a slot whose borrows are out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Places(u16);

impl Places {
    pub(crate) const NONE: Self = Self(0);
    /// The first place, and no other.
    pub(crate) const FIRST: Self = Self(Place::FIRST.0);

    /// The lowest place that is not taken; the low ones share a cache line.
    pub(crate) const fn vacant(self) -> Option<Place> {
        let lowest = !self.0 & self.0.wrapping_add(1);
        if lowest == 0 { None } else { Some(Place(lowest)) }
    }

    pub(crate) const fn take(&mut self, place: Place) {
        self.0 |= place.0;
    }

    pub(crate) const fn vacate(&mut self, place: Place) {
        self.0 &= !place.0;
    }

    pub(crate) const fn holds(self, place: Place) -> bool {
        self.0 & place.0 != 0
    }

    pub(crate) const fn count(self) -> u32 {
        self.0.count_ones()
    }

    /// In order of their index.
    pub(crate) fn iter(self) -> impl Iterator<Item = Place> {
        (0..MAX_BORROWS).map(|index| Place(1 << index)).filter(move |place| self.holds(*place))
    }
}

//! The registry itself.

use std::marker::PhantomData;

/// An index into a ring's buffer table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SlotIndex(pub u16);

/// How often a slot had been reserved before; wraps after 2^32 times.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Generation(pub u32);

/// The request that a slot is lent for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Owner {
    /// Device id.
    pub device: u32,
    /// Queue of the device.
    pub qid: u16,
    /// Tag in the queue.
    pub tag: u16,
}

/// State of a lease whose registration is under way.
#[derive(Debug)]
pub enum Reserved {}
/// State of a lease whose buffer may be borrowed.
#[derive(Debug)]
pub enum Active {}
/// State of a lease whose buffer is on its way back.
#[derive(Debug)]
pub enum Retiring {}

/// The right to a slot while its request is open. One lease exists per lent slot; losing it does
/// not free the slot.
#[derive(Debug)]
#[must_use = "a lost lease keeps its slot for ever"]
pub struct Lease<State> {
    slot: SlotIndex,
    generation: Generation,
    state: PhantomData<State>,
}

impl<State> Lease<State> {
    /// The slot.
    #[must_use]
    pub const fn slot(&self) -> SlotIndex {
        self.slot
    }

    /// Which lending of the slot this is.
    #[must_use]
    pub const fn generation(&self) -> Generation {
        self.generation
    }

    fn into_state<Next>(self) -> Lease<Next> {
        Lease { slot: self.slot, generation: self.generation, state: PhantomData }
    }
}

/// One operation's use of a lease. Plain data, since it passes through the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Borrow {
    slot: SlotIndex,
    generation: Generation,
    /// Which of the slot's [`MAX_BORROWS`] places it takes.
    place: u8,
}

impl Borrow {
    /// The slot.
    #[must_use]
    pub const fn slot(&self) -> SlotIndex {
        self.slot
    }
}

/// The slot cannot be reserved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Busy {
    /// It is lent.
    #[error("slot {} is lent to tag {}", .0.slot.0, .0.owner.tag)]
    Lent(Lent),
    /// The registry has no such slot.
    #[error("slot {} is beyond the table", .0.0)]
    Beyond(SlotIndex),
}

/// How many operations may borrow one lease at a time.
pub const MAX_BORROWS: u32 = u64::BITS;

/// The lease has [`MAX_BORROWS`] borrows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{MAX_BORROWS} operations borrow the lease, which is the limit")]
pub struct NotBorrowable;

/// A key of an earlier life of its slot, or one that was given back before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("stale borrow")]
pub struct Stale;

/// The lease cannot be retired yet; it comes back.
#[derive(Debug, thiserror::Error)]
#[error("{borrows} operations still borrow slot {}", lease.slot.0)]
pub struct StillBorrowed {
    /// The lease, unchanged.
    pub lease: Lease<Active>,
    /// How many operations borrow it.
    pub borrows: u32,
}

/// What is known about a lent slot.
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
    /// How many operations borrow it.
    pub borrows: u32,
}

/// Counters since construction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Leases given out.
    pub reserved: u64,
    /// Leases that ended.
    pub released: u64,
    /// Borrows given out.
    pub borrowed: u64,
    /// Borrows that came back stale.
    pub stale: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Free,
    Reserved,
    Active,
    Retiring,
}

#[derive(Clone, Copy, Debug)]
struct Slot {
    state: State,
    /// One bit a place, set while its borrow is out.
    out: u64,
    /// The place after the one given out last. Places rotate, so that a borrow given back twice
    /// does not meet the next one in its place.
    next_place: u8,
    generation: Generation,
    owner: Owner,
    since: u64,
}

/// The slots of one ring's buffer table.
#[derive(Debug)]
pub struct Registry {
    slots: Box<[Slot]>,
    stats: Stats,
}

impl Registry {
    /// A registry of `capacity` free slots, numbered from 0.
    #[must_use]
    pub fn new(capacity: u16) -> Self {
        let free = Slot {
            state: State::Free,
            out: 0,
            next_place: 0,
            generation: Generation(0),
            owner: Owner { device: 0, qid: 0, tag: 0 },
            since: 0,
        };
        Self { slots: vec![free; usize::from(capacity)].into(), stats: Stats::default() }
    }

    /// Reserves a slot for a request, before its buffer is registered. `now` is kept as the time
    /// of lending.
    ///
    /// # Errors
    /// [`Busy`] if the slot is lent or beyond the table.
    pub fn reserve(
        &mut self,
        slot: SlotIndex,
        owner: Owner,
        now: u64,
    ) -> Result<Lease<Reserved>, Busy> {
        let entry = self.slots.get_mut(usize::from(slot.0)).ok_or(Busy::Beyond(slot))?;
        if entry.state != State::Free {
            return Err(Busy::Lent(entry.describe(slot)));
        }
        entry.state = State::Reserved;
        entry.generation = Generation(entry.generation.0.wrapping_add(1));
        entry.owner = owner;
        entry.since = now;
        self.stats.reserved += 1;
        Ok(Lease { slot, generation: entry.generation, state: PhantomData })
    }

    /// The buffer is registered: it may be borrowed.
    pub fn activate(&mut self, lease: Lease<Reserved>) -> Lease<Active> {
        self.held(&lease, State::Reserved).state = State::Active;
        lease.into_state()
    }

    /// The registration failed: the slot is free again.
    pub fn cancel(&mut self, lease: Lease<Reserved>) {
        self.held(&lease, State::Reserved).state = State::Free;
        self.stats.released += 1;
    }

    /// Counts one more operation that uses the buffer.
    ///
    /// # Errors
    /// [`NotBorrowable`] at [`MAX_BORROWS`] borrows.
    pub fn borrow(&mut self, lease: &Lease<Active>) -> Result<Borrow, NotBorrowable> {
        let entry = self.held(lease, State::Active);
        let free = (!entry.out).rotate_right(u32::from(entry.next_place)).trailing_zeros();
        if free == MAX_BORROWS {
            return Err(NotBorrowable);
        }
        let place = (entry.next_place + u8::try_from(free).unwrap_or(0)) % 64;
        entry.out |= 1 << place;
        entry.next_place = (place + 1) % 64;
        self.stats.borrowed += 1;
        Ok(Borrow { slot: lease.slot, generation: lease.generation, place })
    }

    /// An operation has completed; returns how many still borrow the buffer.
    ///
    /// # Errors
    /// [`Stale`] if the slot has had another lease since, or the borrow was given back before.
    /// Nothing changes then but the counter.
    pub fn give_back(&mut self, borrow: Borrow) -> Result<u32, Stale> {
        let entry = self.slots.get_mut(usize::from(borrow.slot.0));
        let live = entry.filter(|entry| {
            entry.state == State::Active
                && entry.generation == borrow.generation
                && entry.out & (1 << borrow.place) != 0
        });
        if let Some(entry) = live {
            entry.out &= !(1 << borrow.place);
            return Ok(entry.out.count_ones());
        }
        self.stats.stale += 1;
        Err(Stale)
    }

    /// Ends the borrowing: the buffer is about to be given back.
    ///
    /// # Errors
    /// [`StillBorrowed`] with the lease, as long as an operation borrows it.
    pub fn retire(&mut self, lease: Lease<Active>) -> Result<Lease<Retiring>, StillBorrowed> {
        let entry = self.held(&lease, State::Active);
        if entry.out != 0 {
            let borrows = entry.out.count_ones();
            return Err(StillBorrowed { lease, borrows });
        }
        entry.state = State::Retiring;
        Ok(lease.into_state())
    }

    /// The buffer is back with the driver: the slot is free.
    pub fn release(&mut self, lease: Lease<Retiring>) {
        self.held(&lease, State::Retiring).state = State::Free;
        self.stats.released += 1;
    }

    /// All lent slots, in order of their index. After a drain there must be none; what is left is
    /// a leak.
    pub fn lent(&self) -> impl Iterator<Item = Lent> + '_ {
        let indexed = (0_u16..).zip(self.slots.iter());
        indexed
            .filter(|(_, entry)| entry.state != State::Free)
            .map(|(index, entry)| entry.describe(SlotIndex(index)))
    }

    /// The number of slots.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.slots.len()
    }

    /// Counters since construction.
    #[must_use]
    pub const fn stats(&self) -> Stats {
        self.stats
    }

    /// The entry of a lease. A lease is made by `reserve` alone, is not copied, and every
    /// transition consumes it, so entry and lease can only disagree if the lease is of another
    /// registry: a bug that must not go on.
    fn held<S>(&mut self, lease: &Lease<S>, state: State) -> &mut Slot {
        let entry = &mut self.slots[usize::from(lease.slot.0)];
        assert!(
            entry.state == state && entry.generation == lease.generation,
            "lease of slot {} does not belong to this registry",
            lease.slot.0
        );
        entry
    }
}

impl Slot {
    const fn describe(&self, slot: SlotIndex) -> Lent {
        Lent {
            slot,
            generation: self.generation,
            owner: self.owner,
            since: self.since,
            borrows: self.out.count_ones(),
        }
    }
}

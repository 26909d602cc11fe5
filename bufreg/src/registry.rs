//! The registry itself: every transition of every slot.

use crate::error::{Busy, NoneFree, NotBorrowable, Stale, StillBorrowed, Unsettled};
use crate::free::FreeSlots;
use crate::identity::{Borrower, Generation, Incarnation, LeaseKey, Owner, SlotIndex};
use crate::lease::{
    Active, Borrow, Lease, LeaseState, MAX_BORROWS, Place, Places, Quarantinable, Quarantined,
    Reserved, Retiring, Sole,
};
use crate::report::{Borrowers, Counts, Leak, Lent, SlotState, Stats};

/// What every request touches, half a cache line.
#[derive(Clone, Copy, Debug)]
struct Slot {
    state: SlotState,
    /// Not empty only in the states `Active` and `Quarantined`.
    out: Places,
    generation: Generation,
    /// How many borrows the present lease has had.
    turn: u32,
    owner: Owner,
    since: u64,
}

const _: () = assert!(size_of::<Slot>() <= 32);

/// What is kept of a borrow that is out.
#[derive(Clone, Copy, Debug)]
struct BorrowRecord {
    borrower: Borrower,
    /// [`Borrow::turn`] of the borrow.
    turn: u32,
}

/// The slots of one ring's buffer table.
#[derive(Debug)]
pub struct Registry {
    incarnation: Incarnation,
    slots: Box<[Slot]>,
    /// By slot and place; meaningful where the slot's `out` has the place.
    borrows: Box<[[BorrowRecord; MAX_BORROWS as usize]]>,
    /// The slots in state `Free`, and those that [`Registry::lend`] has lent, which spares it the
    /// look into yet another table.
    free: FreeSlots,
    stats: Stats,
}

// What every request goes through is inlined into the caller's crate, which halves its cost.
impl Registry {
    /// A registry of `capacity` free slots, numbered from 0, for one life of the server. A ring's
    /// table has at most 16,384 slots.
    #[must_use]
    pub fn new(capacity: u16, incarnation: Incarnation) -> Self {
        let slot = Slot {
            state: SlotState::Free,
            out: Places::NONE,
            generation: Generation(0),
            turn: 0,
            owner: Owner { device: 0, qid: 0, tag: 0 },
            since: 0,
        };
        let record = BorrowRecord { borrower: Borrower(0), turn: 0 };
        Self {
            incarnation,
            slots: vec![slot; usize::from(capacity)].into(),
            borrows: vec![[record; MAX_BORROWS as usize]; usize::from(capacity)].into(),
            free: FreeSlots::new(capacity),
            stats: Stats::default(),
        }
    }

    /// The life of the server that the registry was made for.
    #[must_use]
    pub const fn incarnation(&self) -> Incarnation {
        self.incarnation
    }

    /// Reserves the slot of the caller's choice for a request, before its buffer is registered.
    /// `now` is kept as the time of lending.
    ///
    /// # Errors
    /// [`Busy`] if the slot is lent or beyond the table.
    #[inline]
    pub fn reserve(
        &mut self,
        slot: SlotIndex,
        owner: Owner,
        now: u64,
    ) -> Result<Lease<Reserved>, Busy> {
        let entry = self.slots.get_mut(usize::from(slot.0)).ok_or(Busy::Beyond(slot))?;
        if entry.state != SlotState::Free {
            return Err(Busy::Lent(entry.describe(slot)));
        }
        let generation = Generation(entry.generation.0.wrapping_add(1));
        *entry =
            Slot { state: SlotState::Reserved, generation, turn: 0, owner, since: now, ..*entry };
        self.free.remove(slot);
        self.stats.reserved += 1;
        Ok(Lease::new(LeaseKey { incarnation: self.incarnation, slot, generation }))
    }

    /// Reserves the lowest free slot, otherwise like [`reserve`](Self::reserve).
    ///
    /// # Errors
    /// [`NoneFree`] if all slots are lent.
    #[inline]
    pub fn reserve_any(&mut self, owner: Owner, now: u64) -> Result<Lease<Reserved>, NoneFree> {
        let is_free = |slot: SlotIndex| self.slots[usize::from(slot.0)].state == SlotState::Free;
        let slot = self.free.lowest(is_free).ok_or(NoneFree)?;
        Ok(self.reserve(slot, owner, now).expect("a slot in the free set is free"))
    }

    /// The buffer is registered: it may be borrowed.
    ///
    /// # Panics
    /// If the lease is of another registry, like all transitions.
    #[inline]
    pub fn activate(&mut self, lease: Lease<Reserved>) -> Lease<Active> {
        self.held(&lease).state = SlotState::Active;
        lease.into_state()
    }

    /// The registration failed: the slot is free again.
    ///
    /// # Panics
    /// If the lease is of another registry.
    pub fn cancel(&mut self, lease: Lease<Reserved>) {
        self.end(&lease);
    }

    /// Counts one more operation that uses the buffer, under the name by which the caller knows
    /// it.
    ///
    /// # Errors
    /// [`NotBorrowable`] at [`MAX_BORROWS`] borrows.
    ///
    /// # Panics
    /// If the lease is of another registry.
    #[inline]
    pub fn borrow(
        &mut self,
        lease: &Lease<Active>,
        borrower: Borrower,
    ) -> Result<Borrow, NotBorrowable> {
        let entry = self.held(lease);
        let place = entry.out.vacant().ok_or(NotBorrowable)?;
        let turn = entry.turn;
        entry.out.take(place);
        entry.turn = turn.wrapping_add(1);
        let LeaseKey { incarnation, slot, generation } = lease.key();
        self.borrows[usize::from(slot.0)][place.index()] = BorrowRecord { borrower, turn };
        self.stats.borrowed += 1;
        Ok(Borrow { incarnation, generation, turn, slot, place })
    }

    /// Reserves a slot whose buffer is registered already, for a request that is one operation:
    /// [`reserve`](Self::reserve), [`activate`](Self::activate) and [`borrow`](Self::borrow) in
    /// one.
    ///
    /// # Errors
    /// [`Busy`] if the slot is lent or beyond the table.
    #[inline(always)]
    pub fn lend(
        &mut self,
        slot: SlotIndex,
        owner: Owner,
        now: u64,
        borrower: Borrower,
    ) -> Result<Lease<Sole>, Busy> {
        let entry = self.slots.get_mut(usize::from(slot.0)).ok_or(Busy::Beyond(slot))?;
        if entry.state != SlotState::Free {
            return Err(Busy::Lent(entry.describe(slot)));
        }
        let generation = Generation(entry.generation.0.wrapping_add(1));
        let out = Places::FIRST;
        *entry = Slot { state: SlotState::Active, out, generation, turn: 1, owner, since: now };
        let first = Place::FIRST.index();
        self.borrows[usize::from(slot.0)][first] = BorrowRecord { borrower, turn: 0 };
        self.stats.reserved += 1;
        self.stats.borrowed += 1;
        Ok(Lease::new(LeaseKey { incarnation: self.incarnation, slot, generation }))
    }

    /// The only operation that borrows a buffer has completed, and the buffer goes back with the
    /// answer: [`give_back`](Self::give_back), [`retire`](Self::retire) and
    /// [`release`](Self::release) in one.
    ///
    /// # Panics
    /// If the lease is of another registry.
    #[inline]
    pub fn take_back(&mut self, lease: Lease<Sole>) {
        let entry = self.held(&lease);
        entry.state = SlotState::Free;
        entry.out = Places::NONE;
        self.stats.given_back += 1;
        self.stats.released += 1;
    }

    /// Parts what [`lend`](Self::lend) has made into the lease and the borrow, for a request that
    /// turns out to need more than one operation.
    ///
    /// # Panics
    /// If the lease is of another registry.
    pub fn part(&mut self, lease: Lease<Sole>) -> (Lease<Active>, Borrow) {
        self.held(&lease);
        let LeaseKey { incarnation, slot, generation } = lease.key();
        let borrow = Borrow { incarnation, generation, turn: 0, slot, place: Place::FIRST };
        (lease.into_state(), borrow)
    }

    /// The operation was issued again and has a new name.
    ///
    /// # Errors
    /// [`Stale`] as for [`give_back`](Self::give_back).
    pub fn relabel(&mut self, borrow: Borrow, borrower: Borrower) -> Result<(), Stale> {
        self.live(borrow)?;
        self.borrows[usize::from(borrow.slot.0)][borrow.place.index()].borrower = borrower;
        Ok(())
    }

    /// An operation has completed, be it late, in quarantine; returns how many still borrow the
    /// buffer.
    ///
    /// # Errors
    /// [`Stale`] if the borrow is of another incarnation, if the slot has had another lease
    /// since, or if it was given back before. Nothing changes then but the counter.
    #[inline]
    pub fn give_back(&mut self, borrow: Borrow) -> Result<u32, Stale> {
        let entry = self.live(borrow)?;
        entry.out.vacate(borrow.place);
        let left = entry.out.count();
        self.stats.given_back += 1;
        Ok(left)
    }

    /// Ends the borrowing: the buffer is about to be given back.
    ///
    /// # Errors
    /// [`StillBorrowed`] with the lease, as long as an operation borrows it.
    ///
    /// # Panics
    /// If the lease is of another registry.
    #[inline]
    pub fn retire(&mut self, lease: Lease<Active>) -> Result<Lease<Retiring>, StillBorrowed> {
        let entry = self.held(&lease);
        if entry.out != Places::NONE {
            let borrows = entry.out.count();
            return Err(StillBorrowed { lease, borrows });
        }
        entry.state = SlotState::Retiring;
        Ok(lease.into_state())
    }

    /// The buffer is back with the driver: the slot is free.
    ///
    /// # Panics
    /// If the lease is of another registry.
    #[inline]
    pub fn release(&mut self, lease: Lease<Retiring>) {
        self.end(&lease);
    }

    /// Sets a slot apart whose buffer the kernel may still use, though the program knows no way to
    /// get it back: an operation neither completed nor was cancelled (its borrow stays out), or
    /// the unregistration failed.
    ///
    /// # Panics
    /// If the lease is of another registry.
    pub fn quarantine<S: Quarantinable>(&mut self, lease: Lease<S>) -> Lease<Quarantined> {
        self.held(&lease).state = SlotState::Quarantined;
        self.stats.quarantined += 1;
        lease.into_state()
    }

    /// The fate of a quarantined slot is known: its buffer is about to be given back.
    ///
    /// # Errors
    /// [`Unsettled`] with the lease, as long as an operation borrows it.
    ///
    /// # Panics
    /// If the lease is of another registry.
    pub fn settle(&mut self, lease: Lease<Quarantined>) -> Result<Lease<Retiring>, Unsettled> {
        let entry = self.held(&lease);
        if entry.out != Places::NONE {
            let borrows = entry.out.count();
            return Err(Unsettled { lease, borrows });
        }
        entry.state = SlotState::Retiring;
        self.stats.settled += 1;
        Ok(lease.into_state())
    }

    /// All lent slots, in order of their index. After a drain there must be none.
    pub fn lent(&self) -> impl Iterator<Item = Lent> {
        let indexed = self.slots.iter().zip((0_u16..).map(SlotIndex));
        indexed
            .filter(|(entry, _)| entry.state != SlotState::Free)
            .map(|(entry, slot)| entry.describe(slot))
    }

    /// Who borrows a slot, in order of place; nobody if it is free or beyond the table.
    pub fn borrowers(&self, slot: SlotIndex) -> impl Iterator<Item = Borrower> {
        let index = usize::from(slot.0);
        let out = self.slots.get(index).map_or(Places::NONE, |entry| entry.out);
        out.iter().map(move |place| self.borrows[index][place.index()].borrower)
    }

    /// The lent slots whose lease the caller no longer holds, by its own account. Such a slot is
    /// never lent again.
    pub fn leaks(
        &self,
        now: u64,
        is_held: impl Fn(LeaseKey) -> bool,
    ) -> impl Iterator<Item = Leak> {
        let incarnation = self.incarnation;
        let lost = self.lent().filter(move |&Lent { slot, generation, .. }| {
            !is_held(LeaseKey { incarnation, slot, generation })
        });
        lost.map(move |lent| Leak {
            lent,
            age: now.saturating_sub(lent.since),
            borrowers: Borrowers::gather(self.borrowers(lent.slot)),
        })
    }

    /// How many slots are doing what. Scans all slots, so that no transition pays for it and it
    /// cannot disagree with them.
    #[must_use]
    pub fn counts(&self) -> Counts {
        let mut counts = Counts::default();
        self.slots.iter().for_each(|entry| counts.add(entry.state, entry.out.count()));
        counts
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

    /// Ends a lease; without borrows, since `Reserved` has none yet and `Retiring` none left.
    #[inline]
    fn end<S: LeaseState>(&mut self, lease: &Lease<S>) {
        self.held(lease).state = SlotState::Free;
        self.free.insert(lease.slot());
        self.stats.released += 1;
    }

    /// The slot of a lease. A lease is made by `reserve` alone, is not copied, and every
    /// transition consumes it, so slot and lease can only disagree if the lease is of another
    /// registry: a bug that must not go on.
    #[inline]
    fn held<S: LeaseState>(&mut self, lease: &Lease<S>) -> &mut Slot {
        let LeaseKey { incarnation, slot, generation } = lease.key();
        let ours = incarnation == self.incarnation;
        let entry = self
            .slots
            .get_mut(usize::from(slot.0))
            .filter(|entry| ours && entry.state == S::SLOT && entry.generation == generation);
        entry.unwrap_or_else(|| foreign(slot))
    }

    /// The slot of a borrow that is out. Unlike a lease a borrow is copied and comes back by way of
    /// the kernel, so that it may name anything that once was.
    #[inline]
    fn live(&mut self, borrow: Borrow) -> Result<&mut Slot, Stale> {
        let index = usize::from(borrow.slot.0);
        let ours = borrow.incarnation == self.incarnation;
        let entry = self.slots.get_mut(index).filter(|entry| {
            let same_lease = ours && entry.generation == borrow.generation;
            same_lease
                && entry.out.holds(borrow.place)
                && self.borrows[index][borrow.place.index()].turn == borrow.turn
        });
        if entry.is_none() {
            self.stats.stale += 1;
        }
        entry.ok_or(Stale)
    }
}

#[cold]
fn foreign(slot: SlotIndex) -> ! {
    panic!("lease of slot {} does not belong to this registry", slot.0)
}

impl Slot {
    const fn describe(&self, slot: SlotIndex) -> Lent {
        Lent {
            slot,
            generation: self.generation,
            owner: self.owner,
            since: self.since,
            state: self.state,
            borrows: self.out.count(),
        }
    }
}

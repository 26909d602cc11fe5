//! The registry itself: every transition of every slot.

use crate::error::{Busy, NoneFree, NotBorrowable, Stale, StillBorrowed, Unsettled};
use crate::free::FreeSlots;
use crate::identity::{Borrower, Generation, Incarnation, LeaseKey, Owner, SlotIndex};
use crate::lease::{
    Active, Borrow, BorrowIndex, BorrowSet, Lease, LeaseState, MAX_BORROWS, Quarantinable,
    Quarantined, Reserved, Retiring, Sole,
};
use crate::report::{Borrowers, Counts, Leak, Lent, SlotState, Stats};

/// The fields that every request uses: half a cache line.
#[derive(Clone, Copy, Debug)]
struct Slot {
    state: SlotState,
    /// Empty except in the states `Active` and `Quarantined`.
    borrowed: BorrowSet,
    generation: Generation,
    /// How many borrows the current lease has had.
    sequence: u32,
    owner: Owner,
    since: u64,
}

const _: () = assert!(size_of::<Slot>() <= 32);

/// A borrow that is not given back yet.
#[derive(Clone, Copy, Debug)]
struct BorrowRecord {
    borrower: Borrower,
    /// [`Borrow::sequence`] of the borrow.
    sequence: u32,
}

/// The slots of one ring's buffer table.
#[derive(Debug)]
pub struct Registry {
    incarnation: Incarnation,
    slots: Box<[Slot]>,
    /// By slot and index. Valid where the slot's `borrowed` contains the index.
    borrows: Box<[[BorrowRecord; MAX_BORROWS as usize]]>,
    /// The slots in state `Free`, and slots that [`Registry::lend`] has lent: it leaves them here
    /// to avoid access to one more table.
    free: FreeSlots,
    stats: Stats,
}

// The functions that every request calls are inlined into the caller's crate, which halves their
// cost.
impl Registry {
    /// A registry of `capacity` free slots, numbered from 0, for one incarnation of the server. A
    /// ring's table has at most 16,384 slots.
    #[must_use]
    pub fn new(capacity: u16, incarnation: Incarnation) -> Self {
        let slot = Slot {
            state: SlotState::Free,
            borrowed: BorrowSet::NONE,
            generation: Generation(0),
            sequence: 0,
            owner: Owner { device: 0, qid: 0, tag: 0 },
            since: 0,
        };
        let record = BorrowRecord { borrower: Borrower(0), sequence: 0 };
        Self {
            incarnation,
            slots: vec![slot; usize::from(capacity)].into(),
            borrows: vec![[record; MAX_BORROWS as usize]; usize::from(capacity)].into(),
            free: FreeSlots::new(capacity),
            stats: Stats::default(),
        }
    }

    /// The incarnation of the server that the registry was made for.
    #[must_use]
    pub const fn incarnation(&self) -> Incarnation {
        self.incarnation
    }

    /// Reserves a slot that the caller chooses, before the request's buffer is registered. `now` is
    /// stored as the time of lending.
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
        *entry = Slot {
            state: SlotState::Reserved,
            generation,
            sequence: 0,
            owner,
            since: now,
            ..*entry
        };
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

    /// Records that the buffer is registered: operations may borrow it.
    ///
    /// # Panics
    /// If the lease is of another registry, like all transitions.
    #[inline]
    pub fn activate(&mut self, lease: Lease<Reserved>) -> Lease<Active> {
        self.held(&lease).state = SlotState::Active;
        lease.into_state()
    }

    /// Records that the registration failed: the slot is free again.
    ///
    /// # Panics
    /// If the lease is of another registry.
    pub fn cancel(&mut self, lease: Lease<Reserved>) {
        self.end(&lease);
    }

    /// Records one more operation that uses the buffer, with the caller's identifier of it.
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
        let index = entry.borrowed.lowest_free().ok_or(NotBorrowable)?;
        let sequence = entry.sequence;
        entry.borrowed.insert(index);
        entry.sequence = sequence.wrapping_add(1);
        let LeaseKey { incarnation, slot, generation } = lease.key();
        self.borrows[usize::from(slot.0)][index.position()] = BorrowRecord { borrower, sequence };
        self.stats.borrowed += 1;
        Ok(Borrow { incarnation, generation, sequence, slot, index })
    }

    /// Reserves a slot that already has its buffer registered, for a request of one operation:
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
        let borrowed = BorrowSet::FIRST;
        *entry =
            Slot { state: SlotState::Active, borrowed, generation, sequence: 1, owner, since: now };
        let first = BorrowIndex::FIRST.position();
        self.borrows[usize::from(slot.0)][first] = BorrowRecord { borrower, sequence: 0 };
        self.stats.reserved += 1;
        self.stats.borrowed += 1;
        Ok(Lease::new(LeaseKey { incarnation: self.incarnation, slot, generation }))
    }

    /// Records that the only operation on the buffer has completed, and that the answer gives the
    /// buffer back: [`give_back`](Self::give_back), [`retire`](Self::retire) and
    /// [`release`](Self::release) in one.
    ///
    /// # Panics
    /// If the lease is of another registry.
    #[inline]
    pub fn take_back(&mut self, lease: Lease<Sole>) {
        let entry = self.held(&lease);
        entry.state = SlotState::Free;
        entry.borrowed = BorrowSet::NONE;
        self.stats.given_back += 1;
        self.stats.released += 1;
    }

    /// When the slot of a lease was lent.
    ///
    /// # Panics
    /// If the lease is of another registry.
    pub fn lent_since<S: LeaseState>(&mut self, lease: &Lease<S>) -> u64 {
        self.held(lease).since
    }

    /// Splits the result of [`lend`](Self::lend) into lease and borrow, for a request that needs
    /// more than one operation after all.
    ///
    /// # Panics
    /// If the lease is of another registry.
    pub fn split(&mut self, lease: Lease<Sole>) -> (Lease<Active>, Borrow) {
        self.held(&lease);
        let LeaseKey { incarnation, slot, generation } = lease.key();
        let borrow =
            Borrow { incarnation, generation, sequence: 0, slot, index: BorrowIndex::FIRST };
        (lease.into_state(), borrow)
    }

    /// Records that the operation was issued again with a new identifier.
    ///
    /// # Errors
    /// [`Stale`] as for [`give_back`](Self::give_back).
    pub fn relabel(&mut self, borrow: Borrow, borrower: Borrower) -> Result<(), Stale> {
        self.live(borrow)?;
        self.borrows[usize::from(borrow.slot.0)][borrow.index.position()].borrower = borrower;
        Ok(())
    }

    /// Records that an operation has completed, even if its slot is in quarantine by now. Returns
    /// how many operations still borrow the buffer.
    ///
    /// # Errors
    /// [`Stale`] if the borrow is of another incarnation, if the slot has had another lease since,
    /// or if the borrow was given back before. Only the counter changes then.
    #[inline]
    pub fn give_back(&mut self, borrow: Borrow) -> Result<u32, Stale> {
        let entry = self.live(borrow)?;
        entry.borrowed.remove(borrow.index);
        let left = entry.borrowed.count();
        self.stats.given_back += 1;
        Ok(left)
    }

    /// Ends the borrowing: the buffer is about to be given back.
    ///
    /// # Errors
    /// [`StillBorrowed`] with the lease, while an operation borrows it.
    ///
    /// # Panics
    /// If the lease is of another registry.
    #[inline]
    pub fn retire(&mut self, lease: Lease<Active>) -> Result<Lease<Retiring>, StillBorrowed> {
        let entry = self.held(&lease);
        if entry.borrowed != BorrowSet::NONE {
            let borrows = entry.borrowed.count();
            return Err(StillBorrowed { lease, borrows });
        }
        entry.state = SlotState::Retiring;
        Ok(lease.into_state())
    }

    /// Records that the driver has its buffer back: the slot is free.
    ///
    /// # Panics
    /// If the lease is of another registry.
    #[inline]
    pub fn release(&mut self, lease: Lease<Retiring>) {
        self.end(&lease);
    }

    /// Quarantines a slot. The kernel may still use its buffer, and the program cannot get it back:
    /// an operation neither completed nor was cancelled (its borrow remains), or unregistration
    /// failed.
    ///
    /// # Panics
    /// If the lease is of another registry.
    pub fn quarantine<S: Quarantinable>(&mut self, lease: Lease<S>) -> Lease<Quarantined> {
        self.held(&lease).state = SlotState::Quarantined;
        self.stats.quarantined += 1;
        lease.into_state()
    }

    /// Ends the quarantine of a slot: the kernel no longer uses its buffer, which is about to be
    /// given back.
    ///
    /// # Errors
    /// [`Unsettled`] with the lease, while an operation borrows it.
    ///
    /// # Panics
    /// If the lease is of another registry.
    pub fn settle(&mut self, lease: Lease<Quarantined>) -> Result<Lease<Retiring>, Unsettled> {
        let entry = self.held(&lease);
        if entry.borrowed != BorrowSet::NONE {
            let borrows = entry.borrowed.count();
            return Err(Unsettled { lease, borrows });
        }
        entry.state = SlotState::Retiring;
        self.stats.settled += 1;
        Ok(lease.into_state())
    }

    /// All lent slots, in order of their index. After a drain there are none.
    pub fn lent(&self) -> impl Iterator<Item = Lent> {
        let indexed = self.slots.iter().zip((0_u16..).map(SlotIndex));
        indexed
            .filter(|(entry, _)| entry.state != SlotState::Free)
            .map(|(entry, slot)| entry.describe(slot))
    }

    /// The borrowers of a slot, in order of their index. Empty if the slot is free or beyond the
    /// table.
    pub fn borrowers(&self, slot: SlotIndex) -> impl Iterator<Item = Borrower> {
        let index = usize::from(slot.0);
        let borrowed = self.slots.get(index).map_or(BorrowSet::NONE, |entry| entry.borrowed);
        borrowed.iter().map(move |borrow| self.borrows[index][borrow.position()].borrower)
    }

    /// The lent slots for which the caller holds no lease, according to `holds`. Such a slot is
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

    /// How many slots are in each state. Scans all slots: transitions then need no counters, and
    /// the counts cannot be wrong.
    #[must_use]
    pub fn counts(&self) -> Counts {
        let mut counts = Counts::default();
        self.slots.iter().for_each(|entry| counts.add(entry.state, entry.borrowed.count()));
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

    /// Ends a lease. It has no borrows: `Reserved` has none yet, and `Retiring` has none left.
    #[inline]
    fn end<S: LeaseState>(&mut self, lease: &Lease<S>) {
        self.held(lease).state = SlotState::Free;
        self.free.insert(lease.slot());
        self.stats.released += 1;
    }

    /// The slot of a lease. Only this registry makes leases, they cannot be copied, and every
    /// transition consumes them. So slot and lease disagree only if the lease is of another
    /// registry, which is a bug.
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

    /// The slot of a borrow that is not given back. Unlike a lease, a borrow is copied and comes
    /// back through the kernel, so it may be of any earlier lending.
    #[inline]
    fn live(&mut self, borrow: Borrow) -> Result<&mut Slot, Stale> {
        let index = usize::from(borrow.slot.0);
        let ours = borrow.incarnation == self.incarnation;
        let entry = self.slots.get_mut(index).filter(|entry| {
            let same_lease = ours && entry.generation == borrow.generation;
            same_lease
                && entry.borrowed.contains(borrow.index)
                && self.borrows[index][borrow.index.position()].sequence == borrow.sequence
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
            borrows: self.borrowed.count(),
        }
    }
}

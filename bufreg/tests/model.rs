//! All operations in random order, against a model that stores everything in the simplest way.
//! After each step, everything the registry reports is compared with the model.

use bufreg::{
    Active, Borrow, Borrower, Busy, Counts, Generation, Incarnation, Lease, LeaseKey, Lent,
    NoneFree, NotBorrowable, Owner, Quarantined, Registry, Reserved, Retiring, SlotIndex,
    SlotState, Sole, Stale, Stats,
};
use proptest::prelude::*;

const CAPACITY: u16 = 4;
const SLOTS: usize = 4;
const BORROWS: usize = 16;

/// One operation. It is skipped if the slot is not in the right state.
#[derive(Clone, Copy, Debug)]
enum Step {
    Reserve(usize),
    ReserveAny,
    /// Reserves, activates and borrows, with a label.
    Lend(usize, u64),
    /// Takes back the slot's lease after `Lend`.
    TakeBack(usize),
    /// Splits it into a lease and a borrow.
    Split(usize),
    Activate(usize),
    Cancel(usize),
    /// This many borrows, with consecutive labels from the one given.
    Borrow(usize, u64, u64),
    /// This and the next use the n-th last of all borrows ever made, live or not.
    Relabel(usize, u64),
    GiveBack(usize),
    /// Gives back all borrows, retires and releases: the slot can be lent again.
    Drain(usize),
    Retire(usize),
    Release(usize),
    Quarantine(usize),
    Settle(usize),
    /// The caller forgets a lease.
    Lose(usize),
    /// The server starts again: all slots are free, and the kernel may still hold old borrows.
    Restart,
}

fn step() -> impl Strategy<Value = Step> {
    let slot = || 0..SLOTS;
    // Sometimes more than the maximum.
    let burst = prop_oneof![6 => 1..3_u64, 1 => 1..20_u64];
    prop_oneof![
        3 => (0..SLOTS + 1).prop_map(Step::Reserve),
        3 => Just(Step::ReserveAny),
        4 => (0..SLOTS + 1, 0..1000_u64).prop_map(|(slot, label)| Step::Lend(slot, label)),
        6 => slot().prop_map(Step::TakeBack),
        2 => slot().prop_map(Step::Split),
        8 => slot().prop_map(Step::Activate),
        1 => slot().prop_map(Step::Cancel),
        8 => (slot(), 0..1000_u64, burst).prop_map(|(slot, label, n)| Step::Borrow(slot, label, n)),
        2 => (0..30_usize, 0..1000_u64).prop_map(|(number, label)| Step::Relabel(number, label)),
        10 => (0..30_usize).prop_map(Step::GiveBack),
        3 => slot().prop_map(Step::Drain),
        6 => slot().prop_map(Step::Retire),
        4 => slot().prop_map(Step::Release),
        2 => slot().prop_map(Step::Quarantine),
        4 => slot().prop_map(Step::Settle),
        1 => slot().prop_map(Step::Lose),
        1 => Just(Step::Restart),
    ]
}

/// A lease that the caller holds.
enum Held {
    Reserved(Lease<Reserved>),
    Sole(Lease<Sole>),
    Active(Lease<Active>),
    Retiring(Lease<Retiring>),
    Quarantined(Lease<Quarantined>),
}

impl Held {
    fn key(&self) -> LeaseKey {
        match self {
            Self::Reserved(lease) => lease.key(),
            Self::Sole(lease) => lease.key(),
            Self::Active(lease) => lease.key(),
            Self::Retiring(lease) => lease.key(),
            Self::Quarantined(lease) => lease.key(),
        }
    }
}

/// A borrow that is not given back: its index in the history, and its label.
type BorrowEntry = Option<(usize, u64)>;

/// The history index of a borrow that only the lease represents.
const UNMADE: usize = usize::MAX;

/// The expected state of a slot.
struct Slot {
    state: SlotState,
    generation: u32,
    owner: Owner,
    since: u64,
    out: [BorrowEntry; BORROWS],
    held: Option<Held>,
}

impl Slot {
    fn free() -> Self {
        let owner = Owner { device: 0, qid: 0, tag: 0 };
        let (state, out) = (SlotState::Free, [None; BORROWS]);
        Self { state, generation: 0, owner, since: 0, out, held: None }
    }

    fn borrows(&self) -> u32 {
        u32::try_from(self.out.iter().flatten().count()).unwrap()
    }

    fn labels(&self) -> Vec<Borrower> {
        self.out.iter().flatten().map(|(_, label)| Borrower(*label)).collect()
    }

    fn lent(&self, slot: usize) -> Option<Lent> {
        (self.state != SlotState::Free).then(|| Lent {
            slot: index(slot),
            generation: Generation(self.generation),
            owner: self.owner,
            since: self.since,
            state: self.state,
            borrows: self.borrows(),
        })
    }
}

fn index(slot: usize) -> SlotIndex {
    SlotIndex(u16::try_from(slot).unwrap())
}

struct World {
    registry: Registry,
    slots: [Slot; SLOTS],
    stats: Stats,
    /// All borrows of all incarnations.
    history: Vec<Borrow>,
    now: u64,
}

impl World {
    fn new() -> Self {
        Self {
            registry: Registry::new(CAPACITY, Incarnation(u32::MAX)),
            slots: std::array::from_fn(|_| Slot::free()),
            stats: Stats::default(),
            history: Vec::new(),
            now: 0,
        }
    }

    fn step(&mut self, step: Step) {
        self.now += 1;
        match step {
            Step::Reserve(slot) => self.reserve(slot),
            Step::ReserveAny => self.reserve_any(),
            Step::Lend(slot, label) => self.lend(slot, label),
            Step::Borrow(slot, label, number) => {
                (label..label + number).for_each(|label| self.borrow(slot, label));
            }
            Step::Relabel(number, label) => {
                self.recall(number).into_iter().for_each(|made| self.relabel(made, label));
            }
            Step::GiveBack(number) => {
                self.recall(number).into_iter().for_each(|made| self.give_back(made));
            }
            Step::Drain(slot) => self.drain(slot),
            Step::Lose(slot) => self.slots[slot].held = None,
            Step::Restart => self.restart(),
            Step::Activate(slot)
            | Step::Cancel(slot)
            | Step::TakeBack(slot)
            | Step::Split(slot)
            | Step::Retire(slot)
            | Step::Release(slot)
            | Step::Quarantine(slot)
            | Step::Settle(slot) => self.change(step, slot),
        }
    }

    fn owner(&self) -> Owner {
        Owner { device: 1, qid: 2, tag: u16::try_from(self.now).unwrap() }
    }

    fn reserve(&mut self, slot: usize) {
        match self.registry.reserve(index(slot), self.owner(), self.now) {
            Ok(lease) => self.reserved(slot, lease),
            Err(Busy::Lent(lent)) => assert_eq!(Some(lent), self.slots[slot].lent(slot)),
            Err(Busy::Beyond(beyond)) => assert_eq!((beyond, slot), (index(slot), SLOTS)),
        }
    }

    fn reserve_any(&mut self) {
        let lowest = self.slots.iter().position(|slot| slot.state == SlotState::Free);
        match (self.registry.reserve_any(self.owner(), self.now), lowest) {
            (Ok(lease), Some(slot)) => self.reserved(slot, lease),
            (Err(NoneFree), None) => {}
            (lease, lowest) => panic!("{lease:?}, but free is {lowest:?}"),
        }
    }

    fn reserved(&mut self, slot: usize, lease: Lease<Reserved>) {
        let owner = self.owner();
        let entry = &mut self.slots[slot];
        assert_eq!(entry.state, SlotState::Free);
        entry.state = SlotState::Reserved;
        entry.generation += 1;
        (entry.owner, entry.since) = (owner, self.now);
        assert_eq!((lease.slot(), lease.generation().0), (index(slot), entry.generation));
        entry.held = Some(Held::Reserved(lease));
        self.stats.reserved += 1;
    }

    fn lend(&mut self, slot: usize, label: u64) {
        let (owner, now) = (self.owner(), self.now);
        match self.registry.lend(index(slot), owner, now, Borrower(label)) {
            Ok(lease) => {
                let entry = &mut self.slots[slot];
                assert_eq!(entry.state, SlotState::Free);
                let generation = entry.generation + 1;
                *entry = Slot {
                    state: SlotState::Active,
                    generation,
                    owner,
                    since: now,
                    ..Slot::free()
                };
                assert_eq!((lease.slot(), lease.generation().0), (index(slot), generation));
                entry.held = Some(Held::Sole(lease));
                entry.out[0] = Some((UNMADE, label));
                self.stats.reserved += 1;
                self.stats.borrowed += 1;
            }
            Err(Busy::Lent(lent)) => assert_eq!(Some(lent), self.slots[slot].lent(slot)),
            Err(Busy::Beyond(beyond)) => assert_eq!((beyond, slot), (index(slot), SLOTS)),
        }
    }

    fn change(&mut self, step: Step, slot: usize) {
        let Some(held) = self.slots[slot].held.take() else { return };
        let held = self.transition(step, slot, held);
        self.slots[slot].state = match &held {
            None => SlotState::Free,
            Some(Held::Reserved(_)) => SlotState::Reserved,
            Some(Held::Sole(_) | Held::Active(_)) => SlotState::Active,
            Some(Held::Retiring(_)) => SlotState::Retiring,
            Some(Held::Quarantined(_)) => SlotState::Quarantined,
        };
        self.slots[slot].held = held;
    }

    /// The lease after the step. Unchanged if the step does not apply to its state.
    fn transition(&mut self, step: Step, slot: usize, held: Held) -> Option<Held> {
        let (registry, stats) = (&mut self.registry, &mut self.stats);
        let borrows = self.slots[slot].borrows();
        match (step, held) {
            (Step::Activate(_), Held::Reserved(lease)) => {
                Some(Held::Active(registry.activate(lease)))
            }
            (Step::Cancel(_), Held::Reserved(lease)) => {
                registry.cancel(lease);
                stats.released += 1;
                None
            }
            (Step::TakeBack(_), Held::Sole(lease)) => {
                registry.take_back(lease);
                self.slots[slot].out = [None; BORROWS];
                stats.given_back += 1;
                stats.released += 1;
                None
            }
            (Step::Split(_), Held::Sole(lease)) => {
                let (lease, borrow) = registry.split(lease);
                assert_eq!(borrow.slot(), index(slot));
                assert!(!self.history.contains(&borrow), "every borrow is unique");
                let label = self.slots[slot].out[0].map_or(0, |(_, label)| label);
                self.slots[slot].out[0] = Some((self.history.len(), label));
                self.history.push(borrow);
                Some(Held::Active(lease))
            }
            (Step::Retire(_), Held::Active(lease)) => match registry.retire(lease) {
                Ok(lease) => {
                    assert_eq!(borrows, 0, "retired while borrowed");
                    Some(Held::Retiring(lease))
                }
                Err(refused) => {
                    assert!(borrows > 0 && refused.borrows == borrows);
                    Some(Held::Active(refused.lease))
                }
            },
            (Step::Release(_), Held::Retiring(lease)) => {
                registry.release(lease);
                stats.released += 1;
                None
            }
            (Step::Quarantine(_), Held::Active(lease)) => {
                stats.quarantined += 1;
                Some(Held::Quarantined(registry.quarantine(lease)))
            }
            (Step::Quarantine(_), Held::Retiring(lease)) => {
                stats.quarantined += 1;
                Some(Held::Quarantined(registry.quarantine(lease)))
            }
            (Step::Settle(_), Held::Quarantined(lease)) => match registry.settle(lease) {
                Ok(lease) => {
                    assert_eq!(borrows, 0, "settled while borrowed");
                    stats.settled += 1;
                    Some(Held::Retiring(lease))
                }
                Err(refused) => {
                    assert!(borrows > 0 && refused.borrows == borrows);
                    Some(Held::Quarantined(refused.lease))
                }
            },
            (_, held) => Some(held),
        }
    }

    fn borrow(&mut self, slot: usize, label: u64) {
        let entry = &mut self.slots[slot];
        let Some(Held::Active(lease)) = &entry.held else { return };
        let vacant = entry.out.iter().position(Option::is_none);
        match (self.registry.borrow(lease, Borrower(label)), vacant) {
            (Ok(borrow), Some(free)) => {
                assert_eq!(borrow.slot(), index(slot));
                assert!(!self.history.contains(&borrow), "every borrow is unique");
                entry.out[free] = Some((self.history.len(), label));
                self.history.push(borrow);
                self.stats.borrowed += 1;
            }
            (Err(NotBorrowable), None) => {}
            (borrow, vacant) => panic!("{borrow:?}, but vacant is {vacant:?}"),
        }
    }

    fn drain(&mut self, slot: usize) {
        for made in self.slots[slot].out.map(|entry| entry.map(|(made, _)| made)) {
            made.filter(|made| *made != UNMADE).into_iter().for_each(|made| self.give_back(made));
        }
        self.change(Step::TakeBack(slot), slot);
        self.change(Step::Retire(slot), slot);
        self.change(Step::Release(slot), slot);
    }

    /// The history index of the n-th last borrow ever made.
    fn recall(&self, number: usize) -> Option<usize> {
        self.history.len().checked_sub(number + 1)
    }

    /// The entry of a borrow, if it is not given back.
    fn entry_of(&mut self, made: usize) -> Option<&mut BorrowEntry> {
        let mut entries = self.slots.iter_mut().flat_map(|slot| &mut slot.out);
        entries.find(|entry| entry.is_some_and(|(out, _)| out == made))
    }

    fn relabel(&mut self, made: usize, label: u64) {
        let live = self.entry_of(made).map(|entry| *entry = Some((made, label)));
        self.stats.stale += u64::from(live.is_none());
        let relabelled = self.registry.relabel(self.history[made], Borrower(label));
        assert_eq!(relabelled, live.ok_or(Stale));
    }

    fn give_back(&mut self, made: usize) {
        let borrow = self.history[made];
        if self.entry_of(made).map(Option::take).is_some() {
            self.stats.given_back += 1;
            let left = self.slots[usize::from(borrow.slot().0)].borrows();
            assert_eq!(self.registry.give_back(borrow), Ok(left));
        } else {
            self.stats.stale += 1;
            assert_eq!(self.registry.give_back(borrow), Err(Stale));
        }
    }

    fn restart(&mut self) {
        self.registry = Registry::new(CAPACITY, self.registry.incarnation().next());
        self.slots = std::array::from_fn(|_| Slot::free());
        self.stats = Stats::default();
    }

    fn check(&self) {
        let lent: Vec<_> = self.registry.lent().collect();
        let slots = || self.slots.iter().enumerate();
        assert_eq!(lent, slots().filter_map(|(slot, entry)| entry.lent(slot)).collect::<Vec<_>>());
        for (slot, entry) in slots() {
            let borrowers: Vec<_> = self.registry.borrowers(index(slot)).collect();
            assert_eq!(borrowers, entry.labels());
        }
        assert_eq!(self.registry.stats(), self.stats);
        self.check_leaks();
        self.check_counts();
    }

    fn check_leaks(&self) {
        let held: Vec<_> =
            self.slots.iter().filter_map(|slot| slot.held.as_ref().map(Held::key)).collect();
        let mut leaks = self.registry.leaks(self.now, |key| held.contains(&key));
        for (slot, entry) in self.slots.iter().enumerate() {
            if let (Some(lent), None) = (entry.lent(slot), &entry.held) {
                let leak = leaks.next().expect("a lost lease is found");
                assert_eq!((leak.lent, leak.age), (lent, self.now - entry.since));
                assert_eq!(leak.borrowers.as_slice(), entry.labels());
            }
        }
        assert!(leaks.next().is_none(), "a lease that is held is no leak");
    }

    fn check_counts(&self) {
        let counts = self.registry.counts();
        let count = |is: &dyn Fn(&Slot) -> bool| {
            u32::try_from(self.slots.iter().filter(|slot| is(slot)).count()).unwrap()
        };
        let expected = Counts {
            capacity: u32::from(CAPACITY),
            free: count(&|slot| slot.state == SlotState::Free),
            reserved: count(&|slot| slot.state == SlotState::Reserved),
            active: count(&|slot| slot.state == SlotState::Active),
            borrowed: count(&|slot| slot.borrows() > 0),
            borrows: self.slots.iter().map(Slot::borrows).sum(),
            retiring: count(&|slot| slot.state == SlotState::Retiring),
            quarantined: count(&|slot| slot.state == SlotState::Quarantined),
        };
        assert_eq!(counts, expected);
        let Counts { free, reserved, active, retiring, quarantined, .. } = counts;
        assert_eq!(free + reserved + active + retiring + quarantined, counts.capacity);
    }
}

/// Miri is slow, and allows no file to record failures in.
fn config() -> ProptestConfig {
    let config = ProptestConfig::with_cases(if cfg!(miri) { 5 } else { 500 });
    if cfg!(miri) { ProptestConfig { failure_persistence: None, ..config } } else { config }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn random_operations_agree_with_the_model(steps in prop::collection::vec(step(), 1..200)) {
        let mut world = World::new();
        for step in steps {
            world.step(step);
            world.check();
        }
    }
}

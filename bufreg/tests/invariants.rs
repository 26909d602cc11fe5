//! One test for each invariant of `bufreg::invariants`. `model.rs` checks all of them together,
//! `free_slots.rs` the choice of slots in large tables.

use bufreg::{
    Active, Borrow, Borrower, Busy, Counts, Incarnation, Lease, LeaseKey, MAX_BORROWS, NoneFree,
    NotBorrowable, Owner, Registry, SlotIndex, SlotState, Stale,
};

const INCARNATION: Incarnation = Incarnation(5);
const NOW: u64 = 100;

fn registry(capacity: u16) -> Registry {
    Registry::new(capacity, INCARNATION)
}

fn owner(tag: u16) -> Owner {
    Owner { device: 3, qid: 1, tag }
}

fn lend(registry: &mut Registry, slot: u16) -> Lease<Active> {
    let lease = registry.reserve(SlotIndex(slot), owner(slot), NOW).unwrap();
    registry.activate(lease)
}

fn end(registry: &mut Registry, lease: Lease<Active>) {
    let lease = registry.retire(lease).unwrap();
    registry.release(lease);
}

fn borrowers(registry: &Registry, slot: u16) -> Vec<u64> {
    registry.borrowers(SlotIndex(slot)).map(|borrower| borrower.0).collect()
}

/// Tries every operation on a borrow, and checks that nothing changes.
fn assert_stale(registry: &mut Registry, borrow: Borrow) {
    let slot = borrow.slot();
    let before: Vec<_> = registry.lent().collect();
    let borrowers: Vec<_> = registry.borrowers(slot).collect();
    let stats = registry.stats();
    assert_eq!(registry.give_back(borrow), Err(Stale));
    assert_eq!(registry.relabel(borrow, Borrower(999)), Err(Stale));
    assert_eq!(registry.lent().collect::<Vec<_>>(), before);
    assert_eq!(registry.borrowers(slot).collect::<Vec<_>>(), borrowers);
    assert_eq!(registry.stats(), bufreg::Stats { stale: stats.stale + 2, ..stats });
}

#[test]
fn a_slot_is_lent_once() {
    let mut registry = registry(2);
    let first = registry.reserve(SlotIndex(1), owner(7), 5).unwrap();
    let Err(Busy::Lent(lent)) = registry.reserve(SlotIndex(1), owner(8), 6) else {
        panic!("lent twice");
    };
    assert_eq!((lent.owner, lent.since, lent.state), (owner(7), 5, SlotState::Reserved));
    let beyond = registry.reserve(SlotIndex(2), owner(8), 6).unwrap_err();
    assert_eq!(beyond, Busy::Beyond(SlotIndex(2)));
    let first = registry.activate(first);
    assert!(registry.reserve(SlotIndex(1), owner(8), 6).is_err());
    let first = registry.retire(first).unwrap();
    assert!(registry.reserve(SlotIndex(1), owner(8), 6).is_err(), "not back with the driver yet");
    registry.release(first);
    let again = registry.reserve(SlotIndex(1), owner(8), 6).unwrap();
    registry.cancel(again);
    assert_eq!(registry.lent().count(), 0);
}

#[test]
fn a_borrowed_slot_is_not_retired() {
    let mut registry = registry(1);
    let lease = lend(&mut registry, 0);
    let borrows = [1, 2].map(|label| registry.borrow(&lease, Borrower(label)).unwrap());
    let refused = registry.retire(lease).unwrap_err();
    assert_eq!(refused.borrows, 2);
    assert_eq!(registry.lent().next().unwrap().state, SlotState::Active);
    assert_eq!(registry.give_back(borrows[0]), Ok(1));
    let refused = registry.retire(refused.lease).unwrap_err();
    assert_eq!(registry.give_back(borrows[1]), Ok(0));
    end(&mut registry, refused.lease);
}

#[test]
fn a_borrow_is_given_back_once() {
    let mut registry = registry(1);
    let lease = lend(&mut registry, 0);
    let borrow = registry.borrow(&lease, Borrower(1)).unwrap();
    assert_eq!(registry.give_back(borrow), Ok(0));
    assert_stale(&mut registry, borrow);
    // It is not mistaken for a later borrow with the same index either.
    for _ in 0..3 * MAX_BORROWS {
        let later = registry.borrow(&lease, Borrower(2)).unwrap();
        assert_stale(&mut registry, borrow);
        assert_eq!(registry.give_back(later), Ok(0));
    }
    end(&mut registry, lease);
}

#[test]
fn a_borrow_outlives_those_beside_it() {
    let mut registry = registry(1);
    let lease = lend(&mut registry, 0);
    let [first, second, third] =
        [10, 11, 12].map(|label| registry.borrow(&lease, Borrower(label)).unwrap());
    assert_eq!(registry.give_back(second), Ok(2));
    assert_eq!(borrowers(&registry, 0), [10, 12]);
    let fourth = registry.borrow(&lease, Borrower(13)).unwrap();
    assert_eq!(borrowers(&registry, 0), [10, 13, 12], "the free index is used again");
    assert_eq!(registry.relabel(third, Borrower(20)), Ok(()));
    assert_eq!(borrowers(&registry, 0), [10, 13, 20]);
    assert_stale(&mut registry, second);
    for (borrow, left) in [(third, 2), (first, 1), (fourth, 0)] {
        assert_eq!(registry.give_back(borrow), Ok(left));
    }
    assert_eq!(borrowers(&registry, 0), []);
    assert_eq!(borrowers(&registry, 1), [], "no such slot");
    end(&mut registry, lease);
}

#[test]
fn an_older_generation_changes_nothing() {
    let mut registry = registry(1);
    let first = lend(&mut registry, 0);
    let stale = registry.borrow(&first, Borrower(1)).unwrap();
    assert_eq!(registry.give_back(stale), Ok(0));
    end(&mut registry, first);
    assert_stale(&mut registry, stale);

    let second = lend(&mut registry, 0);
    let live = registry.borrow(&second, Borrower(2)).unwrap();
    assert_stale(&mut registry, stale);
    assert_eq!(registry.give_back(live), Ok(0));
    end(&mut registry, second);
}

#[test]
fn another_incarnation_changes_nothing() {
    let mut earlier = registry(2);
    let lease = lend(&mut earlier, 0);
    let other_lease = lend(&mut earlier, 1);
    let stale = earlier.borrow(&lease, Borrower(1)).unwrap();
    let beyond = earlier.borrow(&other_lease, Borrower(1)).unwrap();

    let mut registry = Registry::new(1, INCARNATION.next());
    assert_stale(&mut registry, stale);
    let lease = lend(&mut registry, 0);
    assert_stale(&mut registry, stale);
    let live = registry.borrow(&lease, Borrower(2)).unwrap();
    assert_stale(&mut registry, stale);
    assert_stale(&mut registry, beyond);
    assert_eq!(registry.give_back(live), Ok(0));
    end(&mut registry, lease);
}

#[test]
fn nothing_is_missing_after_a_drain() {
    let mut registry = registry(64);
    let leases: Vec<_> = (0..64).map(|slot| lend(&mut registry, slot)).collect();
    assert_eq!(registry.lent().count(), 64);
    for lease in leases {
        let borrow = registry.borrow(&lease, Borrower(1)).unwrap();
        registry.give_back(borrow).unwrap();
        end(&mut registry, lease);
    }
    assert_eq!(registry.lent().count(), 0);
    assert_eq!(registry.leaks(NOW, |_| false).count(), 0);
    assert_eq!(registry.counts(), Counts { capacity: 64, free: 64, ..Counts::default() });
    let stats = registry.stats();
    assert_eq!((stats.reserved, stats.released), (64, 64));
    assert_eq!((stats.borrowed, stats.given_back), (64, 64));
    let again: Vec<_> = (0..64).map(|_| registry.reserve_any(owner(0), NOW).unwrap()).collect();
    assert_eq!(again.len(), 64, "every slot can be lent again");
}

#[test]
fn a_lost_lease_is_found() {
    let mut registry = registry(4);
    let held = lend(&mut registry, 1);
    let lost = lend(&mut registry, 2);
    let borrows = [7, 9].map(|label| registry.borrow(&lost, Borrower(label)).unwrap());
    let lost_key = lost.key();
    drop(lost);

    let keys: [LeaseKey; 1] = [held.key()];
    let leaks: Vec<_> = registry.leaks(NOW + 50, |key| keys.contains(&key)).collect();
    assert_eq!(leaks.len(), 1);
    assert_eq!((leaks[0].lent.slot, leaks[0].lent.owner), (SlotIndex(2), owner(2)));
    assert_eq!(leaks[0].lent.generation, lost_key.generation);
    assert_eq!((leaks[0].age, leaks[0].lent.borrows), (50, 2));
    assert_eq!(leaks[0].borrowers.as_slice(), [Borrower(7), Borrower(9)]);
    let clock_went_back = registry.leaks(NOW - 1, |key| keys.contains(&key)).next().unwrap();
    assert_eq!(clock_went_back.age, 0);

    // The borrows come back; the slot does not.
    assert_eq!(registry.give_back(borrows[0]), Ok(1));
    assert_eq!(registry.give_back(borrows[1]), Ok(0));
    assert!(matches!(registry.reserve(SlotIndex(2), owner(9), NOW), Err(Busy::Lent(_))));
    let others: Vec<_> = (0..2).map(|_| registry.reserve_any(owner(9), NOW).unwrap()).collect();
    assert_eq!(others.iter().map(|lease| lease.slot().0).collect::<Vec<_>>(), [0, 3]);
    assert_eq!(registry.reserve_any(owner(9), NOW).unwrap_err(), NoneFree);
}

#[test]
fn borrows_are_bounded() {
    let mut registry = registry(2);
    let lease = lend(&mut registry, 0);
    let labels = (0..16).map(Borrower);
    let borrows: Vec<_> = labels.map(|label| registry.borrow(&lease, label).unwrap()).collect();
    assert_eq!(registry.borrow(&lease, Borrower(16)), Err(NotBorrowable));
    assert_eq!(MAX_BORROWS, 16);
    assert_eq!(borrowers(&registry, 0), (0..16).collect::<Vec<_>>());
    assert_eq!(registry.stats().borrowed, 16);
    assert_eq!(registry.leaks(NOW, |_| false).next().unwrap().borrowers.as_slice().len(), 16);
    let other = lend(&mut registry, 1);
    assert!(registry.borrow(&other, Borrower(17)).is_ok(), "each lease has its own borrows");
    assert_eq!(registry.give_back(borrows[11]), Ok(15));
    assert!(registry.borrow(&lease, Borrower(18)).is_ok());
    assert_eq!(registry.borrow(&lease, Borrower(19)), Err(NotBorrowable));
}

/// The compiler checks that it is neither borrowed nor retired: see `bufreg::invariants`.
#[test]
fn a_quarantined_slot_is_not_lent() {
    let mut registry = registry(2);
    let lease = lend(&mut registry, 0);
    let unanswered = registry.borrow(&lease, Borrower(1)).unwrap();
    let active = registry.quarantine(lease);
    let lease = lend(&mut registry, 1);
    let lease = registry.retire(lease).unwrap();
    let retiring = registry.quarantine(lease);
    for slot in [0, 1] {
        let Err(Busy::Lent(lent)) = registry.reserve(SlotIndex(slot), owner(9), NOW) else {
            panic!("slot {slot} lent in quarantine");
        };
        assert_eq!(lent.state, SlotState::Quarantined);
    }
    assert_eq!(registry.reserve_any(owner(9), NOW).unwrap_err(), NoneFree);
    assert_eq!(borrowers(&registry, 0), [1], "the borrower is still known");
    assert_eq!(registry.counts().quarantined, 2);

    assert_eq!(registry.give_back(unanswered), Ok(0), "a late completion counts");
    assert!(registry.reserve(SlotIndex(0), owner(9), NOW).is_err());
    for lease in [active, retiring] {
        let lease = registry.settle(lease).unwrap();
        registry.release(lease);
    }
    assert_eq!((registry.stats().quarantined, registry.stats().settled), (2, 2));
    assert_eq!(registry.counts().free, 2);
}

#[test]
fn a_borrowed_slot_is_not_settled() {
    let mut registry = registry(1);
    let lease = lend(&mut registry, 0);
    let borrows = [1, 2].map(|label| registry.borrow(&lease, Borrower(label)).unwrap());
    let lease = registry.quarantine(lease);
    let refused = registry.settle(lease).unwrap_err();
    assert_eq!(refused.borrows, 2);
    assert_eq!(registry.give_back(borrows[1]), Ok(1));
    assert_eq!(registry.relabel(borrows[0], Borrower(3)), Ok(()));
    assert_stale(&mut registry, borrows[1]);
    let refused = registry.settle(refused.lease).unwrap_err();
    assert_eq!(refused.borrows, 1);
    assert_eq!(registry.counts().quarantined, 1);
    assert_eq!(registry.give_back(borrows[0]), Ok(0));
    let lease = registry.settle(refused.lease).unwrap();
    assert_eq!(registry.lent().next().unwrap().state, SlotState::Retiring);
    registry.release(lease);
}

#[test]
fn counts_add_up_to_the_capacity() {
    let mut registry = registry(9);
    let _reserved = registry.reserve(SlotIndex(0), owner(0), NOW).unwrap();
    let _active = [1, 2].map(|slot| lend(&mut registry, slot));
    let borrowed = lend(&mut registry, 3);
    let _borrows = [1, 2, 3].map(|label| registry.borrow(&borrowed, Borrower(label)).unwrap());
    let retiring = lend(&mut registry, 4);
    let _retiring = registry.retire(retiring).unwrap();
    let quarantined = lend(&mut registry, 5);
    let _borrow = registry.borrow(&quarantined, Borrower(4)).unwrap();
    let _quarantined = registry.quarantine(quarantined);

    let counts = registry.counts();
    let expected = Counts {
        capacity: 9,
        free: 3,
        reserved: 1,
        active: 3,
        borrowed: 2,
        borrows: 4,
        retiring: 1,
        quarantined: 1,
    };
    assert_eq!(counts, expected);
    assert_eq!(registry.capacity(), 9);
}

#[test]
fn a_leak_is_told_in_one_line() {
    let mut registry = registry(3);
    let lease = lend(&mut registry, 2);
    let leak = registry.leaks(NOW + 95, |_| false).next().unwrap();
    let line = "slot 2 (active) is lent for device 3, qid 1, tag 2; its lease is lost; \
                age 95 (in the caller's unit)";
    assert_eq!(leak.to_string(), line);
    for label in [0x70, 0x91] {
        let _ = registry.borrow(&lease, Borrower(label)).unwrap();
    }
    let _quarantined = registry.quarantine(lease);
    let leak = registry.leaks(NOW + 95, |_| false).next().unwrap();
    let line = format!("{}; borrowed by 0x70, 0x91", line.replace("active", "quarantined"));
    assert_eq!(leak.to_string(), line);
}

#[test]
fn incarnations_wrap() {
    assert_eq!(Incarnation(1).next(), Incarnation(2));
    assert_eq!(Incarnation(u32::MAX).next(), Incarnation(0));
    assert_eq!(registry(0).incarnation(), INCARNATION);
}

//! The invariants listed in the crate's documentation, each by name, and all of them under
//! random operations against a model.

use bufreg::{
    Active, Borrow, Busy, Lease, MAX_BORROWS, NotBorrowable, Owner, Registry, SlotIndex, Stale,
};
use proptest::prelude::*;

fn owner(tag: u16) -> Owner {
    Owner { device: 3, qid: 1, tag }
}

fn lend(registry: &mut Registry, slot: u16) -> Lease<Active> {
    let lease = registry.reserve(SlotIndex(slot), owner(slot), 0).unwrap();
    registry.activate(lease)
}

fn give_back_lease(registry: &mut Registry, lease: Lease<Active>) {
    let lease = registry.retire(lease).unwrap();
    registry.release(lease);
}

#[test]
fn a_slot_is_lent_once() {
    let mut registry = Registry::new(2);
    let first = registry.reserve(SlotIndex(1), owner(7), 5).unwrap();
    let Err(Busy::Lent(lent)) = registry.reserve(SlotIndex(1), owner(8), 6) else {
        panic!("lent twice");
    };
    assert_eq!((lent.owner, lent.since), (owner(7), 5));
    assert_eq!(
        registry.reserve(SlotIndex(2), owner(8), 6).unwrap_err(),
        Busy::Beyond(SlotIndex(2))
    );
    registry.cancel(first);
    let again = registry.reserve(SlotIndex(1), owner(8), 6).unwrap();
    registry.cancel(again);
}

#[test]
fn a_borrowed_slot_is_not_retired() {
    let mut registry = Registry::new(1);
    let lease = lend(&mut registry, 0);
    let borrows = [registry.borrow(&lease).unwrap(), registry.borrow(&lease).unwrap()];
    let refused = registry.retire(lease).unwrap_err();
    assert_eq!(refused.borrows, 2);
    assert_eq!(registry.give_back(borrows[0]), Ok(1));
    let refused = registry.retire(refused.lease).unwrap_err();
    assert_eq!(registry.give_back(borrows[1]), Ok(0));
    give_back_lease(&mut registry, refused.lease);
}

#[test]
fn a_borrow_is_given_back_once() {
    let mut registry = Registry::new(1);
    let lease = lend(&mut registry, 0);
    let borrow = registry.borrow(&lease).unwrap();
    assert_eq!(registry.give_back(borrow), Ok(0));
    assert_eq!(registry.give_back(borrow), Err(Stale));
    assert_eq!(registry.stats().stale, 1);
    // Nor does it count for another borrow of the same lease.
    let other = registry.borrow(&lease).unwrap();
    assert_eq!(registry.give_back(borrow), Err(Stale));
    assert_eq!(registry.give_back(other), Ok(0));
    give_back_lease(&mut registry, lease);
}

#[test]
fn borrows_are_bounded() {
    let mut registry = Registry::new(1);
    let lease = lend(&mut registry, 0);
    let borrows: Vec<_> = (0..MAX_BORROWS).map(|_| registry.borrow(&lease).unwrap()).collect();
    assert_eq!(registry.borrow(&lease), Err(NotBorrowable));
    assert_eq!(registry.give_back(borrows[17]), Ok(MAX_BORROWS - 1));
    assert!(registry.borrow(&lease).is_ok());
}

#[test]
fn stale_keys_change_nothing() {
    let mut registry = Registry::new(1);
    let first = lend(&mut registry, 0);
    let stale = registry.borrow(&first).unwrap();
    assert_eq!(registry.give_back(stale), Ok(0));
    give_back_lease(&mut registry, first);

    let second = lend(&mut registry, 0);
    let live = registry.borrow(&second).unwrap();
    assert_eq!(registry.give_back(stale), Err(Stale));
    assert_eq!(registry.lent().next().unwrap().borrows, 1, "the live borrow stands");
    assert_eq!(registry.give_back(live), Ok(0));
    give_back_lease(&mut registry, second);
}

#[test]
fn nothing_is_missing_after_a_drain() {
    let mut registry = Registry::new(64);
    let leases: Vec<_> = (0..64).map(|slot| lend(&mut registry, slot)).collect();
    assert_eq!(registry.lent().count(), 64);
    for lease in leases {
        give_back_lease(&mut registry, lease);
    }
    assert_eq!(registry.lent().count(), 0);
    let stats = registry.stats();
    assert_eq!((stats.reserved, stats.released), (64, 64));
}

#[test]
fn a_lost_lease_is_found() {
    let mut registry = Registry::new(4);
    let lease = lend(&mut registry, 2);
    let _borrow = registry.borrow(&lease).unwrap();
    drop(lease);
    let leaks: Vec<_> = registry.lent().collect();
    assert_eq!(leaks.len(), 1);
    assert_eq!((leaks[0].slot, leaks[0].owner, leaks[0].borrows), (SlotIndex(2), owner(2), 1));
    assert!(matches!(registry.reserve(SlotIndex(2), owner(9), 0), Err(Busy::Lent(_))));
}

#[test]
#[should_panic(expected = "does not belong to this registry")]
fn a_foreign_lease_is_refused() {
    let mut one = Registry::new(1);
    let mut other = Registry::new(1);
    let lease = lend(&mut one, 0);
    let _ = other.borrow(&lease);
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Lend(u16),
    Borrow(u16),
    /// Gives back the n-th borrow ever made, live or not.
    GiveBack(usize),
    Retire(u16),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (0..5_u16).prop_map(Step::Lend),
        (0..4_u16).prop_map(Step::Borrow),
        (0..64_usize).prop_map(Step::GiveBack),
        (0..4_u16).prop_map(Step::Retire),
    ]
}

/// The model: per slot the numbers of the borrows that are out, if it is lent.
#[derive(Default)]
struct Model {
    slots: [Option<Vec<usize>>; 4],
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn random_operations_agree_with_the_model(steps in prop::collection::vec(step(), 1..120)) {
        let mut registry = Registry::new(4);
        let mut model = Model::default();
        let mut leases: [Option<Lease<Active>>; 4] = Default::default();
        let mut borrows: Vec<Borrow> = Vec::new();
        for step in steps {
            match step {
                Step::Lend(slot) => {
                    let free = model.slots.get(usize::from(slot)).is_some_and(Option::is_none);
                    let reserved = registry.reserve(SlotIndex(slot), owner(slot), 0);
                    prop_assert_eq!(reserved.is_ok(), free);
                    if let Ok(lease) = reserved {
                        leases[usize::from(slot)] = Some(registry.activate(lease));
                        model.slots[usize::from(slot)] = Some(Vec::new());
                    }
                }
                Step::Borrow(slot) => {
                    if let Some(lease) = &leases[usize::from(slot)] {
                        model.slots[usize::from(slot)].as_mut().unwrap().push(borrows.len());
                        borrows.push(registry.borrow(lease).unwrap());
                    }
                }
                Step::GiveBack(number) => {
                    if let Some(borrow) = borrows.get(number) {
                        let out = model.slots[usize::from(borrow.slot().0)].as_mut();
                        let live = out.and_then(|out| {
                            // By key: what the kernel gives back is compared with what is out.
                            let at = out.iter().position(|out| borrows[*out] == *borrow)?;
                            out.swap_remove(at);
                            u32::try_from(out.len()).ok()
                        });
                        let left = registry.give_back(*borrow).ok();
                        prop_assert_eq!(left, live);
                    }
                }
                Step::Retire(slot) => {
                    if let Some(lease) = leases[usize::from(slot)].take() {
                        let out = model.slots[usize::from(slot)].as_ref().unwrap().len();
                        match registry.retire(lease) {
                            Ok(lease) => {
                                prop_assert_eq!(out, 0);
                                registry.release(lease);
                                model.slots[usize::from(slot)] = None;
                            }
                            Err(refused) => {
                                prop_assert_eq!(usize::try_from(refused.borrows).unwrap(), out);
                                prop_assert!(out > 0);
                                leases[usize::from(slot)] = Some(refused.lease);
                            }
                        }
                    }
                }
            }
            let lent = model.slots.iter().flatten().count();
            prop_assert_eq!(registry.lent().count(), lent);
        }
    }
}

//! The choice of slots, in tables that need several words of free bits, and several words at the
//! second level.

use std::collections::BTreeMap;

use bufreg::{Busy, Incarnation, Lease, NoneFree, Owner, Registry, Reserved, SlotIndex};
use proptest::prelude::*;

const OWNER: Owner = Owner { device: 0, qid: 0, tag: 0 };
/// More than 64 × 64, and no multiple of 64.
const CAPACITY: u16 = 64 * 64 + 70;

#[test]
fn a_chosen_and_an_automatic_slot_never_collide() {
    let mut registry = Registry::new(CAPACITY, Incarnation(0));
    let chosen = [0, 1, 63, 64, 4095, 4096, CAPACITY - 1];
    let chosen = chosen.map(|slot| registry.reserve(SlotIndex(slot), OWNER, 0).unwrap());
    let chosen_slots = chosen.each_ref().map(Lease::slot);
    let rest: Vec<_> = std::iter::from_fn(|| registry.reserve_any(OWNER, 0).ok()).collect();
    let slots: Vec<_> = rest.iter().map(Lease::slot).collect();
    let expected: Vec<_> =
        (0..CAPACITY).map(SlotIndex).filter(|slot| !chosen_slots.contains(slot)).collect();
    assert_eq!(slots, expected);

    for lease in chosen.into_iter().rev() {
        let slot = lease.slot();
        registry.cancel(lease);
        let lease = registry.reserve_any(OWNER, 0).unwrap();
        assert_eq!(lease.slot(), slot, "the only free slot");
    }
}

#[test]
#[cfg_attr(miri, ignore = "takes minutes")]
fn tables_of_any_size_are_used_up() {
    for capacity in [0, 1, 63, 64, 65, 128, 4096, 16_384, u16::MAX] {
        let mut registry = Registry::new(capacity, Incarnation(0));
        for slot in (0..capacity).map(SlotIndex) {
            assert_eq!(registry.reserve_any(OWNER, 0).unwrap().slot(), slot);
        }
        assert_eq!(registry.reserve_any(OWNER, 0).unwrap_err(), NoneFree);
        let mut lent = registry.lent();
        assert!((0..capacity).all(|slot| lent.next().unwrap().slot == SlotIndex(slot)));
        assert!(lent.next().is_none());
        drop(lent);
        let beyond = registry.reserve(SlotIndex(capacity), OWNER, 0).unwrap_err();
        assert_eq!(beyond, Busy::Beyond(SlotIndex(capacity)));
    }
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Choose(u16),
    Any,
    /// Cancels the held lease with this index, modulo their number.
    Cancel(usize),
}

fn step() -> impl Strategy<Value = Step> {
    // Few distinct words, so that each becomes empty and full repeatedly.
    let slot = prop_oneof![0..4_u16, 62..66_u16, 4094..4098_u16, CAPACITY - 2..CAPACITY + 2];
    prop_oneof![slot.prop_map(Step::Choose), Just(Step::Any), (0..64_usize).prop_map(Step::Cancel)]
}

/// Miri is slow, and allows no file to record failures in.
fn config() -> ProptestConfig {
    let config = ProptestConfig::with_cases(if cfg!(miri) { 1 } else { 100 });
    if cfg!(miri) { ProptestConfig { failure_persistence: None, ..config } } else { config }
}

proptest! {
    #![proptest_config(config())]

    /// All slots are lent except those that the steps change, so that the lowest free slot can be
    /// anywhere.
    #[test]
    fn the_lowest_free_slot_is_found(steps in prop::collection::vec(step(), 1..80)) {
        let mut registry = Registry::new(CAPACITY, Incarnation(0));
        let mut held: BTreeMap<u16, Lease<Reserved>> = (0..CAPACITY)
            .map(|slot| (slot, registry.reserve_any(OWNER, 0).unwrap()))
            .collect();
        for slot in [0, 1, 2, 3, 63, 64, 65, 4095, 4096, 4097, CAPACITY - 1] {
            registry.cancel(held.remove(&slot).unwrap());
        }
        for step in steps {
            match step {
                Step::Choose(slot) => {
                    let free = slot < CAPACITY && !held.contains_key(&slot);
                    let lease = registry.reserve(SlotIndex(slot), OWNER, 0);
                    prop_assert_eq!(lease.is_ok(), free);
                    held.extend(lease.ok().map(|lease| (slot, lease)));
                }
                Step::Any => {
                    let lowest = (0..CAPACITY).find(|slot| !held.contains_key(slot));
                    let lease = registry.reserve_any(OWNER, 0).ok();
                    prop_assert_eq!(lease.as_ref().map(|lease| lease.slot().0), lowest);
                    held.extend(lease.map(|lease| (lease.slot().0, lease)));
                }
                Step::Cancel(number) => {
                    let slot = *held.keys().rev().nth(number).unwrap();
                    registry.cancel(held.remove(&slot).unwrap());
                }
            }
            prop_assert_eq!(registry.lent().count(), held.len());
        }
    }
}

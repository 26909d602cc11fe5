//! A lease that contradicts the registry is of another registry, and panics. One test for each kind
//! of contradiction.

use bufreg::{Incarnation, Lease, Owner, Registry, Reserved, SlotIndex};

const OWNER: Owner = Owner { device: 0, qid: 0, tag: 0 };

fn reserve(registry: &mut Registry, slot: u16) -> Lease<Reserved> {
    registry.reserve(SlotIndex(slot), OWNER, 0).unwrap()
}

#[test]
#[should_panic(expected = "lease of slot 0 does not belong to this registry")]
fn of_a_free_slot() {
    let lease = reserve(&mut Registry::new(1, Incarnation(0)), 0);
    let _ = Registry::new(1, Incarnation(0)).activate(lease);
}

#[test]
#[should_panic(expected = "lease of slot 1 does not belong to this registry")]
fn of_a_slot_beyond_the_table() {
    let lease = reserve(&mut Registry::new(2, Incarnation(0)), 1);
    let _ = Registry::new(1, Incarnation(0)).activate(lease);
}

#[test]
#[should_panic(expected = "does not belong to this registry")]
fn of_another_incarnation() {
    let lease = reserve(&mut Registry::new(1, Incarnation(0)), 0);
    let mut other = Registry::new(1, Incarnation(1));
    let _own = reserve(&mut other, 0);
    other.cancel(lease);
}

#[test]
#[should_panic(expected = "does not belong to this registry")]
fn of_another_generation() {
    let lease = reserve(&mut Registry::new(1, Incarnation(0)), 0);
    let mut other = Registry::new(1, Incarnation(0));
    let first = reserve(&mut other, 0);
    other.cancel(first);
    let _second = reserve(&mut other, 0);
    let _ = other.activate(lease);
}

#[test]
#[should_panic(expected = "does not belong to this registry")]
fn of_another_state() {
    let lease = reserve(&mut Registry::new(1, Incarnation(0)), 0);
    let mut other = Registry::new(1, Incarnation(0));
    let own = reserve(&mut other, 0);
    let _own = other.activate(own);
    other.cancel(lease);
}

//! What the registry promises. This module holds no code.
//!
//! The tests named are in `tests/invariants.rs`, but for 11, which is in `tests/free_slots.rs`. All
//! invariants together are checked under random operations, restarts and lost leases included, by
//! `random_operations_agree_with_the_model` in `tests/model.rs`, which compares all that the
//! registry tells with a model after every step.
//!
//! 1. A slot is lent to one request at a time (`a_slot_is_lent_once`).
//! 2. A slot with borrows is not retired, hence not given back
//!    (`a_borrowed_slot_is_not_retired`).
//! 3. A borrow is given back at most once (`a_borrow_is_given_back_once`), and no other borrow
//!    ends with it (`a_borrow_outlives_those_beside_it`).
//! 4. A borrow of an older generation changes nothing and is counted
//!    (`an_older_generation_changes_nothing`).
//! 5. A borrow of another incarnation changes nothing and is counted
//!    (`another_incarnation_changes_nothing`).
//! 6. After all leases are released no slot is missing (`nothing_is_missing_after_a_drain`).
//! 7. A lease that was lost is found and named with its borrowers, and its slot is never lent again
//!    (`a_lost_lease_is_found`).
//! 8. A lease has at most [`MAX_BORROWS`] borrows (`borrows_are_bounded`).
//! 9. A quarantined slot is not lent (`a_quarantined_slot_is_not_lent`), borrowed or retired until
//!    settled (the examples below do not compile).
//! 10. A quarantined slot with borrows is not settled (`a_borrowed_slot_is_not_settled`).
//! 11. A slot chosen by the caller and one chosen by the registry are never the same
//!     (`a_chosen_and_an_automatic_slot_never_collide`).
//! 12. The counts of slots by state add up to the capacity (`counts_add_up_to_the_capacity`).
//!
//! # What they rest on
//! * A lease is made by `reserve`, `reserve_any` and `lend` only, cannot be copied, and is consumed
//!   by each transition. One that contradicts the registry is of another registry: a bug, which ends in a
//!   panic (`tests/foreign_leases.rs`). One that happens to agree in incarnation, slot, generation
//!   and state is not recognised: a lane must keep to its own registry.
//! * Generations wrap after 2^32 leases of a slot, and the numbers that tell the borrows of a lease
//!   apart after as many borrows. A stale borrow would have to be older than that to be taken for a
//!   live one.
//! * Two incarnations that the kernel can know of at the same time have different numbers. The
//!   caller sees to that.
//!
//! # What rests on them
//! * *A success is the whole request*: the engine answers with all bytes that were delivered, or with an
//!   error. It does so only once the lease is retired or taken back, that is after its last borrow
//!   (2), and a lease is retired, taken back and released whole: there is no way to give back a
//!   part, so nothing of it can come to a second answer.
//!
//! # What does not compile
//! A quarantined slot is not borrowed,
//! ```compile_fail,E0308
//! # use bufreg::{Active, Borrower, Lease, Registry};
//! fn borrow(registry: &mut Registry, lease: Lease<Active>) {
//!     let lease = registry.quarantine(lease);
//!     let _ = registry.borrow(&lease, Borrower(0));
//! }
//! ```
//! nor retired.
//! ```compile_fail,E0308
//! # use bufreg::{Active, Lease, Registry};
//! fn retire(registry: &mut Registry, lease: Lease<Active>) {
//!     let lease = registry.quarantine(lease);
//!     let _ = registry.retire(lease);
//! }
//! ```
//! A reserved one is not quarantined: as long as its registration is unanswered, it is nobody's
//! anyway.
//! ```compile_fail,E0277
//! # use bufreg::{Lease, Registry, Reserved};
//! fn quarantine(registry: &mut Registry, lease: Lease<Reserved>) {
//!     let _ = registry.quarantine(lease);
//! }
//! ```
//! No lease is released twice.
//! ```compile_fail,E0382
//! # use bufreg::{Lease, Registry, Retiring};
//! fn release(registry: &mut Registry, lease: Lease<Retiring>) {
//!     registry.release(lease);
//!     registry.release(lease);
//! }
//! ```
//!
//! [`MAX_BORROWS`]: crate::MAX_BORROWS

//! What the registry promises. This module holds no code.
//!
//! The tests named below are in `tests/invariants.rs`, except for 11, which is in
//! `tests/free_slots.rs`. `random_operations_agree_with_the_model` in `tests/model.rs` checks all
//! invariants together: it performs random operations, including restarts and lost leases, and
//! compares everything the registry reports with a model after every step.
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
//! 7. A lost lease is reported together with its borrowers, and its slot is never lent again
//!    (`a_lost_lease_is_found`).
//! 8. A lease has at most [`MAX_BORROWS`] borrows (`borrows_are_bounded`).
//! 9. A quarantined slot is not lent (`a_quarantined_slot_is_not_lent`), borrowed or retired until
//!    settled (the examples below do not compile).
//! 10. A quarantined slot with borrows is not settled (`a_borrowed_slot_is_not_settled`).
//! 11. A slot chosen by the caller and one chosen by the registry are never the same
//!     (`a_chosen_and_an_automatic_slot_never_collide`).
//! 12. The counts of slots by state add up to the capacity (`counts_add_up_to_the_capacity`).
//!
//! # What they depend on
//! * Only `reserve`, `reserve_any` and `lend` make leases. A lease cannot be copied, and each
//!   transition consumes it. A lease that contradicts the registry belongs to another registry:
//!   this is a bug and panics (`tests/foreign_leases.rs`). A foreign lease that happens to agree in
//!   incarnation, slot, generation and state is not detected: a lane must use only its own
//!   registry.
//! * Generations wrap after 2^32 leases of a slot, and the sequence numbers of borrows after 2^32
//!   borrows of a lease. Only a stale borrow older than that could be mistaken for a live one.
//! * The caller ensures that two incarnations that the kernel may know at the same time have
//!   different numbers.
//!
//! # What depends on them
//! * *A success is the whole request*: the engine answers with all bytes that were delivered, or
//!   with an error. It answers only after the lease was retired or taken back, and so after its
//!   last borrow (2). A lease is retired, taken back and released as a whole, so no part of a
//!   request can be answered a second time.
//!
//! # What does not compile
//! A quarantined slot cannot be borrowed,
//! ```compile_fail,E0308
//! # use bufreg::{Active, Borrower, Lease, Registry};
//! fn borrow(registry: &mut Registry, lease: Lease<Active>) {
//!     let lease = registry.quarantine(lease);
//!     let _ = registry.borrow(&lease, Borrower(0));
//! }
//! ```
//! or retired.
//! ```compile_fail,E0308
//! # use bufreg::{Active, Lease, Registry};
//! fn retire(registry: &mut Registry, lease: Lease<Active>) {
//!     let lease = registry.quarantine(lease);
//!     let _ = registry.retire(lease);
//! }
//! ```
//! A reserved slot cannot be quarantined: nobody uses it before its registration is answered.
//! ```compile_fail,E0277
//! # use bufreg::{Lease, Registry, Reserved};
//! fn quarantine(registry: &mut Registry, lease: Lease<Reserved>) {
//!     let _ = registry.quarantine(lease);
//! }
//! ```
//! A lease cannot be released twice.
//! ```compile_fail,E0382
//! # use bufreg::{Lease, Registry, Retiring};
//! fn release(registry: &mut Registry, lease: Lease<Retiring>) {
//!     registry.release(lease);
//!     registry.release(lease);
//! }
//! ```
//!
//! [`MAX_BORROWS`]: crate::MAX_BORROWS

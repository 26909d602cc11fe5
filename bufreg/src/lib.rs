//! The registry of lent buffers: which slot of a ring's buffer table is lent for which request,
//! since when, and how many operations borrow it.
//!
//! The registry issues no system call and allocates nothing after construction. It does not
//! move buffers; it is the place where the program's knowledge about them is kept, so that a
//! buffer is given back once, after its last borrow, and never while the kernel may still use
//! it.
//!
//! ```text
//!            reserve                activate               retire
//!   Free ───────────────> Reserved ──────────> Active ───────────────> Retiring
//!    ^                       │                  ^  │ borrow/give_back     │
//!    │        cancel         │                  └──┘                      │
//!    ├───────────────────────┘                                            │
//!    └────────────────────────────────────────────────────────────────────┘
//!                                  release
//! ```
//!
//! * *Reserved*: the slot is spoken for, its registration is under way.
//! * *Active*: the kernel has the request's buffer in the slot; operations may borrow it.
//! * *Retiring*: no new borrow is possible; the buffer is on its way back.
//!
//! What code holds is typed: a [`Lease`] carries its state as a parameter, is neither `Copy`
//! nor `Clone`, and each transition consumes it. What the kernel holds is plain data: a
//! [`Borrow`] names slot and generation, travels with an operation, and is checked when it
//! comes back.
//!
//! # Invariants
//! Each is checked by the test named.
//!
//! 1. A slot is lent to one request at a time (`a_slot_is_lent_once`).
//! 2. A slot with borrows is not retired, hence not given back (`a_borrowed_slot_is_not_retired`).
//! 3. A borrow is given back at most once (`a_borrow_is_given_back_once`).
//! 4. What carries an older generation changes nothing and is counted (`stale_keys_change_nothing`).
//! 5. After all leases are released no slot is missing (`nothing_is_missing_after_a_drain`).
//! 6. A lease that was lost is found and named, and its slot is never lent again
//!    (`a_lost_lease_is_found`).
//! 7. A lease has at most [`MAX_BORROWS`] borrows (`borrows_are_bounded`).
//!
//! All together are checked against a model under random operations
//! (`random_operations_agree_with_the_model`).
//!
//! # Example
//! ```
//! use bufreg::{Owner, Registry, SlotIndex};
//!
//! let mut registry = Registry::new(2);
//! let owner = Owner { device: 0, qid: 0, tag: 7 };
//! let lease = registry.reserve(SlotIndex(1), owner, 100).unwrap();
//! let lease = registry.activate(lease);
//! let borrow = registry.borrow(&lease).unwrap();
//! let lease = registry.retire(lease).unwrap_err().lease; // still borrowed
//! assert_eq!(registry.give_back(borrow), Ok(0));
//! let lease = registry.retire(lease).unwrap();
//! registry.release(lease);
//! assert_eq!(registry.lent().count(), 0);
//! ```

#![forbid(unsafe_code)]

mod registry;

pub use registry::{
    Active, Borrow, Busy, Generation, Lease, Lent, MAX_BORROWS, NotBorrowable, Owner, Registry,
    Reserved, Retiring, SlotIndex, Stale, Stats, StillBorrowed,
};

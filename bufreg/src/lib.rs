//! The registry of lent buffers: which slot of a ring's buffer table is lent for which request,
//! since when, and which operations borrow it.
//!
//! The registry issues no system call, reads no clock and allocates nothing after construction. It
//! does not move buffers; it is the place where the program's knowledge about them is kept, so
//! that a buffer is given back once, after its last borrow, and never while the kernel may still
//! use it. `docs/lifetimes.md` tells a buffer's life, the kernel's part in it included.
//!
//! ```text
//!          reserve               activate            retire               release
//!   Free ────────────> Reserved ──────────> Active ──────────> Retiring ──────────> Free
//!    ^      cancel        │                   │                 │    ^
//!    └────────────────────┘                   │ quarantine      │    │ settle
//!                                             v                 v    │
//!                                             Quarantined ───────────┘
//! ```
//!
//! * *Reserved*: the slot is spoken for, its registration is under way.
//! * *Active*: the kernel has the request's buffer in the slot; operations may borrow it.
//! * *Retiring*: no new borrow is possible; the buffer is on its way back.
//! * *Quarantined*: nobody knows whether the kernel still uses the buffer, so that nothing is done
//!   with the slot until that is settled.
//!
//! What code holds is typed: a [`Lease`] carries its state as a parameter, is neither `Copy`
//! nor `Clone`, and each transition consumes it. What the kernel holds is plain data: a
//! [`Borrow`] names incarnation, slot, generation and place, travels with an operation, and is
//! checked when it comes back.
//!
//! What the registry promises, and which test checks it, is listed in [`invariants`].
//!
//! # Example
//! ```
//! use bufreg::{Borrower, Incarnation, Owner, Registry, SlotIndex};
//!
//! let mut registry = Registry::new(2, Incarnation(0));
//! let owner = Owner { device: 0, qid: 0, tag: 7 };
//! let lease = registry.reserve(SlotIndex(1), owner, 100).unwrap();
//! let lease = registry.activate(lease);
//! let borrow = registry.borrow(&lease, Borrower(42)).unwrap();
//! let lease = registry.retire(lease).unwrap_err().lease; // still borrowed
//! assert!(registry.borrowers(SlotIndex(1)).eq([Borrower(42)]));
//! assert_eq!(registry.give_back(borrow), Ok(0));
//! let lease = registry.retire(lease).unwrap();
//! registry.release(lease);
//! assert_eq!(registry.lent().count(), 0);
//! ```

#![forbid(unsafe_code)]

mod error;
mod free;
mod identity;
pub mod invariants;
mod lease;
mod registry;
mod report;

pub use error::{Busy, NoneFree, NotBorrowable, Stale, StillBorrowed, Unsettled};
pub use identity::{Borrower, Generation, Incarnation, LeaseKey, Owner, SlotIndex};
pub use lease::{
    Active, Borrow, Lease, MAX_BORROWS, Quarantinable, Quarantined, Reserved, Retiring, Sole,
};
pub use registry::Registry;
pub use report::{Borrowers, Counts, Leak, Lent, SlotState, Stats};

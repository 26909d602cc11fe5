//! The registry of lent buffers: for each slot of a ring's buffer table, the request that it is
//! lent for, since when, and the operations that borrow it.
//!
//! The registry issues no system call, reads no clock and allocates nothing after construction. It
//! does not move buffers. It records who uses them, so that a buffer is given back once, after its
//! last borrow, and never while the kernel may still use it. `docs/lifetimes.md` describes the life
//! of a buffer, including the kernel's part.
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
//! * *Reserved*: the buffer is being registered in the slot.
//! * *Active*: the request's buffer is in the slot, and operations may borrow it.
//! * *Retiring*: no new borrow is possible, and the buffer is being given back.
//! * *Quarantined*: it is unknown whether the kernel still uses the buffer. The slot is not used
//!   until that is settled.
//!
//! What code holds is typed: a [`Lease`] has its state as a type parameter, is neither `Copy` nor
//! `Clone`, and each transition consumes it. What the kernel holds is plain data: a [`Borrow`]
//! names incarnation, slot, generation and index, travels with an operation, and is checked when it
//! comes back.
//!
//! [`invariants`] lists what the registry promises, and the test for each promise.
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

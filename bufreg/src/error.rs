//! Errors of the registry.

use crate::identity::SlotIndex;
use crate::lease::{Active, Lease, MAX_BORROWS, Quarantined};
use crate::report::Lent;

/// The chosen slot cannot be reserved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Busy {
    /// The slot is lent.
    #[error("{0}")]
    Lent(Lent),
    /// The registry has no such slot.
    #[error("slot {} is beyond the table", .0.0)]
    Beyond(SlotIndex),
}

/// Every slot is lent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("every slot of the table is lent")]
pub struct NoneFree;

/// The lease has [`MAX_BORROWS`] borrows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{MAX_BORROWS} operations borrow the lease, which is the limit")]
pub struct NotBorrowable;

/// The borrow belongs to another incarnation or to an earlier lending of its slot, or was already
/// given back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("stale borrow")]
pub struct Stale;

/// The lease cannot be retired yet. The error returns it.
#[derive(Debug, thiserror::Error)]
#[error("{borrows} operations still borrow slot {}", lease.slot().0)]
pub struct StillBorrowed {
    /// The lease, unchanged.
    pub lease: Lease<Active>,
    /// How many operations borrow it.
    pub borrows: u32,
}

/// The lease cannot be settled yet. The error returns it.
#[derive(Debug, thiserror::Error)]
#[error("{borrows} operations still borrow the quarantined slot {}", lease.slot().0)]
pub struct Unsettled {
    /// The lease, unchanged.
    pub lease: Lease<Quarantined>,
    /// How many operations borrow it.
    pub borrows: u32,
}

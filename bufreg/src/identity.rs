//! By which names registry, caller and kernel speak of the same thing.

/// Which life of the server a key was made in. Keys pass through the kernel, which may outlive
/// the server that made them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Incarnation(pub u32);

impl Incarnation {
    /// The life after this one; wraps.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0.wrapping_add(1))
    }
}

/// An index into a ring's buffer table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SlotIndex(pub u16);

/// How often a slot had been reserved before in this incarnation; wraps after 2^32 times.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Generation(pub u32);

/// The request that a slot is lent for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Owner {
    /// Device id.
    pub device: u32,
    /// Queue of the device.
    pub qid: u16,
    /// Tag in the queue.
    pub tag: u16,
}

/// The name by which the caller knows a borrowing operation. Kept and reported, never
/// interpreted; printed in hexadecimal, since such names are usually packed fields.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Borrower(pub u64);

impl std::fmt::Display for Borrower {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// Names one lending of one slot. Plain data: it gives no right to the slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LeaseKey {
    /// The life of the server that lent it.
    pub incarnation: Incarnation,
    /// The slot.
    pub slot: SlotIndex,
    /// Which lending of the slot.
    pub generation: Generation,
}

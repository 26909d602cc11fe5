//! Identifiers that registry, caller and kernel share.

/// The incarnation of the server that made a key. Keys pass through the kernel, which may return
/// them after that server has died.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Incarnation(pub u32);

impl Incarnation {
    /// The next incarnation. Wraps.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0.wrapping_add(1))
    }
}

/// An index into a ring's buffer table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SlotIndex(pub u16);

/// How many times the slot was reserved before in this incarnation. Wraps after 2^32 times.
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

/// The caller's identifier of a borrowing operation. The registry keeps and reports it and never
/// interprets it. It is printed in hexadecimal, since such identifiers are usually packed fields.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Borrower(pub u64);

impl std::fmt::Display for Borrower {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// Identifies one lending of one slot. Plain data: it gives no right to the slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LeaseKey {
    /// The incarnation of the server that lent it.
    pub incarnation: Incarnation,
    /// The slot.
    pub slot: SlotIndex,
    /// Which lending of the slot.
    pub generation: Generation,
}

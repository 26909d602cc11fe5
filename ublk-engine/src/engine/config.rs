//! What an engine is made for.

use bufreg::Incarnation;

use crate::lend::LendMode;
use crate::request::Geometry;
use crate::units::Qid;

/// The device and queue that an engine serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueIdentity {
    /// Device id.
    pub device: u32,
    /// Queue of the device.
    pub qid: Qid,
    /// Number of tags.
    pub depth: u16,
}

/// Which slot a request's buffer goes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SlotChoice {
    /// Tag *t* has the slot with this number plus *t*.
    From(u16),
    /// Whichever is free; only where the server registers.
    AnyFree,
}

/// The lane's buffer table: first the slots that buffers of the driver are lent in, behind them
/// buffers of the server's own, through which data is copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotTable {
    /// Slots for lent buffers.
    pub lent: u16,
    /// Buffers of the server. In the copy modes there is one a tag; else a few, for requests whose
    /// buffer could not be registered, and none where the device has no user copy.
    pub pool: u16,
    /// Scratch buffers, behind those of the pool: one a tag if the planner wants any, else none.
    pub scratch: u16,
    /// How slots for lent buffers are chosen.
    pub choice: SlotChoice,
}

impl SlotTable {
    /// Number of slots.
    #[must_use]
    pub const fn capacity(&self) -> u16 {
        self.lent.saturating_add(self.buffers())
    }

    /// Number of the server's own buffers.
    #[must_use]
    pub const fn buffers(&self) -> u16 {
        self.pool.saturating_add(self.scratch)
    }
}

/// What an engine is made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EngineConfig {
    /// The queue.
    pub queue: QueueIdentity,
    /// Which life of the server this is.
    pub incarnation: Incarnation,
    /// How the device lends.
    pub lend: LendMode,
    /// The buffer table.
    pub slots: SlotTable,
    /// What requests have to keep to.
    pub geometry: Geometry,
    /// Nanoseconds after which an operation is cancelled; none where nobody asked.
    pub deadline: Option<u64>,
}

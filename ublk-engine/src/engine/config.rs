//! The configuration of an engine.

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

/// How the slot for a request's buffer is chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SlotChoice {
    /// Tag *t* has slot number *t* plus this.
    From(u16),
    /// Any free slot. Only if the server registers.
    AnyFree,
}

/// The lane's buffer table: first the slots for lent buffers, then the server's own buffers,
/// through which data is copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotTable {
    /// Slots for lent buffers.
    pub lent: u16,
    /// Buffers of the server. The copy modes have one for each tag. Other modes have a few, for
    /// requests with a buffer that could not be registered, or none if the device has no user copy.
    pub pool: u16,
    /// Scratch buffers, after those of the pool: one for each tag if the planner needs them, else
    /// none.
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

/// The configuration of an engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EngineConfig {
    /// The queue.
    pub queue: QueueIdentity,
    /// The incarnation of the server.
    pub incarnation: Incarnation,
    /// The lend mode.
    pub lend: LendMode,
    /// The buffer table.
    pub slots: SlotTable,
    /// The limits of requests.
    pub geometry: Geometry,
    /// The time after which an operation is cancelled, in nanoseconds. `None` for no deadline.
    pub deadline: Option<u64>,
}

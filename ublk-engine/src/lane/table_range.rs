//! The ranges of a queue in the tables of its ring.

use bufreg::SlotIndex;
use uring_ext::ring::MAX_BUFFER_SLOTS;
use uring_ext::sqe::FixedFile;

use crate::engine::SlotTable;

/// The fixed file of a backing if the ring serves one queue: the character device is the first
/// file, the backings follow.
#[must_use]
pub fn backing_file(index: u16) -> FixedFile {
    TableRange::default().backing_file(index)
}

/// A slot number beyond any buffer table.
pub(super) const NO_SLOT: u16 = 1 << 14;
const _: () = assert!(MAX_BUFFER_SLOTS <= 1 << 14);

/// The ranges of a queue's files and slots in the tables of its ring. By default they begin at 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TableRange {
    /// The fixed file of the character device. The backings follow.
    pub first_file: u32,
    /// The slot of the ring that is slot 0 of the queue.
    pub first_slot: u16,
    /// The ring's slot of the spare buffer that its queues share. It replaces the queue's own pool,
    /// which then has no slots.
    pub spare: Option<u16>,
}

impl TableRange {
    /// The fixed file of the character device.
    #[must_use]
    #[inline]
    pub const fn cdev(self) -> FixedFile {
        FixedFile(self.first_file)
    }

    /// The fixed file of a backing.
    #[must_use]
    #[inline]
    pub fn backing_file(self, index: u16) -> FixedFile {
        FixedFile(self.first_file + 1 + u32::from(index))
    }

    /// The ring's slot for this slot of the queue.
    #[inline]
    pub(super) const fn slot(self, slot: SlotIndex) -> u16 {
        self.first_slot + slot.0
    }

    /// The ring's slot of this buffer of the server.
    pub(super) const fn pool_slot(self, slots: &SlotTable, index: u16) -> u16 {
        match self.spare {
            Some(spare) if index < slots.pool => spare,
            Some(_) => self.first_slot + slots.lent + index - slots.pool,
            None => self.first_slot + slots.lent + index,
        }
    }
}

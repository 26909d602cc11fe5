//! The table of operations in flight.

use bufreg::Borrow;
use slab::Slab;
use uring_ext::Errno;

use super::Progress;
use crate::plan::{Op, WINDOW_OPS};
use crate::units::Tag;

/// Names an operation in flight: its place in the table, and a number that tells it from earlier
/// ones in that place. Travels through the kernel as `user_data`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct OpKey {
    /// Place in the table, below 2^24.
    pub place: u32,
    /// Which submission this is.
    pub serial: u32,
}

/// An operation in flight.
#[derive(Clone, Copy, Debug)]
pub(super) struct InFlight {
    pub tag: Tag,
    /// What is left of it.
    pub op: Op,
    pub borrow: Option<Borrow>,
    pub retries: u8,
}

impl InFlight {
    /// Takes note of `moved` bytes (0 for what moves none).
    pub fn advance(&mut self, moved: u32) -> Progress {
        if !self.op.has_data() {
            return Progress::Done;
        }
        let moved_bytes = u64::from(moved);
        if moved == 0 || moved_bytes > self.op.len {
            // The end of the backing, or a drive that takes nothing: no way to fill the rest.
            return Progress::Failed(Errno::EIO);
        }
        self.op.offset += moved_bytes;
        self.op.buf_offset += moved;
        self.op.len -= moved_bytes;
        self.retries = 0;
        if self.op.len == 0 { Progress::Done } else { Progress::Again }
    }
}

#[derive(Debug)]
struct Entry {
    serial: u32,
    inflight: InFlight,
}

/// Room for a full window of every tag, allocated once.
#[derive(Debug)]
pub(super) struct InFlightTable {
    entries: Slab<Entry>,
    capacity: usize,
    next_serial: u32,
}

impl InFlightTable {
    pub fn new(depth: u16) -> Self {
        let capacity = usize::from(depth) * WINDOW_OPS;
        Self { entries: Slab::with_capacity(capacity), capacity, next_serial: 0 }
    }

    /// Adds an operation; `None` if the table is full.
    pub fn insert(&mut self, inflight: InFlight) -> Option<OpKey> {
        if self.entries.len() == self.capacity {
            return None;
        }
        let serial = self.serial();
        let place = self.entries.insert(Entry { serial, inflight });
        Some(OpKey { place: u32::try_from(place).ok()?, serial })
    }

    pub fn get_mut(&mut self, key: OpKey) -> Option<&mut InFlight> {
        let entry = self.entries.get_mut(usize::try_from(key.place).ok()?)?;
        (entry.serial == key.serial).then_some(&mut entry.inflight)
    }

    /// Gives a live operation a new key, for its next submission.
    ///
    /// # Panics
    /// If the key is not live.
    pub fn renew(&mut self, key: OpKey) -> (OpKey, Op, Option<Borrow>) {
        let serial = self.serial();
        let entry = &mut self.entries[key.place as usize];
        assert_eq!(entry.serial, key.serial, "renewed a stale operation");
        entry.serial = serial;
        (OpKey { place: key.place, serial }, entry.inflight.op, entry.inflight.borrow)
    }

    pub fn remove(&mut self, key: OpKey) -> Option<InFlight> {
        self.get_mut(key)?;
        self.entries.try_remove(usize::try_from(key.place).ok()?).map(|entry| entry.inflight)
    }

    fn serial(&mut self) -> u32 {
        self.next_serial = self.next_serial.wrapping_add(1);
        self.next_serial
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::{BackingIndex, OpKind};

    fn inflight(kind: OpKind) -> InFlight {
        let op = Op { kind, backing: BackingIndex(0), offset: 1000, len: 4096, buf_offset: 512 };
        InFlight { tag: Tag(0), op, borrow: None, retries: 3 }
    }

    #[test]
    fn transfers_advance_by_what_was_moved() {
        let mut read = inflight(OpKind::Read);
        assert_eq!(read.advance(1024), Progress::Again);
        assert_eq!((read.op.offset, read.op.buf_offset, read.op.len), (2024, 1536, 3072));
        assert_eq!(read.retries, 0, "progress renews the retries");
        assert_eq!(read.advance(3072), Progress::Done);
    }

    #[test]
    fn nothing_or_too_much_moved_is_an_error() {
        for moved in [0, 4097] {
            let mut write = inflight(OpKind::Write { fua: false });
            assert_eq!(write.advance(moved), Progress::Failed(Errno::EIO), "{moved}");
        }
        assert_eq!(inflight(OpKind::Flush).advance(0), Progress::Done);
    }

    #[test]
    fn old_keys_find_nothing() {
        let mut table = InFlightTable::new(1);
        let first = table.insert(inflight(OpKind::Read)).unwrap();
        let (renewed, ..) = table.renew(first);
        assert!(table.get_mut(first).is_none());
        assert!(table.remove(renewed).is_some());
        let next = table.insert(inflight(OpKind::Read)).unwrap();
        assert_eq!(next.place, renewed.place);
        assert!(table.remove(renewed).is_none());
        assert!(table.remove(next).is_some());
    }

    #[test]
    fn the_table_is_bounded() {
        let mut table = InFlightTable::new(2);
        for _ in 0..2 * WINDOW_OPS {
            assert!(table.insert(inflight(OpKind::Read)).is_some());
        }
        assert!(table.insert(inflight(OpKind::Read)).is_none());
    }
}

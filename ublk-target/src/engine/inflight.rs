//! The table of operations in flight.

use bufreg::{Borrow, Borrower};
use slab::Slab;
use uring_ext::Errno;

use super::key::OpKey;
use crate::plan::{Op, WINDOW_OPS};
use crate::units::Tag;

/// What a completion means for its operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Progress {
    /// All of it is done.
    Done,
    /// The rest, or all of it again, is to be issued.
    Again,
    /// It will not be done.
    Failed(Errno),
}

/// How far the cancelling of an operation has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cancel {
    /// Nobody wants it.
    No,
    /// Asked for; the operation has not completed.
    Asked,
    /// Asked for long ago: the operation has neither completed nor been cancelled.
    Lost,
}

/// An operation in flight.
#[derive(Clone, Copy, Debug)]
pub(super) struct InFlight {
    pub tag: Tag,
    /// What is left of it.
    pub op: Op,
    /// Bytes moved so far.
    pub moved: u32,
    pub borrow: Option<Borrow>,
    pub retries: u8,
    /// How many operations have failed in whose place it was issued.
    pub substitutes: u8,
    pub cancel: Cancel,
    /// When it is cancelled, or given up for lost.
    pub deadline: u64,
}

impl InFlight {
    /// Goes back to the start of the block that it has come to, for somebody else to go on with: a
    /// drive may take whole blocks only.
    pub fn rewind(&mut self, block: u32) {
        let into = self.moved % block;
        self.op.offset -= u64::from(into);
        self.op.buf_offset -= into;
        self.op.len += u64::from(into);
        self.moved = 0;
    }

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
        self.moved += moved;
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
    transfers: usize,
}

impl InFlightTable {
    pub fn new(depth: u16) -> Self {
        let capacity = usize::from(depth) * WINDOW_OPS;
        Self { entries: Slab::with_capacity(capacity), capacity, next_serial: 0, transfers: 0 }
    }

    /// The key that the next operation added will have; `None` if the table is full.
    pub fn next_key(&self) -> Option<OpKey> {
        if self.entries.len() == self.capacity {
            return None;
        }
        let place = u16::try_from(self.entries.vacant_key()).ok()?;
        Some(OpKey { place, serial: self.next_serial })
    }

    /// Adds an operation under [`InFlightTable::next_key`].
    pub fn insert(&mut self, inflight: InFlight) {
        let serial = self.take_serial();
        self.transfers += usize::from(inflight.op.has_data());
        self.entries.insert(Entry { serial, inflight });
    }

    pub fn get_mut(&mut self, key: OpKey) -> Option<&mut InFlight> {
        let entry = self.entries.get_mut(usize::from(key.place))?;
        (entry.serial == key.serial).then_some(&mut entry.inflight)
    }

    /// Gives a live operation a new key, for its next submission.
    ///
    /// # Panics
    /// If the key is not live.
    pub fn renew(&mut self, key: OpKey) -> (OpKey, InFlight) {
        let serial = self.take_serial();
        let entry = &mut self.entries[usize::from(key.place)];
        assert_eq!(entry.serial, key.serial, "renewed a stale operation");
        entry.serial = serial;
        (OpKey { place: key.place, serial }, entry.inflight)
    }

    pub fn remove(&mut self, key: OpKey) -> Option<InFlight> {
        self.get_mut(key)?;
        let entry = self.entries.try_remove(usize::from(key.place))?;
        self.transfers -= usize::from(entry.inflight.op.has_data());
        Some(entry.inflight)
    }

    /// How many read or write.
    pub fn transfers(&self) -> usize {
        self.transfers
    }

    /// All operations, for what happens rarely.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = (OpKey, &mut InFlight)> {
        self.entries.iter_mut().filter_map(|(place, entry)| {
            let place = u16::try_from(place).ok()?;
            Some((OpKey { place, serial: entry.serial }, &mut entry.inflight))
        })
    }

    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The operation that the registry knows by this label.
    pub fn borrower(&self, borrower: Borrower) -> Option<&InFlight> {
        let [_, _, p1, p0, s3, s2, s1, s0] = borrower.0.to_be_bytes();
        let entry = self.entries.get(usize::from(u16::from_be_bytes([p1, p0])))?;
        (entry.serial == u32::from_be_bytes([s3, s2, s1, s0])).then_some(&entry.inflight)
    }

    fn take_serial(&mut self) -> u32 {
        let serial = self.next_serial;
        self.next_serial = serial.wrapping_add(1);
        serial
    }
}

impl OpKey {
    /// By which the registry knows the operation.
    pub(super) fn borrower(self) -> Borrower {
        Borrower((u64::from(self.place) << 32) | u64::from(self.serial))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::{BackingIndex, OpKind};

    fn inflight(kind: OpKind) -> InFlight {
        let op = Op { kind, backing: BackingIndex(0), offset: 1000, len: 4096, buf_offset: 512 };
        let (tag, cancel) = (Tag(0), Cancel::No);
        let (borrow, retries, substitutes) = (None, 3, 0);
        let deadline = u64::MAX;
        InFlight { tag, op, moved: 0, borrow, retries, substitutes, cancel, deadline }
    }

    fn insert(table: &mut InFlightTable) -> Option<OpKey> {
        let key = table.next_key()?;
        table.insert(inflight(OpKind::Read));
        Some(key)
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
    fn others_go_on_at_a_block() {
        let mut read = inflight(OpKind::Read);
        assert_eq!(read.advance(600), Progress::Again);
        read.rewind(512);
        assert_eq!((read.op.offset, read.op.buf_offset, read.op.len), (1512, 1024, 3584));
        read.rewind(512);
        assert_eq!(read.op.buf_offset, 1024, "once");
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
        let first = insert(&mut table).unwrap();
        let (renewed, _) = table.renew(first);
        assert!(table.get_mut(first).is_none());
        assert!(table.borrower(first.borrower()).is_none());
        assert!(table.borrower(renewed.borrower()).is_some());
        assert!(table.remove(renewed).is_some());
        let next = insert(&mut table).unwrap();
        assert_eq!(next.place, renewed.place);
        assert!(table.remove(renewed).is_none());
        assert!(table.remove(next).is_some());
        assert!(table.is_empty());
    }

    #[test]
    fn the_table_is_bounded() {
        let mut table = InFlightTable::new(2);
        for _ in 0..2 * WINDOW_OPS {
            assert!(insert(&mut table).is_some());
        }
        assert!(insert(&mut table).is_none());
    }
}

//! The table of operations in flight.

use bufreg::{Borrow, Borrower};
use uring_ext::Errno;

use super::key::OpKey;
use crate::plan::{BackingIndex, Op, OpKind, WINDOW_OPS};
use crate::units::Tag;

/// The state of an operation after a completion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Progress {
    /// All of it is done.
    Done,
    /// The rest, or all of it, has to be issued again.
    Again,
    /// It has failed.
    Failed(Errno),
}

/// The state of an operation's cancellation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cancel {
    /// Not cancelled.
    No,
    /// Cancellation was requested; the operation has not completed.
    Asked,
    /// Cancellation was requested long ago; the operation has neither completed nor been cancelled.
    Lost,
}

/// An operation in flight.
#[derive(Clone, Copy, Debug)]
pub(super) struct InFlight {
    pub tag: Tag,
    /// The rest of it.
    pub op: Op,
    /// Bytes moved so far.
    pub moved: u32,
    pub borrow: Option<Borrow>,
    pub retries: u8,
    /// The pause before it is issued again, in nanoseconds. While it is not 0, a delay is in flight
    /// instead.
    pub pause_ns: u64,
    /// How many failed operations it replaces.
    pub substitutes: u8,
    pub cancel: Cancel,
    /// When it is cancelled, or considered lost.
    pub deadline: u64,
}

impl InFlight {
    /// The initial contents of an entry.
    const fn nothing(tag: Tag) -> Self {
        let op =
            Op { kind: OpKind::Flush, backing: BackingIndex(0), offset: 0, len: 0, buf_offset: 0 };
        let (cancel, deadline) = (Cancel::No, u64::MAX);
        let (borrow, retries, substitutes, pause_ns) = (None, 0, 0, 0);
        Self { tag, op, moved: 0, borrow, retries, pause_ns, substitutes, cancel, deadline }
    }

    /// Goes back to the start of the current block: the rest is issued elsewhere, and a drive may
    /// take only whole blocks.
    pub fn rewind(&mut self, block: u32) {
        let into = self.moved % block;
        self.op.offset -= u64::from(into);
        self.op.buf_offset -= into;
        self.op.len += u64::from(into);
        self.moved = 0;
    }

    /// The operation in flight: itself, or the delay before it is issued again.
    pub const fn issued(&self) -> Op {
        if self.pause_ns == 0 {
            return self.op;
        }
        let backing = self.op.backing;
        Op { kind: OpKind::Delay, backing, offset: 0, len: self.pause_ns, buf_offset: 0 }
    }

    /// How many bytes to issue now. A transfer that is longer than `at_first` is limited to that
    /// until it has made progress.
    #[inline]
    pub const fn asked(&self, at_first: u64) -> u64 {
        let is_cut = self.op.len > at_first && self.moved == 0 && self.op.has_data();
        if is_cut { at_first } else { self.op.len }
    }

    /// Records `moved` bytes (0 for operations that move none).
    pub fn advance(&mut self, moved: u32) -> Progress {
        if !self.op.has_data() {
            return Progress::Done;
        }
        let moved_bytes = u64::from(moved);
        if moved == 0 || moved_bytes > self.op.len {
            // The end of the backing, or a drive that moves nothing: the rest cannot be done.
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

/// Entries of a tag.
const TAG_ENTRIES: u16 = 8;
const _: () = assert!(TAG_ENTRIES as usize == WINDOW_OPS);

/// An entry of the table. A free one keeps its last contents.
#[derive(Debug)]
struct Entry {
    live: bool,
    serial: u32,
    inflight: InFlight,
}

/// The table of operations in flight: a full window of entries for every tag, allocated once.
#[derive(Debug)]
pub(super) struct InFlightTable {
    entries: Box<[Entry]>,
    next_serial: u32,
    /// The number of operations on the fast path. The other fields do not include them.
    fast_path: usize,
    count: usize,
    transfers: usize,
}

impl InFlightTable {
    pub fn new(depth: u16) -> Self {
        let vacant = |tag| Entry { live: false, serial: 0, inflight: InFlight::nothing(Tag(tag)) };
        let window = |tag| std::iter::repeat_with(move || vacant(tag)).take(WINDOW_OPS);
        let entries = (0..depth).flat_map(window).collect();
        Self { entries, next_serial: 0, fast_path: 0, count: 0, transfers: 0 }
    }

    /// The tag of an entry.
    #[inline]
    pub fn tag_of(key: OpKey) -> Tag {
        Tag(key.index / TAG_ENTRIES)
    }

    /// Whether the entry is the first of its tag, which operations on the fast path use.
    #[inline]
    pub const fn is_first(key: OpKey) -> bool {
        key.index % TAG_ENTRIES == 0
    }

    /// The key for an operation on the fast path, of a tag without operations in flight.
    #[inline]
    pub fn first_key(&self, tag: Tag) -> OpKey {
        OpKey { index: tag.0 * TAG_ENTRIES, serial: self.next_serial }
    }

    /// Counts an operation on the fast path with key [`InFlightTable::first_key`]. The table does
    /// not have its contents.
    #[inline]
    pub fn begin_fast(&mut self) {
        self.next_serial = self.next_serial.wrapping_add(1);
        self.fast_path += 1;
    }

    /// Counts the end of an operation on the fast path, or its move to the general path.
    #[inline]
    pub fn end_fast(&mut self) {
        self.fast_path -= 1;
    }

    /// Adds an operation that moves from the fast path to the general path.
    pub fn insert_fast(&mut self, serial: u32, inflight: InFlight) {
        let next_serial = self.next_serial;
        self.insert(OpKey { index: inflight.tag.0 * TAG_ENTRIES, serial }, inflight);
        self.next_serial = next_serial;
    }

    /// The key that the next operation of a tag will have; `None` if the tag has a full window.
    #[inline]
    pub fn next_key(&self, tag: Tag) -> Option<OpKey> {
        let first = tag.index() * WINDOW_OPS;
        let entries = self.entries.get(first..first + WINDOW_OPS)?;
        let index = first + entries.iter().position(|entry| !entry.live)?;
        Some(OpKey { index: u16::try_from(index).ok()?, serial: self.next_serial })
    }

    /// Adds an operation with the key that [`InFlightTable::next_key`] has just returned.
    #[inline]
    pub fn insert(&mut self, key: OpKey, inflight: InFlight) {
        let entry = &mut self.entries[usize::from(key.index)];
        debug_assert!(!entry.live && entry.inflight.tag == inflight.tag);
        *entry = Entry { live: true, serial: key.serial, inflight };
        self.next_serial = key.serial.wrapping_add(1);
        self.count += 1;
        self.transfers += usize::from(inflight.op.has_data());
    }

    #[inline]
    pub fn get_mut(&mut self, key: OpKey) -> Option<&mut InFlight> {
        let entry = self.entries.get_mut(usize::from(key.index))?;
        (entry.live && entry.serial == key.serial).then_some(&mut entry.inflight)
    }

    /// Gives a live operation a new key, for its next submission.
    ///
    /// # Panics
    /// If the key is not live.
    pub fn renew(&mut self, key: OpKey) -> (OpKey, InFlight) {
        let serial = self.next_serial;
        self.next_serial = serial.wrapping_add(1);
        let entry = &mut self.entries[usize::from(key.index)];
        assert!(entry.live && entry.serial == key.serial, "renewed a stale operation");
        entry.serial = serial;
        (OpKey { index: key.index, serial }, entry.inflight)
    }

    pub fn remove(&mut self, key: OpKey) -> Option<InFlight> {
        let inflight = *self.get_mut(key)?;
        self.entries[usize::from(key.index)].live = false;
        self.count -= 1;
        self.transfers -= usize::from(inflight.op.has_data());
        Some(inflight)
    }

    /// How many reads and writes are in flight.
    pub fn transfers(&self) -> usize {
        self.transfers + self.fast_path
    }

    /// All operations. Slow: for rare events.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = (OpKey, &mut InFlight)> {
        self.entries
            .iter_mut()
            .zip(0..=u16::MAX)
            .filter(|(entry, _)| entry.live)
            .map(|(entry, index)| (OpKey { index, serial: entry.serial }, &mut entry.inflight))
    }

    pub fn is_empty(&self) -> bool {
        self.count + self.fast_path == 0
    }

    pub fn get(&self, key: OpKey) -> Option<&InFlight> {
        let entry = self.entries.get(usize::from(key.index))?;
        (entry.live && entry.serial == key.serial).then_some(&entry.inflight)
    }
}

impl OpKey {
    /// The registry's identifier of the operation.
    pub(super) fn borrower(self) -> Borrower {
        Borrower((u64::from(self.index) << 32) | u64::from(self.serial))
    }

    /// The operation with this identifier in the registry.
    pub(super) fn of_borrower(borrower: Borrower) -> Self {
        let [_, _, p1, p0, s3, s2, s1, s0] = borrower.0.to_be_bytes();
        let index = u16::from_be_bytes([p1, p0]);
        Self { index, serial: u32::from_be_bytes([s3, s2, s1, s0]) }
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
        let (deadline, pause_ns) = (u64::MAX, 0);
        InFlight { tag, op, moved: 0, borrow, retries, pause_ns, substitutes, cancel, deadline }
    }

    fn insert(table: &mut InFlightTable) -> Option<OpKey> {
        let key = table.next_key(Tag(0))?;
        table.insert(key, inflight(OpKind::Read));
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
    fn what_comes_short_asks_for_the_rest_after_progress() {
        let mut write = inflight(OpKind::Write { fua: true });
        assert_eq!((write.asked(512), write.asked(4096)), (512, 4096));
        assert_eq!(write.advance(100), Progress::Again);
        assert_eq!((write.op.len, write.asked(512)), (3996, 3996));
        assert_eq!(inflight(OpKind::Delay).asked(512), 4096, "only transfers do");
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
        assert!(table.get(OpKey::of_borrower(first.borrower())).is_none());
        assert!(table.get(OpKey::of_borrower(renewed.borrower())).is_some());
        assert!(table.remove(renewed).is_some());
        let next = insert(&mut table).unwrap();
        assert_eq!(next.index, renewed.index);
        assert!(table.remove(renewed).is_none());
        assert!(table.remove(next).is_some());
        assert!(table.is_empty());
    }

    #[test]
    fn a_tag_has_a_window_of_its_own() {
        let mut table = InFlightTable::new(2);
        for _ in 0..WINDOW_OPS {
            assert!(insert(&mut table).is_some());
        }
        assert!(insert(&mut table).is_none());
        let other = table.next_key(Tag(1)).unwrap();
        assert_eq!(usize::from(other.index), WINDOW_OPS);
        assert!(table.get_mut(other).is_none(), "not yet");
        assert!(table.next_key(Tag(2)).is_none(), "there is no such tag");
        assert_eq!(table.iter_mut().count(), WINDOW_OPS);
    }
}

//! Backings: their bytes, and which writes are on stable storage.

use rand_xoshiro::SplitMix64;

use crate::draw::Draw as _;

/// The most backings that a planner of the simulation has.
pub const MAX_BACKINGS: usize = 4;

/// How a range is cleared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Zeroing {
    /// `BLOCK_URING_CMD_DISCARD`: the contents become undefined.
    Discard,
    /// `FALLOC_FL_PUNCH_HOLE`: zeros.
    Punch,
    /// `FALLOC_FL_ZERO_RANGE`: zeros.
    ZeroRange,
}

/// A drive with a volatile cache.
#[derive(Debug)]
pub struct Backing {
    bytes: Vec<u8>,
    /// Reads as zeros at any offset, like `/dev/zero`.
    endless: bool,
    /// How many writes have completed.
    writes: u64,
    /// How many of these, in order, are on stable storage.
    durable: u64,
}

fn range(at: u64, len: usize) -> std::ops::Range<usize> {
    let start = usize::try_from(at).unwrap_or(usize::MAX);
    start..start.saturating_add(len)
}

impl Backing {
    /// A drive full of zeros.
    #[must_use]
    pub fn new(bytes: u64, endless: bool) -> Self {
        let bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
        Self { bytes: vec![0; bytes], endless, writes: 0, durable: 0 }
    }

    /// Sets contents that a device below has returned.
    pub fn put(&mut self, at: u64, bytes: &[u8]) {
        self.bytes[range(at, bytes.len())].copy_from_slice(bytes);
    }

    /// Sets the initial contents.
    pub fn begin_with(&mut self, bytes: &[u8]) {
        self.bytes[..bytes.len()].copy_from_slice(bytes);
    }

    /// Reads.
    ///
    /// # Panics
    /// If the range is beyond the end, as in all functions with a range: planners know the sizes of
    /// their backings.
    pub fn read(&self, at: u64, into: &mut [u8]) {
        if self.endless {
            return into.fill(0);
        }
        into.copy_from_slice(&self.bytes[range(at, into.len())]);
    }

    /// Writes; returns the number of the write, or 0 if it is on stable storage.
    pub fn write(&mut self, at: u64, from: &[u8], dsync: bool) -> u64 {
        self.bytes[range(at, from.len())].copy_from_slice(from);
        if dsync {
            return 0;
        }
        self.writes += 1;
        self.writes
    }

    /// Clears; returns the number of the write.
    pub fn zero(&mut self, at: u64, len: u64, how: Zeroing, rng: &mut SplitMix64) -> u64 {
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        let range = range(at, len);
        match how {
            Zeroing::Punch | Zeroing::ZeroRange => self.bytes[range].fill(0),
            Zeroing::Discard => match rng.below(3) {
                0 => self.bytes[range].fill(0),
                1 => self.bytes[range].fill(0x55),
                _ => assert!(range.end <= self.bytes.len(), "a discard beyond the end"),
            },
        }
        self.writes += 1;
        self.writes
    }

    /// How many writes a flush that starts now makes durable.
    #[must_use]
    pub const fn flush_covers(&self) -> u64 {
        self.writes
    }

    /// A flush has completed.
    pub fn flushed(&mut self, covers: u64) {
        self.durable = self.durable.max(covers);
    }

    /// Whether a write is on stable storage.
    #[must_use]
    pub const fn is_durable(&self, write: u64) -> bool {
        write <= self.durable
    }
}

//! The expected contents of the device.

use super::backing::MAX_BACKINGS;
use crate::{GARBAGE, SECTOR};

/// The expected contents of the device.
#[derive(Debug)]
pub struct Oracle {
    bytes: Vec<u8>,
    /// For each sector: whether its contents are defined. They are undefined after a discard or a
    /// failed write.
    known: Vec<bool>,
    /// Writes have no effect.
    pub(super) null: bool,
    /// For each backing: the newest write that was acknowledged to a client.
    pub(super) acknowledged: [u64; MAX_BACKINGS],
}

impl Oracle {
    /// A device full of zeros.
    #[must_use]
    pub fn new(bytes: u64, null: bool) -> Self {
        let index = |bytes: u64| usize::try_from(bytes).unwrap_or(usize::MAX);
        let (bytes, sectors) = (vec![0; index(bytes)], index(bytes / SECTOR));
        Self { bytes, known: vec![true; sectors], null, acknowledged: [0; MAX_BACKINGS] }
    }

    /// Sets the initial contents.
    pub(super) fn begin_with(&mut self, bytes: &[u8]) {
        self.bytes.copy_from_slice(bytes);
    }

    pub(super) fn forget(&mut self, sectors: std::ops::Range<usize>) {
        if !self.null {
            self.known[sectors].fill(false);
        }
    }

    pub(super) fn learn(&mut self, sectors: std::ops::Range<usize>, data: Option<&[u8]>) {
        if self.null {
            return;
        }
        let bytes = &mut self.bytes[sectors.start * 512..sectors.end * 512];
        match data {
            Some(data) => bytes.copy_from_slice(data),
            None => bytes.fill(0),
        }
        self.known[sectors].fill(true);
    }

    /// Checks that a successful read has filled every byte with the expected contents.
    pub(super) fn check(&self, sectors: std::ops::Range<usize>, data: &[u8]) {
        let bytes = &self.bytes[sectors.start * 512..sectors.end * 512];
        if bytes == data {
            return;
        }
        for (number, sector) in sectors.clone().enumerate() {
            let (expected, read) = (&bytes[number * 512..][..512], &data[number * 512..][..512]);
            // No client writes such a byte.
            let hole = read.iter().position(|byte| *byte & 0x80 != 0);
            assert_eq!(hole, None, "a successful read left a hole in sector {sector}");
            assert!(!self.known[sector] || expected == read, "sector {sector} was read wrongly");
        }
    }
}

const _: () = assert!(GARBAGE & 0x80 != 0, "the highest bit distinguishes garbage from data");

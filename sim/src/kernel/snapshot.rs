//! Checks the snapshot of a copy-on-write device against the device's initial contents.

use super::Kernel;

/// The initial contents of a device with a snapshot. All sectors differ, and no byte looks like
/// garbage.
pub(super) fn first_contents(size: u64) -> Vec<u8> {
    let byte = |at: u64| (at.wrapping_mul(0x9e37_79b9) >> 9).to_le_bytes()[0] & 0x7f;
    (0..size).map(byte).collect()
}

impl Kernel {
    /// Checks the snapshot, if there is one.
    ///
    /// # Panics
    /// If a chunk of it differs from the initial contents.
    pub(crate) fn check_snapshot(&self) {
        let Some(cow) = self.setup.mapping.snapshot() else { return };
        let first = first_contents(self.setup.geometry.size);
        let chunk_bytes = usize::try_from(cow.chunk).unwrap_or(usize::MAX);
        for (chunk, expected) in (0..).zip(first.chunks(chunk_bytes)) {
            let copied = cow.is_copied(chunk);
            let mut found = vec![0; expected.len()];
            self.backings[usize::from(copied)].read(chunk * cow.chunk, &mut found);
            assert!(found == expected, "chunk {chunk} of the snapshot, copied: {copied}");
        }
    }
}

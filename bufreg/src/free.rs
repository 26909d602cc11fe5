//! The set of free slots.

use crate::identity::SlotIndex;

/// One bit a free slot, and one bit a word that has any: the lowest free slot is found in at most
/// 16 + 1 words (4 + 1 for a ring's largest table), and a slot chosen by the caller is taken out
/// as cheaply as the lowest.
#[derive(Debug)]
pub(crate) struct FreeSlots {
    words: Box<[u64]>,
    /// Bit *n* is set while `words[n]` is not 0.
    occupied: Box<[u64]>,
}

impl FreeSlots {
    /// The slots from 0 to `capacity`.
    pub(crate) fn new(capacity: u16) -> Self {
        let words = usize::from(capacity).div_ceil(64);
        let mut free =
            Self { words: vec![0; words].into(), occupied: vec![0; words.div_ceil(64)].into() };
        (0..capacity).map(SlotIndex).for_each(|slot| free.insert(slot));
        free
    }

    #[inline]
    pub(crate) fn insert(&mut self, slot: SlotIndex) {
        let word = usize::from(slot.0 / 64);
        self.words[word] |= 1 << (slot.0 % 64);
        self.occupied[word / 64] |= 1 << (word % 64);
    }

    #[inline]
    pub(crate) fn remove(&mut self, slot: SlotIndex) {
        let word = usize::from(slot.0 / 64);
        self.words[word] &= !(1 << (slot.0 % 64));
        if self.words[word] == 0 {
            self.occupied[word / 64] &= !(1 << (word % 64));
        }
    }

    /// The lowest. Slots used lately tend to be low, so this one is likely in the cache.
    #[inline]
    pub(crate) fn lowest(&self) -> Option<SlotIndex> {
        let (group, occupied) = self.occupied.iter().enumerate().find(|(_, bits)| **bits != 0)?;
        let word = group * 64 + occupied.trailing_zeros() as usize;
        let slot = word * 64 + self.words[word].trailing_zeros() as usize;
        u16::try_from(slot).ok().map(SlotIndex)
    }
}

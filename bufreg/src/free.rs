//! The set of free slots.

use crate::identity::SlotIndex;

/// A bitmap of slots that may be free. Every free slot is in it; a slot in it may be lent. A second
/// level has one bit for each word that is not 0, so the lowest free slot is found in at most 16 +
/// 1 words (4 + 1 for a ring's largest table). Removing any slot costs the same.
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

    /// The lowest free slot. Recently used slots tend to have low numbers, so this one is probably
    /// in the cache.
    #[inline]
    pub(crate) fn lowest(&self, is_free: impl Fn(SlotIndex) -> bool) -> Option<SlotIndex> {
        for (group, occupied) in self.occupied.iter().enumerate() {
            for word in bits(*occupied).map(|bit| group * 64 + bit) {
                let slots =
                    bits(self.words[word]).filter_map(|bit| u16::try_from(word * 64 + bit).ok());
                if let Some(slot) = slots.map(SlotIndex).find(|slot| is_free(*slot)) {
                    return Some(slot);
                }
            }
        }
        None
    }
}

/// The indices of the set bits, lowest first.
fn bits(word: u64) -> impl Iterator<Item = usize> {
    std::iter::successors(Some(word), |word| word.checked_sub(1).map(|below| word & below))
        .take_while(|word| *word != 0)
        .map(|word| word.trailing_zeros() as usize)
}

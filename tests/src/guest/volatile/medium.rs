//! What is on a drive with a volatile cache, and what a power cut leaves of it.

use std::collections::BTreeMap;
use std::ops::AddAssign;

use rand::RngExt as _;
use rand_xoshiro::SplitMix64;

type Block = Box<[u8]>;

/// How many contents of a block that was not flushed are remembered; which of them the drive may
/// have put on stable storage by itself.
const CONTENTS: usize = 4;

/// What a power cut leaves of what was not flushed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Survival {
    /// Nothing.
    Nothing,
    /// Of each block with so many chances out of eight one of the contents that it was given, not
    /// always the last: drives write back what they like, in whatever order.
    Some(u32),
}

impl Survival {
    /// Any of them.
    pub fn draw(rng: &mut SplitMix64) -> Self {
        match rng.random_range(0..3) {
            0 => Self::Nothing,
            1 => Self::Some(4),
            _ => Self::Some(rng.random_range(1..=7)),
        }
    }
}

/// Blocks that were in the cache at a power cut.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Lost {
    /// With contents that were not on stable storage.
    pub cached: u64,
    /// Of these: with another content now than the last one.
    pub lost: u64,
}

impl AddAssign for Lost {
    fn add_assign(&mut self, other: Self) {
        self.cached += other.cached;
        self.lost += other.lost;
    }
}

/// Blocks on stable storage, and blocks in a cache.
#[derive(Debug)]
pub struct Medium {
    block_bytes: usize,
    stable: BTreeMap<u64, Block>,
    /// The contents since the last flush, the last one last.
    cached: BTreeMap<u64, Vec<Block>>,
}

impl Medium {
    /// A medium that reads as zeros. Blocks are written whole or not at all.
    pub fn new(block_bytes: usize) -> Self {
        Self { block_bytes, stable: BTreeMap::new(), cached: BTreeMap::new() }
    }

    fn number(&self, offset: u64) -> u64 {
        offset / u64::try_from(self.block_bytes).unwrap_or(u64::MAX)
    }

    /// Writes whole blocks: with `fua` to stable storage, else to the cache.
    pub fn write(&mut self, offset: u64, data: &[u8], fua: bool) {
        for (number, block) in (self.number(offset)..).zip(data.chunks(self.block_bytes)) {
            if fua {
                self.cached.remove(&number);
                self.stable.insert(number, block.into());
                continue;
            }
            let contents = self.cached.entry(number).or_default();
            if contents.len() == CONTENTS {
                contents.remove(0);
            }
            contents.push(block.into());
        }
    }

    /// Reads whole blocks as they were written last.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        for (number, into) in (self.number(offset)..).zip(data.chunks_mut(self.block_bytes)) {
            match self.newest(number) {
                Some(block) => into.copy_from_slice(block),
                None => into.fill(0),
            }
        }
    }

    /// How many blocks are in the cache.
    pub fn cached(&self) -> usize {
        self.cached.len()
    }

    fn newest(&self, number: u64) -> Option<&Block> {
        let cached = self.cached.get(&number).and_then(|contents| contents.last());
        cached.or_else(|| self.stable.get(&number))
    }

    /// Brings the cache to stable storage.
    pub fn flush(&mut self) {
        for (number, mut contents) in std::mem::take(&mut self.cached) {
            self.stable.extend(contents.pop().map(|newest| (number, newest)));
        }
    }

    /// Cuts the power.
    pub fn cut(&mut self, survival: Survival, rng: &mut SplitMix64) -> Lost {
        let mut lost = Lost::default();
        for (number, mut contents) in std::mem::take(&mut self.cached) {
            lost.cached += 1;
            let survives = match survival {
                Survival::Nothing => false,
                Survival::Some(eighths) => rng.random_ratio(eighths, 8),
            };
            let newest = contents.len() - 1;
            let survivor = survives.then(|| rng.random_range(0..contents.len()));
            lost.lost += u64::from(survivor != Some(newest));
            if let Some(survivor) = survivor {
                self.stable.insert(number, contents.swap_remove(survivor));
            }
        }
        lost
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng as _;

    use super::*;

    const BLOCK: usize = 512;

    fn medium(writes: &[(u64, u8, bool)]) -> Medium {
        let mut medium = Medium::new(BLOCK);
        for &(block, content, fua) in writes {
            medium.write(block * 512, &[content; BLOCK], fua);
        }
        medium
    }

    fn contents(medium: &Medium) -> [u8; 4] {
        let mut bytes = [9; 4 * BLOCK];
        medium.read(0, &mut bytes);
        let [a, b, c, d] = [0, 1, 2, 3].map(|number| &bytes[number * BLOCK..][..BLOCK]);
        [a, b, c, d].map(|block| {
            assert!(block.iter().all(|byte| *byte == block[0]), "a torn block");
            block[0]
        })
    }

    #[test]
    fn a_cut_loses_what_was_neither_flushed_nor_written_with_fua() {
        let mut rng = SplitMix64::seed_from_u64(1);
        let mut medium = medium(&[(0, 1, false), (1, 1, false)]);
        medium.flush();
        for (block, fua) in [(1, false), (2, true), (3, false)] {
            medium.write(block * 512, &[2; BLOCK], fua);
        }
        assert_eq!(contents(&medium), [1, 2, 2, 2], "until then nobody sees a difference");
        assert_eq!(medium.cut(Survival::Nothing, &mut rng), Lost { cached: 2, lost: 2 });
        assert_eq!(contents(&medium), [1, 1, 2, 0]);
        assert_eq!(medium.cut(Survival::Nothing, &mut rng), Lost::default());
    }

    #[test]
    fn fua_is_not_undone_by_what_was_written_before() {
        for seed in 0..50 {
            let mut medium = medium(&[(0, 1, false), (0, 2, true)]);
            medium.cut(Survival::Some(8), &mut SplitMix64::seed_from_u64(seed));
            assert_eq!(contents(&medium)[0], 2);
        }
    }

    #[test]
    fn what_survives_is_any_content_of_any_block() {
        let writes = [(0, 1, false), (0, 2, false), (1, 3, false)];
        let mut seen = std::collections::BTreeSet::new();
        for seed in 0..200 {
            let mut medium = medium(&writes);
            let lost = medium.cut(Survival::Some(4), &mut SplitMix64::seed_from_u64(seed));
            let [a, b, ..] = contents(&medium);
            assert_eq!(lost, Lost { cached: 2, lost: u64::from(a != 2) + u64::from(b != 3) });
            seen.insert((a, b));
        }
        let all = [(0, 0), (0, 3), (1, 0), (1, 3), (2, 0), (2, 3)];
        assert_eq!(seen, all.into());
    }

    #[test]
    fn a_flush_brings_the_last_content() {
        let writes: Vec<_> = (1..20).map(|content| (3, content, false)).collect();
        let mut medium = medium(&writes);
        medium.flush();
        medium.cut(Survival::Nothing, &mut SplitMix64::seed_from_u64(1));
        assert_eq!(contents(&medium), [0, 0, 0, 19]);
    }
}

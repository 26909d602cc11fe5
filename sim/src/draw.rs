//! Draws from a seeded generator.

use rand_xoshiro::SplitMix64;
use rand_xoshiro::rand_core::Rng as _;

/// The simulator's random draws. `rand` would draw other numbers, and seeds in notes would no
/// longer mean the same runs.
pub trait Draw {
    /// A number below `bound`, which must not be 0.
    fn below(&mut self, bound: u32) -> u32;

    /// An index below `len`, which must not be 0.
    fn index(&mut self, len: usize) -> usize {
        self.below(u32::try_from(len).unwrap_or(u32::MAX)) as usize
    }

    /// True `rate` times out of 1024.
    fn chance(&mut self, rate: u32) -> bool;

    /// One of `choices`, which must not be empty.
    fn pick<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.index(choices.len())]
    }
}

impl Draw for SplitMix64 {
    fn below(&mut self, bound: u32) -> u32 {
        let product = (self.next_u64() >> 32) * u64::from(bound);
        u32::try_from(product >> 32).unwrap_or(0)
    }

    fn chance(&mut self, rate: u32) -> bool {
        // Most rates are 0 on a sound kernel: no number is drawn for them.
        rate > 0 && self.next_u64() & 1023 < u64::from(rate)
    }
}

#[cfg(test)]
mod tests {
    use rand_xoshiro::rand_core::SeedableRng as _;

    use super::*;

    #[test]
    fn numbers_are_determined_by_the_seed_and_below_their_bound() {
        let mut rng = SplitMix64::seed_from_u64(7);
        let mut other = rng.clone();
        let mut seen = [0; 10];
        for _ in 0..1000 {
            let number = rng.below(10);
            assert_eq!(number, other.below(10));
            seen[number as usize] += 1;
        }
        assert!(seen.iter().all(|count| (50..200).contains(count)), "{seen:?}");
        assert!(!rng.chance(0) && rng.chance(1024));
    }

    /// A seed in notes still means the same run.
    #[test]
    fn draws_of_a_seed_stay_the_same() {
        let mut rng = SplitMix64::seed_from_u64(1_234_567);
        // The first is from the reference implementation of SplitMix64.
        assert_eq!(rng.next_u64(), 6_457_827_717_110_365_317);
        let drawn = [0; 4].map(|_| rng.below(1000));
        assert_eq!((drawn, rng.chance(512)), ([173, 532, 249, 889], true));
    }
}

//! The power of drives, which is cut for all of them at once: at any instant, or when one of them
//! is about to do what it should not be interrupted in.

use std::sync::{Mutex, MutexGuard, PoisonError};

use rand::RngExt as _;
use rand_xoshiro::SplitMix64;

/// When the power is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moment {
    /// At once.
    Now,
    /// In place of a flush that has something to do.
    InsteadOfFlush,
    /// After a write, before it is answered, when so many blocks are in a drive's cache.
    AfterWrite(usize),
    /// After a write with FUA, before it is answered, when something is in its drive's cache.
    AfterFua,
}

impl Moment {
    /// Any of them.
    pub fn draw(rng: &mut SplitMix64) -> Self {
        match rng.random_range(0..4) {
            0 => Self::Now,
            1 => Self::InsteadOfFlush,
            2 => Self::AfterWrite(rng.random_range(1..=60)),
            _ => Self::AfterFua,
        }
    }
}

/// What a drive is at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum When {
    /// About to carry a flush out.
    BeforeFlush,
    /// A write has gone to the cache.
    AfterWrite,
    /// A write with FUA has gone past it.
    AfterFua,
    /// None of these.
    Before,
}

/// The power of some drives.
#[derive(Debug)]
pub struct Power(Mutex<State>);

#[derive(Debug)]
struct State {
    is_on: bool,
    /// When it will be cut.
    moment: Option<Moment>,
}

impl Power {
    pub const fn new() -> Self {
        Self(Mutex::new(State { is_on: false, moment: None }))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn is_on(&self) -> bool {
        self.lock().is_on
    }

    pub fn turn_on(&self) {
        *self.lock() = State { is_on: true, moment: None };
    }

    pub fn cut(&self) {
        *self.lock() = State { is_on: false, moment: None };
    }

    /// Has it cut later.
    pub fn cut_at(&self, moment: Moment) {
        match moment {
            Moment::Now => self.cut(),
            Moment::InsteadOfFlush | Moment::AfterWrite(_) | Moment::AfterFua => {
                self.lock().moment = Some(moment);
            }
        }
    }

    /// Whether there is power still, now that a drive with so many blocks in its cache has come
    /// to something.
    pub fn stays_on(&self, when: When, cached: usize) -> bool {
        let mut state = self.lock();
        let has_come = match state.moment {
            None | Some(Moment::Now) => false,
            Some(Moment::InsteadOfFlush) => when == When::BeforeFlush && cached > 0,
            Some(Moment::AfterWrite(blocks)) => when == When::AfterWrite && cached >= blocks,
            Some(Moment::AfterFua) => when == When::AfterFua && cached > 0,
        };
        state.is_on &= !has_come;
        state.is_on
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_power_is_cut_when_its_moment_has_come() {
        const ALL: [When; 4] = [When::Before, When::BeforeFlush, When::AfterWrite, When::AfterFua];
        for (moment, cutting) in [
            (Moment::InsteadOfFlush, Some((When::BeforeFlush, 1))),
            (Moment::AfterWrite(7), Some((When::AfterWrite, 7))),
            (Moment::AfterFua, Some((When::AfterFua, 1))),
            (Moment::Now, None),
        ] {
            for when in ALL {
                for cached in [0, 1, 6, 7] {
                    let power = Power::new();
                    power.turn_on();
                    power.cut_at(moment);
                    let stays = cutting.is_some_and(|(it, least)| it != when || cached < least);
                    assert_eq!(power.stays_on(when, cached), stays, "{moment:?} {when:?} {cached}");
                    assert_eq!(power.is_on(), stays, "for all drives");
                }
            }
        }
    }

    #[test]
    fn power_stays_until_it_is_cut_and_comes_back_without_a_moment() {
        let power = Power::new();
        assert!(!power.is_on());
        for _ in 0..2 {
            power.turn_on();
            assert!(power.stays_on(When::BeforeFlush, 9) && power.is_on());
            power.cut_at(Moment::InsteadOfFlush);
            assert!(power.stays_on(When::AfterFua, 9) && !power.stays_on(When::BeforeFlush, 9));
            assert!(!power.stays_on(When::Before, 0));
        }
    }
}

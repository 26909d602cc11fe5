//! Levels of the devices of a process: how many of them lie below each.
//!
//! An operation that the kernel gives to a worker of a lane's thread (`fallocate`, `fsync`) holds it until
//! the backing has answered. If the backing is served by the same thread, its operations may need the
//! very worker that waits for them, and nothing moves again. So a lane is shared by devices of one
//! level only: what a lane waits for is done by lanes of lower levels, and the lowest ones wait
//! for drives.

use std::collections::{BTreeMap, BTreeSet};

/// How many devices of the process lie below a device, the longest way down.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Level(pub u16);

/// The devices of a process, and what is below each.
#[derive(Debug, Default)]
pub struct Levels {
    devices: BTreeMap<u32, Standing>,
}

#[derive(Debug)]
struct Standing {
    /// `None` for one that shares no lane.
    level: Option<Level>,
    below: BTreeSet<u32>,
}

impl Levels {
    /// Finds the level of a device before it is served. `below` are the ids of all ublk devices below it,
    /// whoever serves them. `None` if no level is right, since devices above it were there first: it
    /// must share no lane with any other.
    pub fn enter(&mut self, id: u32, below: BTreeSet<u32>) -> Option<Level> {
        let others = || self.devices.iter().filter(|(other, _)| **other != id);
        let levels_below = others().filter(|(other, _)| below.contains(other));
        let highest = levels_below.filter_map(|(_, standing)| standing.level).max();
        let level = highest.map_or(Some(Level(0)), |below| below.0.checked_add(1).map(Level));
        let mut above = others().filter(|(_, standing)| standing.below.contains(&id));
        let mut is_above = |level| above.all(|(_, it)| it.level.is_none_or(|it| it > level));
        let level = level.filter(|level| is_above(*level));
        self.devices.insert(id, Standing { level, below });
        level
    }

    /// A device is not served any more.
    pub fn leave(&mut self, id: u32) {
        self.devices.remove(&id);
    }
}

/// Puts devices behind those that are below them, and else leaves them in their order.
pub fn lower_first<T>(
    devices: Vec<T>,
    id: impl Fn(&T) -> u32,
    below: impl Fn(&T) -> BTreeSet<u32>,
) -> Vec<T> {
    let mut waiting: Vec<_> = devices.into_iter().map(|it| (id(&it), below(&it), it)).collect();
    let mut sorted = Vec::with_capacity(waiting.len());
    while !waiting.is_empty() {
        let is_low = |(id, below, _): &(u32, BTreeSet<u32>, T)| {
            waiting.iter().all(|(other, _, _)| other == id || !below.contains(other))
        };
        // There is one, but for devices that go round in a circle.
        let at = waiting.iter().position(is_low).unwrap_or(0);
        sorted.push(waiting.remove(at).2);
    }
    sorted
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_device_is_above_all_that_is_below_it() {
        let mut levels = Levels::default();
        let mut enter = |id, below: &[u32]| {
            levels.enter(id, below.iter().copied().collect()).map(|level| level.0)
        };
        assert_eq!(enter(0, &[]), Some(0));
        assert_eq!(enter(1, &[0]), Some(1));
        assert_eq!(enter(2, &[99]), Some(0), "another process serves it");
        assert_eq!(enter(3, &[1, 0, 2]), Some(2));
        assert_eq!(enter(4, &[2]), Some(1));
        // Made again: those above it are there.
        assert_eq!(enter(1, &[0]), Some(1));
        assert_eq!(enter(0, &[]), Some(0));
        // Its backing stands elsewhere by now.
        assert_eq!(enter(0, &[4, 2]), None);
        assert_eq!(enter(5, &[0, 2, 4]), Some(2));
        levels.leave(4);
        assert_eq!(levels.enter(6, BTreeSet::from([4])), Some(Level(0)));
    }

    #[test]
    fn a_lower_device_that_comes_late_shares_no_lane() {
        let mut levels = Levels::default();
        assert_eq!(levels.enter(1, BTreeSet::from([0])), Some(Level(0)));
        assert_eq!(levels.enter(0, BTreeSet::new()), None);
        levels.leave(1);
        assert_eq!(levels.enter(0, BTreeSet::new()), Some(Level(0)));
        assert_eq!(levels.enter(1, BTreeSet::from([0])), Some(Level(1)));
    }

    #[test]
    fn devices_come_behind_those_below_them() {
        let below: BTreeMap<u32, BTreeSet<u32>> = [
            (5, BTreeSet::from([3, 1])),
            (4, BTreeSet::new()),
            (3, BTreeSet::from([1])),
            (1, BTreeSet::from([77])),
        ]
        .into();
        let sort = |ids: Vec<u32>| lower_first(ids, |id| *id, |id| below[id].clone());
        assert_eq!(sort(vec![5, 4, 3, 1]), [4, 1, 3, 5]);
        assert_eq!(sort(vec![1, 3, 5, 4]), [1, 3, 5, 4]);
        let circle = |id: &u32| BTreeSet::from([(id + 1) % 3]);
        let mut all = lower_first(vec![0, 1, 2], |id| *id, circle);
        all.sort_unstable();
        assert_eq!(all, [0, 1, 2]);
    }

    proptest! {
        /// Whatever comes and goes in whatever order: between devices that share lanes, the one above has
        /// the higher level.
        #[test]
        fn no_level_is_shared_with_a_device_below(
            edges in prop::collection::btree_set((0_u32..8, 0_u32..8), 0..20),
            turns in prop::collection::vec((0_u32..8, any::<bool>()), 1..40),
        ) {
            // An edge leads down, so there is no circle.
            let mut below: BTreeMap<u32, BTreeSet<u32>> = BTreeMap::new();
            for id in 0..8 {
                let next: Vec<_> = (0..id).filter(|low| edges.contains(&(*low, id))).collect();
                let all = next.iter().flat_map(|low| below[low].clone().into_iter().chain([*low]));
                let all = all.collect();
                below.insert(id, all);
            }
            let mut levels = Levels::default();
            let mut live = BTreeMap::new();
            for (id, enters) in turns {
                if enters {
                    live.insert(id, levels.enter(id, below[&id].clone()));
                } else {
                    levels.leave(id);
                    live.remove(&id);
                }
                for (high, level) in &live {
                    for (low, level_below) in live.iter().filter(|(low, _)| below[high].contains(low)) {
                        if let (Some(level), Some(level_below)) = (level, level_below) {
                            prop_assert!(level > level_below, "{high} on {low}: {live:?}");
                        }
                    }
                }
            }
        }
    }
}

//! The stacking of this program's devices, by their state files.

use std::cell::OnceCell;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use crate::backing::below::{Below, Records};
use crate::device::description::device_ids;
use crate::device::paths::RUN_DIR;
use crate::device::state_file::StateFile;

/// The backings of all devices of this program, of any server.
#[derive(Debug, Default)]
pub struct Recorded {
    /// Backings of the existing devices; read on first use.
    files: OnceCell<BTreeMap<u32, StateFile>>,
}

impl Recorded {
    fn files(&self) -> &BTreeMap<u32, StateFile> {
        self.files.get_or_init(|| {
            let read = |id| Some((id, StateFile::read(Path::new(RUN_DIR), id).ok()?));
            device_ids().into_iter().filter_map(read).collect()
        })
    }
}

impl Records for Recorded {
    fn backings(&self, id: u32) -> Vec<PathBuf> {
        let backings = self.files().get(&id).map(|file| file.backings.as_slice());
        backings.unwrap_or_default().iter().map(|known| known.path.clone()).collect()
    }

    fn beside(&self, id: u32) -> Vec<u32> {
        let Some(server) = self.files().get(&id).map(|file| file.pid) else { return Vec::new() };
        let files = self.files().iter().filter(|(other, it)| **other != id && it.pid == server);
        files.map(|(other, _)| *other).collect()
    }
}

/// The order of two devices, if one is stacked on the other. All others keep their order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// To stop them: the upper one first.
    UpperFirst,
    /// To start them: the lower one first.
    LowerFirst,
}

/// Sorts devices by their stacking.
#[must_use]
pub fn sorted(ids: &BTreeSet<u32>, order: Order) -> Vec<u32> {
    let recorded = Recorded::default();
    let below = |id: &u32| Below::paths(&recorded.backings(*id), &recorded);
    sort(ids.iter().map(|id| (*id, below(id))).collect(), order)
}

fn sort(mut waiting: Vec<(u32, Below)>, order: Order) -> Vec<u32> {
    let mut sorted = Vec::with_capacity(waiting.len());
    while !waiting.is_empty() {
        let is_next = |(id, below): &(u32, Below)| {
            waiting.iter().all(|(other, below_other)| match order {
                Order::UpperFirst => !below_other.has(*id),
                Order::LowerFirst => !below.has(*other),
            })
        };
        // There is always one, except for a cycle of devices.
        let at = waiting.iter().position(is_next).unwrap_or(0);
        sorted.push(waiting.remove(at).0);
    }
    sorted
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_sorted_by_what_is_below_them() {
        let on = |id: u32, below: &[u32]| (id, Below::of(below));
        let all = [on(0, &[]), on(1, &[0, 3]), on(2, &[]), on(3, &[0]), on(5, &[4])];
        assert_eq!(sort(all.to_vec(), Order::UpperFirst), [1, 2, 3, 0, 5]);
        assert_eq!(sort(all.to_vec(), Order::LowerFirst), [0, 2, 3, 1, 5]);
        for order in [Order::UpperFirst, Order::LowerFirst] {
            let circle = vec![on(0, &[1]), on(1, &[0])];
            assert_eq!(sort(circle, order), [0, 1], "all of a circle");
            assert!(sort(Vec::new(), order).is_empty());
        }
    }
}

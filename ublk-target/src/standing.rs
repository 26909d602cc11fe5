//! What the devices of this program stand on, by their state files.

use std::cell::OnceCell;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use crate::backing::below::{Below, Records};
use crate::state::{RUN_DIR, StateFile, device_ids};

/// The backings of all devices of this program, whoever serves them.
#[derive(Debug, Default)]
pub struct Recorded {
    /// Of the devices that there are; read when the first is asked for.
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

/// The devices with each before those that it stands on, and else in their order.
#[must_use]
pub fn upper_first(ids: &BTreeSet<u32>) -> Vec<u32> {
    let recorded = Recorded::default();
    let below = |id: &u32| Below::paths(&recorded.backings(*id), &recorded);
    sorted(ids.iter().map(|id| (*id, below(id))).collect())
}

fn sorted(mut waiting: Vec<(u32, Below)>) -> Vec<u32> {
    let mut sorted = Vec::with_capacity(waiting.len());
    while !waiting.is_empty() {
        let is_top = |(id, _): &(u32, Below)| waiting.iter().all(|(_, below)| !below.has(*id));
        // There is one, but for devices that go round in a circle.
        let at = waiting.iter().position(is_top).unwrap_or(0);
        sorted.push(waiting.remove(at).0);
    }
    sorted
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_comes_before_those_below_it() {
        let on = |id: u32, below: &[u32]| (id, Below::of(below));
        let sort = |devices: &[(u32, Below)]| sorted(devices.to_vec());
        let all = [on(0, &[]), on(1, &[0, 3]), on(2, &[]), on(3, &[0]), on(5, &[4])];
        assert_eq!(sort(&all), [1, 2, 3, 0, 5]);
        assert_eq!(sort(&[on(0, &[1]), on(1, &[0])]), [0, 1], "all of a circle");
        assert!(sort(&[]).is_empty());
    }
}

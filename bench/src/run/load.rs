//! The loads.

use crate::results::Load;

const KIB: u64 = 1 << 10;

/// A load of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoadKind {
    /// Its name in options and results.
    pub name: &'static str,
    /// Its title in tables.
    pub title: &'static str,
    rw: &'static str,
    block_bytes: u64,
    depth: u32,
    read_percent: Option<u32>,
    /// Whether profiles with few loads include it.
    pub is_essential: bool,
}

const fn load(name: &'static str, title: &'static str, rw: &'static str, depth: u32) -> LoadKind {
    let block_bytes = 4 * KIB;
    LoadKind { name, title, rw, block_bytes, depth, read_percent: None, is_essential: false }
}

impl LoadKind {
    const fn essential(self) -> Self {
        Self { is_essential: true, ..self }
    }

    const fn kib(self, kib: u64) -> Self {
        Self { block_bytes: kib * KIB, ..self }
    }

    const fn reads(self, percent: u32) -> Self {
        Self { read_percent: Some(percent), ..self }
    }

    /// Whether it never writes.
    pub fn only_reads(&self) -> bool {
        matches!(self.rw, "read" | "randread")
    }

    /// Its description in results.
    pub fn described(&self) -> Load {
        Load {
            name: self.name.to_owned(),
            title: self.title.to_owned(),
            rw: self.rw.to_owned(),
            block_bytes: self.block_bytes,
            depth: self.depth,
            read_percent: self.read_percent,
        }
    }
}

/// All loads, in the order of the tables.
pub const LOADS: &[LoadKind] = &[
    load("randread-4k-qd1", "4 KiB random read, QD1", "randread", 1).essential(),
    load("randread-4k-qd8", "4 KiB random read, QD8", "randread", 8),
    load("randread-4k-qd32", "4 KiB random read, QD32", "randread", 32).essential(),
    load("randread-4k-qd128", "4 KiB random read, QD128", "randread", 128),
    load("randwrite-4k-qd1", "4 KiB random write, QD1", "randwrite", 1),
    load("randwrite-4k-qd8", "4 KiB random write, QD8", "randwrite", 8),
    load("randwrite-4k-qd32", "4 KiB random write, QD32", "randwrite", 32).essential(),
    load("randwrite-4k-qd128", "4 KiB random write, QD128", "randwrite", 128),
    load("randrw-4k-qd32", "4 KiB random, 70 % reads, QD32", "randrw", 32).reads(70).essential(),
    load("read-128k-qd8", "128 KiB sequential read, QD8", "read", 8).kib(128).essential(),
    load("write-128k-qd8", "128 KiB sequential write, QD8", "write", 8).kib(128),
    load("read-1m-qd4", "1 MiB sequential read, QD4", "read", 4).kib(1024).essential(),
    load("write-1m-qd4", "1 MiB sequential write, QD4", "write", 4).kib(1024),
];

/// The loads in `named`, or those of the profile if it is empty, in the order of the tables. Loads
/// that write are left out unless `may_write`.
pub fn chosen(named: &[String], only_essential: bool, may_write: bool) -> Vec<LoadKind> {
    let is_wanted = |load: &&LoadKind| match named {
        [] => load.is_essential || !only_essential,
        named => named.iter().any(|name| name == load.name),
    };
    LOADS.iter().filter(is_wanted).filter(|load| may_write || load.only_reads()).copied().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn titles_say_what_the_loads_are() {
        for (n, load) in LOADS.iter().enumerate() {
            assert!(LOADS[n + 1..].iter().all(|other| other.name != load.name), "{}", load.name);
            let size = match load.block_bytes {
                bytes @ 0x10_0000.. => format!("{} MiB ", bytes >> 20),
                bytes => format!("{} KiB ", bytes >> 10),
            };
            assert!(load.title.starts_with(&size), "{}", load.title);
            assert!(load.title.ends_with(&format!(", QD{}", load.depth)), "{}", load.title);
            assert!(load.name.starts_with(&format!("{}-", load.rw)), "{}", load.name);
            assert!(load.name.ends_with(&format!("-qd{}", load.depth)), "{}", load.name);
            let is_random = load.rw.starts_with("rand");
            assert_eq!(load.title.contains(" random"), is_random, "{}", load.title);
            assert_eq!(load.read_percent.is_some(), load.rw == "randrw", "{}", load.name);
        }
    }

    #[test]
    fn loads_are_chosen_by_name_profile_and_permission() {
        let names = |loads: Vec<LoadKind>| loads.iter().map(|load| load.name).collect::<Vec<_>>();
        assert_eq!(chosen(&[], false, true).len(), LOADS.len());
        let reads = ["randread-4k-qd1", "randread-4k-qd32", "read-128k-qd8", "read-1m-qd4"];
        assert_eq!(names(chosen(&[], true, false)), reads);
        let named = ["write-1m-qd4", "randread-4k-qd8"].map(String::from);
        assert_eq!(names(chosen(&named, true, true)), ["randread-4k-qd8", "write-1m-qd4"]);
        assert_eq!(names(chosen(&named, true, false)), ["randread-4k-qd8"]);
    }
}

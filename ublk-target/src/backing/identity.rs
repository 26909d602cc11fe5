//! The identity of a backing, which recovery checks.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, StatxFlags, statx};
use serde::{Deserialize, Serialize};
use ublk_engine::units::Bytes;

use crate::backing::sysfs::SysfsDevice;
use crate::backing::{Backing, BackingError, BackingProblem};

/// A backing as it was when its device was added.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Known {
    /// Its canonical path.
    pub path: PathBuf,
    /// The used size, in whole blocks.
    pub size: Bytes,
    /// Its identity in words; empty if it has none.
    pub identity: String,
    /// Whether it goes through the page cache, because its own blocks are larger than the device's.
    pub page_cache: bool,
}

impl Backing {
    /// The record for a later recovery.
    #[must_use]
    pub fn known(&self) -> Known {
        let (path, size) = (self.path().to_owned(), self.size());
        let (identity, page_cache) = (self.identity.clone(), self.is_buffered());
        Known { path, size, identity, page_cache }
    }

    /// Limits it to the recorded size, if it is the recorded backing.
    ///
    /// # Errors
    /// [`BackingProblem::Changed`] for another backing, or one that has shrunk.
    pub fn keep_to(mut self, known: &Known) -> Result<Self, BackingError> {
        let changed = |what| {
            let problem = BackingProblem::Changed(what);
            Err(BackingError { path: known.path.clone(), problem })
        };
        if self.identity != known.identity {
            return changed(format!(
                "it is {} now, and it was {}",
                or_nameless(&self.identity),
                or_nameless(&known.identity)
            ));
        }
        if self.size < known.size {
            return changed(format!("its size is {}, and it was {}", self.size, known.size));
        }
        self.size = known.size;
        Ok(self)
    }
}

fn or_nameless(identity: &str) -> &str {
    if identity.is_empty() { "a device without an identity" } else { identity }
}

/// The identity of a block device: the first of these attributes in sysfs.
pub(super) fn of_device(device: &SysfsDevice) -> String {
    let names = ["wwid", "device/wwid", "device/serial", "serial", "dm/uuid", "loop/backing_file"];
    let named = names.iter().find_map(|name| {
        let text = device.attribute_of_disk(name).filter(|text| !text.is_empty())?;
        Some(format!("{} {text}", name.rsplit('/').next().unwrap_or(name)))
    });
    let disk = named.unwrap_or_default();
    match device.partition_start() {
        Some(start) => format!("{disk} from sector {start}").trim_start().to_owned(),
        None => disk,
    }
}

/// The identity of a regular file: its inode, and its creation time if the file system records it.
pub(super) fn of_file(file: &File) -> String {
    let mask = StatxFlags::INO | StatxFlags::BTIME;
    let Ok(stat) = statx(file.as_fd(), Path::new(""), AtFlags::EMPTY_PATH, mask) else {
        return String::new();
    };
    let made = stat.stx_btime;
    let has_time = stat.stx_mask & StatxFlags::BTIME.bits() != 0;
    let time =
        if has_time { format!(" of {}.{:09}", made.tv_sec, made.tv_nsec) } else { String::new() };
    format!("inode {}{time}", stat.stx_ino)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backing::Opening;

    #[test]
    fn a_file_is_known_again_and_another_is_not() {
        let directory = tempfile::tempdir_in(".").unwrap();
        let path = directory.path().join("disk");
        let make = |len: u64| File::create(&path).unwrap().set_len(len).unwrap();
        make(1 << 20);
        let known = Backing::open(&path, Opening::ALONE).unwrap().known();
        let again = || Backing::open(&path, Opening::ALONE).unwrap().keep_to(&known);
        assert_eq!(again().unwrap().size(), Bytes(1 << 20));
        // What has been added to it is not used.
        make(2 << 20);
        assert_eq!(again().unwrap().size(), Bytes(1 << 20));
        make(1 << 19);
        let shrunk = again().unwrap_err().to_string();
        assert!(shrunk.contains("its size is 512 KiB, and it was 1 MiB"), "{shrunk}");
        // Another file of this name, made while the first one still has its number.
        let other = directory.path().join("other");
        File::create(&other).unwrap().set_len(1 << 20).unwrap();
        std::fs::rename(&other, &path).unwrap();
        let other = again().unwrap_err().to_string();
        assert!(other.contains("it is inode") && other.contains("it was inode"), "{other}");
    }
}

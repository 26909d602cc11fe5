//! What a backing is known again by.

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
    /// The bytes that were used, whole blocks.
    pub size: Bytes,
    /// What tells it from others, in words; empty where nothing does.
    pub identity: String,
    /// It goes through the page cache, since its own blocks are larger than the device's.
    pub page_cache: bool,
}

impl Backing {
    /// What to know it by later.
    #[must_use]
    pub fn known(&self) -> Known {
        let (path, size) = (self.path().to_owned(), self.size());
        let (identity, page_cache) = (self.identity.clone(), self.is_buffered());
        Known { path, size, identity, page_cache }
    }

    /// Uses no more of it than was used before, if it is the one that is known.
    ///
    /// # Errors
    /// [`BackingProblem::Changed`] for another one, or one that has shrunk.
    pub fn keep_to(mut self, known: &Known) -> Result<Self, BackingError> {
        let changed = |what| {
            let problem = BackingProblem::Changed(what);
            Err(BackingError { path: known.path.clone(), problem })
        };
        if self.identity != known.identity {
            return changed(format!(
                "it is {}, and was {}",
                or_nameless(&self.identity),
                or_nameless(&known.identity)
            ));
        }
        if self.size < known.size {
            return changed(format!("it has {}, and had {}", self.size, known.size));
        }
        self.size = known.size;
        Ok(self)
    }
}

fn or_nameless(identity: &str) -> &str {
    if identity.is_empty() { "a device without a name of its own" } else { identity }
}

/// A block device's: the first of what sysfs has of these names.
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

/// A regular file's: its number, and when it was made, where its file system knows that.
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
        assert!(shrunk.contains("it has 512 KiB, and had 1 MiB"), "{shrunk}");
        // Another file of this name, made while the first one still has its number.
        let other = directory.path().join("other");
        File::create(&other).unwrap().set_len(1 << 20).unwrap();
        std::fs::rename(&other, &path).unwrap();
        let other = again().unwrap_err().to_string();
        assert!(other.contains("it is inode") && other.contains("and was inode"), "{other}");
    }
}

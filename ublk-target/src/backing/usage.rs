//! The users of a block device or a file, for errors when exclusive use is refused.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FileType, StatxFlags, statx};
use uring_ext::block::LoopFile;

use crate::backing::sysfs::SysfsDevice;
use crate::os::procfs::parse_devt;
use crate::os::procfs::{
    held_up, is_roots, mounts, parent_of, process_name, processes, split_devt,
};
use crate::os::text::printable;

/// The users of the block device `(major, minor)` and of its partitions, in words: mounts, swap,
/// devices stacked on it. Empty if none of these is known.
#[must_use]
pub fn users_of_device(major: u32, minor: u32) -> Vec<String> {
    users_of(&numbers_of_device(major, minor))
}

/// The numbers of a block device and of its partitions.
#[must_use]
pub fn numbers_of_device(major: u32, minor: u32) -> Vec<(u32, u32)> {
    let mut numbers = vec![(major, minor)];
    if let Some(device) = SysfsDevice::find(Path::new("/sys"), major, minor) {
        numbers.extend(device.partitions());
    }
    numbers
}

/// The users of the block devices with these numbers, in words: mounts in every visible mount
/// namespace, devices stacked on them, kernel loop devices, swap.
#[must_use]
pub fn users_of(numbers: &[(u32, u32)]) -> Vec<String> {
    let mut users = mounts_of(numbers);
    for (major, minor) in numbers {
        let holders = SysfsDevice::find(Path::new("/sys"), *major, *minor)
            .map(|device| device.holders())
            .unwrap_or_default();
        users.extend(holders.into_iter().map(|name| format!("held by {}", printable(&name))));
    }
    let is_it = |file: &LoopFile| file.rdevice != 0 && numbers.contains(&split_devt(file.rdevice));
    users.extend(loop_devices_of(is_it));
    users.extend(btrfs_of(numbers));
    let is_swap = |meta: &fs::Metadata| {
        meta.file_type().is_block_device() && numbers.contains(&split_devt(meta.rdev()))
    };
    users.extend(swaps_of(is_swap));
    users
}

/// The mounts of the block devices with these numbers, in words. Each mount namespace is read once,
/// by one of its processes; that of the calling process first.
fn mounts_of(numbers: &[(u32, u32)]) -> Vec<String> {
    let mut seen = BTreeSet::new();
    let mut found = Vec::new();
    let own = std::process::id();
    for pid in std::iter::once(own).chain(processes()) {
        let Ok(namespace) = fs::read_link(format!("/proc/{pid}/ns/mnt")) else { continue };
        if !seen.insert(namespace) {
            continue;
        }
        let mut mounts = mounts(&pid.to_string());
        let root = PathBuf::from(format!("/proc/{pid}/root"));
        mounts.retain(|mount| mount.is_of(numbers, &root));
        mounts.dedup();
        for mount in mounts {
            let point = printable(&mount.point.to_string_lossy());
            let told = format!("mounted on {point}");
            if pid == own {
                found.push(told);
            } else if !found.contains(&told) {
                found.push(format!("{told} among the mounts of {}", Opener::of(pid)));
            }
        }
    }
    found
}

/// The kernel loop devices with such a file, in words.
fn loop_devices_of(is_it: impl Fn(&LoopFile) -> bool) -> Vec<String> {
    let Ok(blocks) = fs::read_dir("/sys/block") else { return Vec::new() };
    let mut found = Vec::new();
    for block in blocks.flatten().filter(|block| block.path().join("loop").exists()) {
        let path = Path::new("/dev").join(block.file_name());
        let Ok(device) = File::open(&path) else { continue };
        if uring_ext::block::loop_file(device.as_fd()).is_ok_and(|file| is_it(&file)) {
            found.push(format!("attached to {}", path.display()));
        }
    }
    found.sort();
    found
}

/// The mounted btrfs file systems that include such a device, in words: their mounts name only one
/// device.
fn btrfs_of(numbers: &[(u32, u32)]) -> Vec<String> {
    let Ok(systems) = fs::read_dir("/sys/fs/btrfs") else { return Vec::new() };
    let has_it = |system: &fs::DirEntry| {
        let devices = fs::read_dir(system.path().join("devices")).into_iter().flatten().flatten();
        let mut number = devices.filter_map(|it| fs::read_to_string(it.path().join("dev")).ok());
        number.any(|number| parse_devt(&number).is_some_and(|it| numbers.contains(&it)))
    };
    let named =
        |it: fs::DirEntry| format!("in btrfs {}", printable(&it.file_name().to_string_lossy()));
    systems.flatten().filter(has_it).map(named).collect()
}

/// Whether such a file is used as swap, in words.
fn swaps_of(is_it: impl Fn(&fs::Metadata) -> bool) -> Option<String> {
    let swaps = fs::read_to_string("/proc/swaps").unwrap_or_default();
    let is_used = swap_paths(&swaps).any(|path| fs::metadata(path).is_ok_and(|meta| is_it(&meta)));
    is_used.then(|| "used as swap".to_owned())
}

/// The users of a block device, or if none is known, the processes that have it open.
#[must_use]
pub fn holders_of_device(major: u32, minor: u32) -> Vec<String> {
    let users = users_of_device(major, minor);
    if !users.is_empty() {
        return users;
    }
    openers_of_device(major, minor).iter().take(3).map(|o| format!("open by {o}")).collect()
}

/// The users of a regular file, in words: swap, kernel loop devices. It may have several hard
/// links, so its device and inode numbers identify it.
#[must_use]
pub fn users_of_file(file: &fs::Metadata) -> Vec<String> {
    let (device, inode) = (file.dev(), file.ino());
    let is_it = |it: &LoopFile| {
        it.rdevice == 0 && it.inode == inode && split_devt(it.device) == split_devt(device)
    };
    let mut users: Vec<_> =
        swaps_of(|meta| (meta.dev(), meta.ino()) == (device, inode)).into_iter().collect();
    users.extend(loop_devices_of(is_it));
    users
}

/// A process that has a device open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Opener {
    /// Process id.
    pub pid: u32,
    /// Name of the process.
    pub name: String,
}

impl Opener {
    /// A process, independent of its open files.
    #[must_use]
    pub fn of(pid: u32) -> Self {
        Self { pid, name: process_name(pid) }
    }

    /// Whether it is a worker of udev, or a program that one has started (`blkid`, `bcache`): these
    /// open every device that appears or was written to, and close it soon.
    #[must_use]
    pub fn is_udev(&self) -> bool {
        let mut pid = Some(self.pid);
        // A parent that ends meanwhile leaves its child to another one: this comes to an end.
        for _ in 0..8 {
            let Some(next) = pid.filter(|pid| *pid > 1) else { return false };
            if process_name(next).contains("udev") && is_roots(next) {
                return true;
            }
            pid = parent_of(next);
        }
        false
    }
}

impl std::fmt::Display for Opener {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({}", self.name, self.pid)?;
        if let Some(why) = held_up(self.pid) {
            write!(f, ", which {why}")?;
        }
        f.write_str(")")
    }
}

/// Processes that have a node of the block device or of one of its partitions open.
#[must_use]
pub fn openers_of_device(major: u32, minor: u32) -> Vec<Opener> {
    openers_of(&numbers_of_device(major, minor))
}

/// Processes that have a block device with these numbers open.
#[must_use]
pub fn openers_of(numbers: &[(u32, u32)]) -> Vec<Opener> {
    openers(|node| !node.is_char && numbers.contains(&node.number))
}

/// Processes that have a node of the character device open.
#[must_use]
pub fn openers_of_char_device(path: &Path) -> Vec<Opener> {
    let Ok(node) = fs::metadata(path) else { return Vec::new() };
    openers(|it| it.is_char && it.number == split_devt(node.rdev()))
}

/// Whether an open file is the character device of the ublk device `id`: its node may have been
/// replaced by another device.
#[must_use]
pub fn is_char_device_of(file: &File, id: u32) -> bool {
    // Without a driver there is nothing to compare with.
    let Some(ublk) = char_major("ublk-char") else { return true };
    file.metadata().is_ok_and(|meta| {
        meta.file_type().is_char_device() && split_devt(meta.rdev()) == (ublk, id)
    })
}

/// The ids of the ublk devices whose character device a process has open, including deleted devices
/// that are still open. The id comes from the device number, since a name can be wrong.
#[must_use]
pub fn served_by(pid: u32) -> Vec<u32> {
    let Some(ublk) = char_major("ublk-char") else { return Vec::new() };
    let id = |node: Node| {
        let (major, minor) = node.number;
        (node.is_char && major == ublk).then_some(minor)
    };
    nodes_of(pid).filter_map(id).collect()
}

/// The major number of a driver's character devices (`/proc/devices`).
fn char_major(name: &str) -> Option<u32> {
    let devices = fs::read_to_string("/proc/devices").ok()?;
    let (characters, _) = devices.split_once("Block devices:")?;
    let mut lines = characters.lines().filter_map(|line| line.trim().split_once(' '));
    lines.find(|(_, driver)| *driver == name)?.0.parse().ok()
}

/// Processes of any program that have the character device of a ublk device open.
#[must_use]
pub fn servers_of(id: u32) -> Vec<Opener> {
    processes().filter(|pid| served_by(*pid).contains(&id)).map(Opener::of).collect()
}

fn openers(is_it: impl Fn(&Node) -> bool) -> Vec<Opener> {
    let has_it = |pid: &u32| nodes_of(*pid).any(|node| is_it(&node));
    processes().filter(has_it).map(Opener::of).collect()
}

/// The node of a device that a process has open.
struct Node {
    is_char: bool,
    number: (u32, u32),
}

fn nodes_of(pid: u32) -> impl Iterator<Item = Node> {
    let files = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    files.filter_map(|file| {
        // A file of a server that does not answer must not be waited for.
        let flags = AtFlags::STATX_DONT_SYNC | AtFlags::NO_AUTOMOUNT;
        let stat = statx(CWD, file.path(), flags, StatxFlags::TYPE).ok()?;
        let kind = FileType::from_raw_mode(stat.stx_mode.into());
        let is_node = kind.is_char_device() || kind.is_block_device();
        let number = (stat.stx_rdev_major, stat.stx_rdev_minor);
        is_node.then(|| Node { is_char: kind.is_char_device(), number })
    })
}

pub(super) fn swap_paths(swaps: &str) -> impl Iterator<Item = &str> {
    swaps.lines().skip(1).filter_map(|line| line.split_whitespace().next())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn swap_files_are_found() {
        let swaps = "Filename\tType\tSize\tUsed\tPriority\n/swap.img file 1 0 -2\n/dev/sda2 partition 1 0 -3\n";
        assert_eq!(swap_paths(swaps).collect::<Vec<_>>(), ["/swap.img", "/dev/sda2"]);
    }
}

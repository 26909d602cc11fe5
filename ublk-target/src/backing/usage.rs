//! Who uses a block device or a file: to say it where exclusive use is refused.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use super::sysfs::{SysfsDevice, parse_devt};

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

/// The users of the block devices of these numbers, in words.
#[must_use]
pub fn users_of(numbers: &[(u32, u32)]) -> Vec<String> {
    let mut users = Vec::new();
    let mut mounts = mounts();
    mounts.retain(|mount| numbers.contains(&mount.devt));
    mounts.dedup();
    users.extend(mounts.iter().map(|mount| format!("mounted on {}", mount.point.display())));
    for (major, minor) in numbers {
        let holders = SysfsDevice::find(Path::new("/sys"), *major, *minor)
            .map(|device| device.holders())
            .unwrap_or_default();
        users.extend(holders.into_iter().map(|name| format!("held by {name}")));
    }
    let swaps = fs::read_to_string("/proc/swaps").unwrap_or_default();
    for path in swap_paths(&swaps) {
        let is_ours = fs::metadata(path).is_ok_and(|meta| {
            meta.file_type().is_block_device() && numbers.contains(&split_devt(meta.rdev()))
        });
        if is_ours {
            users.push("used as swap".to_owned());
        }
    }
    users
}

/// The users of a block device, or where none is known the processes that have it open.
#[must_use]
pub fn holders_of_device(major: u32, minor: u32) -> Vec<String> {
    let users = users_of_device(major, minor);
    if !users.is_empty() {
        return users;
    }
    openers_of_device(major, minor).iter().take(3).map(|o| format!("open by {o}")).collect()
}

/// The users of a regular file, in words: swap, kernel loop devices.
#[must_use]
pub fn users_of_file(path: &Path) -> Vec<String> {
    let mut users = Vec::new();
    let swaps = fs::read_to_string("/proc/swaps").unwrap_or_default();
    if swap_paths(&swaps).any(|swap| Path::new(swap) == path) {
        users.push("used as swap".to_owned());
    }
    let Ok(blocks) = fs::read_dir("/sys/block") else { return users };
    for block in blocks.flatten() {
        let backing = fs::read_to_string(block.path().join("loop/backing_file"));
        if backing.is_ok_and(|backing| Path::new(backing.trim_end()) == path) {
            users.push(format!("attached to /dev/{}", block.file_name().to_string_lossy()));
        }
    }
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
    fn of(pid: u32) -> Self {
        Self { pid, name: process_name(pid) }
    }

    /// Whether it is a worker of udev, which looks at every device that appears or was written
    /// to, and lets go of it by itself.
    #[must_use]
    pub fn is_udev(&self) -> bool {
        self.name.contains("udev")
    }
}

impl std::fmt::Display for Opener {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({})", self.name, self.pid)
    }
}

/// Processes that have a node of the block device open, or of one of its partitions.
#[must_use]
pub fn openers_of_device(major: u32, minor: u32) -> Vec<Opener> {
    openers_of(&numbers_of_device(major, minor))
}

/// Processes that have a block device of these numbers open.
#[must_use]
pub fn openers_of(numbers: &[(u32, u32)]) -> Vec<Opener> {
    openers(|meta| meta.file_type().is_block_device() && numbers.contains(&split_devt(meta.rdev())))
}

/// Processes that have a node of the character device open.
#[must_use]
pub fn openers_of_char_device(path: &Path) -> Vec<Opener> {
    let Ok(node) = fs::metadata(path) else { return Vec::new() };
    openers(|meta| meta.file_type().is_char_device() && meta.rdev() == node.rdev())
}

/// The ids of the ublk devices whose character device a process has open, those among them that are
/// deleted but not let go of.
#[must_use]
pub fn served_by(pid: u32) -> Vec<u32> {
    let Ok(files) = fs::read_dir(format!("/proc/{pid}/fd")) else { return Vec::new() };
    let id = |path: PathBuf| {
        let name = path.to_str()?.strip_prefix("/dev/ublkc")?;
        name.strip_suffix(" (deleted)").unwrap_or(name).parse().ok()
    };
    files.flatten().filter_map(|file| id(fs::read_link(file.path()).ok()?)).collect()
}

/// Processes of any program that have the character device of a ublk device open.
#[must_use]
pub fn servers_of(id: u32) -> Vec<Opener> {
    processes().filter(|pid| served_by(*pid).contains(&id)).map(Opener::of).collect()
}

fn openers(is_it: impl Fn(&fs::Metadata) -> bool) -> Vec<Opener> {
    processes().filter(|pid| has_open(*pid, &is_it)).map(Opener::of).collect()
}

fn processes() -> impl Iterator<Item = u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

fn has_open(pid: u32, is_it: impl Fn(&fs::Metadata) -> bool) -> bool {
    let Ok(files) = fs::read_dir(format!("/proc/{pid}/fd")) else { return false };
    files.flatten().any(|file| fs::metadata(file.path()).is_ok_and(|meta| is_it(&meta)))
}

/// The name of a process, `?` if it is gone.
#[must_use]
pub fn process_name(pid: u32) -> String {
    fs::read_to_string(format!("/proc/{pid}/comm"))
        .map_or_else(|_| "?".to_owned(), |name| name.trim().to_owned())
}

/// Major and minor of a device number.
#[must_use]
pub fn split_devt(devt: u64) -> (u32, u32) {
    (libc::major(devt), libc::minor(devt))
}

/// Something mounted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// The device number; major 0 for file systems without a device.
    pub devt: (u32, u32),
    /// Where.
    pub point: PathBuf,
}

/// What is mounted in the calling process's mount namespace, in the order of mounting.
#[must_use]
pub fn mounts() -> Vec<Mount> {
    parse_mounts(&fs::read_to_string("/proc/self/mountinfo").unwrap_or_default())
}

fn parse_mounts(mountinfo: &str) -> Vec<Mount> {
    let parse = |line: &str| {
        let mut fields = line.split(' ');
        let devt = parse_devt(fields.nth(2)?)?;
        Some(Mount { devt, point: PathBuf::from(unescape(fields.nth(1)?)) })
    };
    mountinfo.lines().filter_map(parse).collect()
}

/// Undoes the octal escapes of blanks and backslashes.
fn unescape(field: &str) -> String {
    [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")]
        .iter()
        .fold(field.to_owned(), |text, (escape, character)| text.replace(escape, character))
}

fn swap_paths(swaps: &str) -> impl Iterator<Item = &str> {
    swaps.lines().skip(1).filter_map(|line| line.split_whitespace().next())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_are_found() {
        let mountinfo = "22 1 259:0 / / rw,relatime shared:1 - ext4 /dev/root rw\n\
                         30 22 259:3 / /mnt/a\\040b rw - xfs /dev/nvme1n1p1 rw\n\
                         31 22 0:20 / /proc rw - proc proc rw\n";
        let found = parse_mounts(mountinfo);
        let found: Vec<_> = found.iter().map(|m| (m.devt, m.point.to_str().unwrap())).collect();
        assert_eq!(found, [((259, 0), "/"), ((259, 3), "/mnt/a b"), ((0, 20), "/proc")]);
        assert!(parse_mounts("garbage\n\n").is_empty());
    }

    #[test]
    fn swap_files_are_found() {
        let swaps = "Filename\tType\tSize\tUsed\tPriority\n/swap.img file 1 0 -2\n/dev/sda2 partition 1 0 -3\n";
        assert_eq!(swap_paths(swaps).collect::<Vec<_>>(), ["/swap.img", "/dev/sda2"]);
    }
}

//! The device to explain, its server, and the drives below it.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use nix::sys::stat::{major, minor};
use ublk_target::backing::sysfs::SysfsDevice;
use ublk_target::device::description::Description;
use ublk_target::os::procfs::parse_devt;
use uring_ext::control::Control;

use super::trace::DeviceNumber;

/// The maximum depth of a stack of devices.
const MAX_DEPTH: usize = 8;

/// A live ublk device.
#[derive(Debug)]
pub struct Device {
    /// Its path.
    pub path: PathBuf,
    /// Its description by driver and server.
    pub described: Description,
    /// Its device number.
    pub number: DeviceNumber,
    /// The threads of its server.
    pub server: Vec<u32>,
    /// The disks below it, as far as they can be found.
    pub backings: Vec<DeviceNumber>,
    /// Its logical block size, in bytes.
    pub block_bytes: u64,
    /// The maximum length of its requests, in bytes. Longer reads are split.
    pub most_bytes: u64,
}

impl Device {
    /// Finds a device by its path, or by a link to it.
    ///
    /// # Errors
    /// A one-line message: it is no ublk device, or it has no server.
    pub fn find(path: &Path) -> anyhow::Result<Self> {
        let named = path.display();
        let metadata = fs::metadata(path).with_context(|| format!("cannot look at {named}"))?;
        let number = (major_of(metadata.rdev())?, minor_of(metadata.rdev())?);
        let disk = SysfsDevice::find(Path::new("/sys"), number.0, number.1)
            .filter(|_| metadata.file_type().is_block_device());
        let Some(disk) = disk else { bail!("{named} is not a block device") };
        let id = fs::canonicalize(path).ok().as_deref().and_then(id);
        let Some(id) = id else {
            bail!(
                "{named} is not a ublk device; give one that `ublk-target list` shows: /dev/ublkbN"
            );
        };
        let described = Description::of(&Control::open()?, id)?;
        let Some(pid) = described.pid.filter(|_| described.state == "LIVE") else {
            bail!("{named} has no server: its state is {}", described.state);
        };
        let attribute = |name: &str| disk.attribute_of_disk(name)?.parse::<u64>().ok();
        let most_bytes = attribute("queue/max_sectors_kb").map_or(u64::MAX, |kib| kib << 10);
        let backings = described.backings.iter().flat_map(|backing| disks_of(backing)).collect();
        Ok(Self {
            path: path.to_owned(),
            number,
            server: threads(pid).with_context(|| format!("cannot look at the server {pid}"))?,
            backings,
            block_bytes: attribute("queue/logical_block_size").unwrap_or(512),
            most_bytes,
            described,
        })
    }
}

fn major_of(device: u64) -> anyhow::Result<u32> {
    Ok(u32::try_from(major(device))?)
}

fn minor_of(device: u64) -> anyhow::Result<u32> {
    Ok(u32::try_from(minor(device))?)
}

/// The id of `/dev/ublkbN`.
fn id(path: &Path) -> Option<u32> {
    path.file_name()?.to_str()?.strip_prefix("ublkb")?.parse().ok()
}

fn threads(pid: u32) -> std::io::Result<Vec<u32>> {
    let entries = fs::read_dir(format!("/proc/{pid}/task"))?;
    Ok(entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect())
}

/// The disks below a backing, which is a block device, a generic device of an NVMe namespace, or a
/// file.
fn disks_of(backing: &Path) -> Vec<DeviceNumber> {
    let block = namespace(backing).unwrap_or_else(|| backing.to_owned());
    let Ok(metadata) = fs::metadata(&block) else { return Vec::new() };
    let number =
        if metadata.file_type().is_block_device() { metadata.rdev() } else { metadata.dev() };
    match (major_of(number), minor_of(number)) {
        (Ok(major), Ok(minor)) => leaves((major, minor), MAX_DEPTH),
        (Ok(_) | Err(_), _) => Vec::new(),
    }
}

/// The block device of `/dev/ngXnY`.
fn namespace(generic: &Path) -> Option<PathBuf> {
    let name = generic.file_name()?.to_str()?.strip_prefix("ng")?;
    Some(generic.with_file_name(format!("nvme{name}")))
}

/// The lowest devices below a device.
fn leaves(number: DeviceNumber, depth: usize) -> Vec<DeviceNumber> {
    let Some(device) = SysfsDevice::find(Path::new("/sys"), number.0, number.1) else {
        return Vec::new();
    };
    let below = below(number);
    if depth == 0 || below.is_empty() {
        let disk = device.attribute_of_disk("dev").and_then(|text| parse_devt(&text));
        return disk.into_iter().collect();
    }
    below.into_iter().flat_map(|number| leaves(number, depth - 1)).collect()
}

fn below(number: DeviceNumber) -> Vec<DeviceNumber> {
    let slaves = format!("/sys/dev/block/{}:{}/slaves", number.0, number.1);
    let Ok(entries) = fs::read_dir(slaves) else { return Vec::new() };
    let number =
        |entry: fs::DirEntry| parse_devt(&fs::read_to_string(entry.path().join("dev")).ok()?);
    entries.flatten().filter_map(number).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_and_namespaces_are_read_from_names() {
        assert_eq!(id(Path::new("/dev/ublkb12")), Some(12));
        assert_eq!(id(Path::new("/dev/ublkc12")), None);
        assert_eq!(id(Path::new("/dev/ublkb1p1")), None);
        assert_eq!(namespace(Path::new("/dev/ng1n2")), Some("/dev/nvme1n2".into()));
        assert_eq!(namespace(Path::new("/dev/nvme1n2")), None);
    }

    #[test]
    fn what_is_no_ublk_device_is_refused() {
        let refused = |path| format!("{:#}", Device::find(Path::new(path)).unwrap_err());
        assert!(refused("/dev/null").contains("/dev/null is not a block device"));
        assert!(refused("/no/such").starts_with("cannot look at /no/such: "));
    }
}

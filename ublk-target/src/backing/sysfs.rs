//! A block device's limits, as sysfs shows them (`Documentation/ABI/stable/sysfs-block`).

use std::fs;
use std::path::{Path, PathBuf};

use crate::backing::limits::{DiscardLimits, Limits};
use crate::os::procfs::parse_devt;

/// A block device in sysfs.
#[derive(Clone, Debug)]
pub struct SysfsDevice {
    directory: PathBuf,
    queue: PathBuf,
    is_partition: bool,
}

impl SysfsDevice {
    /// Finds a device by its number, below `sys` (`/sys` except in tests). `None` if sysfs does not
    /// have it.
    #[must_use]
    pub fn find(sys: &Path, major: u32, minor: u32) -> Option<Self> {
        let directory = fs::canonicalize(sys.join(format!("dev/block/{major}:{minor}"))).ok()?;
        let is_partition = directory.join("partition").exists();
        let disk = if is_partition { directory.parent()? } else { &directory };
        let queue = disk.join("queue");
        Some(Self { queue, is_partition, directory })
    }

    /// Names of the devices that are stacked on this one.
    #[must_use]
    pub fn holders(&self) -> Vec<String> {
        let Ok(entries) = fs::read_dir(self.directory.join("holders")) else { return Vec::new() };
        let mut names: Vec<_> = entries
            .flatten()
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    }

    /// Device numbers of the disk's partitions, empty for a partition.
    #[must_use]
    pub fn partitions(&self) -> Vec<(u32, u32)> {
        if self.is_partition {
            return Vec::new();
        }
        let Ok(entries) = fs::read_dir(&self.directory) else { return Vec::new() };
        entries
            .flatten()
            .filter(|entry| entry.path().join("partition").exists())
            .filter_map(|entry| parse_devt(&fs::read_to_string(entry.path().join("dev")).ok()?))
            .collect()
    }

    /// Whether the device is zoned; no target supports that.
    #[must_use]
    pub fn is_zoned(&self) -> bool {
        self.text("zoned").is_some_and(|model| model != "none")
    }

    /// Whether its driver has poll queues.
    #[must_use]
    pub fn can_poll(&self) -> bool {
        self.text("io_poll").is_some_and(|on| on == "1")
    }

    /// Whether the device refuses writes.
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        read(&self.directory.join("ro")).is_some_and(|text| text == "1")
    }

    /// An attribute of the disk; for a partition, of the whole disk.
    #[must_use]
    pub fn attribute_of_disk(&self, name: &str) -> Option<String> {
        read(&self.queue.parent()?.join(name))
    }

    /// The first sector of a partition.
    #[must_use]
    pub fn partition_start(&self) -> Option<u64> {
        if !self.is_partition {
            return None;
        }
        read(&self.directory.join("start"))?.parse().ok()
    }

    /// The limits. An attribute that an older kernel lacks gets the block layer's default.
    #[must_use]
    pub fn limits(&self) -> Limits {
        let logical_block = self.number_or("logical_block_size", 512);
        let kib = self.number_or::<u32>("max_sectors_kb", 512);
        let chunk = self.number_or("chunk_sectors", 0_u64);
        // Of a partition that does not begin at a chunk, requests are split below.
        let begins_at_chunk = !self.is_partition
            || self.partition_start().is_some_and(|start| start.checked_rem(chunk) == Some(0));
        let chunk = if begins_at_chunk { chunk.saturating_mul(512) } else { 0 };
        Limits {
            logical_block,
            physical_block: self.number_or("physical_block_size", logical_block),
            io_min: self.number_or("minimum_io_size", logical_block),
            io_opt: self.number_or("optimal_io_size", 0),
            max_io: kib.saturating_mul(1024),
            chunk,
            // Shown as a mask; before Linux 6.1 not at all, and 511 is its default.
            dma_alignment: self.number_or::<u32>("dma_alignment", 511).saturating_add(1),
            virt_boundary_mask: self.number_or("virt_boundary_mask", 0),
            max_segments: self.number_or("max_segments", 128),
            max_segment_size: self.number_or("max_segment_size", 65536),
            discard: self.discard_limits(logical_block),
            max_write_zeroes: self.number_or("write_zeroes_max_bytes", 0),
            volatile_cache: self.text("write_cache").is_some_and(|mode| mode == "write back"),
            // Offered also where the drive has none: the block layer below makes a write and a
            // flush of it. It would do so above us too, but if the server dies while such a write
            // waits for its flush, the driver never gives up either of them, and their users hang
            // (`ublk_cancel_cmd()` in `drivers/block/ublk_drv.c`, seen in Linux 7.2).
            fua: true,
            rotational: self.number_or("rotational", 0) == 1,
            read_only: self.is_read_only(),
        }
    }

    fn discard_limits(&self, logical_block: u32) -> Option<DiscardLimits> {
        let max_bytes = self.number_or("discard_max_bytes", 0_u64);
        let granularity = self.number_or("discard_granularity", 0_u32);
        (max_bytes > 0).then(|| DiscardLimits {
            granularity: granularity.max(logical_block),
            alignment: read(&self.directory.join("discard_alignment"))
                .and_then(|text| text.parse().ok())
                .unwrap_or(0),
            max_bytes,
        })
    }

    fn text(&self, attribute: &str) -> Option<String> {
        read(&self.queue.join(attribute))
    }

    fn number_or<T: std::str::FromStr>(&self, attribute: &str, default: T) -> T {
        self.text(attribute).and_then(|text| text.parse().ok()).unwrap_or(default)
    }
}

fn read(path: &Path) -> Option<String> {
    fs::read_to_string(path).ok().map(|text| text.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A sysfs with one NVMe disk of one partition, as a real kernel shows them.
    fn fake_sysfs() -> tempfile::TempDir {
        let sys = tempfile::tempdir().unwrap();
        let disk = sys.path().join("block/nvme0n1");
        let queue = disk.join("queue");
        fs::create_dir_all(&queue).unwrap();
        fs::create_dir_all(disk.join("nvme0n1p1")).unwrap();
        fs::create_dir_all(disk.join("holders/dm-3")).unwrap();
        for (attribute, text) in [
            ("logical_block_size", "512\n"),
            ("physical_block_size", "4096\n"),
            ("minimum_io_size", "4096\n"),
            ("optimal_io_size", "0\n"),
            ("max_sectors_kb", "512\n"),
            ("chunk_sectors", "256\n"),
            ("dma_alignment", "3\n"),
            ("virt_boundary_mask", "4095\n"),
            ("max_segments", "127\n"),
            ("max_segment_size", "4294967295\n"),
            ("discard_max_bytes", "2199023255040\n"),
            ("discard_granularity", "512\n"),
            ("write_zeroes_max_bytes", "131072\n"),
            ("write_cache", "write back\n"),
            ("fua", "1\n"),
            ("rotational", "0\n"),
            ("zoned", "none\n"),
        ] {
            fs::write(queue.join(attribute), text).unwrap();
        }
        fs::write(disk.join("ro"), "0\n").unwrap();
        fs::write(disk.join("nvme0n1p1/partition"), "1\n").unwrap();
        fs::write(disk.join("nvme0n1p1/dev"), "259:1\n").unwrap();
        fs::write(disk.join("nvme0n1p1/ro"), "1\n").unwrap();
        let by_number = sys.path().join("dev/block");
        fs::create_dir_all(&by_number).unwrap();
        std::os::unix::fs::symlink(&disk, by_number.join("259:0")).unwrap();
        std::os::unix::fs::symlink(disk.join("nvme0n1p1"), by_number.join("259:1")).unwrap();
        sys
    }

    #[test]
    fn limits_of_a_disk_are_read() {
        let sys = fake_sysfs();
        let device = SysfsDevice::find(sys.path(), 259, 0).unwrap();
        let limits = device.limits();
        assert_eq!((limits.logical_block, limits.physical_block), (512, 4096));
        assert_eq!((limits.dma_alignment, limits.virt_boundary_mask), (4, 4095));
        assert_eq!((limits.max_segments, limits.max_segment_size), (127, u32::MAX));
        assert_eq!((limits.max_io, limits.chunk), (512 << 10, 128 << 10));
        assert_eq!(limits.discard.unwrap().max_bytes, 2_199_023_255_040);
        assert_eq!(limits.max_write_zeroes, 131_072);
        assert!(limits.volatile_cache && limits.fua && !limits.rotational && !limits.read_only);
        assert!(!device.is_zoned());
        fs::write(sys.path().join("block/nvme0n1/queue/fua"), "0\n").unwrap();
        assert!(device.limits().fua, "the block layer makes do with a flush");
        assert_eq!(device.holders(), ["dm-3"]);
        assert_eq!(device.partitions(), [(259, 1)]);
    }

    #[test]
    fn a_partition_has_the_limits_of_its_disk() {
        let sys = fake_sysfs();
        let device = SysfsDevice::find(sys.path(), 259, 1).unwrap();
        let limits = device.limits();
        assert_eq!((limits.physical_block, limits.chunk), (4096, 0));
        assert!(limits.read_only, "but its own read-only flag");
        assert!(device.partitions().is_empty());
        let start = sys.path().join("block/nvme0n1/nvme0n1p1/start");
        for (sector, chunk) in [("2048\n", 256 << 9), ("2049\n", 0)] {
            fs::write(&start, sector).unwrap();
            assert_eq!(device.limits().chunk, chunk, "of 256 sectors, from {sector}");
        }
    }

    #[test]
    fn absent_attributes_have_defaults() {
        let sys = fake_sysfs();
        fs::remove_dir_all(sys.path().join("block/nvme0n1/queue")).unwrap();
        let limits = SysfsDevice::find(sys.path(), 259, 0).unwrap().limits();
        assert_eq!((limits.logical_block, limits.dma_alignment), (512, 512));
        assert_eq!((limits.discard, limits.max_write_zeroes), (None, 0));
        assert!(SysfsDevice::find(sys.path(), 8, 0).is_none());
    }
}

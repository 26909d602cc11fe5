//! Request descriptors: an array that the driver shares with the server, with one entry for each
//! tag.

use std::fs::File;
use std::num::NonZeroUsize;
use std::ptr::NonNull;

use libublk::sys;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

use crate::Errno;

/// One request as the driver describes it (`struct ublksrv_io_desc`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IoDesc {
    /// Operation in bits 0 to 7 (`UBLK_IO_OP_*`), flags above (`UBLK_IO_F_*`).
    pub op_flags: u32,
    /// Length in sectors of 512 bytes.
    pub nr_sectors: u32,
    /// First sector of 512 bytes.
    pub start_sector: u64,
}

impl IoDesc {
    /// The operation, one of `UBLK_IO_OP_*`.
    #[must_use]
    pub const fn op(self) -> u32 {
        self.op_flags & 0xff
    }

    /// Whether a flag (`UBLK_IO_F_*`) is set.
    #[must_use]
    pub const fn has(self, flag: u32) -> bool {
        self.op_flags & flag != 0
    }
}

/// The mapped descriptor array of one queue, read-only.
#[derive(Debug)]
pub struct IoDescArray {
    base: NonNull<sys::ublksrv_io_desc>,
    bytes: usize,
    depth: u16,
}

// SAFETY: the mapping is read-only, shared with the kernel and not tied to a thread.
unsafe impl Send for IoDescArray {}

impl IoDescArray {
    /// Maps the descriptors of queue `qid` of the device behind `cdev` (`/dev/ublkcN`).
    /// `depth` must be the device's queue depth.
    ///
    /// # Errors
    /// `EINVAL` if `depth` is not the queue's (`ublk_ch_mmap` wants the exact size), `ENODEV`
    /// if the device is gone.
    pub fn map(cdev: &File, qid: u16, depth: u16) -> Result<Self, Errno> {
        let page = page_size();
        let entry = size_of::<sys::ublksrv_io_desc>();
        let bytes = (usize::from(depth) * entry).next_multiple_of(page);
        // The driver places the queues as if each had the maximum depth.
        let stride = (sys::UBLK_MAX_QUEUE_DEPTH as usize * entry).next_multiple_of(page);
        let offset = i64::try_from(usize::from(qid) * stride).map_err(|_| Errno::EINVAL)?;
        let length = NonZeroUsize::new(bytes).ok_or(Errno::EINVAL)?;
        // SAFETY: the kernel chooses the address of the new mapping, so no other memory changes.
        let mapped = unsafe {
            mmap(
                None,
                length,
                ProtFlags::PROT_READ,
                MapFlags::MAP_SHARED | MapFlags::MAP_POPULATE,
                cdev,
                offset,
            )
        };
        let base = mapped.map_err(|errno| Errno::new(errno as i32))?.cast();
        Ok(Self { base, bytes, depth })
    }

    /// The descriptor of a tag. It does not change between the completion of the tag's fetch and
    /// its commit.
    ///
    /// # Panics
    /// If `tag` is not below the queue's depth.
    #[must_use]
    #[inline]
    pub fn get(&self, tag: u16) -> IoDesc {
        assert!(tag < self.depth, "tag {tag} of a queue of depth {}", self.depth);
        // SAFETY: the index is below the depth that was mapped.
        let entry = unsafe { self.base.add(usize::from(tag)) };
        // SAFETY: mapped, aligned and consisting of integers. Volatile since the kernel writes it.
        let raw = unsafe { entry.read_volatile() };
        IoDesc {
            op_flags: raw.op_flags,
            nr_sectors: raw.nr_sectors,
            start_sector: raw.start_sector,
        }
    }
}

impl Drop for IoDescArray {
    fn drop(&mut self) {
        // SAFETY: exactly the range that `map` mapped; `get` cannot be called any more.
        let unmapped = unsafe { munmap(self.base.cast(), self.bytes) };
        debug_assert!(unmapped.is_ok());
    }
}

/// The machine's page size in bytes.
#[must_use]
pub fn page_size() -> usize {
    nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE)
        .ok()
        .flatten()
        .and_then(|size| usize::try_from(size).ok())
        .unwrap_or(4096)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operation_and_flags_are_separate() {
        let iod = IoDesc { op_flags: 1 | sys::UBLK_IO_F_FUA, nr_sectors: 8, start_sector: 1 << 33 };
        assert_eq!(iod.op(), sys::UBLK_IO_OP_WRITE);
        assert!(iod.has(sys::UBLK_IO_F_FUA));
        assert!(!iod.has(sys::UBLK_IO_F_NEED_REG_BUF));
    }
}

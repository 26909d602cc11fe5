//! Memory of the copy modes: one page-aligned buffer for each tag.

use std::num::NonZeroUsize;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;

use libublk::sys;
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous};

use crate::Errno;
use crate::iod::page_size;

/// Page-aligned, zeroed buffers of one size, numbered from 0.
///
/// The memory is mapped once and stays mapped until the process ends. The driver and the drives
/// hold addresses in it, and so no order of tear-down can free it too early.
#[derive(Clone, Copy, Debug)]
pub struct BufferPool {
    base: NonNull<u8>,
    buffer_bytes: usize,
    count: u16,
}

// SAFETY: the pool is an address range that is never unmapped. This crate never creates a reference
// into it.
unsafe impl Send for BufferPool {}

/// An address in a [`BufferPool`]. Only pools make them, so it is never unmapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PoolAddr(u64);

impl PoolAddr {
    /// The address as the kernel takes it.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0
    }
}

/// The direction of [`BufferPool::copy`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// The data of a write, into the pool.
    FromRequest,
    /// The data of a read, out of the pool.
    ToRequest,
}

/// A request's data in the address space of the character device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestAddr {
    /// Queue of the device.
    pub qid: u16,
    /// Tag in the queue.
    pub tag: u16,
}

impl RequestAddr {
    /// The file position of byte `offset` of the request (`ublk_pos_to_*`).
    fn position(self, offset: u32) -> i64 {
        let base = i64::from(sys::UBLKSRV_IO_BUF_OFFSET);
        let queue = i64::from(self.qid) << sys::UBLK_QID_OFF;
        let tag = i64::from(self.tag) << sys::UBLK_TAG_OFF;
        base + queue + tag + i64::from(offset & sys::UBLK_IO_BUF_BITS_MASK)
    }
}

impl BufferPool {
    /// Maps `count` buffers of `buffer_bytes` each, rounded up to whole pages, and faults them in.
    ///
    /// # Errors
    /// `ENOMEM` if there is too little memory, `EINVAL` for an empty pool or one beyond the
    /// address space.
    pub fn new(count: u16, buffer_bytes: u32) -> Result<Self, Errno> {
        let buffer_bytes =
            usize::try_from(buffer_bytes).map_err(|_| Errno::EINVAL)?.next_multiple_of(page_size());
        let bytes = buffer_bytes.checked_mul(usize::from(count)).ok_or(Errno::EINVAL)?;
        let bytes = NonZeroUsize::new(bytes).ok_or(Errno::EINVAL)?;
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: the kernel chooses the address of the new anonymous mapping, so no other memory
        // changes.
        let mapped = unsafe {
            mmap_anonymous(None, bytes, protection, MapFlags::MAP_PRIVATE | MapFlags::MAP_POPULATE)
        };
        let base = mapped.map_err(|errno| Errno::new(errno as i32))?.cast();
        Ok(Self { base, buffer_bytes, count })
    }

    /// The number of buffers.
    #[must_use]
    pub const fn count(&self) -> u16 {
        self.count
    }

    /// The address of `offset` bytes into buffer `index`.
    ///
    /// # Panics
    /// If the buffer or the offset is outside the pool.
    #[must_use]
    pub fn addr(&self, index: u16, offset: u32) -> PoolAddr {
        let offset = offset as usize;
        assert!(index < self.count && offset < self.buffer_bytes, "buffer {index}+{offset}");
        let start = self.base.as_ptr().expose_provenance();
        PoolAddr((start + usize::from(index) * self.buffer_bytes + offset) as u64)
    }

    /// Copies `len` bytes between a delivered request and buffer `index`, both from byte `offset`
    /// on, by `pread(2)` or `pwrite(2)` on the character device (`UBLK_F_USER_COPY`, Linux 6.5,
    /// `ublk_user_copy`). These are plain system calls, since the driver takes only user memory and
    /// no registered buffer. They copy and do not wait.
    ///
    /// Returns the number of bytes copied, which may be less than `len`.
    ///
    /// # Errors
    /// `EINVAL` if the request is not with the server, `EACCES` for a device without user copy or
    /// the wrong direction.
    ///
    /// # Panics
    /// If the range is outside the pool.
    pub fn copy(
        &self,
        cdev: BorrowedFd<'_>,
        request: RequestAddr,
        direction: Direction,
        index: u16,
        offset: u32,
        len: u32,
    ) -> Result<u32, Errno> {
        let (start, len) = (offset as usize, len as usize);
        assert!(index < self.count && start + len <= self.buffer_bytes, "buffer {index}+{offset}");
        let memory = std::ptr::with_exposed_provenance_mut(self.addr_of(index) + start);
        let position = request.position(offset);
        let cdev = cdev.as_raw_fd();
        // The range is never unmapped, and no reference into it exists.
        let copied = match direction {
            // SAFETY: see above.
            Direction::FromRequest => unsafe { libc::pread64(cdev, memory, len, position) },
            // SAFETY: see above.
            Direction::ToRequest => unsafe { libc::pwrite64(cdev, memory, len, position) },
        };
        u32::try_from(copied).map_err(|_negative| Errno::of(&std::io::Error::last_os_error()))
    }

    /// Writes bytes into buffer `index` from byte `offset` on.
    ///
    /// # Panics
    /// If the range is outside the pool.
    pub(crate) fn write(&mut self, index: u16, offset: u32, bytes: &[u8]) {
        let start = offset as usize;
        assert!(index < self.count && start + bytes.len() <= self.buffer_bytes, "{index}+{offset}");
        let to = std::ptr::with_exposed_provenance_mut(self.addr_of(index) + start);
        // SAFETY: the range is never unmapped, no reference into it exists, and `bytes` is outside
        // it.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
    }

    /// One buffer as an I/O vector.
    pub(crate) fn iovec(&self, index: u16) -> libc::iovec {
        libc::iovec {
            iov_base: std::ptr::with_exposed_provenance_mut(self.addr_of(index)),
            iov_len: self.buffer_bytes,
        }
    }

    fn addr_of(&self, index: u16) -> usize {
        self.base.as_ptr().expose_provenance() + usize::from(index) * self.buffer_bytes
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd;
    use std::os::unix::fs::{FileExt, OpenOptionsExt};

    use super::*;

    #[test]
    fn buffers_are_apart_and_aligned() {
        let pool = BufferPool::new(3, 5000).unwrap();
        let page = page_size() as u64;
        let first = pool.addr(0, 0).get();
        assert_eq!(first % page, 0);
        assert_eq!(pool.addr(2, 7).get() - first, 2 * 5000_u64.next_multiple_of(page) + 7);
        assert_eq!(pool.count(), 3);
    }

    #[test]
    #[should_panic(expected = "buffer 3")]
    fn foreign_buffers_are_refused() {
        let _ = BufferPool::new(3, 4096).unwrap().addr(3, 0);
    }

    #[test]
    fn requests_have_positions_in_the_character_device() {
        assert_eq!(RequestAddr { qid: 0, tag: 0 }.position(0), 0x8000_0000);
        assert_eq!(RequestAddr { qid: 0, tag: 1 }.position(512), 0x8200_0200);
        assert_eq!(RequestAddr { qid: 3, tag: 0 }.position(0), 0x0600_8000_0000);
    }

    #[test]
    fn bytes_are_copied_to_and_from_the_file_position_of_the_request() {
        // A sparse file replaces the character device.
        let file = tempfile();
        let pool = BufferPool::new(2, 4096).unwrap();
        let request = RequestAddr { qid: 1, tag: 2 };
        let position = request.position(512);
        file.write_all_at(&[7; 1024], u64::try_from(position).unwrap()).unwrap();
        let copied = pool.copy(file.as_fd(), request, Direction::FromRequest, 1, 512, 2048);
        assert_eq!(copied, Ok(1024), "as far as there is data");
        let back = RequestAddr { qid: 0, tag: 9 };
        assert_eq!(pool.copy(file.as_fd(), back, Direction::ToRequest, 1, 512, 1024), Ok(1024));
        let mut bytes = [0; 1024];
        file.read_exact_at(&mut bytes, u64::try_from(back.position(512)).unwrap()).unwrap();
        assert_eq!(bytes, [7; 1024]);
    }

    fn tempfile() -> File {
        File::options()
            .read(true)
            .write(true)
            .custom_flags(libc::O_TMPFILE)
            .open(std::env::temp_dir())
            .unwrap()
    }

    #[test]
    fn an_empty_pool_is_refused() {
        assert_eq!(BufferPool::new(0, 4096).unwrap_err(), Errno::EINVAL);
    }
}

//! Memory of the copy modes: one page-aligned buffer a tag.

use std::num::NonZeroUsize;
use std::ptr::NonNull;

use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous};

use crate::Errno;
use crate::iod::page_size;

/// Page-aligned, zeroed buffers of one size, numbered from 0.
///
/// The memory is mapped once and stays mapped until the process ends: the driver and the drives
/// hold addresses in it, and no order of tear-down can then free it too early.
#[derive(Clone, Copy, Debug)]
pub struct BufferPool {
    base: NonNull<u8>,
    buffer_bytes: usize,
    count: u16,
}

// SAFETY: the pool is an address range that is never unmapped; this crate never forms a
// reference into it.
unsafe impl Send for BufferPool {}

/// An address in a [`BufferPool`]; only pools make them, so it stays mapped for ever.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PoolAddr(u64);

impl PoolAddr {
    /// The address as the kernel takes it.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0
    }
}

impl BufferPool {
    /// Maps `count` buffers of `buffer_bytes` each, rounded up to whole pages, and faults them in.
    ///
    /// # Errors
    /// `ENOMEM` if the memory is not to be had, `EINVAL` for an empty pool or one beyond the
    /// address space.
    pub fn new(count: u16, buffer_bytes: u32) -> Result<Self, Errno> {
        let buffer_bytes =
            usize::try_from(buffer_bytes).map_err(|_| Errno::EINVAL)?.next_multiple_of(page_size());
        let bytes = buffer_bytes.checked_mul(usize::from(count)).ok_or(Errno::EINVAL)?;
        let bytes = NonZeroUsize::new(bytes).ok_or(Errno::EINVAL)?;
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new anonymous mapping at an address of the kernel's choice touches no memory
        // of ours.
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
    /// If the buffer or the offset is not of this pool.
    #[must_use]
    pub fn addr(&self, index: u16, offset: u32) -> PoolAddr {
        let offset = offset as usize;
        assert!(index < self.count && offset < self.buffer_bytes, "buffer {index}+{offset}");
        let start = self.base.as_ptr().expose_provenance();
        PoolAddr((start + usize::from(index) * self.buffer_bytes + offset) as u64)
    }

    /// The buffers as I/O vectors, for the ring's buffer table.
    pub(crate) fn iovecs(&self) -> Vec<libc::iovec> {
        (0..self.count)
            .map(|index| libc::iovec {
                iov_base: std::ptr::with_exposed_provenance_mut(self.addr_of(index)),
                iov_len: self.buffer_bytes,
            })
            .collect()
    }

    fn addr_of(&self, index: u16) -> usize {
        self.base.as_ptr().expose_provenance() + usize::from(index) * self.buffer_bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_apart_and_aligned() {
        let pool = BufferPool::new(3, 5000).unwrap();
        let page = page_size() as u64;
        let first = pool.addr(0, 0).get();
        assert_eq!(first % page, 0);
        assert_eq!(pool.addr(2, 7).get() - first, 2 * 5000_u64.next_multiple_of(page) + 7);
        assert_eq!(pool.iovecs().len(), 3);
    }

    #[test]
    #[should_panic(expected = "buffer 3")]
    fn foreign_buffers_are_refused() {
        let _ = BufferPool::new(3, 4096).unwrap().addr(3, 0);
    }

    #[test]
    fn an_empty_pool_is_refused() {
        assert_eq!(BufferPool::new(0, 4096).unwrap_err(), Errno::EINVAL);
    }
}

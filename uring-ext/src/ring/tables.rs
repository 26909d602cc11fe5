//! Changes to the file and buffer tables while the ring is in use, by the thread that made it.

use std::os::fd::RawFd;

use crate::Errno;
use crate::pool::BufferPool;
use crate::sqe::FixedFile;

use super::Queues;

/// How many entries one system call changes.
const CHUNK: usize = 64;
/// A slot without a buffer.
const EMPTY: libc::iovec = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };

impl Queues<'_> {
    /// Sets entries of the file table, from `first` on. A file that is replaced stays open until no
    /// operation in flight uses it.
    ///
    /// # Errors
    /// `EBADF` for a closed file, `EINVAL` beyond the table. Files before the one that failed are
    /// set.
    pub fn set_files(&mut self, first: FixedFile, files: &[RawFd]) -> Result<(), Errno> {
        let (mut at, mut left) = (first.0, files);
        while !left.is_empty() {
            // The kernel stops at the first file that it cannot set, and returns how many it has
            // set (`__io_sqe_files_update`). It returns the error only if that file is the first.
            let set = self.submitter.register_files_update(at, left);
            let set = set.map_err(|error| Errno::of(&error))?;
            if set == 0 || set > left.len() {
                return Err(Errno::EIO);
            }
            at += u32::try_from(set).unwrap_or(0);
            left = &left[set..];
        }
        Ok(())
    }

    /// Clears entries of the file table. Does not allocate.
    ///
    /// # Errors
    /// `EINVAL` beyond the table.
    pub fn clear_files(&mut self, first: FixedFile, count: usize) -> Result<(), Errno> {
        let (missing, mut at, mut left) = ([-1; CHUNK], first.0, count);
        while left > 0 {
            let some = left.min(CHUNK);
            self.set_files(FixedFile(at), &missing[..some])?;
            at += u32::try_from(some).unwrap_or(0);
            left -= some;
        }
        Ok(())
    }

    /// Sets slots of the buffer table to the buffers of a pool, from `first` on. Does not allocate.
    ///
    /// # Errors
    /// `EINVAL` beyond the table, `ENOMEM` where the locked-memory limit does not suffice. Buffers
    /// before the one that failed are set.
    pub fn set_buffers(&mut self, first: u16, pool: &BufferPool) -> Result<(), Errno> {
        // One by one: the kernel stops at the first buffer that it cannot set and returns how many
        // it has set (`__io_sqe_buffers_update`), but the `io-uring` crate drops that number.
        for index in 0..pool.count() {
            let slot = u32::from(first) + u32::from(index);
            self.update_buffers(slot, &[pool.iovec(index)])?;
        }
        Ok(())
    }

    /// Clears slots of the buffer table. Does not allocate.
    ///
    /// # Errors
    /// `EINVAL` beyond the table.
    pub fn clear_buffers(&mut self, first: u16, count: u16) -> Result<(), Errno> {
        let (mut at, mut left) = (u32::from(first), usize::from(count));
        while left > 0 {
            // An empty slot needs no memory, so this fails only beyond the table, and then changes
            // nothing.
            let some = left.min(CHUNK);
            self.update_buffers(at, &[EMPTY; CHUNK][..some])?;
            at += u32::try_from(some).unwrap_or(0);
            left -= some;
        }
        Ok(())
    }

    /// The iovecs are [`EMPTY`] or those of a pool.
    fn update_buffers(&mut self, first: u32, iovecs: &[libc::iovec]) -> Result<(), Errno> {
        // SAFETY: the iovecs are empty or name pool memory, which is never unmapped, so it outlives
        // any ring.
        let updated = unsafe { self.submitter.register_buffers_update(first, iovecs, None) };
        updated.map_err(|error| Errno::of(&error))
    }
}

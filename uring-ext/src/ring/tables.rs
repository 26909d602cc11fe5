//! Changing the tables of files and buffers while the ring is in use, on the thread that made it.

use std::os::fd::RawFd;

use crate::Errno;
use crate::pool::BufferPool;
use crate::sqe::FixedFile;

use super::Queues;

/// How many places are changed at a time.
const CHUNK: usize = 64;
/// A slot without a buffer.
const EMPTY: libc::iovec = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };

impl Queues<'_> {
    /// Puts files into places of the table, from `first` on. What was there goes, once nothing in
    /// flight uses it.
    ///
    /// # Errors
    /// `EBADF` for a closed file, `EINVAL` beyond the table. Files before the one at fault are set.
    pub fn set_files(&mut self, first: FixedFile, files: &[RawFd]) -> Result<(), Errno> {
        let (mut at, mut left) = (first.0, files);
        while !left.is_empty() {
            // The kernel stops at the first file it cannot set, and answers with how many it has set
            // before (`__io_sqe_files_update`). It says why only if that one is the first.
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

    /// Empties places of the table of files. Allocates nothing.
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

    /// Puts the buffers of a pool into slots of the buffer table, from `first` on. Allocates nothing.
    ///
    /// # Errors
    /// `EINVAL` beyond the table, `ENOMEM` where the locked-memory limit does not suffice. Buffers
    /// before the one at fault are set.
    pub fn set_buffers(&mut self, first: u16, pool: &BufferPool) -> Result<(), Errno> {
        // One by one: the kernel stops at the first buffer it cannot set and answers with how many
        // it has set before (`__io_sqe_buffers_update`), which the `io-uring` crate does not pass on.
        for index in 0..pool.count() {
            let slot = u32::from(first) + u32::from(index);
            self.update_buffers(slot, &[pool.iovec(index)])?;
        }
        Ok(())
    }

    /// Empties slots of the buffer table. Allocates nothing.
    ///
    /// # Errors
    /// `EINVAL` beyond the table.
    pub fn clear_buffers(&mut self, first: u16, count: u16) -> Result<(), Errno> {
        let (mut at, mut left) = (u32::from(first), usize::from(count));
        while left > 0 {
            // An empty slot takes no memory, so this fails only beyond the table, and then as a whole.
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

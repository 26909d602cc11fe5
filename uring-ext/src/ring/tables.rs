//! Changing the tables of files and buffers while the ring is in use, on the thread that made it.

use std::os::fd::RawFd;

use crate::Errno;
use crate::pool::BufferPool;
use crate::sqe::FixedFile;

use super::Queues;

/// How many places are emptied at a time.
const CHUNK: usize = 64;

impl Queues<'_> {
    /// Puts files into places of the table, from `first` on. What was there goes, once nothing in
    /// flight uses it.
    ///
    /// # Errors
    /// `EBADF` for a closed file, `EINVAL` beyond the table.
    pub fn set_files(&mut self, first: FixedFile, files: &[RawFd]) -> Result<(), Errno> {
        let set = self.submitter.register_files_update(first.0, files);
        set.map(drop).map_err(|error| Errno::of(&error))
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

    /// Puts the buffers of a pool into slots of the buffer table, from `first` on.
    ///
    /// # Errors
    /// `EINVAL` beyond the table, `ENOMEM` where the locked-memory limit does not suffice.
    pub fn set_buffers(&mut self, first: u16, pool: &BufferPool) -> Result<(), Errno> {
        self.update_buffers(first.into(), &pool.iovecs())
    }

    /// Empties slots of the buffer table. Allocates nothing.
    ///
    /// # Errors
    /// `EINVAL` beyond the table.
    pub fn clear_buffers(&mut self, first: u16, count: u16) -> Result<(), Errno> {
        let empty = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };
        let (empty, mut at, mut left) = ([empty; CHUNK], u32::from(first), usize::from(count));
        while left > 0 {
            let some = left.min(CHUNK);
            self.update_buffers(at, &empty[..some])?;
            at += u32::try_from(some).unwrap_or(0);
            left -= some;
        }
        Ok(())
    }

    fn update_buffers(&mut self, first: u32, iovecs: &[libc::iovec]) -> Result<(), Errno> {
        // SAFETY: the iovecs are empty or name pool memory, which is never unmapped, so it outlives
        // any ring.
        let updated = unsafe { self.submitter.register_buffers_update(first, iovecs, None) };
        updated.map_err(|error| Errno::of(&error))
    }
}

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

    /// Puts the buffers of a pool into slots of the buffer table, from `first` on. Allocates nothing.
    ///
    /// # Errors
    /// `EINVAL` beyond the table, `ENOMEM` where the locked-memory limit does not suffice.
    pub fn set_buffers(&mut self, first: u16, pool: &BufferPool) -> Result<(), Errno> {
        self.fill_slots(first, pool.count(), |index| pool.iovec(index))
    }

    /// Empties slots of the buffer table. Allocates nothing.
    ///
    /// # Errors
    /// `EINVAL` beyond the table.
    pub fn clear_buffers(&mut self, first: u16, count: u16) -> Result<(), Errno> {
        self.fill_slots(first, count, |_| EMPTY)
    }

    fn fill_slots(
        &mut self,
        first: u16,
        count: u16,
        buffer: impl Fn(u16) -> libc::iovec,
    ) -> Result<(), Errno> {
        let (mut chunk, mut used) = ([EMPTY; CHUNK], 0);
        for index in 0..count {
            chunk[used] = buffer(index);
            used += 1;
            if used == CHUNK || index + 1 == count {
                let end = u32::from(first) + u32::from(index) + 1;
                let start = end - u32::try_from(used).unwrap_or(0);
                self.update_buffers(start, &chunk[..used])?;
                used = 0;
            }
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

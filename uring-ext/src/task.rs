//! Properties of the calling thread.

use crate::Errno;

/// `PR_SET_IO_FLUSHER` (`include/uapi/linux/prctl.h`).
const PR_SET_IO_FLUSHER: libc::c_int = 57;

/// Marks the thread as one that cleans memory for others: what it allocates in the kernel does
/// not wait for writeback or throttling, which may in turn wait for it (Linux 5.6).
///
/// # Errors
/// `EPERM` without `CAP_SYS_RESOURCE`, `EINVAL` on older kernels.
pub fn set_io_flusher() -> Result<(), Errno> {
    let on: libc::c_ulong = 1;
    let unused: libc::c_ulong = 0;
    // SAFETY: this option takes integers only.
    let result = unsafe { libc::prctl(PR_SET_IO_FLUSHER, on, unused, unused, unused) };
    if result == 0 { Ok(()) } else { Err(Errno::of(&std::io::Error::last_os_error())) }
}

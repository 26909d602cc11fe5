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

/// Gives the thread the least real-time priority (`SCHED_FIFO`, priority 1, which its children do
/// not inherit), or the policy of ordinary threads again (`SCHED_OTHER`, at the nice value that it
/// had). See `sched(7)`.
///
/// # Errors
/// `EPERM` without `CAP_SYS_NICE` if `RLIMIT_RTPRIO` is 0, or where the thread's control group has no
/// share of real time.
pub fn set_real_time(on: bool) -> Result<(), Errno> {
    let policy = if on { libc::SCHED_FIFO } else { libc::SCHED_OTHER };
    let param = libc::sched_param { sched_priority: libc::c_int::from(on) };
    // SAFETY: `param` is valid for reads; 0 is the calling thread.
    let result = unsafe { libc::sched_setscheduler(0, policy | libc::SCHED_RESET_ON_FORK, &param) };
    if result == 0 { Ok(()) } else { Err(Errno::of(&std::io::Error::last_os_error())) }
}

/// Whether the thread has the policy of ordinary threads (`SCHED_OTHER`).
#[must_use]
pub fn is_ordinary() -> bool {
    // SAFETY: it takes an integer; 0 is the calling thread.
    let policy = unsafe { libc::sched_getscheduler(0) };
    policy & !libc::SCHED_RESET_ON_FORK == libc::SCHED_OTHER
}

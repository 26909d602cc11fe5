//! Properties of the calling thread and its process.

use crate::Errno;

/// `PR_SET_IO_FLUSHER` (`include/uapi/linux/prctl.h`).
const PR_SET_IO_FLUSHER: libc::c_int = 57;

/// Marks the thread as an I/O flusher (Linux 5.6): its allocations in the kernel do not wait for
/// writeback or throttling, which may in turn wait for this thread.
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

/// Gives the thread the lowest real-time priority (`SCHED_FIFO`, priority 1, which its children do
/// not inherit), or returns it to the default policy (`SCHED_OTHER`, with its previous nice value).
/// See `sched(7)`.
///
/// # Errors
/// `EPERM` without `CAP_SYS_NICE` if `RLIMIT_RTPRIO` is 0, or if the thread's control group has no
/// real-time budget.
pub fn set_real_time(on: bool) -> Result<(), Errno> {
    let policy = if on { libc::SCHED_FIFO } else { libc::SCHED_OTHER };
    let param = libc::sched_param { sched_priority: libc::c_int::from(on) };
    // SAFETY: `param` is valid for reads; 0 is the calling thread.
    let result = unsafe { libc::sched_setscheduler(0, policy | libc::SCHED_RESET_ON_FORK, &param) };
    if result == 0 { Ok(()) } else { Err(Errno::of(&std::io::Error::last_os_error())) }
}

/// Whether the thread has the default policy (`SCHED_OTHER`).
#[must_use]
pub fn is_ordinary() -> bool {
    // SAFETY: it takes an integer; 0 is the calling thread.
    let policy = unsafe { libc::sched_getscheduler(0) };
    policy & !libc::SCHED_RESET_ON_FORK == libc::SCHED_OTHER
}

/// Closes the descriptors that the process has inherited, except for standard input, output and
/// error (`close_range(2)`, Linux 5.9). Call it before the process opens files of its own, which
/// would also be closed.
///
/// # Errors
/// `ENOSYS` on older kernels.
pub fn close_inherited_files() -> Result<(), Errno> {
    close_range(0)
}

/// Prevents programs that this process starts from inheriting the descriptors that are open now,
/// except for standard input, output and error (`CLOSE_RANGE_CLOEXEC`, Linux 5.11).
///
/// # Errors
/// `ENOSYS` or `EINVAL` on older kernels.
pub fn keep_files_from_children() -> Result<(), Errno> {
    close_range(libc::CLOSE_RANGE_CLOEXEC)
}

fn close_range(flags: libc::c_uint) -> Result<(), Errno> {
    let (first, last, flags) = (libc::c_ulong::from(3_u8), libc::c_ulong::from(u32::MAX), flags);
    // SAFETY: it takes integers only. The caller ensures that nothing in this process owns the
    // descriptors that it closes.
    let result =
        unsafe { libc::syscall(libc::SYS_close_range, first, last, libc::c_ulong::from(flags)) };
    if result == 0 { Ok(()) } else { Err(Errno::of(&std::io::Error::last_os_error())) }
}

/// Forks, runs `work` in the child, and ends the child. Returns the child's process id, which the
/// caller has to wait for.
///
/// # Errors
/// `EBUSY` if the process has several threads: the child could wait for their locks for ever;
/// `EAGAIN` at the limit of processes, `ENOMEM`.
pub fn in_child(work: impl FnOnce()) -> Result<i32, Errno> {
    let threads = std::fs::read_dir("/proc/self/task").map_err(|error| Errno::of(&error))?;
    if threads.count() != 1 {
        return Err(Errno::EBUSY);
    }
    // SAFETY: this is the only thread, so memory and locks are consistent in the child.
    let pid = unsafe { libc::fork() };
    match pid {
        -1 => Err(Errno::of(&std::io::Error::last_os_error())),
        0 => {
            // The child must not unwind or flush anything of the parent.
            let worked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
            // SAFETY: it ends the child at once, without running destructors.
            unsafe { libc::_exit(i32::from(worked.is_err())) }
        }
        pid => Ok(pid),
    }
}

//! Properties of the calling thread and its process.

use std::collections::BTreeSet;
use std::ops::RangeInclusive;
use std::os::fd::{AsRawFd, BorrowedFd};

use crate::Errno;

/// `PR_SET_IO_FLUSHER` (`include/uapi/linux/prctl.h`).
const PR_SET_IO_FLUSHER: libc::c_int = 57;

/// Marks the thread as an I/O flusher, or not any more (Linux 5.6): its allocations in the kernel do
/// not wait for writeback or throttling, which may in turn wait for this thread. Children inherit it.
///
/// # Errors
/// `EPERM` without `CAP_SYS_RESOURCE`, `EINVAL` on older kernels.
pub fn set_io_flusher(on: bool) -> Result<(), Errno> {
    let on = libc::c_ulong::from(on);
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
    close_range(3, u32::MAX, 0)
}

/// Prevents programs that this process starts from inheriting the descriptors that are open now,
/// except for standard input, output and error (`CLOSE_RANGE_CLOEXEC`, Linux 5.11).
///
/// # Errors
/// `ENOSYS` or `EINVAL` on older kernels.
pub fn keep_files_from_children() -> Result<(), Errno> {
    close_range(3, u32::MAX, libc::CLOSE_RANGE_CLOEXEC)
}

fn close_range(first: u32, last: u32, flags: libc::c_uint) -> Result<(), Errno> {
    let [first, last, flags] = [first, last, flags].map(libc::c_ulong::from);
    // SAFETY: it takes integers only. The caller ensures that nothing in this process owns the
    // descriptors that it closes.
    let result = unsafe { libc::syscall(libc::SYS_close_range, first, last, flags) };
    if result == 0 { Ok(()) } else { Err(Errno::of(&std::io::Error::last_os_error())) }
}

/// The descriptors from 3 on that are not in `keep`, as ranges.
fn all_but(keep: &[BorrowedFd<'_>]) -> Vec<RangeInclusive<u32>> {
    let kept = keep.iter().filter_map(|fd| u32::try_from(fd.as_raw_fd()).ok());
    let kept: BTreeSet<u32> = kept.filter(|fd| *fd >= 3).collect();
    let mut first = 3;
    let mut ranges = Vec::new();
    for fd in kept {
        if first < fd {
            ranges.push(first..=fd - 1);
        }
        first = fd + 1;
    }
    ranges.push(first..=u32::MAX);
    ranges
}

/// Forks, runs `work` in the child, and ends the child. Returns the child's process id, which the
/// caller has to wait for.
///
/// The child has only standard input, output and error, and the descriptors in `keep`: it may outlive
/// the parent, and would share the parent's locks. `work` must not use or drop any other descriptor
/// of the parent. Before Linux 5.9 the child has all descriptors.
///
/// # Errors
/// `EBUSY` if the process has several threads: the child could wait for their locks for ever;
/// `EAGAIN` at the limit of processes, `ENOMEM`.
pub fn in_child(keep: &[BorrowedFd<'_>], work: impl FnOnce()) -> Result<i32, Errno> {
    let threads = std::fs::read_dir("/proc/self/task").map_err(|error| Errno::of(&error))?;
    if threads.count() != 1 {
        return Err(Errno::EBUSY);
    }
    // SAFETY: this is the only thread, so memory and locks are consistent in the child.
    unsafe { fork_to(keep, work) }
}

/// # Safety
///
/// If the process has other threads, `work` must not wait for a lock that one of them may hold, such
/// as that of the allocator.
unsafe fn fork_to(keep: &[BorrowedFd<'_>], work: impl FnOnce()) -> Result<i32, Errno> {
    let unused = all_but(keep);
    // SAFETY: the caller ensures that the child can do its work.
    let pid = unsafe { libc::fork() };
    match pid {
        -1 => Err(Errno::of(&std::io::Error::last_os_error())),
        0 => {
            for fds in &unused {
                // If this fails, the child has more descriptors, which does no harm.
                let _ = close_range(*fds.start(), *fds.end(), 0);
            }
            // The child must not unwind or flush anything of the parent.
            let worked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
            // SAFETY: it ends the child at once, without running destructors.
            unsafe { libc::_exit(i32::from(worked.is_err())) }
        }
        pid => Ok(pid),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Write};
    use std::os::fd::AsFd;

    use nix::fcntl::{Flock, FlockArg};

    use super::*;

    #[test]
    fn descriptors_that_are_kept_are_in_no_range() {
        // SAFETY: none of them is used.
        let fd = |fd| unsafe { BorrowedFd::borrow_raw(fd) };
        assert_eq!(all_but(&[]), [3..=u32::MAX]);
        assert_eq!(all_but(&[fd(0), fd(3)]), [4..=u32::MAX]);
        assert_eq!(all_but(&[fd(9), fd(5), fd(6), fd(9)]), [3..=4, 7..=8, 10..=u32::MAX]);
    }

    #[test]
    fn a_child_shares_no_lock() {
        let path = std::env::temp_dir().join(format!("uring-ext-child-{}", std::process::id()));
        let lock = |file| Flock::lock(file, FlockArg::LockExclusiveNonblock);
        let locked = File::create_new(&path).unwrap();
        // SAFETY: it takes integers only. Dropping a `Flock` would also unlock the file for the child.
        assert_eq!(unsafe { libc::flock(locked.as_raw_fd(), libc::LOCK_EX) }, 0);
        let other = File::open(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let pipe = || nix::unistd::pipe().map(|(from, to)| (File::from(from), File::from(to)));
        let ((mut started, starting), (ending, end)) = (pipe().unwrap(), pipe().unwrap());
        let work = || {
            let _ = (&starting).write_all(b"x");
            // This ends when the parent has closed its end, which the child does not have.
            let _ = (&ending).read(&mut [0]);
        };
        // SAFETY: the work takes no lock.
        let child = unsafe { fork_to(&[starting.as_fd(), ending.as_fd()], work) };
        let child = nix::unistd::Pid::from_raw(child.unwrap());
        started.read_exact(&mut [0]).unwrap();
        let (other, _) = lock(other).expect_err("this process has it");
        drop(locked);
        let is_free = lock(other).is_ok();
        drop(end);
        if !is_free {
            // With its own copy of that end, the child would wait for ever.
            let _ = nix::sys::signal::kill(child, nix::sys::signal::Signal::SIGKILL);
        }
        nix::sys::wait::waitpid(child, None).unwrap();
        assert!(is_free, "the child has it");
    }
}

//! Threads that serve requests.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::thread::JoinHandle;

use crate::io_thread::setup::LaneConfig;

/// Starts a thread that serves requests. If it panics, the process aborts: no other thread can
/// answer its open requests, and the driver notices only the end of the process. The device is then
/// in the same state as after any death of its server.
///
/// # Errors
/// `EAGAIN` at the limit of threads.
pub(crate) fn spawn_lane<T: Send + 'static>(
    name: String,
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    let guarded = move || {
        // The panic was already reported.
        catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| {
            log::error!("a lane has panicked; the server ends");
            std::process::abort()
        })
    };
    std::thread::Builder::new().name(name).spawn(guarded)
}

/// Sets the properties of a lane's thread. None of them is essential, so a failure is only logged.
pub(crate) fn prepare_lane_thread() {
    // Allocations that this thread causes in the kernel must not wait for writeback, which may
    // need this thread (`prctl(2)`, Linux 5.6).
    if let Err(errno) = uring_ext::task::set_io_flusher(true) {
        log::warn!("cannot set PR_SET_IO_FLUSHER for a lane: {errno}");
    }
}

/// Sets the properties of the thread of a queue.
pub(crate) fn prepare_thread(config: &LaneConfig) {
    prepare_lane_thread();
    let mut set = nix::sched::CpuSet::new();
    let known = config.cpus.iter().filter(|cpu| set.set(**cpu).is_ok()).count();
    if known > 0 {
        if let Err(errno) = nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &set) {
            log::warn!("lane {}: cannot set its CPUs: {errno}", config.engine.queue.qid.0);
        }
    }
}

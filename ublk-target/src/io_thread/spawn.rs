//! Threads that serve requests.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::thread::JoinHandle;

use crate::io_thread::setup::LaneConfig;

/// Starts a thread that serves requests. Should it panic, the process ends: what the thread had in hand
/// nobody else can answer, and the driver only learns from the end of the process that there is no
/// server any more. The device then fares as after any death of its server.
///
/// # Errors
/// `EAGAIN` at the limit of threads.
pub(crate) fn spawn_lane<T: Send + 'static>(
    name: String,
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    let guarded = move || {
        // The panic has been reported by now.
        catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| {
            log::error!("a lane has panicked; the server ends");
            std::process::abort()
        })
    };
    std::thread::Builder::new().name(name).spawn(guarded)
}

/// Properties of any lane's thread. None of them is vital, so a failure is logged and no more.
pub(crate) fn prepare_lane_thread() {
    // Allocations that this thread causes in the kernel must not wait for writeback, which may
    // need this thread (`prctl(2)`, Linux 5.6).
    if let Err(errno) = uring_ext::task::set_io_flusher() {
        log::warn!("cannot set PR_SET_IO_FLUSHER for a lane: {errno}");
    }
}

/// Properties of the thread of a queue.
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

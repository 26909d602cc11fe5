//! What a server has from the process that started it, and must not keep: it outlives that process by
//! far, and whatever it holds stays busy for as long.

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::stat::{Mode, umask};
use uring_ext::task::close_inherited_files;

/// The limits that end a process, and the signals by which they do.
const LIMITS: [(Resource, Signal); 3] = [
    (Resource::RLIMIT_FSIZE, Signal::SIGXFSZ),
    (Resource::RLIMIT_CPU, Signal::SIGXCPU),
    (Resource::RLIMIT_RTTIME, Signal::SIGXCPU),
];

/// Descriptors that a process needs at most where it serves many devices.
const FILES: u64 = 4096;

/// Makes the calling process independent of the one that started it:
///
/// - its descriptors are closed, but for standard input, output and error: a lock would be held, and a
///   file system stay busy, as long as the server lives;
/// - its umask is 022, so that files have the modes that they are given, and no others can write them;
/// - no limit of file size or processor time ends it. A write beyond a limit that cannot be raised
///   fails with `EFBIG`;
/// - it may open as many files as it needs.
///
/// To be called before the process opens anything or starts a thread.
pub fn shed() {
    if let Err(errno) = close_inherited_files() {
        log::warn!("cannot close what was open before: {errno}");
    }
    let files = getrlimit(Resource::RLIMIT_NOFILE);
    let raised = files.and_then(|(soft, hard)| {
        setrlimit(Resource::RLIMIT_NOFILE, soft.max(FILES), hard.max(FILES))
    });
    if let Err(errno) = raised {
        log::debug!("cannot raise the number of open files: {errno}");
    }
    umask(Mode::from_bits_truncate(0o022));
    for (limit, signal) in LIMITS {
        if let Err(errno) = setrlimit(limit, libc::RLIM_INFINITY, libc::RLIM_INFINITY) {
            log::debug!("cannot lift {limit:?}: {errno}");
        }
        // Blocked signals are inherited by threads. The operation then fails in its own way.
        let blocked = SigSet::from(signal).thread_block();
        if let Err(errno) = blocked {
            log::warn!("cannot block {signal}: {errno}");
        }
    }
}

//! Drops what a server has inherited from its caller. The server lives much longer, and everything
//! that it holds stays busy.

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::stat::{Mode, umask};
use uring_ext::task::close_inherited_files;

/// The limits that kill a process, and their signals.
const LIMITS: [(Resource, Signal); 3] = [
    (Resource::RLIMIT_FSIZE, Signal::SIGXFSZ),
    (Resource::RLIMIT_CPU, Signal::SIGXCPU),
    (Resource::RLIMIT_RTTIME, Signal::SIGXCPU),
];

/// Most descriptors that a process of many devices needs.
const FILES: u64 = 4096;

/// Makes the calling process independent of the one that started it:
///
/// - All descriptors except standard input, output and error are closed. Otherwise a lock would be
///   held, and a file system stay busy, as long as the server lives.
/// - Its umask is 022, so files get exactly their modes, and others cannot write them.
/// - No limit of file size or CPU time kills it. A write beyond a limit that cannot be raised fails
///   with `EFBIG`.
/// - It may open as many files as it needs.
///
/// Call it before the process opens a file or starts a thread.
pub fn shed() {
    if let Err(errno) = close_inherited_files() {
        log::warn!("cannot close inherited files: {errno}");
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

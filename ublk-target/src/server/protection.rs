//! What a server does so that neither a lack of memory nor a client's mounts bring it down, or to a
//! halt.
//!
//! None of it is vital, so a failure is logged and no more.

use std::fs;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::mman::{MlockAllFlags, mlockall};

use crate::backing::usage::{Mount, mounts};

/// Makes the calling process, which has one thread, fit to serve a device. Returns its mounts, if
/// these are its own now.
pub(super) fn protect() -> Option<OwnMounts> {
    lock_memory();
    spare_from_oom_killer();
    OwnMounts::take()
}

/// Keeps the program in memory. When memory is short and all that could be freed is dirty, pages
/// come free by writing through devices such as ours; a server whose own code was evicted could not
/// run to write them. What is mapped later (stacks of threads) is locked as it is used.
fn lock_memory() {
    let on_fault = MlockAllFlags::from_bits_retain(libc::MCL_ONFAULT);
    let locked = mlockall(MlockAllFlags::MCL_CURRENT)
        .and_then(|()| mlockall(MlockAllFlags::MCL_FUTURE | on_fault));
    if let Err(errno) = locked {
        log::warn!("cannot lock the server's memory: {errno}");
    }
}

/// The server's few MiB are no remedy for a lack of memory, and without it no dirty page of its
/// device can be freed.
fn spare_from_oom_killer() {
    if let Err(error) = fs::write("/proc/self/oom_score_adj", "-1000") {
        log::warn!("cannot spare the server from the out-of-memory killer: {error}");
    }
}

/// The mount namespace of a process that is in one of its own.
#[derive(Debug)]
pub(super) struct OwnMounts(());

impl OwnMounts {
    /// Takes the process into a mount namespace of its own.
    ///
    /// The last process of a mount namespace unmounts, as it exits, what is mounted there. If that
    /// is a file system on the device that it serves, it waits for itself for ever.
    fn take() -> Option<Self> {
        let left = unshare(CloneFlags::CLONE_NEWNS).and_then(|()| {
            let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
            mount(None::<&str>, "/", None::<&str>, private, None::<&str>)
        });
        match left {
            Ok(()) => Some(Self(())),
            Err(errno) => {
                log::warn!("cannot leave the mount namespace: {errno}");
                None
            }
        }
    }

    /// Unmounts, here, the file systems that the process does not need: one that was mounted here
    /// when it is unmounted elsewhere would stay in use. `needed` are paths that will be opened
    /// later.
    ///
    /// The device has to be served: a file system on it that is unmounted everywhere else meanwhile
    /// is unmounted for good here.
    pub fn forget(self, needed: &[PathBuf]) {
        // The last ones are on top of the first.
        for mount in mounts().into_iter().rev() {
            if is_dispensable(&mount, needed) {
                if let Err(errno) = umount2(&mount.point, MntFlags::MNT_DETACH) {
                    log::debug!("{} stays mounted: {errno}", mount.point.display());
                }
            }
        }
    }
}

/// Does something with the mounts of the first process in sight: those of the calling one are as they
/// were when it left them, less what it had no use for. Where that cannot be, it is done with these.
///
/// No descriptor of that namespace is kept: whoever lets go of it last unmounts what is mounted there.
pub(super) fn among_present_mounts<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    let enter = || {
        // Threads share their root and working directory, and may not while one changes its mounts.
        unshare(CloneFlags::CLONE_FS)?;
        let mounts = fs::File::open("/proc/1/ns/mnt").map_err(|error| {
            nix::errno::Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO))
        })?;
        setns(mounts, CloneFlags::CLONE_NEWNS)
    };
    std::thread::scope(|scope| {
        let thread = scope.spawn(move || {
            if let Err(errno) = enter() {
                log::warn!("cannot enter the mount namespace of process 1: {errno}");
            }
            work()
        });
        match thread.join() {
            Ok(done) => done,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

/// Whether a mount holds a block device that the server has no use for.
fn is_dispensable(mount: &Mount, needed: &[PathBuf]) -> bool {
    // Pseudo file systems have no device, and the number 0.
    let has_device = mount.devt.0 != 0;
    let is_needed = needed.iter().any(|path| path.starts_with(&mount.point));
    has_device && !is_needed && mount.point != Path::new("/")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_systems_that_nobody_needs_are_left() {
        let needed = [PathBuf::from("/usr/bin/ublk-target"), PathBuf::from("/srv/disks/a")];
        let table = [
            ("/", 259, false),
            ("/usr", 259, false),
            ("/srv", 8, false),
            ("/srv/disks", 253, false),
            ("/srv/di", 253, true),
            ("/home", 259, true),
            ("/mnt/on ours", 259, true),
            ("/proc", 0, false),
            ("/tmp", 0, false),
        ];
        for (point, major, dispensable) in table {
            let mount = Mount { devt: (major, 1), point: PathBuf::from(point) };
            assert_eq!(is_dispensable(&mount, &needed), dispensable, "{point}");
        }
    }
}

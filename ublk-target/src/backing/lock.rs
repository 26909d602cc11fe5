//! Advisory locks on files: `flock(2)`, and locks of open file descriptions (`F_OFD_SETLK`), as
//! virtual machines take them on their images.
//!
//! Any user who may read a file can take a shared lock, and so block an exclusive one. That must
//! not prevent root from serving the file, so only locks of root's processes count.

use std::fs::{self, File, Metadata};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::MetadataExt;

use nix::fcntl::{FcntlArg, fcntl};
use rustix::fs::{FlockOperation, flock};
use uring_ext::Errno;

use crate::backing::usage;
use crate::backing::{BackingProblem, in_use};
use crate::os::procfs::{self, process_name};

/// Locks a file exclusively while it is open.
///
/// # Errors
/// [`BackingProblem::InUse`] with the users: swap, kernel loop devices, and processes of root that
/// have locked it.
pub(super) fn lock(file: &File, read_only: bool) -> Result<(), BackingProblem> {
    let meta = file.metadata().map_err(crate::backing::failed("cannot be looked up"))?;
    let users = usage::users_of_file(&meta);
    if !users.is_empty() {
        return Err(BackingProblem::InUse(users));
    }
    let outcome = |locked: Result<(), Errno>| match locked {
        Ok(()) => Ok(()),
        Err(errno) if errno == Errno::EAGAIN || errno == EACCES => refuse_holders(file, &meta),
        // File systems without locks can be served.
        Err(errno) => {
            log::warn!("the file cannot be locked: {errno}");
            Ok(())
        }
    };
    outcome(lock_whole(file))?;
    outcome(lock_description(file, read_only))
}

const EACCES: Errno = Errno::new(libc::EACCES);

fn lock_whole(file: &File) -> Result<(), Errno> {
    flock(file, FlockOperation::NonBlockingLockExclusive)
        .map_err(|errno| Errno::new(errno.raw_os_error()))
}

fn lock_description(file: &File, read_only: bool) -> Result<(), Errno> {
    let kind = if read_only { libc::F_RDLCK } else { libc::F_WRLCK };
    let lock = libc::flock {
        l_type: i16::try_from(kind).unwrap_or(0),
        l_whence: i16::try_from(libc::SEEK_SET).unwrap_or(0),
        l_start: 0,
        // To its end, wherever that is.
        l_len: 0,
        l_pid: 0,
    };
    let set = fcntl(file.as_fd(), FcntlArg::F_OFD_SETLK(&lock));
    set.map(drop).map_err(|errno| Errno::new(errno as i32))
}

/// Refuses a file that another process of root has locked, or this process by another descriptor.
/// Other users' locks are logged.
fn refuse_holders(own: &File, file: &Metadata) -> Result<(), BackingProblem> {
    let holders = procfs::processes().filter(|pid| *pid != std::process::id());
    let holders = holders.filter(|pid| holds(*pid, file, None));
    let (roots, others): (Vec<_>, Vec<_>) = holders.partition(|pid| procfs::is_roots(*pid));
    for pid in &others {
        log::warn!(
            "{} ({pid}) of another user has locked the file; the device serves it anyway",
            process_name(*pid)
        );
    }
    let named = |pid: u32| format!("locked by {} ({pid})", process_name(pid));
    let mut roots: Vec<_> = roots.into_iter().map(named).collect();
    if holds(std::process::id(), file, Some(own)) {
        roots.push("this server already has it open, perhaps by another hard link".to_owned());
    }
    if roots.is_empty() && !others.is_empty() {
        return Ok(());
    }
    Err(in_use(roots, "locked by a process that is not visible here"))
}

/// Whether a process has locked a file by a descriptor other than `except` (`/proc/PID/fdinfo`,
/// which also shows locks of open file descriptions).
fn holds(pid: u32, file: &Metadata, except: Option<&File>) -> bool {
    let infos = fs::read_dir(format!("/proc/{pid}/fdinfo")).into_iter().flatten().flatten();
    let except = except.map(|file| file.as_raw_fd().to_string());
    infos
        .filter(|info| except.as_deref().is_none_or(|it| info.file_name() != *it))
        .filter_map(|info| fs::read_to_string(info.path()).ok())
        .any(|info| is_locked(&info, file))
}

/// Whether a descriptor has a lock on a file.
fn is_locked(info: &str, file: &Metadata) -> bool {
    let (major, minor) = procfs::split_devt(file.dev());
    let id = format!("{major:02x}:{minor:02x}:{}", file.ino());
    let mut locks = info.lines().filter_map(|line| line.strip_prefix("lock:"));
    locks.any(|lock| lock.split_whitespace().any(|field| field == id))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locks_are_read() {
        let file = tempfile::tempfile().unwrap();
        let meta = file.metadata().unwrap();
        let (major, minor) = procfs::split_devt(meta.dev());
        let id = format!("{major:02x}:{minor:02x}:{}", meta.ino());
        let lock_of = |kind: &str, id: &str| {
            format!("pos:\t0\nflags:\t02\nlock:\t1: {kind}  ADVISORY  READ -1 {id} 0 EOF\n")
        };
        assert!(is_locked(&lock_of("OFDLCK", &id), &meta));
        assert!(!is_locked(&lock_of("FLOCK", "fe:00:1"), &meta));
        assert!(!is_locked(&format!("pos:\t0\nino:\t{id}\n"), &meta));
        let own = std::process::id();
        assert!(!holds(own, &meta, None));
        lock(&file, false).unwrap();
        assert!(holds(own, &meta, None), "{id}");
        assert!(!holds(own, &meta, Some(&file)));
    }

    #[test]
    fn a_file_that_this_process_has_is_told() {
        let directory = tempfile::tempdir().unwrap();
        let (one, other) = (directory.path().join("one"), directory.path().join("other"));
        fs::write(&one, "x").unwrap();
        fs::hard_link(&one, &other).unwrap();
        let open = |path| File::options().read(true).write(true).open(path).unwrap();
        let first = open(&one);
        lock(&first, false).unwrap();
        let refused = lock(&open(&other), false).unwrap_err().to_string();
        assert!(refused.contains("this server already has it open"), "{refused}");
    }
}

//! Protects a server, so that neither a lack of memory nor a client's mounts can kill or block it.
//!
//! None of this is essential, so a failure is only logged.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::fcntl::OFlag;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::mman::{MlockAllFlags, mlockall};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::waitpid;
use nix::unistd::{chroot, fchdir, pipe2};
use uring_ext::task::in_child;

use crate::os::procfs::mounts;

/// Prepares the calling process, which must have one thread, to serve. `needed` are paths that it
/// opens later.
pub(crate) fn protect(needed: &[&Path]) {
    leave_mounts(needed);
    lock_memory();
    spare_from_oom_killer();
}

/// Keeps the program in memory. When memory is short and all reclaimable pages are dirty, the
/// kernel writes them, perhaps through a device of ours. A server whose own code was evicted could
/// not write them. Later mappings (stacks of threads) are locked as they are used.
fn lock_memory() {
    let on_fault = MlockAllFlags::from_bits_retain(libc::MCL_ONFAULT);
    let locked = mlockall(MlockAllFlags::MCL_CURRENT)
        .and_then(|()| mlockall(MlockAllFlags::MCL_FUTURE | on_fault));
    if let Err(errno) = locked {
        log::warn!("cannot lock the server's memory: {errno}");
    }
}

/// Killing the server would free only a few MiB, and without it no dirty page of its device can be
/// freed.
fn spare_from_oom_killer() {
    if let Err(error) = fs::write("/proc/self/oom_score_adj", "-1000") {
        log::warn!("cannot exempt the server from the out-of-memory killer: {error}");
    }
}

/// The longest time to make a mount namespace. It takes long only if this unmounts a file system
/// for the last time, on a device that does not answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// Moves the calling process, which must have one thread, into its own mount namespace. This has
/// only the needed mounts: those that lead to `needed`, to its program, its state, its log, and to
/// devices.
///
/// Any other file system mounted there would stay in use when it is unmounted elsewhere. And when
/// the last process of a mount namespace exits, it unmounts everything there. With a file system on
/// its own device, it would wait for itself for ever. So another process makes the namespace, and
/// this one enters it after those mounts are gone.
fn leave_mounts(needed: &[&Path]) {
    if let Err(error) = enter_own_mounts(needed) {
        log::warn!("cannot leave the mount namespace: {error}");
    }
}

fn enter_own_mounts(needed: &[&Path]) -> io::Result<()> {
    let needed = all_needed(needed);
    let (made, making) = pipe()?;
    let (held, holding) = pipe()?;
    // The child may hang after the end of this process, and must not keep its locks.
    let maker = in_child(&[making.as_fd(), held.as_fd()], || {
        let made = make_own_mounts(&needed).and_then(|()| own_number());
        if made.is_ok_and(|number| (&making).write_all(&number.to_ne_bytes()).is_ok()) {
            // Until the parent has entered the namespace, or has died.
            let _ = (&held).read(&mut [0]);
        }
    });
    let maker = maker.map_err(io::Error::from)?;
    drop(making);
    let entered = await_number(&made).and_then(enter_mounts_of);
    drop(holding);
    let maker = nix::unistd::Pid::from_raw(maker);
    if entered.is_err() {
        let _ = kill(maker, Signal::SIGKILL);
        // It may hang, and is not waited for.
        return entered;
    }
    waitpid(maker, None)?;
    Ok(())
}

/// A pipe that programs do not inherit: its read end and its write end.
fn pipe() -> io::Result<(File, File)> {
    let (reader, writer) = pipe2(OFlag::O_CLOEXEC)?;
    Ok((reader.into(), writer.into()))
}

/// The id of the calling process in `/proc`, which may belong to another pid namespace.
fn own_number() -> io::Result<u32> {
    let name = fs::read_link("/proc/self")?;
    let number = name.to_str().and_then(|name| name.parse().ok());
    number.ok_or_else(|| io::ErrorKind::InvalidData.into())
}

fn await_number(mut pipe: &File) -> io::Result<u32> {
    let mut fds = [PollFd::new(pipe.as_fd(), PollFlags::POLLIN)];
    let timeout = PollTimeout::try_from(PATIENCE).unwrap_or(PollTimeout::MAX);
    if poll(&mut fds, timeout)? == 0 {
        return Err(io::ErrorKind::TimedOut.into());
    }
    let mut number = [0; 4];
    pipe.read_exact(&mut number)?;
    Ok(u32::from_ne_bytes(number))
}

/// Enters the mount namespace of another process, and keeps the present root directory: entering
/// alone would change it to that of the namespace.
fn enter_mounts_of(pid: u32) -> io::Result<()> {
    let root = File::open(format!("/proc/{pid}/root"))?;
    setns(File::open(format!("/proc/{pid}/ns/mnt"))?, CloneFlags::CLONE_NEWNS)?;
    fchdir(root)?;
    chroot(".")?;
    Ok(())
}

/// Makes a mount namespace for the calling process with only the needed mounts.
fn make_own_mounts(needed: &[PathBuf]) -> io::Result<()> {
    unshare(CloneFlags::CLONE_NEWNS)?;
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(None::<&str>, "/", None::<&str>, private, None::<&str>)?;
    // The last ones are on top of the first.
    for mount in mounts("self").into_iter().rev() {
        if !is_needed(&mount.point, needed) {
            // One that stays is no worse than all of them.
            let _ = umount2(&mount.point, MntFlags::MNT_DETACH);
        }
    }
    Ok(())
}

/// The paths that every server needs: devices, their descriptions, and the files of the program
/// (`/proc/self/maps`), from which it starts again.
fn all_needed(needed: &[&Path]) -> Vec<PathBuf> {
    let always = ["/dev", "/proc", "/sys", "/sys/fs/cgroup"].map(PathBuf::from);
    let maps = fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let program = maps.lines().filter_map(|line| Some(PathBuf::from(&line[line.find('/')?..])));
    let needed = needed.iter().flat_map(|path| on_the_way(path));
    // The socket of the service manager, for a later notification, if it is in a file system.
    let manager = std::env::var_os("NOTIFY_SOCKET").map(PathBuf::from);
    let manager = manager.filter(|path| path.is_absolute());
    needed.chain(always).chain(program).chain(manager).collect()
}

/// A path without links, and the links in it, which may be on other mounts.
fn on_the_way(path: &Path) -> Vec<PathBuf> {
    /// The kernel's limit of links (`MAXSYMLINKS`).
    const MAX_LINKS: usize = 40;
    let mut path = path.to_owned();
    let mut found = Vec::new();
    while found.len() < MAX_LINKS {
        let prefixes: Vec<_> = path.ancestors().collect();
        // The first one: what is above it is no link.
        let is_link = |prefix: &&&Path| prefix.is_symlink();
        let Some(link) = prefixes.iter().rev().find(is_link).map(|link| link.to_path_buf()) else {
            break;
        };
        let (Some(parent), Ok(target)) = (link.parent(), fs::read_link(&link)) else { break };
        let next = parent.join(target).join(path.strip_prefix(&link).unwrap_or(Path::new("")));
        let parent = parent.canonicalize().unwrap_or_else(|_| parent.to_owned());
        found.push(parent.join(link.file_name().unwrap_or_default()));
        path = next;
    }
    found.push(path.canonicalize().unwrap_or(path));
    found
}

/// Whether a mount leads to a needed path.
fn is_needed(point: &Path, needed: &[PathBuf]) -> bool {
    needed.iter().any(|path| path.starts_with(point))
}

/// Runs a function in the mounts of process 1: the calling process still has the mounts from its
/// start, without those that it did not need. If that fails, the function runs in the present
/// mounts.
///
/// It keeps no descriptor of that namespace: the process that closes the last one unmounts
/// everything there.
pub(crate) fn among_present_mounts<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    let enter = || {
        // Threads share their root and working directory, and may not while one changes its mounts.
        unshare(CloneFlags::CLONE_FS)?;
        let mounts = File::open("/proc/1/ns/mnt").map_err(|error| {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_on_the_way_are_needed_too() {
        use std::os::unix::fs::symlink;
        let top = tempfile::tempdir().unwrap();
        let top = top.path().canonicalize().unwrap();
        for directory in ["a", "b/deep", "c"] {
            fs::create_dir_all(top.join(directory)).unwrap();
        }
        fs::write(top.join("c/disk"), "x").unwrap();
        symlink("../b/deep/link", top.join("a/link")).unwrap();
        symlink(top.join("c"), top.join("b/deep/link")).unwrap();
        let needed = on_the_way(&top.join("a/link/disk"));
        assert_eq!(needed, ["a/link", "b/deep/link", "c/disk"].map(|it| top.join(it)));
        assert!(is_needed(&top.join("b/deep"), &needed) && is_needed(&top.join("a"), &needed));
        assert!(!is_needed(&top.join("b/other"), &needed));
        assert_eq!(on_the_way(&top.join("none")), [top.join("none")]);
        symlink("loop", top.join("loop")).unwrap();
        assert!(on_the_way(&top.join("loop")).len() <= 41);
    }

    #[test]
    fn mounts_that_lead_to_nothing_are_left() {
        let needed = all_needed(&[Path::new("/srv/disks/a")]);
        let table = [
            ("/", true),
            ("/proc", true),
            ("/dev", true),
            ("/dev/shm", false),
            ("/srv", true),
            ("/srv/disks", true),
            ("/srv/di", false),
            ("/home", false),
            ("/mnt/on ours", false),
            ("/elsewhere", false),
        ];
        for (point, is) in table {
            assert_eq!(is_needed(Path::new(point), &needed), is, "{point}");
        }
        // The program, wherever that is.
        let own = std::env::current_exe().unwrap().canonicalize().unwrap();
        assert!(is_needed(own.parent().unwrap(), &needed));
    }
}

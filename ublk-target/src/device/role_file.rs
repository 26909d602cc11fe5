//! The role file of a process of this program: its role and its device, for as long as it lives.
//!
//! Each process that others must recognise has its own file with a random name, and keeps it locked
//! (`flock(2)`). A file is used only while it is locked, if only root can open it, and only for the
//! process that it names by id, pid namespace and start time. So it cannot stand for a dead process
//! or a later one of the same id. An unlocked file is stale, and any process that finds it removes
//! it.
//!
//! The lock ends with the program: execve(2) closes the descriptor, so another program does not
//! keep it. After an upgrade the new program writes its own file.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::unistd::geteuid;
use serde::{Deserialize, Serialize};

use crate::device::mark::Nonce;
use crate::os::own_files;
use crate::os::procfs;
use crate::os::random;
use crate::os::steps::step;

/// The role of a process of this program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// A command that a user waits for. It ends together with what it has started, and has no file.
    Command,
    /// A server of one device.
    Server,
    /// A server of many devices. It continues when one of them ends.
    Fleet,
    /// A supervisor.
    Supervisor,
    /// A helper: does for other processes what may take long.
    Helper,
}

/// The content of a role file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Told {
    /// What it is.
    pub role: Role,
    /// The device that it is responsible for.
    pub device: Option<u32>,
    /// Process id of its supervisor, in its own pid namespace.
    pub supervisor: Option<u32>,
    /// Its mark on the device that it adds, if another process knows it.
    pub nonce: Option<Nonce>,
}

/// Identifies the process of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Identity {
    /// Its id in its own pid namespace.
    pid: u32,
    /// The inode of that namespace; none if the kernel has no pid namespaces.
    pid_namespace: Option<u64>,
    /// Its start time in milliseconds since boot.
    started_ms: u64,
}

impl Identity {
    /// Reads it for a process by its name in `/proc`, which may be `self`.
    fn of(process: &str) -> Option<Self> {
        let started = procfs::stat_of(process)?.started;
        Some(Self {
            pid: procfs::own_pid_of(process)?,
            pid_namespace: fs::metadata(format!("/proc/{process}/ns/pid")).ok().map(|it| it.ino()),
            started_ms: u64::try_from(started.as_millis()).ok()?,
        })
    }
}

/// The content of a file.
#[derive(Debug, Serialize, Deserialize)]
struct Content {
    #[serde(flatten)]
    told: Told,
    #[serde(flatten)]
    of: Identity,
}

/// The longest file that is read, in bytes.
const MAX_BYTES: u64 = 4 << 10;

/// The directory of the files, below the directory of the state files. It exists while there are
/// files.
fn directory_in(run: &Path) -> PathBuf {
    run.join("process")
}

/// The file of the calling process. Dropping this removes the file.
#[derive(Debug)]
#[must_use = "the file is removed with it"]
pub struct RoleFile {
    path: PathBuf,
    /// The locked file; the last field, so that it is closed last.
    _file: Flock<File>,
}

impl RoleFile {
    /// Writes the role file of the calling process. If there is no room for it, other processes use
    /// its command line.
    pub fn hold(run: &Path, told: Told) -> Option<Self> {
        // Removes also the file that this process has written before an upgrade.
        sweep(run);
        match Self::try_hold(run, told) {
            Ok(held) => Some(held),
            Err(error) => {
                log::info!("cannot say in {} what this process is: {error}", run.display());
                None
            }
        }
    }

    fn try_hold(run: &Path, told: Told) -> io::Result<Self> {
        let of = Identity::of("self").ok_or(io::ErrorKind::NotFound)?;
        let text = serde_json::to_string(&Content { told, of })?;
        // Another process may remove the directory as empty, or the file as stale before it is
        // locked.
        let mut attempts = 0..16;
        loop {
            match Self::write(run, text.as_bytes()) {
                Err(error)
                    if error.kind() == io::ErrorKind::NotFound && attempts.next().is_some() => {}
                written => return written,
            }
        }
    }

    fn write(run: &Path, text: &[u8]) -> io::Result<Self> {
        own_files::directory(run)?;
        let directory = directory_in(run);
        own_files::directory(&directory)?;
        let path = directory.join(format!("{:016x}.json", random::number()));
        // Only root can lock it instead of its process.
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path)?;
        step("role-unlocked");
        // A process that has it locked is about to remove it. Do not wait for it: it may be
        // suspended.
        let locked = Flock::lock(file, FlockArg::LockExclusiveNonblock);
        let locked = locked.map_err(|(_, errno)| {
            if errno == Errno::EWOULDBLOCK { io::ErrorKind::NotFound.into() } else { errno.into() }
        });
        let written = locked.and_then(|mut file| {
            if file.metadata()?.nlink() == 0 {
                return Err(io::ErrorKind::NotFound.into());
            }
            step("role-half-written");
            file.write_all(text)?;
            Ok(file)
        });
        match written {
            Ok(file) => Ok(Self { path, _file: file }),
            Err(error) => {
                remove(&path);
                Err(error)
            }
        }
    }
}

impl Drop for RoleFile {
    fn drop(&mut self) {
        remove(&self.path);
    }
}

/// Removes a file, and the directory after the last one.
fn remove(path: &Path) {
    // A missing file is fine, and a directory with other files stays.
    let _ = fs::remove_file(path);
    let _ = path.parent().map(fs::remove_dir);
}

/// The role files of all live processes.
#[derive(Debug, Default)]
pub struct RoleFiles(Vec<Content>);

impl RoleFiles {
    /// Reads the files of all processes, and removes stale ones.
    #[must_use]
    pub fn read(run: &Path) -> Self {
        Self(all(run))
    }

    /// The role of a process; `None` if it has no valid file.
    #[must_use]
    pub fn of(&self, pid: u32) -> Option<Told> {
        let of = Identity::of(&pid.to_string()).filter(|_| !self.0.is_empty())?;
        self.0.iter().find(|content| content.of == of).map(|content| content.told.clone())
    }
}

/// Removes the files of dead processes.
pub fn sweep(run: &Path) {
    let _ = all(run);
}

fn all(run: &Path) -> Vec<Content> {
    let Ok(entries) = fs::read_dir(directory_in(run)) else { return Vec::new() };
    let paths = entries.flatten().map(|entry| entry.path());
    let found = paths.filter_map(|path| match read(&path) {
        Ok(Found::Held(content)) => Some(content),
        Ok(Found::Left) => {
            remove(&path);
            None
        }
        // The file is gone, is being written, or comes from another version of this program.
        Err(_) => None,
    });
    found.collect()
}

enum Found {
    Held(Content),
    Left,
}

fn read(path: &Path) -> io::Result<Found> {
    let file = own_files::regular(path, libc::O_NOFOLLOW)?;
    let meta = file.metadata()?;
    if meta.uid() != geteuid().as_raw() || meta.mode() & 0o077 != 0 || meta.nlink() > 1 {
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    // The lock is shared, so that two readers do not take each other for the owner.
    let file = match Flock::lock(file, FlockArg::LockSharedNonblock) {
        Ok(_) => return Ok(Found::Left),
        Err((file, Errno::EWOULDBLOCK)) => file,
        Err((_, errno)) => return Err(errno.into()),
    };
    Ok(Found::Held(serde_json::from_str(&own_files::read_whole(&file, MAX_BYTES)?)?))
}

#[cfg(test)]
mod tests {
    use std::ops::ControlFlow;
    use std::os::unix::fs::{PermissionsExt, symlink};
    use std::process::{Command, Stdio};
    use std::time::Duration;

    use super::*;
    use crate::os::wait::Wait;

    fn told(role: Role) -> Told {
        Told { role, device: Some(3), supervisor: Some(77), nonce: Some(Nonce::own()) }
    }

    fn count(run: &Path) -> usize {
        fs::read_dir(directory_in(run)).map_or(0, Iterator::count)
    }

    #[test]
    fn a_process_is_what_it_says_for_as_long_as_it_says_so() {
        let run = tempfile::tempdir().unwrap();
        let run = run.path();
        let own = std::process::id();
        assert_eq!(RoleFiles::read(run).of(own), None);
        let held = RoleFile::hold(run, told(Role::Server)).unwrap();
        assert_eq!(RoleFiles::read(run).of(own), Some(told(Role::Server)));
        // Neither its parent's, nor that of a process that does not exist.
        assert_eq!(RoleFiles::read(run).of(std::os::unix::process::parent_id()), None);
        assert_eq!(RoleFiles::read(run).of(u32::MAX), None);
        drop(held);
        assert_eq!(RoleFiles::read(run).of(own), None);
        assert!(!directory_in(run).exists(), "nothing is left");
    }

    /// Each has one change.
    #[test]
    fn a_file_is_of_one_process() {
        let own = Identity::of("self").unwrap();
        assert_eq!(Identity::of(&std::process::id().to_string()), Some(own));
        assert_eq!(own.pid, std::process::id());
        let others = [
            Identity { pid: own.pid + 1, ..own },
            Identity { started_ms: own.started_ms + 10, ..own },
            Identity { pid_namespace: Some(1), ..own },
        ];
        for of in others {
            let files = RoleFiles(vec![Content { told: told(Role::Server), of }]);
            assert_eq!(files.of(own.pid), None, "{of:?}");
        }
        let files = RoleFiles(vec![Content { told: told(Role::Fleet), of: own }]);
        assert_eq!(files.of(own.pid), Some(told(Role::Fleet)));
    }

    #[test]
    fn what_a_dead_process_has_left_is_removed() {
        let run = tempfile::tempdir().unwrap();
        let run = run.path();
        let held = RoleFile::hold(run, told(Role::Server)).unwrap();
        let whole = fs::read(&held.path).unwrap();
        for (name, text) in [("0.json", &whole[..]), ("1.json", &whole[..9]), ("2.json", b"")] {
            let path = directory_in(run).join(name);
            let mut options = OpenOptions::new();
            options.write(true).create(true).mode(0o600);
            options.open(path).unwrap().write_all(text).unwrap();
        }
        assert_eq!(count(run), 4);
        let files = RoleFiles::read(run);
        assert_eq!(files.0.len(), 1, "{files:?}");
        assert_eq!(count(run), 1);
        drop(held);
    }

    #[test]
    fn only_files_of_root_alone_are_believed_or_removed() {
        let run = tempfile::tempdir().unwrap();
        let run = run.path();
        let held = RoleFile::hold(run, told(Role::Server)).unwrap();
        let own = std::process::id();
        let at = |name: &str| directory_in(run).join(name);
        symlink(&held.path, at("link")).unwrap();
        nix::unistd::mkfifo(&at("pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert_eq!(RoleFiles::read(run).0.len(), 1);
        assert_eq!(count(run), 3);
        // Others could have written it, or locked it.
        for mode in [0o644, 0o620, 0o666] {
            fs::set_permissions(&held.path, fs::Permissions::from_mode(mode)).unwrap();
            assert_eq!(RoleFiles::read(run).of(own), None, "{mode:o}");
        }
        fs::set_permissions(&held.path, fs::Permissions::from_mode(0o600)).unwrap();
        fs::hard_link(&held.path, at("name")).unwrap();
        assert_eq!(RoleFiles::read(run).of(own), None, "it has another name");
    }

    #[test]
    fn a_file_that_cannot_be_written_is_done_without() {
        let top = tempfile::tempdir().unwrap();
        let run = top.path().join("run");
        fs::write(&run, "").unwrap();
        assert!(RoleFile::hold(&run, told(Role::Helper)).is_none());
        assert_eq!(RoleFiles::read(&run).of(std::process::id()), None);
    }

    /// Neither a program that this process starts nor the program that it becomes has the lock.
    #[test]
    fn the_lock_is_not_inherited() {
        let run = tempfile::tempdir().unwrap();
        let held = RoleFile::hold(run.path(), told(Role::Server)).unwrap();
        let path = held.path.clone();
        let mut child = Command::new("sh")
            .args(["-c", "echo; read it"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        // The process is the other program now.
        io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut [0]).unwrap();
        let aside = run.path().join("aside");
        fs::rename(&path, &aside).unwrap();
        let is_locked = || {
            let file = File::open(&aside).unwrap();
            Flock::lock(file, FlockArg::LockSharedNonblock).is_err()
        };
        assert!(is_locked());
        drop(held);
        // Another test may be starting a program at this moment.
        let freed =
            Wait::at_most(Duration::from_secs(60)).every(Duration::from_millis(1)).until(|| {
                if is_locked() { ControlFlow::Continue("the lock") } else { ControlFlow::Break(()) }
            });
        assert_eq!(freed, Ok(()), "the child has it");
        drop(child.stdin.take());
        child.wait().unwrap();
    }

    /// Removing stale files does not remove a file that is being made.
    #[test]
    fn those_who_begin_and_those_who_sweep_do_not_hinder_each_other() {
        let run = tempfile::tempdir().unwrap();
        let run = run.path();
        let is_over = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            let sweeper = scope.spawn(|| {
                while !is_over.load(std::sync::atomic::Ordering::Relaxed) {
                    sweep(run);
                }
            });
            for _ in 0..200 {
                let held = RoleFile::try_hold(run, told(Role::Server)).unwrap();
                assert_eq!(fs::metadata(&held.path).unwrap().nlink(), 1);
                let read = RoleFiles::read(run);
                assert_eq!(read.of(std::process::id()), Some(told(Role::Server)));
            }
            is_over.store(true, std::sync::atomic::Ordering::Relaxed);
            sweeper.join().unwrap();
        });
        assert!(!directory_in(run).exists());
    }
}

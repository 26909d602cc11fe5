//! The role file of a process of this program: its role and its device, for as long as it lives.
//!
//! Each process that others must recognise has its own file with a random name, and keeps it locked
//! (`flock(2)`). A file is used only while it is locked, if only root can open it, and only for the
//! process that it names by id, pid namespace and start time. So it cannot stand for a dead process
//! or a later one of the same id. An unlocked file is stale, and any process that finds it removes
//! it.
//!
//! The directory of the files belongs to root alone and is never a link; otherwise nothing in it is
//! read or removed. The first process that writes a file moves away what another user has put in
//! place of the directory.
//!
//! The lock ends with the program: execve(2) closes the descriptor, so another program does not
//! keep it. After an upgrade the new program writes its own file.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Once;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::unistd::geteuid;
use serde::{Deserialize, Serialize};

use crate::device::mark::Nonce;
use crate::os::own_directory::{self, OwnDirectory};
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
pub struct RoleRecord {
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
    record: RoleRecord,
    #[serde(flatten)]
    of: Identity,
}

/// The longest file that is read, in bytes.
const MAX_BYTES: u64 = 4 << 10;

/// The directory of the files, below the directory of the state files. It exists while there are
/// files.
const DIRECTORY: &str = "process";

/// The file of the calling process. Dropping this removes the file.
#[derive(Debug)]
#[must_use = "the file is removed with it"]
pub struct RoleFile {
    run: PathBuf,
    name: String,
    /// The locked file; the last field, so that it is closed last.
    _file: Flock<File>,
}

impl RoleFile {
    /// Writes the role file of the calling process. If there is no room for it, other processes use
    /// its command line.
    pub fn hold(run: &Path, record: RoleRecord) -> Option<Self> {
        // An error is reported below. This removes also the file that this process has written before
        // an upgrade.
        let _ = Files::make(run).map(|files| files.read());
        match Self::try_hold(run, record) {
            Ok(held) => Some(held),
            Err(error) => {
                let level = if is_planted(&error) { log::Level::Warn } else { log::Level::Info };
                log::log!(level, "cannot write a role file below {}: {error}", run.display());
                None
            }
        }
    }

    fn try_hold(run: &Path, record: RoleRecord) -> io::Result<Self> {
        let of = Identity::of("self").ok_or(io::ErrorKind::NotFound)?;
        let text = serde_json::to_string(&Content { record, of })?;
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
        let files = Files::make(run)?;
        let name = format!("{:016x}.json", random::number());
        // Only root can lock it instead of its process.
        let file = files.directory.create(&name)?;
        step("role-unlocked");
        let written = lock(file).and_then(|mut file| {
            step("role-half-written");
            file.write_all(text)?;
            Ok(file)
        });
        match written {
            Ok(file) => Ok(Self { run: run.to_owned(), name, _file: file }),
            Err(error) => {
                files.remove(&name);
                Err(error)
            }
        }
    }
}

/// Locks a new file. `NotFound` if another process has taken it for a stale file.
fn lock(file: File) -> io::Result<Flock<File>> {
    // A process that has it locked is about to remove it. Do not wait for it: it may be suspended.
    let locked = Flock::lock(file, FlockArg::LockExclusiveNonblock);
    let file = locked.map_err(|(_, errno)| {
        let is_taken = errno == Errno::EWOULDBLOCK;
        if is_taken { io::Error::from(io::ErrorKind::NotFound) } else { errno.into() }
    })?;
    if file.metadata()?.nlink() == 0 {
        return Err(io::ErrorKind::NotFound.into());
    }
    Ok(file)
}

impl Drop for RoleFile {
    fn drop(&mut self) {
        // A file that stays is unlocked, and any process that finds it removes it.
        let _ = Files::open(&self.run).map(|files| files.remove(&self.name));
    }
}

/// The role files of all live processes.
#[derive(Debug, Default)]
pub struct RoleFiles(Vec<Content>);

impl RoleFiles {
    /// Reads the files of all processes, and removes stale ones.
    #[must_use]
    pub fn read(run: &Path) -> Self {
        static SAID: Once = Once::new();
        match Files::open(run) {
            Ok(files) => Self(files.read()),
            Err(error) => {
                if is_planted(&error) {
                    SAID.call_once(|| {
                        log::warn!("{error}: processes are told apart by their command lines");
                    });
                }
                Self::default()
            }
        }
    }

    /// The role of a process; `None` if it has no valid file.
    #[must_use]
    pub fn of(&self, pid: u32) -> Option<RoleRecord> {
        let of = Identity::of(&pid.to_string()).filter(|_| !self.0.is_empty())?;
        self.0.iter().find(|content| content.of == of).map(|content| content.record.clone())
    }
}

/// Whether another user has put something in place of the directory. A user other than root always
/// finds a directory of another user: root's.
fn is_planted(error: &io::Error) -> bool {
    own_directory::is_not_ours(error) && geteuid().is_root()
}

/// Removes the files of dead processes.
pub fn sweep(run: &Path) {
    let _ = RoleFiles::read(run);
}

/// The directory of the files, and its parent.
struct Files {
    run: OwnDirectory,
    directory: OwnDirectory,
}

impl Files {
    fn open(run: &Path) -> io::Result<Self> {
        let run = OwnDirectory::open(run)?;
        let directory = run.open_in(DIRECTORY)?;
        Ok(Self { run, directory })
    }

    fn make(run: &Path) -> io::Result<Self> {
        own_files::directory(run)?;
        let run = OwnDirectory::open(run)?;
        let directory = run.claim(DIRECTORY)?;
        Ok(Self { run, directory })
    }

    /// Removes a file, and the directory after the last one.
    fn remove(&self, name: &str) {
        // A missing file is fine, and a directory with other files stays.
        let _ = self.directory.remove(name);
        let _ = self.run.remove_directory(DIRECTORY);
    }

    /// Reads the files of live processes, and removes stale ones.
    fn read(&self) -> Vec<Content> {
        let names = self.directory.names().unwrap_or_default();
        if names.is_empty() {
            // A process was killed before it had made its file, or after it had removed it. One that
            // is about to make its file makes the directory again.
            let _ = self.run.remove_directory(DIRECTORY);
        }
        let found = names.iter().filter(|name| is_name(name)).filter_map(|name| {
            match self.look_at(name) {
                Ok(Found::Held(content)) => Some(content),
                Ok(Found::Left(_locked)) => {
                    self.remove(name);
                    None
                }
                // The file is gone, is being written, or comes from another version of this program.
                Err(_) => None,
            }
        });
        found.collect()
    }

    fn look_at(&self, name: &str) -> io::Result<Found> {
        let file = self.directory.regular(name)?;
        let meta = file.metadata()?;
        if meta.uid() != geteuid().as_raw() {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        // The lock is shared, so that two readers do not take each other for the owner.
        let file = match Flock::lock(file, FlockArg::LockSharedNonblock) {
            Ok(locked) => return Ok(Found::Left(locked)),
            Err((file, Errno::EWOULDBLOCK)) => file,
            Err((_, errno)) => return Err(errno.into()),
        };
        // Others could have written or locked it.
        if meta.mode() & 0o077 != 0 || meta.nlink() > 1 {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        Ok(Found::Held(serde_json::from_str(&own_files::read_whole(&file, MAX_BYTES)?)?))
    }
}

/// Whether a name has the form of the random names.
fn is_name(name: &str) -> bool {
    let digits = name.strip_suffix(".json");
    digits.is_some_and(|it| it.len() == 16 && it.bytes().all(|byte| byte.is_ascii_hexdigit()))
}

enum Found {
    Held(Content),
    /// Locked, so that its process cannot lock it before it is removed.
    Left(Flock<File>),
}

#[cfg(test)]
mod tests;

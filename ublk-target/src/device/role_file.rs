//! What a process of this program says of itself, for as long as it lives: its role, and which device it is
//! about.
//!
//! Each process that others must recognise has a file of its own with a name drawn by lot, and keeps it
//! locked (`flock(2)`). A file is believed only while it is locked, if it is root's alone, and for the
//! process that it names by its id, its pid namespace and the time of its start. So neither a dead process
//! nor a later one of the same id is taken for what the file says. A file that nobody has locked is left
//! over, and is removed by whoever finds it.
//!
//! The directory of the files is root's alone, and is never a link: otherwise nothing in it is read or removed.
//! Whoever writes a file first puts away what somebody else has put in the place of the directory.
//!
//! The lock ends with the program: the descriptor is closed by execve(2), so that no other program keeps it.
//! After an upgrade the next program writes a file of its own.

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

/// What a process of this program is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// A command that a user waits for, and that ends with what it has started. It has no file.
    Command,
    /// A server of one device.
    Server,
    /// A server of many devices, which goes on without any one of them.
    Fleet,
    /// A supervisor.
    Supervisor,
    /// One that does for others what may take long.
    Helper,
}

/// What a process says of itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Told {
    /// What it is.
    pub role: Role,
    /// The device that it was told to see to.
    pub device: Option<u32>,
    /// Process id of its supervisor, in its own pid namespace.
    pub supervisor: Option<u32>,
    /// What it marks the device with that it adds, where another process knows that.
    pub nonce: Option<Nonce>,
}

/// Which process a file is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Identity {
    /// Its id in its own pid namespace.
    pid: u32,
    /// The inode of that namespace; none where the kernel has no such namespaces.
    pid_namespace: Option<u64>,
    /// When it was started, in milliseconds since the machine was.
    started_ms: u64,
}

impl Identity {
    /// Of a process by its name in `/proc`, which may be `self`.
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

/// The directory of the files, in that of the state files. It is there while there are any.
const DIRECTORY: &str = "process";

/// The file of the calling process, which is removed with this.
#[derive(Debug)]
#[must_use = "the file is removed with it"]
pub struct RoleFile {
    run: PathBuf,
    name: String,
    /// Locked; closed at last.
    _file: Flock<File>,
}

impl RoleFile {
    /// Says what the calling process is. Where there is no room for it, others go by its command line.
    pub fn hold(run: &Path, told: Told) -> Option<Self> {
        // A failure is told below. This makes room: the process may have left a file as another program.
        let _ = Files::make(run).map(|files| files.read());
        match Self::try_hold(run, told) {
            Ok(held) => Some(held),
            Err(error) => {
                let is_planted = own_directory::is_not_ours(&error);
                let level = if is_planted { log::Level::Warn } else { log::Level::Info };
                log::log!(level, "cannot say in {} what this process is: {error}", run.display());
                None
            }
        }
    }

    fn try_hold(run: &Path, told: Told) -> io::Result<Self> {
        let of = Identity::of("self").ok_or(io::ErrorKind::NotFound)?;
        let text = serde_json::to_string(&Content { told, of })?;
        // The directory, or the file before it is locked, may be taken for left over meanwhile.
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
        // Nobody but root can have it locked in the place of its process.
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

/// Locks a new file. `NotFound` if it was taken for left over.
fn lock(file: File) -> io::Result<Flock<File>> {
    // Whoever has it locked is about to remove it, and is not waited for: he may be suspended.
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
        // One that stays is not locked any more, and is removed by whoever finds it.
        let _ = Files::open(&self.run).map(|files| files.remove(&self.name));
    }
}

/// What the processes that live now say of themselves.
#[derive(Debug, Default)]
pub struct RoleFiles(Vec<Content>);

impl RoleFiles {
    /// Reads the files of all processes, and removes those that are left over.
    #[must_use]
    pub fn read(run: &Path) -> Self {
        static SAID: Once = Once::new();
        match Files::open(run) {
            Ok(files) => Self(files.read()),
            Err(error) => {
                // Another user than root finds what is root's.
                if own_directory::is_not_ours(&error) && geteuid().is_root() {
                    SAID.call_once(|| {
                        log::warn!("{error}: processes are told apart by their command lines");
                    });
                }
                Self::default()
            }
        }
    }

    /// What a process says of itself; `None` if it has no file that is to be believed.
    #[must_use]
    pub fn of(&self, pid: u32) -> Option<Told> {
        let of = Identity::of(&pid.to_string()).filter(|_| !self.0.is_empty())?;
        self.0.iter().find(|content| content.of == of).map(|content| content.told.clone())
    }
}

/// Removes the files of processes that are dead.
pub fn sweep(run: &Path) {
    let _ = RoleFiles::read(run);
}

/// The directory of the files, and the one that it is in.
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

    /// Removes a file, and the directory with the last one.
    fn remove(&self, name: &str) {
        // Missing files are what is wanted, and a directory with others in it stays.
        let _ = self.directory.remove(name);
        let _ = self.run.remove_directory(DIRECTORY);
    }

    /// Reads the files of processes that live, and removes those of others.
    fn read(&self) -> Vec<Content> {
        let names = self.directory.names().unwrap_or_default();
        let found = names.iter().filter(|name| is_name(name)).filter_map(|name| {
            match self.look_at(name) {
                Ok(Found::Held(content)) => Some(content),
                Ok(Found::Left(_locked)) => {
                    self.remove(name);
                    None
                }
                // One that is gone by now, is just being written, or is of another version of this
                // program.
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
        // Shared, so that two who look do not take each other for the process.
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

/// Whether a name is one of those that are drawn by lot.
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

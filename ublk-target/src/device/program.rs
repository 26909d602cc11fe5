//! Programs that root runs: this one, another version of it, or that of a server.
//!
//! A descriptor holds a program from the moment of its check, so that nothing else can be run in
//! its place. A program is refused if others than root could have changed it.

use std::fs::{File, Metadata};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::unistd::geteuid;

use crate::backing::{BackingProblem, find};
use crate::device::processes;

/// Why a file is not run.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum ProgramProblem {
    /// It cannot be found.
    #[error("{}: {problem}", path.display())]
    NotFound {
        /// The path.
        path: PathBuf,
        /// The error.
        problem: BackingProblem,
    },
    /// Others than root can change it.
    #[error(
        "{}: users other than root can change {}; it is not run as root", path.display(), what.display()
    )]
    NotRoots {
        /// The path.
        path: PathBuf,
        /// The file, or a directory of its path.
        what: PathBuf,
    },
    /// It is a directory, a pipe or the like.
    #[error("{} is not a program: it is not a regular file", path.display())]
    NoFile {
        /// The path.
        path: PathBuf,
    },
    /// It cannot be opened.
    #[error("{}: {error}", path.display())]
    NotOpened {
        /// The path.
        path: PathBuf,
        /// The error.
        error: io::Error,
    },
}

/// A program that can be run, even if its path changes.
#[derive(Debug)]
pub struct Program {
    file: File,
    meta: Metadata,
    path: PathBuf,
}

impl Program {
    /// Finds a program that only the calling user, who is root, can change.
    ///
    /// # Errors
    /// [`ProgramProblem`].
    pub fn open(path: &Path) -> Result<Self, ProgramProblem> {
        let found = find(path);
        let found =
            found.map_err(|problem| ProgramProblem::NotFound { path: path.into(), problem })?;
        let refused = |what: &Path| {
            Err(ProgramProblem::NotRoots { path: path.to_owned(), what: what.to_owned() })
        };
        if let Some(directory) = &found.open_directory {
            return refused(directory);
        }
        if !is_roots(&found.meta) {
            return refused(&found.path);
        }
        if !found.meta.is_file() {
            return Err(ProgramProblem::NoFile { path: path.to_owned() });
        }
        let file = found.open(false, false, 0).map_err(|errno| ProgramProblem::NotOpened {
            path: path.to_owned(),
            error: io::Error::from_raw_os_error(-errno.negated()),
        })?;
        Ok(Self { file, meta: found.meta, path: found.path })
    }

    /// The file of another process's descriptor. That process reports the path.
    ///
    /// # Errors
    /// As [`Program::open`]; the other process has checked the directories.
    pub fn of_descriptor(pid: u32, descriptor: i32, path: &Path) -> Result<Self, ProgramProblem> {
        let not_opened = |error| ProgramProblem::NotOpened { path: path.to_owned(), error };
        let file = File::open(format!("/proc/{pid}/fd/{descriptor}")).map_err(not_opened)?;
        let meta = file.metadata().map_err(not_opened)?;
        if !is_roots(&meta) || !meta.is_file() {
            let (path, what) = (path.to_owned(), path.to_owned());
            return Err(ProgramProblem::NotRoots { path, what });
        }
        Ok(Self { file, meta, path: path.to_owned() })
    }

    /// The program of a process of ours.
    #[must_use]
    pub fn of_process(pid: u32) -> Option<Self> {
        let file = File::open(format!("/proc/{pid}/exe")).ok()?;
        // The file belongs to this process if the id is still that of one of ours.
        let path = std::fs::read_link(format!("/proc/{pid}/exe")).ok()?;
        let meta = file.metadata().ok()?;
        processes::is_ours(pid).then_some(Self { file, meta, path })
    }

    /// The path where it was found.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Device and inode, which identify the file.
    #[must_use]
    pub fn identity(&self) -> (u64, u64) {
        (self.meta.dev(), self.meta.ino())
    }

    /// A command that runs the file that was checked, even if its path leads to another file now.
    #[must_use]
    pub fn command(&self) -> Command {
        // The interpreter of a script opens it by its path, after the descriptor is closed.
        let mut start = [0; 2];
        let is_script = self.file.read_exact_at(&mut start, 0).is_ok() && start == *b"#!";
        let mut command = if is_script {
            Command::new(&self.path)
        } else {
            Command::new(format!("/proc/self/fd/{}", self.file.as_raw_fd()))
        };
        command.arg0(env!("CARGO_PKG_NAME"));
        command
    }
}

impl AsRawFd for Program {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

/// Whether only the calling user, who is root, can write to a file.
fn is_roots(meta: &Metadata) -> bool {
    let is_own = meta.uid() == 0 || meta.uid() == geteuid().as_raw();
    is_own && meta.mode() & 0o022 == 0
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn what_was_found_is_run() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("program");
        fs::copy("/bin/echo", &path).unwrap();
        let program = Program::open(&path).unwrap();
        fs::remove_file(&path).unwrap();
        fs::copy("/bin/false", &path).unwrap();
        let output = program.command().arg("it").output().unwrap();
        assert_eq!(output.stdout, b"it\n");
        assert_ne!(Program::open(&path).unwrap().identity(), program.identity());
        let script = directory.path().join("script");
        fs::write(&script, "#!/bin/sh\necho that\n").unwrap();
        fs::set_permissions(&script, Permissions::from_mode(0o755)).unwrap();
        let output = Program::open(&script).unwrap().command().output().unwrap();
        assert_eq!(output.stdout, b"that\n");
    }

    #[test]
    fn what_others_can_change_is_not_run() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("program");
        fs::copy("/bin/echo", &path).unwrap();
        let set = |path: &Path, mode| fs::set_permissions(path, Permissions::from_mode(mode));
        set(&path, 0o777).unwrap();
        let refused = Program::open(&path).unwrap_err().to_string();
        assert!(refused.contains("users other than root"), "{refused}");
        set(&path, 0o755).unwrap();
        assert!(Program::open(&path).is_ok());
        set(directory.path(), 0o777).unwrap();
        assert!(matches!(Program::open(&path), Err(ProgramProblem::NotRoots { .. })));
        // A pipe is refused too, without waiting for it.
        set(directory.path(), 0o755).unwrap();
        let pipe = directory.path().join("pipe");
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
        for path in [pipe.as_path(), directory.path()] {
            assert!(matches!(Program::open(path), Err(ProgramProblem::NoFile { .. })));
        }
        assert!(matches!(
            Program::open(&directory.path().join("none")),
            Err(ProgramProblem::NotFound { .. })
        ));
    }
}

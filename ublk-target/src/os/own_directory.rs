//! An open directory that belongs to the calling user alone. Names are looked up relative to its
//! descriptor, so a link that another user puts in its place has no effect.

use std::ffi::OsStr;
use std::fs::{File, Permissions};
use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::unistd::geteuid;
use rustix::fs::{
    AtFlags, CWD, Dir, FileType, Mode, OFlags, RenameFlags, mkdirat, openat, renameat_with, statat,
    unlinkat,
};
use rustix::io::Errno;

use crate::os::own_files::not_ours;
use crate::os::random;

/// An open directory of the calling user to which others cannot write.
#[derive(Debug)]
pub struct OwnDirectory {
    file: File,
    path: PathBuf,
}

impl OwnDirectory {
    /// Opens a directory. Links to it are not followed.
    ///
    /// # Errors
    /// For a link, for anything else that is no directory, and for a directory of another user or with
    /// write permission for others: errors that [`is_not_ours`] recognises. Also those of the file
    /// system.
    pub fn open(path: &Path) -> io::Result<Self> {
        Self::open_any(CWD, path.as_os_str(), path.to_owned())?.closed_to_others()
    }

    /// Like [`OwnDirectory::open`], for a directory in this one.
    ///
    /// # Errors
    /// Those of [`OwnDirectory::open`].
    pub fn open_in(&self, name: &str) -> io::Result<Self> {
        self.open_any_in(name)?.closed_to_others()
    }

    fn open_any_in(&self, name: &str) -> io::Result<Self> {
        Self::open_any(self.fd(), OsStr::new(name), self.path.join(name))
    }

    /// Opens a directory of the calling user; others may be able to write to it.
    fn open_any(parent: BorrowedFd<'_>, name: &OsStr, path: PathBuf) -> io::Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = match openat(parent, name, flags, Mode::empty()) {
            Err(Errno::NOTDIR | Errno::LOOP) => {
                return Err(not_ours(&path, "it is a link, or no directory"));
            }
            opened => File::from(opened?),
        };
        if file.metadata()?.uid() != geteuid().as_raw() {
            return Err(not_ours(&path, "it belongs to another user"));
        }
        Ok(Self { file, path })
    }

    fn closed_to_others(self) -> io::Result<Self> {
        if self.file.metadata()?.mode() & 0o022 != 0 {
            return Err(not_ours(&self.path, "others can write to it"));
        }
        Ok(self)
    }

    fn fd(&self) -> BorrowedFd<'_> {
        std::os::fd::AsFd::as_fd(&self.file)
    }

    /// Makes a directory in this one with permissions for the calling user only. If it exists already,
    /// sets these permissions.
    ///
    /// Anything else with this name comes from a user who could once write to this directory. A link
    /// or an empty directory is removed; anything else is renamed.
    ///
    /// # Errors
    /// Those of the file system. `ENOENT` if another process removes the directory meanwhile.
    pub fn claim(&self, name: &str) -> io::Result<Self> {
        match self.make(name) {
            Err(error) if is_not_ours(&error) => {
                let done = self.put_away(name).inspect_err(|_| log::warn!("{error}"))?;
                log::warn!("{error}; {done}");
                self.make(name)
            }
            made => made,
        }
    }

    fn make(&self, name: &str) -> io::Result<Self> {
        match mkdirat(&self.file, name, Mode::RWXU) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(errno) => return Err(errno.into()),
        }
        let made = self.open_any_in(name)?;
        let mode = made.file.metadata()?.mode();
        if mode & 0o077 != 0 {
            made.file.set_permissions(Permissions::from_mode(0o700))?;
        }
        if mode & 0o022 != 0 {
            log::warn!("{} could be written by others; now it cannot", made.path.display());
        }
        Ok(made)
    }

    /// Frees a name, and returns how.
    fn put_away(&self, name: &str) -> io::Result<String> {
        let there = statat(&self.file, name, AtFlags::SYMLINK_NOFOLLOW)?;
        let kind = FileType::from_raw_mode(there.st_mode);
        // Only an empty directory can be removed.
        let is_removed = kind == FileType::Symlink && self.remove(name).is_ok()
            || kind == FileType::Directory && self.remove_directory(name).is_ok();
        if is_removed {
            return Ok("it was removed".to_owned());
        }
        let aside = format!("{name}.{:016x}", random::number());
        self.rename(name, &aside)?;
        if self.open_in(&aside).is_ok() {
            // Another process of this program was faster and has made the directory.
            self.rename(&aside, name)?;
            return Ok("another process has moved it".to_owned());
        }
        Ok(format!("it is {} now", self.path.join(aside).display()))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        Ok(renameat_with(&self.file, from, &self.file, to, RenameFlags::NOREPLACE)?)
    }

    /// The names of all entries of the directory, except those that are not UTF-8.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn names(&self) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in Dir::read_from(&self.file)? {
            let entry = entry?;
            match entry.file_name().to_str() {
                Ok("." | "..") | Err(_) => {}
                Ok(name) => names.push(name.to_owned()),
            }
        }
        Ok(names)
    }

    /// Opens a regular file in the directory for reading. It does not block, and follows no link.
    ///
    /// # Errors
    /// `ELOOP` for a link, `InvalidInput` for anything else that is not a regular file, and those of
    /// the file system.
    pub fn regular(&self, name: &str) -> io::Result<File> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = File::from(openat(&self.file, name, flags, Mode::empty())?);
        if file.metadata()?.is_file() {
            Ok(file)
        } else {
            Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no regular file"))
        }
    }

    /// Makes a file for writing that only the calling user can open.
    ///
    /// # Errors
    /// `EEXIST` if the name is taken; those of the file system.
    pub fn create(&self, name: &str) -> io::Result<File> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        Ok(openat(&self.file, name, flags, Mode::RUSR | Mode::WUSR)?.into())
    }

    /// Removes a name of a file in the directory.
    ///
    /// # Errors
    /// `EISDIR` for a directory; those of the file system.
    pub fn remove(&self, name: &str) -> io::Result<()> {
        Ok(unlinkat(&self.file, name, AtFlags::empty())?)
    }

    /// Removes an empty directory in this one.
    ///
    /// # Errors
    /// `ENOTEMPTY`; `ENOTDIR` for anything else, such as a link; those of the file system.
    pub fn remove_directory(&self, name: &str) -> io::Result<()> {
        Ok(unlinkat(&self.file, name, AtFlags::REMOVEDIR)?)
    }
}

/// Whether a directory was refused because another user owns it or could write to it.
#[must_use]
pub fn is_not_ours(error: &io::Error) -> bool {
    // A refusal by the kernel has an errno.
    error.kind() == io::ErrorKind::PermissionDenied && error.raw_os_error().is_none()
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{chown, symlink};

    use super::*;

    fn is_refused(opened: io::Result<OwnDirectory>) -> bool {
        opened.is_err_and(|error| is_not_ours(&error))
    }

    /// A directory of another user, if the test has the permission to make one.
    fn make_foreign(path: &Path) -> bool {
        fs::create_dir(path).unwrap();
        let made = chown(path, Some(65534), Some(65534));
        if made.is_err() {
            eprintln!("skipped: only root can give a directory to another user");
        }
        made.is_ok()
    }

    fn mode(path: &Path) -> u32 {
        fs::symlink_metadata(path).unwrap().mode() & 0o7777
    }

    #[test]
    fn only_a_directory_of_the_user_alone_is_opened() {
        let top = tempfile::tempdir().unwrap();
        let at = |name: &str| top.path().join(name);
        let own = OwnDirectory::open(top.path()).unwrap();
        fs::create_dir(at("own")).unwrap();
        symlink("own", at("link")).unwrap();
        fs::write(at("file"), "").unwrap();
        assert!(own.open_in("own").is_ok());
        for name in ["link", "file"] {
            assert!(is_refused(own.open_in(name)), "{name}");
            assert!(is_refused(OwnDirectory::open(&at(name))), "{name}");
        }
        fs::set_permissions(at("own"), Permissions::from_mode(0o775)).unwrap();
        assert!(is_refused(own.open_in("own")), "its group can write to it");
        let missing = own.open_in("none").unwrap_err();
        assert_eq!(missing.kind(), io::ErrorKind::NotFound);
        if make_foreign(&at("foreign")) {
            assert!(is_refused(own.open_in("foreign")));
        }
    }

    #[test]
    fn a_claimed_directory_is_closed_to_others() {
        let top = tempfile::tempdir().unwrap();
        let own = OwnDirectory::open(top.path()).unwrap();
        own.claim("it").unwrap();
        let path = top.path().join("it");
        assert_eq!(mode(&path), 0o700);
        for open in [0o755, 0o777] {
            fs::set_permissions(&path, Permissions::from_mode(open)).unwrap();
            own.claim("it").unwrap();
            assert_eq!(mode(&path), 0o700);
        }
    }

    #[test]
    fn what_is_in_the_place_of_a_claimed_directory_is_put_away() {
        let top = tempfile::tempdir().unwrap();
        let run = top.path().join("run");
        let elsewhere = top.path().join("elsewhere");
        fs::create_dir(&run).unwrap();
        fs::create_dir(&elsewhere).unwrap();
        let own = OwnDirectory::open(&run).unwrap();
        let it = run.join("it");
        let clear = || fs::remove_dir(&it).unwrap();
        let others = || own.names().unwrap().into_iter().filter(|name| name != "it").count();

        symlink(&elsewhere, &it).unwrap();
        own.claim("it").unwrap();
        assert!(fs::symlink_metadata(&it).unwrap().is_dir());
        assert!(elsewhere.is_dir(), "what the link leads to is there");
        assert_eq!(others(), 0, "the link is removed");
        clear();
        fs::write(&it, "kept").unwrap();
        own.claim("it").unwrap();
        assert_eq!(others(), 1, "a file is kept");
        clear();
        if make_foreign(&it) {
            own.claim("it").unwrap();
            assert_eq!((mode(&it), others()), (0o700, 1), "an empty one is removed");
            clear();
            make_foreign(&it);
            fs::write(it.join("file"), "").unwrap();
            own.claim("it").unwrap();
            assert_eq!((fs::read_dir(&it).unwrap().count(), others()), (0, 2), "it is moved");
        }
    }

    #[test]
    fn a_name_leads_to_nothing_elsewhere() {
        let top = tempfile::tempdir().unwrap();
        let run = top.path().join("run");
        fs::create_dir(&run).unwrap();
        let own = OwnDirectory::open(&run).unwrap();
        own.create("file").unwrap();
        assert_eq!(mode(&run.join("file")), 0o600);
        assert!(own.create("file").is_err(), "it is there");
        symlink("file", run.join("link")).unwrap();
        assert!(own.regular("link").is_err());
        assert!(own.remove_directory("link").is_err());
        let mut names = own.names().unwrap();
        names.sort();
        assert_eq!(names, ["file", "link"]);
        // Another directory is in its place now.
        fs::rename(&run, top.path().join("moved")).unwrap();
        fs::create_dir(&run).unwrap();
        fs::write(run.join("file"), "another").unwrap();
        own.remove("file").unwrap();
        assert!(run.join("file").exists());
        assert!(!top.path().join("moved/file").exists());
    }
}

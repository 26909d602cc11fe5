//! Directories and files for root only: others can neither write to them nor replace them by links.
//! And files that are read as a whole: nothing in their place can block the reader.

use std::fs::{self, DirBuilder, File, Metadata, OpenOptions, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

use nix::fcntl::{Flock, FlockArg};
use nix::unistd::geteuid;

use crate::os::random;
use crate::os::steps::step;

/// Makes a directory that only the calling user can write to, independent of the umask, or finds
/// it. If others can write to it, its mode is corrected.
///
/// # Errors
/// `EPERM` for a directory of another user, `ENOTDIR` for a link or a file, and those of the file
/// system.
pub fn directory(path: &Path) -> io::Result<()> {
    if let Some(parent) = path.parent() {
        DirBuilder::new().recursive(true).mode(0o755).create(parent)?;
    }
    match DirBuilder::new().mode(0o755).create(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        Ok(()) | Err(_) => {}
    }
    // The directory itself, and not something that has replaced it.
    let flags = libc::O_DIRECTORY | libc::O_NOFOLLOW;
    let directory = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
    let meta = directory.metadata()?;
    if meta.uid() != geteuid().as_raw() {
        return Err(not_ours(path, "it belongs to another user"));
    }
    if meta.mode() & 0o022 != 0 {
        directory.set_permissions(Permissions::from_mode(0o755))?;
        log::warn!("others could write to {}; its mode is now 0755", path.display());
    }
    Ok(())
}

/// Opens a file for appending, and creates it with `mode` if it is missing. Links are not followed.
///
/// # Errors
/// `EPERM` for a file of another user or with several hard links, `ELOOP` for a link, `ENXIO` for a
/// pipe, and those of the file system.
pub fn append(path: &Path, mode: u32) -> io::Result<File> {
    let mut options = OpenOptions::new();
    // A pipe without a reader would be waited for.
    options.create(true).append(true).mode(mode).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
    let file = options.open(path)?;
    let meta = file.metadata()?;
    if !meta.is_file() {
        return Err(not_ours(path, "it is not a regular file"));
    }
    if meta.uid() != geteuid().as_raw() {
        return Err(not_ours(path, "it belongs to another user"));
    }
    if meta.nlink() > 1 {
        return Err(not_ours(path, "it has several hard links"));
    }
    Ok(file)
}

/// Opens a regular file for reading, with more `flags` of open(2). It never blocks, not even on a
/// pipe without a writer.
///
/// # Errors
/// `InvalidInput` if it is not a regular file, and those of the file system.
pub fn regular(path: &Path, flags: i32) -> io::Result<File> {
    let file = OpenOptions::new().read(true).custom_flags(flags | libc::O_NONBLOCK).open(path)?;
    if file.metadata()?.is_file() {
        Ok(file)
    } else {
        Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file"))
    }
}

/// Whether a file belongs to the calling user, and others cannot write to it.
#[must_use]
pub fn is_own(meta: &Metadata) -> bool {
    meta.uid() == geteuid().as_raw() && meta.mode() & 0o022 == 0
}

/// Reads a whole file of at most `max` bytes.
///
/// # Errors
/// `FileTooLarge` for a longer file: a part of it may have another meaning than the whole.
/// `InvalidData` if it is not UTF-8, and those of the file system.
pub fn read_whole(file: &File, max: u64) -> io::Result<String> {
    let mut text = Vec::new();
    file.take(max + 1).read_to_end(&mut text)?;
    if text.len() as u64 > max {
        let why = format!("it is longer than {max} bytes");
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, why));
    }
    String::from_utf8(text).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        io::Error::new(io::ErrorKind::InvalidData, format!("it is not UTF-8 text (byte {at})"))
    })
}

/// Replaces a file atomically. Until it is complete, the new file has the old name with a random
/// suffix, and [`is_being_written`] distinguishes it from the file of a dead writer.
///
/// # Errors
/// Those of the file system.
pub fn replace(path: &Path, text: &[u8]) -> io::Result<()> {
    // One that looks for files of dead writers may take it for such before it is locked.
    let mut attempts = 0..3;
    loop {
        match try_replace(path, text) {
            Err(error) if error.kind() == io::ErrorKind::NotFound && attempts.next().is_some() => {}
            written => return written,
        }
    }
}

fn try_replace(path: &Path, text: &[u8]) -> io::Result<()> {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{:012x}", random::number() >> 16));
    let new = Path::new(&name);
    let file = OpenOptions::new().write(true).create_new(true).mode(0o644).open(new)?;
    let locked = Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, errno)| errno.into());
    let written = locked.and_then(|mut file: Flock<File>| {
        file.write_all(text)?;
        step("half-recorded");
        fs::rename(new, path)
    });
    if written.is_err() {
        // It may be gone already; nobody needs it.
        let _ = fs::remove_file(new);
    }
    written
}

/// The final name for the name of an incomplete file ([`replace`]).
#[must_use]
pub fn whole_name(half_written: &str) -> Option<&str> {
    let (whole, suffix) = half_written.rsplit_once('.')?;
    let is_suffix = suffix.len() == 12 && suffix.bytes().all(|byte| byte.is_ascii_hexdigit());
    is_suffix.then_some(whole)
}

/// Whether a process is still writing an incomplete file ([`replace`]): it then holds a lock. A
/// file that cannot be opened is gone, or not ours.
#[must_use]
pub fn is_being_written(path: &Path) -> bool {
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let file = OpenOptions::new().write(true).custom_flags(flags).open(path);
    file.is_ok_and(|file| Flock::lock(file, FlockArg::LockExclusiveNonblock).is_err())
}

pub(super) fn not_ours(path: &Path, why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::PermissionDenied, format!("{}: {why}", path.display()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().mode() & 0o7777
    }

    #[test]
    fn a_directory_is_closed_to_others() {
        let top = tempfile::tempdir().unwrap();
        let path = top.path().join("run");
        directory(&path).unwrap();
        assert_eq!(mode(&path) & 0o022, 0);
        fs::set_permissions(&path, Permissions::from_mode(0o777)).unwrap();
        directory(&path).unwrap();
        assert_eq!(mode(&path), 0o755);
        let link = top.path().join("link");
        symlink(&path, &link).unwrap();
        assert!(directory(&link).is_err(), "a link");
        fs::write(top.path().join("file"), "").unwrap();
        assert!(directory(&top.path().join("file")).is_err(), "a file");
    }

    #[test]
    fn what_others_have_put_in_its_place_is_not_written() {
        let top = tempfile::tempdir().unwrap();
        let at = |name: &str| top.path().join(name);
        fs::write(at("secret"), "secret").unwrap();
        symlink(at("secret"), at("link")).unwrap();
        fs::hard_link(at("secret"), at("name")).unwrap();
        nix::unistd::mkfifo(&at("pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        for name in ["link", "name", "pipe"] {
            assert!(append(&at(name), 0o600).is_err(), "{name}");
        }
        assert_eq!(fs::read(at("secret")).unwrap(), b"secret");
        append(&at("log"), 0o600).unwrap();
        assert_eq!(mode(&at("log")), 0o600);
    }

    #[test]
    fn only_regular_files_are_read_and_only_whole() {
        let top = tempfile::tempdir().unwrap();
        let at = |name: &str| top.path().join(name);
        fs::write(at("file"), "four").unwrap();
        fs::write(at("binary"), b"a\xff").unwrap();
        symlink("file", at("link")).unwrap();
        nix::unistd::mkfifo(&at("pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        let read = |name: &str, max| read_whole(&regular(&at(name), 0)?, max);
        assert_eq!(read("file", 4).unwrap(), "four");
        assert_eq!(read("link", 5).unwrap(), "four");
        let refused = |name: &str, max| read(name, max).unwrap_err().to_string();
        assert_eq!(refused("file", 3), "it is longer than 3 bytes");
        assert_eq!(refused("binary", 9), "it is not UTF-8 text (byte 1)");
        assert_eq!(refused("pipe", 9), "it is not a regular file");
        assert_eq!(refused(".", 9), "it is not a regular file");
        assert_eq!(refused("/dev/zero", 9), "it is not a regular file");
        assert!(regular(&at("link"), libc::O_NOFOLLOW).is_err());
    }
}

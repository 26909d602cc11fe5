//! Path lookup: once, and not through links that others can change.
//!
//! Otherwise, a user who can change a link in the path, or its directory, could choose the file
//! that root opens and that members of a group may read and write.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::fs::{File, Metadata};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

use nix::unistd::geteuid;
use rustix::fs::{Mode, OFlags, open, openat, readlinkat};
use uring_ext::Errno;

use crate::backing::{BackingProblem, failed, open_quietly};

/// The largest number of links in a path, as in the kernel (`MAXSYMLINKS`).
const MAX_LINKS: u32 = 40;
/// The sticky bit (`S_ISVTX`): in such a directory, users can rename or remove only their own
/// files.
const STICKY: u32 = 0o1000;

/// A looked-up file. It stays the same file even if its path changes.
#[derive(Debug)]
pub(crate) struct Found {
    node: File,
    /// The path without links.
    pub path: PathBuf,
    pub meta: Metadata,
    /// A directory in the path that users other than the calling one can change.
    pub open_directory: Option<PathBuf>,
}

impl Found {
    /// Opens it for direct I/O, or through the page cache.
    pub fn open(&self, write: bool, direct: bool, flags: i32) -> Result<File, Errno> {
        // The descriptor's link leads to the node itself, wherever its path leads by now.
        let node = PathBuf::from(format!("/proc/self/fd/{}", self.node.as_raw_fd()));
        open_quietly(&node, write, if direct { flags | libc::O_DIRECT } else { flags })
    }
}

/// A directory in the path.
struct Step {
    directory: File,
    name: OsString,
}

/// Looks a path up.
///
/// # Errors
/// [`BackingProblem::Missing`], [`BackingProblem::OthersLink`], [`BackingProblem::Failed`].
pub(crate) fn find(path: &Path) -> Result<Found, BackingProblem> {
    let looked_up = failed("cannot be looked up");
    let absolute = std::path::absolute(path).map_err(&looked_up)?;
    let root = node(open("/", FLAGS, Mode::empty()).map_err(errno)?);
    let mut steps: Vec<Step> = Vec::new();
    let mut left: VecDeque<OsString> = components(&absolute);
    let (mut links, mut open_directory, mut found) = (0, None, None);
    while let Some(name) = left.pop_front() {
        if name == OsStr::new("..") {
            found = steps.pop().and(None);
            continue;
        }
        let parent = steps.last().map_or(&root, |step| &step.directory);
        let parent_meta = parent.metadata().map_err(&looked_up)?;
        let entry = node(openat(parent, &name, FLAGS, Mode::empty()).map_err(errno)?);
        let meta = entry.metadata().map_err(&looked_up)?;
        let is_safe = is_safe(&parent_meta, &meta);
        if meta.is_symlink() {
            let at = path_of(&steps).join(&name);
            links += 1;
            if links > MAX_LINKS {
                return Err(BackingProblem::Failed { doing: "cannot be looked up", errno: ELOOP });
            }
            if !is_safe && !is_own(&meta) {
                return Err(BackingProblem::OthersLink { link: at, uid: meta.uid() });
            }
            let target = readlinkat(&entry, "", Vec::new()).map_err(errno)?;
            let target = PathBuf::from(OsString::from_vec(target.into_bytes()));
            if target.is_absolute() {
                steps.clear();
            }
            for component in components(&target).into_iter().rev() {
                left.push_front(component);
            }
            continue;
        }
        if !is_safe {
            open_directory.get_or_insert_with(|| path_of(&steps));
        }
        if meta.is_dir() {
            steps.push(Step { directory: entry, name });
            continue;
        }
        if !left.is_empty() {
            return Err(BackingProblem::Failed { doing: "cannot be looked up", errno: ENOTDIR });
        }
        let path = path_of(&steps).join(&name);
        found = Some(Found { node: entry, path, meta, open_directory: open_directory.take() });
    }
    // A directory, which is for the caller to refuse.
    let directory = || {
        let path = path_of(&steps);
        let node = steps.pop().map_or(root, |step| step.directory);
        let meta = node.metadata().map_err(&looked_up)?;
        Ok(Found { node, path, meta, open_directory: None })
    };
    found.map_or_else(directory, Ok)
}

const FLAGS: OFlags = OFlags::PATH.union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);
const ELOOP: Errno = Errno::new(libc::ELOOP);
const ENOTDIR: Errno = Errno::new(libc::ENOTDIR);

fn node(fd: OwnedFd) -> File {
    fd.into()
}

fn errno(errno: rustix::io::Errno) -> BackingProblem {
    match Errno::new(errno.raw_os_error()) {
        Errno::ENOENT => BackingProblem::Missing,
        errno => BackingProblem::Failed { doing: "cannot be looked up", errno },
    }
}

/// The names in a path, `..` included.
fn components(path: &Path) -> VecDeque<OsString> {
    let name = |component: Component<'_>| match component {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some(OsString::from("..")),
        Component::RootDir | Component::CurDir | Component::Prefix(_) => None,
    };
    path.components().filter_map(name).collect()
}

fn path_of(steps: &[Step]) -> PathBuf {
    let names = steps.iter().map(|step| step.name.as_os_str());
    std::iter::once(OsStr::new("/")).chain(names).collect()
}

/// Whether a file belongs to the calling user (who is root) or to root.
fn is_own(meta: &Metadata) -> bool {
    meta.uid() == geteuid().as_raw() || meta.uid() == 0
}

/// Whether nobody else can replace this directory entry.
fn is_safe(directory: &Metadata, entry: &Metadata) -> bool {
    let is_writable = directory.mode() & 0o022 != 0;
    let is_sticky = directory.mode() & STICKY != 0;
    is_own(directory) && (!is_writable || is_sticky && is_own(entry))
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::{PermissionsExt, chown, symlink};

    use super::*;

    #[test]
    fn paths_lead_where_the_kernel_leads_them() {
        let top = tempfile::tempdir().unwrap();
        let at = |name: &str| top.path().join(name);
        fs::create_dir_all(at("a/b")).unwrap();
        fs::write(at("a/b/file"), "x").unwrap();
        symlink("b/file", at("a/link")).unwrap();
        symlink("../a", at("a/up")).unwrap();
        symlink(at("a"), at("whole")).unwrap();
        symlink("loop", at("loop")).unwrap();
        for path in
            ["a/b/file", "a/./b//file", "a/b/../b/file", "a/link", "a/up/link", "whole/link"]
        {
            let found = find(&at(path)).unwrap();
            assert_eq!(found.path, at(path).canonicalize().unwrap(), "{path}");
            assert_eq!(found.meta.ino(), fs::metadata(at(path)).unwrap().ino());
            assert!(found.open(true, false, 0).is_ok());
        }
        assert!(find(&at("a/b")).unwrap().meta.is_dir());
        assert!(find(Path::new("/")).unwrap().meta.is_dir());
        assert_eq!(find(&at("a/none")).unwrap_err(), BackingProblem::Missing);
        for path in ["loop", "a/b/file/x"] {
            assert!(matches!(find(&at(path)), Err(BackingProblem::Failed { .. })), "{path}");
        }
        // What was found stays what it is.
        let found = find(&at("a/link")).unwrap();
        fs::rename(at("a/b/file"), at("moved")).unwrap();
        fs::write(at("a/b/file"), "another").unwrap();
        assert_eq!(found.open(false, false, 0).unwrap().metadata().unwrap().len(), 1);
    }

    #[test]
    fn links_of_others_are_not_followed() {
        if !geteuid().is_root() {
            return;
        }
        const OTHER: Option<u32> = Some(65534);
        let top = tempfile::tempdir().unwrap();
        fs::set_permissions(top.path(), Permissions::from_mode(0o755)).unwrap();
        let at = |name: &str| top.path().join(name);
        fs::write(at("secret"), "x").unwrap();
        for (directory, mode) in [("home", 0o755), ("tmp", 0o1777), ("open", 0o777)] {
            fs::create_dir(at(directory)).unwrap();
            fs::set_permissions(at(directory), Permissions::from_mode(mode)).unwrap();
            symlink("../secret", at(directory).join("theirs")).unwrap();
            std::os::unix::fs::lchown(at(directory).join("theirs"), OTHER, OTHER).unwrap();
            symlink("../secret", at(directory).join("ours")).unwrap();
            fs::write(at(directory).join("disk"), "x").unwrap();
        }
        chown(at("home"), OTHER, OTHER).unwrap();
        for directory in ["home", "tmp", "open"] {
            let refused = find(&at(directory).join("theirs")).unwrap_err();
            assert!(matches!(refused, BackingProblem::OthersLink { uid: 65534, .. }), "{refused}");
            assert!(find(&at(directory).join("ours")).is_ok(), "{directory}");
        }
        let others = |directory: &str| find(&at(directory).join("disk")).unwrap().open_directory;
        assert_eq!((others("home"), others("open")), (Some(at("home")), Some(at("open"))));
        assert_eq!(others("tmp"), None, "nobody else can take root's files away there");
    }
}

//! Backings: the files and block devices where the bytes live.

pub mod identity;
pub mod limits;
mod namespace;
pub mod sysfs;
pub mod usage;

use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use rustix::fs::{AtFlags, StatxFlags, statx};
use uring_ext::Errno;
use uring_ext::nvme::Namespace;

use crate::kernel::KernelVersion;
use crate::units::Bytes;
use limits::{DiscardLimits, Limits};
use namespace::NamespaceFiles;
use sysfs::SysfsDevice;

/// Why a path cannot be a backing. Each says what to do where something can be done.
#[non_exhaustive]
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BackingProblem {
    /// Nothing is there.
    #[error("does not exist; give the path of a block device or a regular file")]
    Missing,
    /// Neither a block device nor a regular file.
    #[error("is {0}; give a block device or a regular file")]
    WrongKind(&'static str),
    /// There is nothing in it to serve.
    #[error("is empty; give it a size first, for example with `truncate -s 1G`")]
    Empty,
    /// It is smaller than a block.
    #[error("has {size} bytes, less than one block of {block}")]
    TooSmall {
        /// Its size in bytes.
        size: u64,
        /// The logical block size in bytes.
        block: u32,
    },
    /// Somebody uses it.
    #[error("is in use: {}; stop that use first", .0.join(", "))]
    InUse(Vec<String>),
    /// Its zones would need a zoned target.
    #[error("is a zoned device, which this target does not serve")]
    Zoned,
    /// It is no whole NVMe namespace.
    #[error(
        "is not a whole NVMe namespace, which passthrough needs; give /dev/ngXnY or /dev/nvmeXnY, \
         or leave out --passthru"
    )]
    NoNamespace,
    /// Its blocks have metadata, which no request here carries.
    #[error(
        "is formatted with {0} bytes of metadata a block, which passthrough does not serve; format it \
         without (`nvme format`), or serve its block device"
    )]
    Metadata(u16),
    /// The kernel lacks what passthrough needs.
    #[error("passthrough needs Linux {needs}, and this is {running}; serve the block device")]
    TooOld {
        /// The first version that has it.
        needs: KernelVersion,
        /// The one that runs.
        running: KernelVersion,
    },
    /// Its file system cannot do direct I/O.
    #[error("its file system does not support direct I/O (O_DIRECT); move it to one that does")]
    NoDirectIo,
    /// It is not what it was when the device was added.
    #[error(
        "is not the backing that the device was added with: {0}; give the device its own one back, \
         or delete it"
    )]
    Changed(String),
    /// Any other error of the kernel.
    #[error("{doing}: {errno}")]
    Failed {
        /// What was tried.
        doing: &'static str,
        /// Why it failed.
        errno: Errno,
    },
}

/// A path that cannot be a backing, and why.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}: {problem}", path.display())]
pub struct BackingError {
    /// The path as it was given.
    pub path: PathBuf,
    /// Why.
    pub problem: BackingProblem,
}

/// How a backing discards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiscardCall {
    /// `BLOCK_URING_CMD_DISCARD` (Linux 6.12).
    BlockCommand,
    /// `fallocate(FALLOC_FL_PUNCH_HOLE)`.
    PunchHole,
}

/// How operations reach a backing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// As reads, writes and so on of a file or block device.
    File(DiscardCall),
    /// As commands to a namespace's generic device.
    Namespace {
        /// Which, and how it counts.
        namespace: Namespace,
        /// Blocks deallocated by write-zeroes read as zeros.
        deallocates_zeroes: bool,
    },
}

impl Route {
    /// Whether operations are commands to a namespace.
    #[must_use]
    pub const fn is_namespace(&self) -> bool {
        matches!(self, Self::Namespace { .. })
    }
}

/// What keeps a backing open, and exclusive.
#[derive(Debug)]
enum Handle {
    /// Opened with `O_EXCL`, or a shared device such as `/dev/zero`.
    Device(File),
    /// Locked with `flock`.
    File(Flock<File>),
    /// Both devices of a namespace.
    Namespace(NamespaceFiles),
}

/// An open backing.
#[derive(Debug)]
pub struct Backing {
    path: PathBuf,
    handle: Handle,
    identity: String,
    size: Bytes,
    limits: Limits,
    route: Route,
    can_poll: bool,
}

impl Backing {
    /// Opens a block device (exclusively) or a regular file (locked) for direct I/O and reads its
    /// limits. One that refuses writes is opened for reading and has
    /// [`Limits::read_only`] set. The generic device of an NVMe namespace is given commands, and
    /// with `passthru` so is a block device, which must be such a namespace then.
    ///
    /// # Errors
    /// [`BackingError`]; nothing is left open.
    pub fn open(path: &Path, passthru: bool) -> Result<Self, BackingError> {
        let opened = Self::try_open(path, passthru);
        opened.map_err(|problem| BackingError { path: path.to_owned(), problem })
    }

    fn try_open(path: &Path, passthru: bool) -> Result<Self, BackingProblem> {
        let path = path.canonicalize().map_err(|error| match Errno::of(&error) {
            Errno::ENOENT => BackingProblem::Missing,
            errno => BackingProblem::Failed { doing: "cannot be looked up", errno },
        })?;
        let meta = path.metadata().map_err(failed("cannot be looked up"))?;
        let kind = meta.file_type();
        if kind.is_block_device() && passthru {
            let generic = namespace::generic_of(&path).ok_or(BackingProblem::NoNamespace)?;
            namespace::open(Self::open_device(path, meta.rdev())?, generic)
        } else if kind.is_block_device() {
            Self::open_device(path, meta.rdev())
        } else if let Some(block) = namespace::block_of(&path).filter(|_| kind.is_char_device()) {
            let meta = block.metadata().map_err(failed("its block device cannot be looked up"))?;
            namespace::open(Self::open_device(block, meta.rdev())?, path)
        } else if passthru {
            Err(BackingProblem::NoNamespace)
        } else if kind.is_file() {
            Self::open_file(path)
        } else if kind.is_dir() {
            Err(BackingProblem::WrongKind("a directory"))
        } else if kind.is_char_device() {
            Err(BackingProblem::WrongKind("a character device"))
        } else {
            Err(BackingProblem::WrongKind("neither"))
        }
    }

    fn open_device(path: PathBuf, rdev: u64) -> Result<Self, BackingProblem> {
        let (major, minor) = usage::split_devt(rdev);
        let sysfs = SysfsDevice::find(Path::new("/sys"), major, minor)
            .ok_or(BackingProblem::Failed { doing: "has no driver", errno: Errno::ENXIO })?;
        if sysfs.is_zoned() {
            return Err(BackingProblem::Zoned);
        }
        let limits = sysfs.limits();
        let file = open_direct(&path, !limits.read_only, libc::O_EXCL).map_err(|errno| {
            if errno == Errno::EBUSY {
                in_use(usage::holders_of_device(major, minor), "another program has claimed it")
            } else {
                BackingProblem::Failed { doing: "cannot be opened", errno }
            }
        })?;
        let size = size_of_open(&file, limits.logical_block)?;
        let by_command = KernelVersion::running() >= KernelVersion(6, 12);
        let discard_call =
            if by_command { DiscardCall::BlockCommand } else { DiscardCall::PunchHole };
        // Punching a hole in a device writes zeroes with unmapping, and fails where it cannot.
        let can_discard = by_command || limits.max_write_zeroes > 0;
        let limits = Limits { discard: limits.discard.filter(|_| can_discard), ..limits };
        let route = Route::File(discard_call);
        let can_poll = sysfs.can_poll();
        let (handle, identity) = (Handle::Device(file), identity::of_device(&sysfs));
        Ok(Self { path, handle, identity, size, limits, route, can_poll })
    }

    fn open_file(path: PathBuf) -> Result<Self, BackingProblem> {
        let users = usage::users_of_file(&path);
        if !users.is_empty() {
            return Err(BackingProblem::InUse(users));
        }
        let (file, read_only) = match open_direct(&path, true, 0) {
            Ok(file) => (file, false),
            Err(Errno::EROFS) => (open_direct(&path, false, 0).map_err(not_opened)?, true),
            Err(errno) => return Err(not_opened(errno)),
        };
        let file = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| {
            if errno == nix::errno::Errno::EWOULDBLOCK {
                in_use(Vec::new(), "another program has locked it, likely another ublk-target")
            } else {
                BackingProblem::Failed {
                    doing: "cannot be locked",
                    errno: Errno::new(errno as i32),
                }
            }
        })?;
        let below = device_below(&file)?;
        let limits = Limits { read_only, ..limits_of_file(&file, below.as_ref())? };
        let size = size_of_open(&file, limits.logical_block)?;
        let tail = file.metadata().map_err(failed("cannot be looked up"))?.len() - size.0;
        if tail > 0 {
            let block = limits.logical_block;
            log::warn!(
                "{}: the last {tail} bytes, less than a block of {block}, are not served",
                path.display()
            );
        }
        let route = Route::File(DiscardCall::PunchHole);
        let can_poll = below.is_some_and(|device| device.can_poll());
        let (identity, handle) = (identity::of_file(&file), Handle::File(file));
        Ok(Self { path, handle, identity, size, limits, route, can_poll })
    }

    /// `/dev/zero`, which fills the reads of targets without data.
    ///
    /// # Errors
    /// [`BackingError`] if it cannot be opened.
    pub fn zero() -> Result<Self, BackingError> {
        let path = PathBuf::from("/dev/zero");
        let file = File::open(&path)
            .map_err(failed("cannot be opened"))
            .map_err(|problem| BackingError { path: path.clone(), problem })?;
        Ok(Self {
            path,
            handle: Handle::Device(file),
            identity: String::new(),
            size: Bytes(u64::MAX),
            limits: Limits::default(),
            route: Route::File(DiscardCall::PunchHole),
            can_poll: false,
        })
    }

    /// The canonical path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Size in bytes, whole logical blocks.
    #[must_use]
    pub const fn size(&self) -> Bytes {
        self.size
    }

    /// The size that it has now, whole logical blocks. What is used of it stays the same.
    ///
    /// # Errors
    /// [`BackingError`].
    pub fn size_now(&self) -> Result<Bytes, BackingError> {
        let block = self.limits.logical_block;
        let size = match &self.handle {
            Handle::Device(file) => size_of_open(file, block),
            Handle::File(file) => size_of_open(file, block),
            Handle::Namespace(files) => files.size_now(),
        };
        size.map_err(|problem| BackingError { path: self.path.clone(), problem })
    }

    /// Its limits.
    #[must_use]
    pub const fn limits(&self) -> &Limits {
        &self.limits
    }

    /// How operations reach it.
    #[must_use]
    pub const fn route(&self) -> Route {
        self.route
    }

    /// Whether the drive has queues to be polled.
    #[must_use]
    pub const fn can_poll(&self) -> bool {
        self.can_poll
    }
}

impl AsRawFd for Backing {
    fn as_raw_fd(&self) -> RawFd {
        match &self.handle {
            Handle::Device(file) => file.as_raw_fd(),
            Handle::File(file) => file.as_raw_fd(),
            Handle::Namespace(files) => files.as_raw_fd(),
        }
    }
}

fn failed(doing: &'static str) -> impl Fn(std::io::Error) -> BackingProblem {
    move |error| BackingProblem::Failed { doing, errno: Errno::of(&error) }
}

fn not_opened(errno: Errno) -> BackingProblem {
    match errno {
        Errno::EINVAL => BackingProblem::NoDirectIo,
        errno => BackingProblem::Failed { doing: "cannot be opened", errno },
    }
}

fn in_use(mut users: Vec<String>, otherwise: &str) -> BackingProblem {
    if users.is_empty() {
        users.push(otherwise.to_owned());
    }
    BackingProblem::InUse(users)
}

/// Opens for direct I/O, without updates of the access time where that is allowed.
fn open_direct(path: &Path, write: bool, flags: i32) -> Result<File, Errno> {
    let open = |flags| {
        OpenOptions::new()
            .read(true)
            .write(write)
            .custom_flags(flags | libc::O_DIRECT)
            .open(path)
            .map_err(|error| Errno::of(&error))
    };
    match open(flags | libc::O_NOATIME) {
        // Only the owner and root may ask for O_NOATIME.
        Err(Errno::EPERM) => open(flags),
        opened => opened,
    }
}

fn size_of_open(mut file: &File, block: u32) -> Result<Bytes, BackingProblem> {
    let size = file.seek(SeekFrom::End(0)).map_err(failed("its size cannot be read"))?;
    match size {
        0 => Err(BackingProblem::Empty),
        size if size < u64::from(block) => Err(BackingProblem::TooSmall { size, block }),
        size => Ok(Bytes(size / u64::from(block) * u64::from(block))),
    }
}

/// The block device that a file's file system is on.
fn device_below(file: &File) -> Result<Option<SysfsDevice>, BackingProblem> {
    let meta = file.metadata().map_err(failed("cannot be looked up"))?;
    let (major, minor) = usage::split_devt(meta.dev());
    Ok(SysfsDevice::find(Path::new("/sys"), major, minor))
}

/// The limits of a regular file: what direct I/O on its file system wants (`STATX_DIOALIGN`,
/// Linux 6.1), and the I/O size of the device below it.
fn limits_of_file(file: &File, below: Option<&SysfsDevice>) -> Result<Limits, BackingProblem> {
    let meta = file.metadata().map_err(failed("cannot be looked up"))?;
    let below = below.map(SysfsDevice::limits);
    let dio = statx(file.as_fd(), "", AtFlags::EMPTY_PATH, StatxFlags::from_bits_retain(DIOALIGN));
    let dio = dio.ok().filter(|stat| stat.stx_mask & DIOALIGN != 0);
    let (mem_align, offset_align) = match dio {
        Some(stat) if stat.stx_dio_offset_align == 0 => return Err(BackingProblem::NoDirectIo),
        Some(stat) => (stat.stx_dio_mem_align, stat.stx_dio_offset_align),
        // Older kernels do not tell: a page fits every file system's block layer.
        None => below.map_or((4096, 4096), |limits| (limits.dma_alignment, limits.logical_block)),
    };
    let block = u32::try_from(meta.blksize()).unwrap_or(4096).max(offset_align);
    let granularity = block.max(512);
    Ok(Limits {
        logical_block: offset_align.clamp(512, 4096),
        physical_block: granularity.clamp(512, 4096),
        io_min: granularity,
        io_opt: 0,
        chunk: 0,
        dma_alignment: mem_align.clamp(1, 4096).next_power_of_two(),
        discard: Some(DiscardLimits { granularity, alignment: 0, max_bytes: FILE_MAX_PUNCH }),
        max_write_zeroes: FILE_MAX_PUNCH,
        // Metadata and the device below are flushed by fdatasync; RWF_DSYNC does the same for one
        // write.
        volatile_cache: true,
        fua: true,
        read_only: false,
        ..below.unwrap_or_default()
    })
}

/// `STATX_DIOALIGN` (`include/uapi/linux/stat.h`).
const DIOALIGN: u32 = 0x2000;

/// Most bytes of a file that are punched out in one request, so that none takes for ever.
const FILE_MAX_PUNCH: u64 = 1 << 30;

#[cfg(test)]
mod tests {
    use super::*;

    fn problem(path: &Path) -> BackingProblem {
        Backing::open(path, false).unwrap_err().problem
    }

    #[test]
    fn what_cannot_be_a_backing_is_refused_with_the_reason() {
        let directory = tempfile::tempdir_in(".").unwrap();
        let at = |name: &str| directory.path().join(name);
        assert_eq!(problem(&at("missing")), BackingProblem::Missing);
        assert_eq!(problem(directory.path()), BackingProblem::WrongKind("a directory"));
        assert_eq!(
            problem(Path::new("/dev/null")),
            BackingProblem::WrongKind("a character device")
        );
        File::create(at("empty")).unwrap();
        assert_eq!(problem(&at("empty")), BackingProblem::Empty);
        std::fs::write(at("tiny"), [0; 100]).unwrap();
        assert!(matches!(problem(&at("tiny")), BackingProblem::TooSmall { size: 100, .. }));
    }

    #[test]
    fn a_file_is_served_in_whole_blocks_and_locked() {
        let directory = tempfile::tempdir_in(".").unwrap();
        let path = directory.path().join("disk");
        File::create(&path).unwrap().set_len((1 << 20) + 100).unwrap();
        let backing = Backing::open(&path, false).unwrap();
        assert_eq!(backing.size(), Bytes(1 << 20));
        let limits = backing.limits();
        assert!(limits.volatile_cache && limits.fua && !limits.read_only);
        assert!(limits.logical_block.is_power_of_two() && limits.dma_alignment.is_power_of_two());
        assert!(matches!(problem(&path), BackingProblem::InUse(_)), "opened twice");
        drop(backing);
        assert!(Backing::open(&path, false).is_ok());
        let passthru = Backing::open(&path, true).unwrap_err();
        assert_eq!(passthru.problem, BackingProblem::NoNamespace);
    }
}

//! Backings: the files and block devices that store the bytes.

pub mod below;
mod error;
pub mod identity;
pub mod limits;
mod lock;
mod lookup;
mod namespace;
pub mod sysfs;
pub mod usage;

use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FallocateFlags, StatxFlags, fallocate, statx};
use ublk_engine::route::{DiscardCall, Route};
use ublk_engine::units::Bytes;
use uring_ext::Errno;

use crate::os::kernel::KernelVersion;
use crate::os::procfs;
pub use error::{BackingError, BackingProblem};
use limits::{DiscardLimits, Limits, MAX_BLOCK};
use lookup::Found;
pub(crate) use lookup::find;
use namespace::NamespaceFiles;
use sysfs::SysfsDevice;

/// The open files of a backing, which also keep it exclusive.
#[derive(Debug)]
enum Handle {
    /// Opened with `O_EXCL`, or a shared device such as `/dev/zero`.
    Device(File),
    /// A locked regular file.
    File(File),
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
    is_buffered: bool,
}

/// How a backing is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Opening {
    /// As an NVMe namespace, by NVMe commands.
    pub passthru: bool,
    /// Exclusively. Without it, the backing is only inspected.
    pub claims: bool,
    /// The block size of the device in bytes, a power of two. A file with larger blocks of its own
    /// goes through the page cache.
    pub block_size: Option<u32>,
}

impl Opening {
    /// For direct I/O on its own blocks, exclusively.
    pub const ALONE: Self = Self { passthru: false, claims: true, block_size: None };
}

impl Backing {
    /// Opens a block device (exclusively) or a regular file (locked) for direct I/O and reads its
    /// limits. If it refuses writes, it is opened for reading, with [`Limits::read_only`] set. The
    /// generic device of an NVMe namespace gets NVMe commands. With [`Opening::passthru`] a block
    /// device gets them too, and must be a whole namespace.
    ///
    /// The path is looked up once, and links that other users can change are not followed.
    ///
    /// # Errors
    /// [`BackingError`]; nothing is left open.
    pub fn open(path: &Path, how: Opening) -> Result<Self, BackingError> {
        let opened = Self::try_open(path, how);
        opened.map_err(|problem| BackingError { path: path.to_owned(), problem })
    }

    fn try_open(path: &Path, how: Opening) -> Result<Self, BackingProblem> {
        let found = lookup::find(path)?;
        let kind = found.meta.file_type();
        if kind.is_block_device() && how.passthru {
            let generic = namespace::generic_of(&found.path).ok_or(BackingProblem::NoNamespace)?;
            namespace::open(Self::open_device(found, how)?, generic)
        } else if kind.is_block_device() {
            Self::open_device(found, how)
        } else if let Some(block) =
            namespace::block_of(&found.path).filter(|_| kind.is_char_device())
        {
            let block = lookup::find(&block)?;
            if !block.meta.file_type().is_block_device() {
                return Err(BackingProblem::NoNamespace);
            }
            namespace::open(Self::open_device(block, how)?, found.path)
        } else if how.passthru {
            Err(BackingProblem::NoNamespace)
        } else if kind.is_file() {
            Self::open_file(found, how)
        } else if kind.is_dir() {
            Err(BackingProblem::WrongKind("a directory"))
        } else if kind.is_char_device() {
            Err(BackingProblem::WrongKind("a character device"))
        } else {
            Err(BackingProblem::WrongKind("neither"))
        }
    }

    fn open_device(found: Found, how: Opening) -> Result<Self, BackingProblem> {
        let (major, minor) = procfs::split_devt(found.meta.rdev());
        let sysfs = SysfsDevice::find(Path::new("/sys"), major, minor)
            .ok_or(BackingProblem::Failed { doing: "has no driver", errno: Errno::ENXIO })?;
        if sysfs.is_zoned() {
            return Err(BackingProblem::Zoned);
        }
        let limits = sysfs.limits();
        check_block(limits.logical_block)?;
        if how.block_size.is_some_and(|block| block < limits.logical_block) {
            return Err(BackingProblem::BlocksTooLarge(limits.logical_block));
        }
        let flags = if how.claims { libc::O_EXCL } else { 0 };
        let file = found.open(!limits.read_only, true, flags).map_err(|errno| {
            if errno == Errno::EBUSY {
                in_use(usage::holders_of_device(major, minor), "claimed by another program")
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
        let (path, is_buffered) = (found.path, false);
        Ok(Self { path, handle, identity, size, limits, route, can_poll, is_buffered })
    }

    fn open_file(found: Found, how: Opening) -> Result<Self, BackingProblem> {
        if let Some(directory) = &found.open_directory {
            if found.meta.nlink() > 1 {
                return Err(BackingProblem::OthersName(directory.clone()));
            }
            log::warn!(
                "{}: users other than root can replace this file, since they can change {}",
                found.path.display(),
                directory.display()
            );
        }
        let open = |direct: bool| match found.open(true, direct, 0) {
            Ok(file) => Ok((file, false)),
            Err(Errno::EROFS) => Ok((found.open(false, direct, 0).map_err(not_opened)?, true)),
            Err(errno) => Err(not_opened(errno)),
        };
        let (mut file, read_only) = open(true)?;
        let below = device_below(&file)?;
        let mut limits = Limits { read_only, ..limits_of_file(&file, below.as_ref())? };
        // The page cache reads and writes parts of blocks.
        let wanted = how.block_size.filter(|block| *block < limits.logical_block);
        let is_buffered = wanted.is_some();
        if let Some(block) = wanted {
            file = open(false)?.0;
            limits = Limits { logical_block: block, dma_alignment: 4, ..limits };
        }
        let mut discard_call = DiscardCall::PunchHole;
        if how.claims {
            if limits.logical_block > 512 && has_partitions_of_512(&found) {
                log::warn!(
                    "{}: its partition table is for blocks of 512 bytes, but its file system needs blocks \
                     of {}, so the kernel finds no partitions; use --block-size 512",
                    found.path.display(),
                    limits.logical_block
                );
            }
            lock::lock(&file, read_only)?;
            if !read_only {
                match probe(&file) {
                    Some(call) => discard_call = call,
                    // The kernel would answer each of them with an error, and log it.
                    None => limits = Limits { discard: None, max_write_zeroes: 0, ..limits },
                }
            }
        }
        let size = size_of_open(&file, limits.logical_block)?;
        let tail = file.metadata().map_err(failed("cannot be looked up"))?.len() - size.0;
        if tail > 0 {
            let block = limits.logical_block;
            log::warn!(
                "{}: the last {tail} bytes, less than a block of {block}, are not served",
                found.path.display()
            );
        }
        let route = Route::File(discard_call);
        let can_poll = below.is_some_and(|device| device.can_poll()) && !is_buffered;
        let (identity, handle) = (identity::of_file(&file), Handle::File(file));
        let path = found.path;
        Ok(Self { path, handle, identity, size, limits, route, can_poll, is_buffered })
    }

    /// Opens `/dev/zero`, which fills the reads of targets without data.
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
            is_buffered: false,
        })
    }

    /// The canonical path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The used size in bytes, whole logical blocks.
    #[must_use]
    pub const fn size(&self) -> Bytes {
        self.size
    }

    /// The present size, whole logical blocks. The used size does not change.
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

    /// Whether it is a block device that now has fewer than `end` bytes. A removed drive has 0.
    #[must_use]
    pub fn has_shrunk(&self, end: u64) -> bool {
        match &self.handle {
            // Nothing but this looks at the position.
            Handle::Device(file) => (&*file).seek(SeekFrom::End(0)).is_ok_and(|size| size < end),
            Handle::File(_) | Handle::Namespace(_) => false,
        }
    }

    /// The limits of the backing.
    #[must_use]
    pub const fn limits(&self) -> &Limits {
        &self.limits
    }

    /// How operations access the backing.
    #[must_use]
    pub const fn route(&self) -> Route {
        self.route
    }

    /// Whether it goes through the page cache, because its own blocks are larger than the device's.
    #[must_use]
    pub const fn is_buffered(&self) -> bool {
        self.is_buffered
    }

    /// Whether the drive has poll queues.
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

/// Opens without access time updates (`O_NOATIME`) where that is allowed.
fn open_quietly(path: &Path, write: bool, flags: i32) -> Result<File, Errno> {
    let open = |flags| {
        OpenOptions::new()
            .read(true)
            .write(write)
            .custom_flags(flags)
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

/// The block device of a file's file system.
fn device_below(file: &File) -> Result<Option<SysfsDevice>, BackingProblem> {
    let meta = file.metadata().map_err(failed("cannot be looked up"))?;
    let (major, minor) = procfs::split_devt(meta.dev());
    Ok(SysfsDevice::find(Path::new("/sys"), major, minor))
}

/// The limits of a regular file: the requirements of direct I/O on its file system
/// (`STATX_DIOALIGN`, Linux 6.1), and the I/O size of the device below.
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
    check_block(offset_align)?;
    let block = u32::try_from(meta.blksize()).unwrap_or(4096).max(offset_align);
    let granularity = block.max(512);
    Ok(Limits {
        logical_block: offset_align.max(512),
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

/// Refuses block sizes that a device cannot have: the driver would only return `EINVAL`.
const fn check_block(bytes: u32) -> Result<(), BackingProblem> {
    if bytes > MAX_BLOCK { Err(BackingProblem::BlockTooBig(bytes)) } else { Ok(()) }
}

/// Whether a file has a GPT in its second 512-byte sector.
fn has_partitions_of_512(found: &Found) -> bool {
    let mut signature = [0; 8];
    let read = found.open(false, false, 0).map(|file| file.read_exact_at(&mut signature, 512));
    matches!(read, Ok(Ok(()))) && signature == *b"EFI PART"
}

/// Probes which call of the file system discards and writes zeroes, behind the end of the file;
/// `None` if none does.
fn probe(file: &File) -> Option<DiscardCall> {
    const LEN: u64 = 4096;
    let end = file.metadata().ok()?.len().checked_next_multiple_of(LEN)?;
    let try_on = |how| fallocate(file, how | FallocateFlags::KEEP_SIZE, end, LEN);
    let is_absent = |tried: rustix::io::Result<()>| {
        tried.is_err_and(|errno| errno == rustix::io::Errno::OPNOTSUPP)
    };
    if is_absent(try_on(FallocateFlags::PUNCH_HOLE)) {
        return None;
    }
    let has_zeroes = !is_absent(try_on(FallocateFlags::ZERO_RANGE));
    // Gives back what that has allocated; a hole behind the end would not.
    let _ = file.set_len(file.metadata().ok()?.len());
    Some(if has_zeroes { DiscardCall::PunchHole } else { DiscardCall::OnlyHoles })
}

/// `STATX_DIOALIGN` (`include/uapi/linux/stat.h`).
const DIOALIGN: u32 = 0x2000;

/// Most bytes of a file for one discard, so that none takes too long.
const FILE_MAX_PUNCH: u64 = 1 << 30;

#[cfg(test)]
mod tests {
    use super::*;

    fn problem(path: &Path) -> BackingProblem {
        Backing::open(path, Opening::ALONE).unwrap_err().problem
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
        let backing = Backing::open(&path, Opening::ALONE).unwrap();
        assert_eq!(backing.size(), Bytes(1 << 20));
        let limits = backing.limits();
        assert!(limits.volatile_cache && limits.fua && !limits.read_only);
        assert!(limits.logical_block.is_power_of_two() && limits.dma_alignment.is_power_of_two());
        assert!(matches!(problem(&path), BackingProblem::InUse(_)), "opened twice");
        drop(backing);
        assert!(Backing::open(&path, Opening::ALONE).is_ok());
        let passthru =
            Backing::open(&path, Opening { passthru: true, ..Opening::ALONE }).unwrap_err();
        assert_eq!(passthru.problem, BackingProblem::NoNamespace);
    }
}

//! Why a backing cannot be used.

use std::path::PathBuf;

use uring_ext::Errno;

use super::limits::MAX_BLOCK;
use crate::os::kernel::KernelVersion;

/// Why a path cannot be a backing. If there is a remedy, the text names it.
#[non_exhaustive]
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BackingProblem {
    /// The path does not exist.
    #[error("does not exist; give the path of a block device or a regular file")]
    Missing,
    /// Neither a block device nor a regular file.
    #[error("is {0}; give a block device or a regular file")]
    WrongKind(&'static str),
    /// It has no bytes.
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
    /// Its blocks are larger than a ublk device can have.
    #[error(
        "has blocks of {0} bytes, and a ublk device has blocks of at most {MAX_BLOCK}; give a backing \
         with smaller ones"
    )]
    BlockTooBig(u32),
    /// The requested blocks are smaller than those of the block device.
    #[error("has blocks of {0} bytes; only a file can be served in smaller blocks")]
    BlocksTooLarge(u32),
    /// The path leads through a link of another user.
    #[error(
        "leads through the link {}, which user {uid} can change; give the path that it leads to",
        link.display()
    )]
    OthersLink {
        /// The link.
        link: PathBuf,
        /// Its owner.
        uid: u32,
    },
    /// The file has several hard links, one of them in a directory that others can change.
    #[error(
        "has several hard links, and users other than root can change {}: they may have linked another \
         file there; give another path of the file",
        .0.display()
    )]
    OthersName(PathBuf),
    /// It is in use, by these users.
    #[error("is in use: {}; stop that use first", .0.join(", "))]
    InUse(Vec<String>),
    /// It is zoned; no target supports zones.
    #[error("is a zoned device; zoned devices are not supported")]
    Zoned,
    /// It is not a whole NVMe namespace.
    #[error(
        "is not a whole NVMe namespace, and passthrough needs one; give /dev/ngXnY or /dev/nvmeXnY, \
         or leave out --passthru"
    )]
    NoNamespace,
    /// Its blocks have metadata; requests carry none. The number is bytes per block.
    #[error(
        "has {0} bytes of metadata per block, and passthrough does not support metadata; format it \
         without metadata (`nvme format`), or serve its block device"
    )]
    Metadata(u16),
    /// The kernel is too old for passthrough.
    #[error("passthrough needs Linux {needs}, and this is {running}; serve the block device")]
    TooOld {
        /// The first version with passthrough.
        needs: KernelVersion,
        /// The running version.
        running: KernelVersion,
    },
    /// Its file system cannot do direct I/O.
    #[error("its file system does not support direct I/O (O_DIRECT); move it to one that does")]
    NoDirectIo,
    /// It is not the backing that the device was added with.
    #[error(
        "is not the backing that the device was added with: {0}; restore the original backing, or \
         delete the device"
    )]
    Changed(String),
    /// Any other kernel error.
    #[error("{doing}: {errno}")]
    Failed {
        /// The operation that failed.
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

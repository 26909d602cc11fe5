//! Why a backing cannot be used.

use std::path::PathBuf;

use uring_ext::Errno;

use super::limits::MAX_BLOCK;
use crate::os::kernel::KernelVersion;

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
    /// Its blocks are longer than those of a ublk device can be.
    #[error(
        "has blocks of {0} bytes, and a ublk device has blocks of at most {MAX_BLOCK}; give a backing \
         with smaller ones"
    )]
    BlockTooBig(u32),
    /// Smaller blocks are asked for than a block device has.
    #[error("has blocks of {0} bytes; only files can be served in smaller ones")]
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
    /// The file has several names, one of them where others can make them.
    #[error(
        "has another name, and {} is not root's alone: it may be anybody's file; give that other name",
        .0.display()
    )]
    OthersName(PathBuf),
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

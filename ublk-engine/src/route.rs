//! How operations reach a backing.

use uring_ext::nvme::Namespace;

/// How a backing discards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiscardCall {
    /// `BLOCK_URING_CMD_DISCARD` (Linux 6.12).
    BlockCommand,
    /// `fallocate(FALLOC_FL_PUNCH_HOLE)`.
    PunchHole,
    /// The same, and zeroes are holes, too: the file system has no `FALLOC_FL_ZERO_RANGE`.
    OnlyHoles,
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

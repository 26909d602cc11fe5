//! How operations reach a backing.

use uring_ext::nvme::Namespace;

/// How to discard on a backing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiscardCall {
    /// `BLOCK_URING_CMD_DISCARD` (Linux 6.12).
    BlockCommand,
    /// `fallocate(FALLOC_FL_PUNCH_HOLE)`.
    PunchHole,
    /// The same, also to write zeros: the file system has no `FALLOC_FL_ZERO_RANGE`.
    OnlyHoles,
}

/// How operations reach a backing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// By reads, writes and so on of a file or block device.
    File(DiscardCall),
    /// By commands to a namespace's generic device.
    Namespace {
        /// The namespace.
        namespace: Namespace,
        /// Whether blocks that write-zeroes deallocates read as zeros.
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

//! Keys that travel through the kernel and come back with completions.

use crate::units::Tag;

/// The key of an operation in flight: its index in the table, and a number that distinguishes it
/// from earlier operations with the same index.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct OpKey {
    /// Index in the table of operations in flight.
    pub index: u16,
    /// The number of this submission.
    pub serial: u32,
}

/// The key of a command to the driver about a tag. A tag has one command at a time, so a completion
/// with an earlier sequence number is stale.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TagKey {
    /// The tag.
    pub tag: Tag,
    /// The sequence number of the command.
    pub seq: u32,
}

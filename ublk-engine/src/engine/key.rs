//! Names that travel through the kernel and come back with completions.

use crate::units::Tag;

/// An operation in flight: its place in the table, and a number that tells it from earlier ones
/// in that place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct OpKey {
    /// Place in the table of operations in flight.
    pub place: u16,
    /// Which submission this is.
    pub serial: u32,
}

/// A command to the driver about a tag. A tag has one command at a time, so an answer with an
/// earlier sequence number is stale.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TagKey {
    /// The tag.
    pub tag: Tag,
    /// Which of the tag's commands this is.
    pub seq: u32,
}

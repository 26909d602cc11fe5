//! Errors of a device's configuration, found before the driver is asked for anything.

use std::path::{Path, PathBuf};

use ublk_engine::lane::fault::UnknownFault;
use ublk_engine::lend::LendMode;
use ublk_engine::target::{BadExtents, BadStripe};
use ublk_engine::units::Bytes;
use uring_ext::feature::Feature;

use super::is_passing;
use crate::backing::{BackingError, BackingProblem};
use crate::config::lend::CannotLend;
use crate::config::on_death::CannotRecover;
use crate::control::polling::CannotPoll;
use crate::os::memory::Shortage;

/// Why the backings of a device do not make its target.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum LayoutError {
    /// A backing cannot be used.
    #[error(transparent)]
    Backing(#[from] BackingError),
    /// The device cannot poll.
    #[error(transparent)]
    Poll(#[from] CannotPoll),
    /// No backing is an NVMe namespace.
    #[error("the null target has no drive to give commands to; leave --passthru out")]
    NoPassthru,
    /// An extent cannot be used.
    #[error("the extent of {} that begins at {offset}: {problem}", file.display())]
    Extent {
        /// The backing.
        file: PathBuf,
        /// The start of the extent on the backing.
        offset: Bytes,
        /// The problem.
        problem: ExtentProblem,
    },
    /// The extents do not make a device.
    #[error(transparent)]
    Linear(#[from] BadExtents),
    /// The backings do not make a stripe.
    #[error(transparent)]
    Stripe(#[from] BadStripe),
    /// A backing is given twice.
    #[error("{} is given twice; a stripe needs different backings", .0.display())]
    GivenTwice(PathBuf),
    /// The size is less than a block.
    #[error("a device of {0} bytes is less than one block of 512; give it a greater --size")]
    TooSmall(u64),
    /// Growing would change the place of existing data.
    #[error(
        "the device cannot grow: with the backings' new sizes, the place of existing data would \
         change; a stripe grows if all its backings do, a linear device if its last extent does"
    )]
    WouldMove,
    /// A target without backings, which only a state file can have.
    #[error("the target has no backings")]
    NoBackings,
    /// The state file names other backings than its target has.
    #[error("the state file does not fit together: its target has other backings than it names")]
    BackingsDiffer,
}

impl LayoutError {
    /// The error for a backing that does not exist.
    pub(in crate::control) fn missing(path: &Path) -> Self {
        Self::Backing(BackingError { path: path.to_owned(), problem: BackingProblem::Missing })
    }

    /// Whether a later attempt may succeed, for instance when another process has closed a backing.
    #[must_use]
    pub fn is_passing(&self) -> bool {
        match self {
            Self::Backing(BackingError { problem, .. }) => {
                matches!(problem, BackingProblem::InUse(_))
                    || matches!(problem, BackingProblem::Failed { errno, .. } if is_passing(*errno))
            }
            Self::Poll(_)
            | Self::NoPassthru
            | Self::Extent { .. }
            | Self::Linear(_)
            | Self::Stripe(_)
            | Self::GivenTwice(_)
            | Self::TooSmall(_)
            | Self::WouldMove
            | Self::NoBackings
            | Self::BackingsDiffer => false,
        }
    }
}

/// The problem of an extent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ExtentProblem {
    /// It reaches beyond the backing.
    #[error("it reaches beyond the backing, which has {0} bytes")]
    Beyond(u64),
    /// It is not aligned to the blocks.
    #[error("offset and length must be multiples of the block of {0} bytes")]
    Unaligned(u32),
    /// Two extents share bytes.
    #[error("it overlaps another extent of the same backing")]
    Overlapping,
}

/// Why a device is not possible with these options, backings and memory.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// The backings do not make the target.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// The lend mode is unavailable.
    #[error(transparent)]
    Lend(#[from] CannotLend),
    /// The device cannot outlive its server.
    #[error(transparent)]
    OnDeath(#[from] CannotRecover),
    /// The id is beyond the driver's limit.
    #[error("device id {0} is beyond the driver's limit of 1048575")]
    IdTooBig(u32),
    /// It would be stacked on itself.
    #[error(
        "device {0} would be stacked on itself: one of its backings is on {path}, directly or through \
         other devices; give it a backing elsewhere", path = crate::device::paths::block_path(*.0).display()
    )]
    OnItself(u32),
    /// An invalid block size.
    #[error("{0} is not a block size; use 512, 1024, 2048 or 4096")]
    BlockSize(u32),
    /// Two options exclude each other.
    #[error("{option} needs {needs}, and this device lends by {lend}; {instead}")]
    Mismatch {
        /// The option.
        option: &'static str,
        /// What it needs.
        needs: &'static str,
        /// The lend mode of the device.
        lend: LendMode,
        /// What to do instead.
        instead: &'static str,
    },
    /// The driver lacks a feature that an option needs.
    #[error(
        "{option} needs the ublk feature {} (Linux {} or newer), which this kernel ({release}) lacks; \
         leave it out", feature.name, feature.since
    )]
    Lacks {
        /// The option.
        option: &'static str,
        /// The missing feature.
        feature: Feature,
        /// The running kernel.
        release: String,
    },
    /// The slots do not exist.
    #[error(
        "tags 0 to {depth} from slot {first} on do not fit a buffer table, which has {max} slots; \
         lower --first-slot or -d", max = uring_ext::ring::MAX_BUFFER_SLOTS
    )]
    TooManySlots {
        /// The slot of tag 0.
        first: u16,
        /// Tags of each queue.
        depth: u16,
    },
    /// The buffers of the server do not fit into memory.
    #[error(
        "lending by {lend} with {queues} queues of depth {depth} needs {needed} for buffers, more than \
         half of the {available} that are available; lower -q or -d"
    )]
    BuffersTooBig {
        /// The lend mode.
        lend: LendMode,
        /// Number of queues.
        queues: u16,
        /// Tags of each queue.
        depth: u16,
        /// Bytes of all buffers.
        needed: Bytes,
        /// Bytes of available memory.
        available: Bytes,
    },
    /// A limit leaves the server too little memory.
    #[error(
        "the server needs {needed} of memory, {buffers} of it locked for buffers, but {shortage}"
    )]
    NoMemory {
        /// Bytes that the server needs in total.
        needed: Bytes,
        /// Bytes of its buffers.
        buffers: Bytes,
        /// The limit.
        shortage: Shortage,
    },
    /// A test asked for an unknown fault.
    #[error(transparent)]
    Fault(#[from] UnknownFault),
}

impl PlanError {
    /// Whether a later attempt may succeed.
    #[must_use]
    pub fn is_passing(&self) -> bool {
        match self {
            Self::Layout(error) => error.is_passing(),
            Self::BuffersTooBig { .. } | Self::NoMemory { .. } => true,
            Self::Lend(_)
            | Self::OnDeath(_)
            | Self::IdTooBig(_)
            | Self::OnItself(_)
            | Self::BlockSize(_)
            | Self::Mismatch { .. }
            | Self::Lacks { .. }
            | Self::TooManySlots { .. }
            | Self::Fault(_) => false,
        }
    }

    /// Whether another process uses a backing.
    pub(in crate::control) fn is_in_use(&self) -> bool {
        let Self::Layout(LayoutError::Backing(error)) = self else { return false };
        matches!(error.problem, BackingProblem::InUse(_))
    }
}

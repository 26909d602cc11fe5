//! Why a device could not be served.

use std::io;
use std::path::{Path, PathBuf};

use ublk_engine::lane::LaneError;
use ublk_engine::lane::fault::UnknownFault;
use ublk_engine::lend::LendMode;
use ublk_engine::target::{BadExtents, BadStripe};
use ublk_engine::units::{Bytes, Qid};
use uring_ext::Errno;
use uring_ext::control::ControlError;
use uring_ext::feature::Feature;

use crate::backing::{BackingError, BackingProblem};
use crate::config::lend::CannotLend;
use crate::config::on_death::CannotRecover;
use crate::control::deletion::DeleteError;
use crate::control::polling::CannotPoll;
use crate::control::recoverable::CannotRecoverDevice;
use crate::os::memory::{self, Shortage};

/// Why a device could not be served.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// A backing cannot be used.
    #[error(transparent)]
    Backing(#[from] BackingError),
    /// The lend mode is unavailable.
    #[error(transparent)]
    Lend(#[from] CannotLend),
    /// The driver said no.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// The id is taken.
    #[error("device id {0} is taken; choose another one, or let the driver choose without -n")]
    IdTaken(u32),
    /// The id is beyond the driver's limit.
    #[error("device id {0} is beyond the driver's limit of 1048575")]
    IdTooBig(u32),
    /// Its I/O would come back to it.
    #[error(
        "device {0} would stand on itself: a backing of it lies on {path}, directly or through other \
         devices; give it a backing elsewhere", path = crate::device::paths::block_path(*.0).display()
    )]
    OnItself(u32),
    /// A device below it has no server.
    #[error(
        "the backings stand on device {0}, which has no server, so that its I/O waits; \
         `ublk-target recover -n {0}` first"
    )]
    OnUnserved(u32),
    /// One device of a process would have to wait for another.
    #[error(
        "device {upper} has to wait for device {lower} of the same process: it stands on it, directly or \
         through other devices and their servers; if the process were killed, neither might ever end; \
         serve one of them by a process of its own (`ublk-target add`, or `recover` if it waits)"
    )]
    Beside {
        /// The one that stands on the other.
        upper: u32,
        /// The other.
        lower: u32,
    },
    /// The driver has as many devices as it allows.
    #[error(
        "the driver has no room for another device; delete one, or raise its limit in \
         /sys/module/ublk_drv/parameters/ublks_max"
    )]
    NoRoom,
    /// The buffers of the server would not fit.
    #[error(
        "lending by {lend} with {queues} queues of depth {depth} needs {needed} for buffers, more than \
         half of the {available} that are available; lower -q or -d"
    )]
    BuffersTooBig {
        /// How the device lends.
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
        /// Bytes of all it needs.
        needed: Bytes,
        /// Bytes of its buffers.
        buffers: Bytes,
        /// The limit.
        shortage: Shortage,
    },
    /// The kernel refused memory, perhaps for a limit.
    #[error("queue {}: {error}: memory is short; {shortage}", qid.0)]
    LaneMemory {
        /// The queue.
        qid: Qid,
        /// What was refused.
        error: LaneError,
        /// The limit.
        shortage: Shortage,
    },
    /// The slots asked for do not exist.
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
    /// Options that exclude each other.
    #[error("{option} needs {needs}, and this device lends by {lend}; {instead}")]
    Mismatch {
        /// The option.
        option: &'static str,
        /// What it needs.
        needs: &'static str,
        /// What the device does.
        lend: LendMode,
        /// What to do.
        instead: &'static str,
    },
    /// The driver lacks what an option needs.
    #[error(
        "{option} needs the ublk feature {} (Linux {} or newer), which this kernel ({release}) lacks; \
         leave it out", feature.name, feature.since
    )]
    Lacks {
        /// The option.
        option: &'static str,
        /// What the driver lacks.
        feature: Feature,
        /// The running kernel.
        release: String,
    },
    /// The device cannot poll.
    #[error(transparent)]
    Poll(#[from] CannotPoll),
    /// The device cannot outlive its server.
    #[error(transparent)]
    OnDeath(#[from] CannotRecover),
    /// There is no namespace to give commands to.
    #[error("the null target has no drive to give commands to; leave --passthru out")]
    NoPassthru,
    /// A test asked for a fault that there is not.
    #[error(transparent)]
    Fault(#[from] UnknownFault),
    /// The driver took a feature back that it lists.
    #[error(
        "the driver refused the ublk feature {feature} for this device, though it lists it; use \
         `--lend copy`"
    )]
    TakenBack {
        /// Its name.
        feature: &'static str,
    },
    /// An extent cannot be used.
    #[error("the extent of {} that begins at {offset}: {problem}", file.display())]
    Extent {
        /// The backing.
        file: PathBuf,
        /// Where the extent begins.
        offset: Bytes,
        /// What is wrong with it.
        problem: ExtentProblem,
    },
    /// The extents do not make a device.
    #[error(transparent)]
    Linear(#[from] BadExtents),
    /// The backings do not make a stripe.
    #[error(transparent)]
    Stripe(#[from] BadStripe),
    /// A backing is given twice.
    #[error("{} is given twice; each backing of a stripe is one of its own", .0.display())]
    GivenTwice(PathBuf),
    /// The size asked for is less than a block.
    #[error("a device of {0} bytes is less than one block of 512; give it a greater --size")]
    TooSmall(u64),
    /// Growing would change where data is.
    #[error(
        "the device cannot grow: with the backings' new sizes, data that is on it would be \
         elsewhere; a stripe grows if all its backings do, a linear device if its last extent does"
    )]
    WouldMove,
    /// Blocks that there are not.
    #[error("blocks of {0} bytes; they have 512, 1024, 2048 or 4096")]
    BlockSize(u32),
    /// A target without backings, which only a state file can have.
    #[error("the target has no backings")]
    NoBackings,
    /// The state file names other backings than its target has.
    #[error("the state file does not fit together: its target has other backings than it names")]
    BackingsDiffer,
    /// The device cannot be recovered.
    #[error(transparent)]
    Recover(#[from] CannotRecoverDevice),
    /// What a dead server has left of the device does not go away.
    #[error("cannot delete what a dead server has left of device {id}: {error}")]
    Remains {
        /// The device.
        id: u32,
        /// Why.
        error: Box<DeleteError>,
    },
    /// Part of the set-up failed.
    #[error("{doing}: {errno}")]
    Setup {
        /// What was tried.
        doing: String,
        /// Why it failed.
        errno: Errno,
    },
    /// A lane could not serve, or failed later.
    #[error("queue {}: {error}", qid.0)]
    Lane {
        /// The queue.
        qid: Qid,
        /// Why.
        error: LaneError,
    },
    /// The process that was to stop the device has failed, and said why.
    #[error("the device could not be stopped; `ublk-target del` may")]
    NotStopped,
    /// The process that was to make I/O wait has failed, and said why.
    #[error("the device's I/O could not be made to wait")]
    NotQuiesced,
    /// A signal came before the device was recovered.
    #[error("interrupted before the device was recovered; it is as it was")]
    NotRecovered,
    /// Somebody has deleted it.
    #[error("device {0} was deleted while it was started")]
    Deleted(u32),
    /// A signal came before the device was live.
    #[error("interrupted before the device was live; nothing is left of it")]
    Interrupted,
    /// Whoever asked for the device went away before it was live.
    #[error("nobody waits for the device any more; nothing is left of it")]
    Abandoned,
}

/// What is wrong with an extent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ExtentProblem {
    /// It reaches beyond the backing.
    #[error("it reaches beyond the backing, which has {0} bytes")]
    Beyond(u64),
    /// It does not fit the blocks.
    #[error("offset and length must be multiples of the block of {0} bytes")]
    Unaligned(u32),
    /// Two extents share bytes.
    #[error("it overlaps another extent of the same backing")]
    Overlapping,
}

impl DeviceError {
    /// Whether something was lacking that may be there later: memory, descriptors, room in a file system,
    /// or what somebody else has.
    #[must_use]
    pub fn is_passing(&self) -> bool {
        const PASSING: [i32; 9] = [
            libc::EAGAIN,
            libc::EINTR,
            libc::ENOMEM,
            libc::ENOSPC,
            libc::EDQUOT,
            libc::EMFILE,
            libc::ENFILE,
            libc::EBUSY,
            libc::ENOBUFS,
        ];
        let is_passing = |errno: Errno| PASSING.contains(&errno.number());
        if let Self::Setup { errno, .. }
        | Self::Lane {
            error: LaneError::Setup { errno, .. } | LaneError::Ring(errno), ..
        } = self
        {
            return is_passing(*errno);
        }
        if let Self::Backing(error) = self {
            let is_failing =
                |it: &_| matches!(it, BackingProblem::Failed { errno, .. } if is_passing(*errno));
            return matches!(error.problem, BackingProblem::InUse(_)) || is_failing(&error.problem);
        }
        if let Self::Control(error) = self {
            return error.errno().is_some_and(is_passing);
        }
        matches!(
            self,
            Self::BuffersTooBig { .. }
                | Self::NoMemory { .. }
                | Self::LaneMemory { .. }
                | Self::OnUnserved(_)
                | Self::Recover(
                    CannotRecoverDevice::Stuck { .. } | CannotRecoverDevice::Below { .. }
                )
        )
    }

    /// Part of the set-up failed in reading or writing, with an errno or in words of our own.
    #[must_use]
    pub fn of_io(doing: &str, error: &io::Error) -> Self {
        match error.raw_os_error() {
            Some(_) => Self::setup(doing, Errno::of(error)),
            None => Self::setup(format!("{doing}: {error}"), Errno::EPERM),
        }
    }

    /// A lane could not be set up. Where that is for lack of memory, the limits are told.
    pub(super) fn of_lane(qid: Qid, error: LaneError) -> Self {
        let errno = match error {
            LaneError::Setup { errno, .. } => Some(errno),
            LaneError::Refused { .. } | LaneError::Ring(_) => None,
        };
        match errno.and_then(memory::suspect) {
            Some(shortage) => Self::LaneMemory { qid, error, shortage },
            None => Self::Lane { qid, error },
        }
    }

    /// A backing does not exist.
    pub(super) fn missing(path: &Path) -> Self {
        Self::Backing(BackingError { path: path.to_owned(), problem: BackingProblem::Missing })
    }

    pub(super) fn setup(doing: impl Into<String>, errno: Errno) -> Self {
        Self::Setup { doing: doing.into(), errno }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A supervisor waits for the first ones, and gives up on the others.
    #[test]
    fn what_may_be_there_later_is_told_apart() {
        let shortage = || Shortage::Locked { limit: Bytes(8 << 20) };
        let error = |errno| LaneError::Setup { doing: "making the ring", errno };
        let backing = |problem| DeviceError::Backing(BackingError { path: "/x".into(), problem });
        let bytes = Bytes(16 << 20);
        let lane = |error| DeviceError::Lane { qid: Qid(0), error };
        let passing = [
            DeviceError::setup("writing", Errno::ENOSPC),
            lane(error(Errno::ENOMEM)),
            DeviceError::LaneMemory {
                qid: Qid(0),
                error: error(Errno::EFAULT),
                shortage: shortage(),
            },
            DeviceError::NoMemory { needed: bytes, buffers: bytes, shortage: shortage() },
            backing(BackingProblem::InUse(Vec::new())),
            CannotRecoverDevice::Below { id: 1, lower: 0 }.into(),
            DeviceError::OnUnserved(0),
            backing(BackingProblem::Failed { doing: "opening", errno: Errno::EAGAIN }),
        ];
        for error in passing {
            assert!(error.is_passing(), "{error}");
        }
        let lasting = [
            DeviceError::setup("writing", Errno::EIO),
            lane(LaneError::Ring(Errno::EINVAL)),
            backing(BackingProblem::Missing),
            backing(BackingProblem::Changed("it is another".to_owned())),
            DeviceError::NoBackings,
        ];
        for error in lasting {
            assert!(!error.is_passing(), "{error}");
        }
    }
}

//! Why there is no fleet, or a device is not in it.

use uring_ext::control::ControlError;

use crate::control::deletion::DeleteError;
use crate::control::error::{AddError, PlanError, RecoverError, ServeError, SetupError};

/// Why there is no fleet.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum FleetError {
    /// Some devices cannot be made, each of these for its own reason. Nothing has been made.
    #[error("{}", .0.join("\n"))]
    Faults(Vec<String>),
    /// A step failed that all of them need.
    #[error(transparent)]
    Setup(#[from] SetupError),
    /// The driver said no.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// None could be made.
    #[error("no device could be added; the log says why")]
    None,
    /// Not all could be taken down in order.
    #[error("{0} devices could not be stopped; the log says why")]
    NotEnded(usize),
}

/// Why a device is not in a fleet, or is no longer.
#[derive(Debug, thiserror::Error)]
pub(super) enum MemberError {
    /// It was not added.
    #[error(transparent)]
    Add(#[from] AddError),
    /// It was not taken over.
    #[error(transparent)]
    Recover(#[from] RecoverError),
    /// It cannot be served on.
    #[error(transparent)]
    Serve(#[from] ServeError),
    /// One device of a process would have to wait for another.
    #[error(
        "device {upper} would wait for device {lower} of the same process: it is stacked on device {lower}, \
         directly or through other devices and their servers; after a kill neither might end; serve one \
         of them in its own process (`ublk-target add`, or `recover` if it waits)"
    )]
    Beside {
        /// The one that stands on the other.
        upper: u32,
        /// The other.
        lower: u32,
    },
    /// What a dead server has left of the device does not go away.
    #[error("cannot delete the leftovers of a dead server of device {id}: {error}")]
    Remains {
        /// The device.
        id: u32,
        /// Why.
        error: DeleteError,
    },
}

impl From<PlanError> for MemberError {
    fn from(error: PlanError) -> Self {
        Self::Add(error.into())
    }
}

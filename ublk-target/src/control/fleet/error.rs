//! Errors of a fleet and of its devices.

use uring_ext::control::ControlError;

use crate::control::deletion::DeleteError;
use crate::control::error::{AddError, PlanError, RecoverError, ServeError, SetupError};

/// Why a fleet could not start, or did not end in order.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum FleetError {
    /// Some devices have errors, one line each. No device was added.
    #[error("{}", .0.join("\n"))]
    Faults(Vec<String>),
    /// A step failed that all devices need.
    #[error(transparent)]
    Setup(#[from] SetupError),
    /// The driver refused.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// No device could be added.
    #[error("no device could be added; the log says why")]
    None,
    /// Not all devices could be stopped in order.
    #[error("{0} devices could not be stopped; the log says why")]
    NotEnded(usize),
}

/// Why a device is not in a fleet, or not any more.
#[derive(Debug, thiserror::Error)]
pub(super) enum MemberError {
    /// It was not added.
    #[error(transparent)]
    Add(#[from] AddError),
    /// It was not taken over.
    #[error(transparent)]
    Recover(#[from] RecoverError),
    /// It cannot be served any more.
    #[error(transparent)]
    Serve(#[from] ServeError),
    /// A device would wait for another one of the process.
    #[error(
        "device {upper} would wait for device {lower} of the same process: it is stacked on device {lower}, \
         directly or through other devices and their servers; after a kill neither might end; serve one \
         of them in its own process (`ublk-target add`, or `recover` if it waits)"
    )]
    Beside {
        /// The device that is stacked on the other.
        upper: u32,
        /// The device below.
        lower: u32,
    },
    /// The leftovers of a dead server cannot be deleted.
    #[error("cannot delete the leftovers of a dead server of device {id}: {error}")]
    Remains {
        /// The device.
        id: u32,
        /// The error.
        error: DeleteError,
    },
}

impl From<PlanError> for MemberError {
    fn from(error: PlanError) -> Self {
        Self::Add(error.into())
    }
}

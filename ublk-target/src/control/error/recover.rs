//! Why a device has no next server.

use std::time::Duration;

use uring_ext::control::ControlError;

use super::{PlanError, QueueError, ServeError, SetupError, is_passing_control};
use crate::device::state_file::StateProblem;

/// Why a device cannot be recovered, or why its server failed after that.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum RecoverError {
    /// It does not exist.
    #[error("there is no ublk device {0}; `ublk-target list` lists the existing ones")]
    NoDevice(u32),
    /// A device below it has no server.
    #[error(
        "device {id} is stacked on device {lower}, which has no server; run \
         `ublk-target recover -n {lower}` first, or `recover --all`"
    )]
    Below {
        /// The device.
        id: u32,
        /// The device below.
        lower: u32,
    },
    /// It does not outlive its server.
    #[error(
        "device {0} was added with `--on-death fail` and goes away with its server; \
         `ublk-target del -n {0}` cleans up"
    )]
    NotRecoverable(u32),
    /// It has no disk.
    #[error(
        "device {0} was never started, or has been stopped; `ublk-target del -n {0}` removes it, \
         then add it again"
    )]
    NotStarted(u32),
    /// It has a live server.
    #[error("device {id} is served by {server}; nothing to recover")]
    Served {
        /// The device.
        id: u32,
        /// Its server, in words.
        server: String,
    },
    /// Its state file is missing or cannot be used.
    #[error(
        "{problem}; without it the configuration of device {id} is unknown: delete it \
         (`ublk-target del -n {id}`) and add it again"
    )]
    State {
        /// The device.
        id: u32,
        /// The problem.
        problem: StateProblem,
    },
    /// The state file belongs to an earlier device of this id, or was changed.
    #[error(
        "the state file of device {id} is not this device's: {difference}; delete the device \
         (`ublk-target del -n {id}`) and add it again"
    )]
    OtherDevice {
        /// The device.
        id: u32,
        /// The difference.
        difference: String,
    },
    /// The backings accept less than the device promises.
    #[error(
        "the backings of device {id} are not what they were: {difference}; restore the original \
         backings, or delete the device"
    )]
    LimitsChanged {
        /// The device.
        id: u32,
        /// The difference.
        difference: String,
    },
    /// A wait has timed out.
    #[error("gave up waiting after {} s for {what}", waited.as_secs())]
    Stuck {
        /// What the wait was for.
        what: String,
        /// How long it took.
        waited: Duration,
    },
    /// A signal came before the device was recovered.
    #[error("interrupted before the device was recovered; nothing has changed")]
    NotRecovered,
    /// The recorded configuration does not make a device.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// The driver refused.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// A step failed.
    #[error(transparent)]
    Setup(#[from] SetupError),
    /// A queue could not be served.
    #[error(transparent)]
    Queue(#[from] QueueError),
    /// The device was recovered, but its server failed.
    #[error(transparent)]
    Serve(#[from] ServeError),
}

impl RecoverError {
    /// Whether a later attempt may succeed.
    #[must_use]
    pub fn is_passing(&self) -> bool {
        match self {
            Self::Stuck { .. } | Self::Below { .. } => true,
            Self::Plan(error) => error.is_passing(),
            Self::Control(error) => is_passing_control(error),
            Self::Setup(error) => error.is_passing(),
            Self::Queue(error) => error.is_passing(),
            Self::Serve(error) => error.is_passing(),
            Self::NoDevice(_)
            | Self::NotRecoverable(_)
            | Self::NotStarted(_)
            | Self::Served { .. }
            | Self::State { .. }
            | Self::OtherDevice { .. }
            | Self::LimitsChanged { .. }
            | Self::NotRecovered => false,
        }
    }
}

//! Why a device has no next server.

use std::time::Duration;

use uring_ext::control::ControlError;

use super::{PlanError, QueueError, ServeError, SetupError, is_passing_control};
use crate::device::state_file::StateProblem;

/// Why a device cannot be recovered, and what to do; or how the server failed that has recovered it.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum RecoverError {
    /// There is none.
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
        /// The one below it.
        lower: u32,
    },
    /// It goes away with its server.
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
    /// It has a server.
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
        /// What is wrong.
        problem: StateProblem,
    },
    /// The state file is of an earlier device of this id, or has been tampered with.
    #[error(
        "the state file of device {id} is not this device's: {difference}; delete the device \
         (`ublk-target del -n {id}`) and add it again"
    )]
    OtherDevice {
        /// The device.
        id: u32,
        /// How they differ.
        difference: String,
    },
    /// The backings take less than the device promises.
    #[error(
        "the backings of device {id} are not what they were: {difference}; restore the original \
         backings, or delete the device"
    )]
    LimitsChanged {
        /// The device.
        id: u32,
        /// How they differ.
        difference: String,
    },
    /// It took too long.
    #[error("gave up waiting after {} s for {what}", waited.as_secs())]
    Stuck {
        /// What was waited for.
        what: String,
        /// How long.
        waited: Duration,
    },
    /// A signal came before the device was recovered.
    #[error("interrupted before the device was recovered; nothing has changed")]
    NotRecovered,
    /// It cannot be made of what was recorded.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// The driver said no.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// A step failed.
    #[error(transparent)]
    Setup(#[from] SetupError),
    /// A queue is not served.
    #[error(transparent)]
    Queue(#[from] QueueError),
    /// The device was recovered, and its server failed.
    #[error(transparent)]
    Serve(#[from] ServeError),
}

impl RecoverError {
    /// Whether what was lacking may be there later.
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

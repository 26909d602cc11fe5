//! Why a device was not added.

use uring_ext::control::ControlError;

use super::{PlanError, QueueError, ServeError, SetupError, is_passing_control};

/// Why a device was not added, or why its server failed after that.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum AddError {
    /// The options or backings do not make a device.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// A device below it has no server.
    #[error(
        "the backings are on device {0}, which has no server, so its I/O waits; \
         run `ublk-target recover -n {0}` first"
    )]
    OnUnserved(u32),
    /// The id is in use.
    #[error("device id {0} is taken; choose another one, or let the driver choose without -n")]
    IdTaken(u32),
    /// The driver has reached its maximum number of devices.
    #[error(
        "the driver has no room for another device; delete one, or raise its limit in \
         /sys/module/ublk_drv/parameters/ublks_max"
    )]
    NoRoom,
    /// The driver lists a feature, but refused it for this device.
    #[error(
        "the driver refused the ublk feature {feature} for this device, though it lists it; use \
         `--lend copy`"
    )]
    TakenBack {
        /// Its name.
        feature: &'static str,
    },
    /// Another process has deleted it.
    #[error("device {0} was deleted while it was started")]
    Deleted(u32),
    /// A signal came before the device was live.
    #[error("interrupted before the device was live; nothing is left of it")]
    Interrupted,
    /// The driver refused.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// A step of the set-up failed.
    #[error(transparent)]
    Setup(#[from] SetupError),
    /// A queue could not be served.
    #[error(transparent)]
    Queue(#[from] QueueError),
    /// The device was added, but its server failed.
    #[error(transparent)]
    Serve(#[from] ServeError),
}

impl AddError {
    /// Whether a later attempt may succeed.
    #[must_use]
    pub fn is_passing(&self) -> bool {
        match self {
            Self::Plan(error) => error.is_passing(),
            Self::OnUnserved(_) => true,
            Self::Control(error) => is_passing_control(error),
            Self::Setup(error) => error.is_passing(),
            Self::Queue(error) => error.is_passing(),
            Self::Serve(error) => error.is_passing(),
            Self::IdTaken(_)
            | Self::NoRoom
            | Self::TakenBack { .. }
            | Self::Deleted(_)
            | Self::Interrupted => false,
        }
    }
}

//! Why a device is not served any more.

use uring_ext::control::ControlError;

use super::{LayoutError, QueueError, RecoverError, SetupError, is_passing_control};

/// Why a server failed after it had added or taken over its device.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// A queue is not served any more.
    #[error(transparent)]
    Queue(#[from] QueueError),
    /// The grown backings do not make the target.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// The device could not be announced.
    #[error(transparent)]
    Announce(#[from] AnnounceError),
    /// The process that stops the device has failed, and has reported the reason.
    #[error("the device could not be stopped; `ublk-target del` may")]
    NotStopped,
    /// The process that quiesces the device has failed, and has reported the reason.
    #[error("the device's I/O could not be quiesced")]
    NotQuiesced,
    /// The server has closed the device and could not take it back.
    #[error(transparent)]
    TakeBack(Box<RecoverError>),
    /// The driver refused.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// A step failed.
    #[error(transparent)]
    Setup(#[from] SetupError),
}

impl ServeError {
    /// Whether a later attempt may succeed.
    #[must_use]
    pub fn is_passing(&self) -> bool {
        match self {
            Self::Queue(error) => error.is_passing(),
            Self::Layout(error) => error.is_passing(),
            Self::Announce(error) => error.is_passing(),
            Self::TakeBack(error) => error.is_passing(),
            Self::Control(error) => is_passing_control(error),
            Self::Setup(error) => error.is_passing(),
            Self::NotStopped | Self::NotQuiesced => false,
        }
    }
}

impl From<RecoverError> for ServeError {
    fn from(error: RecoverError) -> Self {
        Self::TakeBack(Box::new(error))
    }
}

/// Why the command was not told that its device is live.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum AnnounceError {
    /// The command ended before the device was live.
    #[error("the command that waits for the device is gone; the device is deleted")]
    Abandoned,
    /// A step failed.
    #[error(transparent)]
    Setup(#[from] SetupError),
}

impl AnnounceError {
    /// Whether a later attempt may succeed.
    #[must_use]
    pub fn is_passing(&self) -> bool {
        match self {
            Self::Abandoned => false,
            Self::Setup(error) => error.is_passing(),
        }
    }
}

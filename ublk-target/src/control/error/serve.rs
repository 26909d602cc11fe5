//! Why a device is served no longer.

use uring_ext::control::ControlError;

use super::{LayoutError, QueueError, RecoverError, SetupError, is_passing_control};

/// Why a server failed whose device it has added or taken over.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// A queue is served no longer.
    #[error(transparent)]
    Queue(#[from] QueueError),
    /// The backings that have grown do not make the target.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// The device could not be announced.
    #[error(transparent)]
    Announce(#[from] AnnounceError),
    /// The process that was to stop the device has failed, and said why.
    #[error("the device could not be stopped; `ublk-target del` may")]
    NotStopped,
    /// The process that was to make I/O wait has failed, and said why.
    #[error("the device's I/O could not be quiesced")]
    NotQuiesced,
    /// The server let go of the device and could not take it back.
    #[error(transparent)]
    TakeBack(Box<RecoverError>),
    /// The driver said no.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// A step failed.
    #[error(transparent)]
    Setup(#[from] SetupError),
}

impl ServeError {
    /// Whether what was lacking may be there later.
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

/// Why nobody was told that a device is live.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum AnnounceError {
    /// Whoever asked for the device went away before it was live.
    #[error("the command that waits for the device is gone; the device is deleted")]
    Abandoned,
    /// A step failed.
    #[error(transparent)]
    Setup(#[from] SetupError),
}

impl AnnounceError {
    /// Whether what was lacking may be there later.
    #[must_use]
    pub fn is_passing(&self) -> bool {
        match self {
            Self::Abandoned => false,
            Self::Setup(error) => error.is_passing(),
        }
    }
}

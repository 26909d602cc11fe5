//! Why the layers of a device were not changed.

use std::time::Duration;

use nix::sys::signal::Signal;
use uring_ext::Errno;

use super::SetupError;
use crate::config::BadLayers;

/// Why the layers of a device were not changed. It goes on with the old ones.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum LayersError {
    /// It cannot have such layers.
    #[error(transparent)]
    Bad(#[from] BadLayers),
    /// A request that had begun did not end in time.
    #[error(
        "{request}; it did not end within {} s, so nothing has changed; try again when it has ended",
        waited.as_secs_f64()
    )]
    Busy {
        /// The limit.
        waited: Duration,
        /// The oldest such request, in words.
        request: String,
    },
    /// The server ends.
    #[error("the server has got {0} and ends; nothing has changed")]
    Interrupted(Signal),
    /// Who wanted it is gone.
    #[error("the client that asked for it is gone; nothing has changed")]
    Unwanted,
    /// A lane has ended.
    #[error(
        "the device is not served any more, or is about to get another server; nothing has changed"
    )]
    LaneEnded,
    /// The server has no more descriptors.
    #[error("the server cannot watch its lanes: {0}")]
    NoDescriptors(Errno),
    /// A step failed.
    #[error(transparent)]
    Setup(#[from] SetupError),
}

//! Whether a device can poll its drives.

use serde::{Deserialize, Serialize};
use uring_ext::ring::Polling;

/// [`Polling`], written down.
#[derive(Serialize, Deserialize)]
#[serde(remote = "Polling", rename_all = "kebab-case")]
pub(crate) enum WrittenPolling {
    Off,
    Busy,
    Hybrid,
}

/// What to do where a backing has no queues to be polled. A polling ring cannot serve it: the block
/// layer refuses what it cannot poll for with `EOPNOTSUPP` (`submit_bio_noacct`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Unpolled {
    /// Refuse to serve the device.
    #[default]
    Refuse,
    /// Serve all of it by interrupt.
    Interrupt,
}

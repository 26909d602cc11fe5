//! Whether a device can poll its drives.

use serde::{Deserialize, Serialize};
use uring_ext::ring::Polling;

/// The form of [`Polling`] in a state file.
#[derive(Serialize, Deserialize)]
#[serde(remote = "Polling", rename_all = "kebab-case")]
pub(crate) enum WrittenPolling {
    Off,
    Busy,
    Hybrid,
}

/// What to do if a backing has no poll queues. A polling ring cannot serve it: the block layer
/// refuses operations that it cannot poll for with `EOPNOTSUPP` (`submit_bio_noacct`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Unpolled {
    /// Refuse to serve the device.
    #[default]
    Refuse,
    /// Use interrupts for the whole device.
    Interrupt,
}

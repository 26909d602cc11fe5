//! Whether a device can poll its drives.

use std::path::PathBuf;

use uring_ext::ring::Polling;

use super::config::{DeviceConfig, TargetConfig};
use crate::backing::Backing;
use crate::kernel::KernelVersion;

/// The first kernel whose driver takes its commands on a ring that polls.
const FIRST_KERNEL: KernelVersion = KernelVersion(7, 1);

/// What to do about a backing whose drive has no queues to be polled.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Unpolled {
    /// Refuse to serve it.
    #[default]
    Refuse,
    /// Let it interrupt. The lane looks for its completions like for the others', so it is busy as
    /// long as any operation is in flight.
    Interrupt,
}

/// Why a device cannot poll.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CannotPoll {
    /// The driver does not take commands on such a ring.
    #[error("--poll needs Linux {FIRST_KERNEL}, and this is {0}; leave it out")]
    TooOld(KernelVersion),
    /// The target has no drive.
    #[error("the null target has no drive to poll; leave --poll out")]
    NoDrive,
    /// Two lanes would have to poll.
    #[error("--poll and --io-lane exclude each other; leave one of them out")]
    IoLane,
    /// A backing has no queues for it.
    #[error(
        "{} has no queues to be polled; give its driver some (nvme.poll_queues=N on the kernel's \
         command line), or let it interrupt with `--unpolled interrupt`", .0.display()
    )]
    NoQueues(PathBuf),
    /// No backing has.
    #[error(
        "no backing has queues to be polled; give their driver some (nvme.poll_queues=N on the \
         kernel's command line), or leave --poll out"
    )]
    Nothing,
}

/// What can be said before any backing is opened.
pub(super) fn check(config: &DeviceConfig) -> Result<(), CannotPoll> {
    if config.polling == Polling::Off {
        return Ok(());
    }
    if matches!(config.target, TargetConfig::Null { .. }) {
        return Err(CannotPoll::NoDrive);
    }
    if config.io_lane {
        return Err(CannotPoll::IoLane);
    }
    match KernelVersion::running() {
        running if running < FIRST_KERNEL => Err(CannotPoll::TooOld(running)),
        _ => Ok(()),
    }
}

/// Whether the backings are fit for it.
pub(super) fn check_backings(
    config: &DeviceConfig,
    backings: &[Backing],
) -> Result<(), CannotPoll> {
    if config.polling == Polling::Off {
        return Ok(());
    }
    let unpolled: Vec<_> = backings.iter().filter(|backing| !backing.can_poll()).collect();
    match (unpolled.first(), config.unpolled) {
        (None, _) => Ok(()),
        (Some(_), Unpolled::Interrupt) if unpolled.len() == backings.len() => {
            Err(CannotPoll::Nothing)
        }
        (Some(_), Unpolled::Interrupt) => Ok(()),
        (Some(backing), Unpolled::Refuse) => Err(CannotPoll::NoQueues(backing.path().to_owned())),
    }
}

//! Whether a device can poll its drives.

use std::path::PathBuf;

use uring_ext::ring::Polling;

use crate::backing::Backing;
use crate::config::polling::Unpolled;
use crate::config::{DeviceConfig, TargetConfig};
use crate::os::kernel::KernelVersion;

/// The first kernel whose driver takes its commands on a polling ring.
const FIRST_KERNEL: KernelVersion = KernelVersion(7, 1);

/// Why a device cannot poll.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CannotPoll {
    /// The driver does not take commands on a polling ring.
    #[error("--poll needs Linux {FIRST_KERNEL}, and this is {0}; leave it out")]
    TooOld(KernelVersion),
    /// The target has no drive.
    #[error("the null target has no drive to poll; leave --poll out")]
    NoDrive,
    /// The I/O lane would have to poll too.
    #[error("--poll and --io-lane exclude each other; leave one of them out")]
    IoLane,
    /// A backing has no poll queues.
    #[error(
        "{} has no poll queues; configure some (nvme.poll_queues=N on the kernel's command line), \
         or use interrupts for all backings with `--unpolled interrupt`", .0.display()
    )]
    NoQueues(PathBuf),
}

/// Checks that need no open backing.
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

/// Selects how to find completions of operations on these backings.
pub(super) fn choose(config: &DeviceConfig, backings: &[Backing]) -> Result<Polling, CannotPoll> {
    if config.polling == Polling::Off {
        return Ok(Polling::Off);
    }
    let Some(unpolled) = backings.iter().find(|backing| !backing.can_poll()) else {
        return Ok(config.polling);
    };
    match config.unpolled {
        Unpolled::Refuse => Err(CannotPoll::NoQueues(unpolled.path().to_owned())),
        Unpolled::Interrupt => {
            log::info!(
                "{} cannot be polled: all backings use interrupts",
                unpolled.path().display()
            );
            Ok(Polling::Off)
        }
    }
}

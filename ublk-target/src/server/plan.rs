//! What is decided of a device before the driver is asked for anything, and asking it.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use uring_ext::control::Control;
use uring_ext::feature::{self, Feature, Features};
use uring_ext::{Errno, sys};

use super::config::{DeviceConfig, DeviceError};
use super::layout::{Layout, slot_table};
use super::polling;
use crate::backing::identity::Known;
use crate::engine::SlotTable;
use crate::kernel;
use crate::lane::fault::{self, Faults};
use crate::lend::{self, Choice, LendMode};
use crate::state::{self, LOG_DIR, RUN_DIR};

/// What is decided before the driver is asked for anything.
pub(super) struct Plan {
    pub config: DeviceConfig,
    pub choice: Choice,
    pub layout: Layout,
    pub slots: SlotTable,
    pub faults: Option<Faults>,
    /// Servers that the device has had before.
    pub incarnation: u32,
}

impl Plan {
    /// `known` are the backings of a device that is to be recovered.
    pub fn make(
        config: &DeviceConfig,
        control: &Control,
        known: Option<&[Known]>,
    ) -> Result<Self, DeviceError> {
        Self::for_driver(config, kernel::features(control)?, known)
    }

    /// As [`Plan::make`], for a driver with these features; on any thread.
    pub fn for_driver(
        config: &DeviceConfig,
        features: Features,
        known: Option<&[Known]>,
    ) -> Result<Self, DeviceError> {
        let mut choice = config.lend.choose(features)?;
        choice.flags |= config.on_death.flags(features)?;
        if config.io_lane {
            lend::check_io_lane(features)?;
            if choice.mode != LendMode::Slot {
                return Err(DeviceError::Mismatch {
                    option: "--io-lane",
                    needs: "registration by command",
                    lend: choice.mode,
                    instead: "leave it out, or use `--lend slot`",
                });
            }
        }
        polling::check(config)?;
        let faults = match std::env::var(fault::VARIABLE) {
            Ok(list) => Some(Faults::parse(&list)?),
            Err(_) => None,
        };
        let layout = Layout::open(config, choice.mode, known)?;
        let slots = slot_table(config, &choice, &layout.target)?;
        layout.check_memory(config.queues, config.depth, choice.mode, &slots)?;
        log::info!("lend mode {}: {}", choice.mode, choice.reason);
        let mut config = DeviceConfig { lend: choice.mode.into(), ..config.clone() };
        config.target.absolute();
        Ok(Self { config, choice, layout, slots, faults, incarnation: 0 })
    }

    /// What this server, or the next one in its place, opens later.
    pub fn needed_paths(&self) -> Vec<PathBuf> {
        let program = std::env::current_exe().ok();
        let backings = self.layout.backings.iter().map(|backing| backing.path().to_owned());
        backings.chain(program).chain([RUN_DIR, LOG_DIR].map(PathBuf::from)).collect()
    }
}

/// The features that a device is ever asked for with. The driver adds some by itself.
const SERVED: &[Feature] = &[
    feature::SUPPORT_ZERO_COPY,
    feature::USER_RECOVERY,
    feature::USER_RECOVERY_REISSUE,
    feature::CMD_IOCTL_ENCODE,
    feature::USER_COPY,
    feature::USER_RECOVERY_FAIL_IO,
    feature::AUTO_BUF_REG,
    feature::QUIESCE,
];

/// The flags that `ADD_DEV` is given: whatever else a driver offers may change what its requests
/// look like.
fn asked_for(choice: &Choice) -> u64 {
    let flags = choice.flags | feature::CMD_IOCTL_ENCODE.bit;
    let served = SERVED.iter().fold(0, |bits, feature| bits | feature.bit);
    debug_assert_eq!(flags & !served, 0, "not served");
    flags & served
}

pub(super) fn add(
    control: &Control,
    plan: &Plan,
) -> Result<sys::ublksrv_ctrl_dev_info, DeviceError> {
    let config = &plan.config;
    let info = sys::ublksrv_ctrl_dev_info {
        dev_id: config.id.unwrap_or(u32::MAX),
        nr_hw_queues: config.queues,
        queue_depth: config.depth,
        max_io_buf_bytes: plan.layout.buffer_bytes,
        ublksrv_pid: i32::try_from(std::process::id()).unwrap_or(0),
        flags: asked_for(&plan.choice),
        ublksrv_flags: state::mark(),
        ..Default::default()
    };
    let mut added = control.add(info);
    // A device that is gone keeps its id for a moment, while the driver takes it apart
    // (`ublk_cdev_rel`), and nobody tells when that is over.
    let deadline = Instant::now() + Duration::from_secs(5);
    while let (Err(error), Some(id)) = (&added, config.id) {
        let is_taken = error.errno() == Some(Errno::EEXIST);
        let is_gone = || control.info(id).is_err_and(|error| state::is_missing(&error));
        if !is_taken || !is_gone() || Instant::now() > deadline {
            break;
        }
        std::thread::sleep(Duration::from_millis(5));
        added = control.add(info);
    }
    added.map_err(|error| match (error.errno(), config.id) {
        (Some(Errno::EEXIST), Some(id)) => DeviceError::IdTaken(id),
        (Some(Errno::EACCES | Errno::ENOSPC), _) => DeviceError::NoRoom,
        _ => DeviceError::Control(error),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lend::LendRequest;
    use crate::server::on_death::OnDeath;

    /// A driver of the future offers all that there can be.
    #[test]
    fn no_driver_is_asked_for_what_is_not_served() {
        use LendRequest::{Auto, Copy, Fused, Slot, UserCopy};
        use OnDeath::{Error, Fail, Reissue, Wait};
        let all = Features(u64::MAX);
        for request in [Auto, Fused, Slot, UserCopy, Copy] {
            for on_death in [Fail, Wait, Reissue, Error] {
                let mut choice = request.choose(all).unwrap();
                choice.flags |= on_death.flags(all).unwrap();
                let flags = Features(asked_for(&choice));
                assert_eq!(flags.0 & !choice.flags, feature::CMD_IOCTL_ENCODE.bit);
                assert_eq!(flags.unknown_bits(), 0);
                for feature in [feature::IO_DESC_SIZE, feature::BATCH_IO, feature::NEED_GET_DATA] {
                    assert!(!flags.has(feature), "{}", feature.name);
                }
            }
        }
    }
}

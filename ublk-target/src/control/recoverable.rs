//! Whether a device can have another server: its record, and the present state of its backings.

use std::path::Path;

use ublk_engine::lend::LendMode;
use ublk_engine::units::{Bytes, Sectors};
use uring_ext::control::{Control, ControlError};
use uring_ext::feature::{Features, IO_DESC_SIZE};
use uring_ext::params::Params;
use uring_ext::sys;

use crate::backing::below::Below;
use crate::backing::usage::Opener;
use crate::config::DeviceConfig;
use crate::config::on_death::OnDeath;
use crate::control::error::{AddError, PlanError, RecoverError};
use crate::control::plan::Plan;
use crate::device::description;
use crate::device::mark::Nonce;
use crate::device::paths::RUN_DIR;
use crate::device::standing::Recorded;
use crate::device::state_file::StateFile;
use crate::os::kernel;
use crate::os::procfs;
use crate::socket::client;

/// Checks whether a device can be recovered, and returns its record.
///
/// # Errors
/// [`RecoverError`].
pub fn check(control: &Control, id: u32) -> Result<StateFile, RecoverError> {
    let info = lasting(control, id)?;
    if let Some(server) = server_of(&info) {
        return Err(RecoverError::Served { id, server });
    }
    read(control, id)
}

/// The driver's information about a device that outlives its server.
fn lasting(control: &Control, id: u32) -> Result<sys::ublksrv_ctrl_dev_info, RecoverError> {
    let info = control.info(id).map_err(|error| missing(id, error))?;
    if OnDeath::of_flags(info.flags) == OnDeath::Fail {
        return Err(RecoverError::NotRecoverable(id));
    }
    if !description::has_disk(&info) {
        return Err(RecoverError::NotStarted(id));
    }
    Ok(info)
}

/// Checks whether a device can have another server, now or after the death of its present one.
/// Returns its record.
///
/// # Errors
/// [`RecoverError`].
pub fn read(control: &Control, id: u32) -> Result<StateFile, RecoverError> {
    let info = lasting(control, id)?;
    let record = StateFile::read(Path::new(RUN_DIR), id)
        .map_err(|problem| RecoverError::State { id, problem })?;
    match difference(&record, &info, description::diskseq(id)) {
        Some(difference) => Err(RecoverError::OtherDevice { id, difference }),
        None => Ok(record),
    }
}

/// Refuses a device that is stacked on itself, or on one without a server: opening its backing
/// would wait for the next server below. Only devices that are certainly below count.
pub(super) fn refuse_unserved(
    control: &Control,
    id: u32,
    record: &StateFile,
) -> Result<(), RecoverError> {
    let paths: Vec<_> = record.backings.iter().map(|it| it.path.clone()).collect();
    let below = Below::paths(&paths, &Recorded::default());
    if below.has(id) {
        return Err(PlanError::OnItself(id).into());
    }
    match unserved(control, &below) {
        Some(lower) => Err(RecoverError::Below { id, lower }),
        None => Ok(()),
    }
}

/// As [`refuse_unserved`], for a device to be added on these backings.
pub(super) fn refuse_new_on_unserved(
    control: &Control,
    backings: &[&Path],
) -> Result<(), AddError> {
    let paths: Vec<_> = backings.iter().map(|path| path.to_path_buf()).collect();
    let below = Below::paths(&paths, &Recorded::default());
    unserved(control, &below).map_or(Ok(()), |lower| Err(AddError::OnUnserved(lower)))
}

/// A device below that waits for a server.
fn unserved(control: &Control, below: &Below) -> Option<u32> {
    let waiting = [sys::UBLK_S_DEV_QUIESCED, sys::UBLK_S_DEV_FAIL_IO];
    below
        .certain()
        .find(|lower| control.info(*lower).is_ok_and(|info| waiting.contains(&info.state.into())))
}

pub(super) fn missing(id: u32, error: ControlError) -> RecoverError {
    if description::is_missing(&error) { RecoverError::NoDevice(id) } else { error.into() }
}

/// The live server of a device, in words. The calling process does not count: it has closed the
/// device, which the driver notices with its last ring; or it has the process id of a dead server
/// by chance.
pub(super) fn server_of(info: &sys::ublksrv_ctrl_dev_info) -> Option<String> {
    let pid = u32::try_from(info.ublksrv_pid).ok();
    if u32::from(info.state) != sys::UBLK_S_DEV_LIVE || pid == Some(std::process::id()) {
        return None;
    }
    match pid.filter(|pid| procfs::is_alive(*pid)) {
        Some(pid) => Some(Opener::of(pid).to_string()),
        // The server has no process id here, or is dead.
        None => {
            client::is_served(info.dev_id).then(|| "a process of another pid namespace".to_owned())
        }
    }
}

/// The difference between a state file and its device.
fn difference(
    record: &StateFile,
    info: &sys::ublksrv_ctrl_dev_info,
    diskseq: Option<u64>,
) -> Option<String> {
    let config = &record.config;
    let differs = |what: &str, recorded: &dyn std::fmt::Display, is: &dyn std::fmt::Display| {
        Some(format!("it says {what} {recorded}, and the driver {is}"))
    };
    let lend = LendMode::of_flags(info.flags);
    let on_death = OnDeath::of_flags(info.flags);
    match (record.diskseq, diskseq) {
        (Some(recorded), Some(is)) if recorded != is => differs("disk", &recorded, &is),
        // The mark is unique for each device, and exists before the disk.
        _ if record.nonce != Nonce::of(info) => Some("its mark is another device's".to_owned()),
        // The driver gives at most one queue per CPU.
        _ if config.queues < info.nr_hw_queues => {
            differs("queues", &config.queues, &info.nr_hw_queues)
        }
        _ if config.depth != info.queue_depth => differs("depth", &config.depth, &info.queue_depth),
        _ if config.lend != lend.into() => Some(format!("it does not lend by {lend}")),
        _ if config.on_death != on_death => differs("--on-death", &config.on_death, &on_death),
        _ if Features(info.flags).has(IO_DESC_SIZE) => {
            Some("its request descriptors have a size of their own".to_owned())
        }
        _ => None,
    }
}

/// Checks whether this program could serve a device that another server has now. Opens its backings
/// without claiming them.
///
/// # Errors
/// [`RecoverError`].
pub fn check_upgrade(control: &Control, id: u32) -> Result<(), RecoverError> {
    let record = read(control, id)?;
    refuse_unserved(control, id, &record)?;
    let info = control.info(id).map_err(|error| missing(id, error))?;
    let params = control.params(id)?;
    let config = config_of(&record, &info, &params);
    let plan = Plan::look(&config, kernel::features(control)?, Some(&record.backings))?;
    check_limits(&plan, &params, &info)
}

/// The configuration of a device, from the record and from the driver.
pub(super) fn config_of(
    record: &StateFile,
    info: &sys::ublksrv_ctrl_dev_info,
    params: &Params,
) -> DeviceConfig {
    DeviceConfig {
        id: Some(record.id),
        queues: info.nr_hw_queues,
        depth: info.queue_depth,
        // The device keeps its block size. If a file needs larger blocks by now, as on XFS once it
        // shares blocks with a copy, it goes through the page cache.
        block_size: Some(1 << params.basic().logical_bs_shift.min(12)),
        ..record.config.clone()
    }
}

pub(super) fn check_limits(
    plan: &Plan,
    params: &Params,
    info: &sys::ublksrv_ctrl_dev_info,
) -> Result<(), RecoverError> {
    match stricter(plan, params, info) {
        Some(difference) => Err(RecoverError::LimitsChanged { id: info.dev_id, difference }),
        None => Ok(()),
    }
}

/// The limit of the backings that is lower than the device's, if any.
fn stricter(
    plan: &Plan,
    params_were: &Params,
    info: &sys::ublksrv_ctrl_dev_info,
) -> Option<String> {
    let layout = &plan.layout;
    let now_params = layout.limits.params(layout.size, info.max_io_buf_bytes);
    let (now, was) = (now_params.basic(), params_were.basic());
    let has_now = |attribute: u32| now.attrs & attribute > was.attrs & attribute;
    let size = |sectors| Bytes::from(Sectors(sectors));
    if now.dev_sectors < was.dev_sectors {
        let (now, was) = (size(now.dev_sectors), size(was.dev_sectors));
        Some(format!("they hold {now}, and the device has {was}"))
    } else if now.logical_bs_shift > was.logical_bs_shift {
        let (now, was) = (1_u32 << now.logical_bs_shift, 1_u32 << was.logical_bs_shift);
        Some(format!("their blocks have {now} bytes, and those of the device {was}"))
    } else if now.max_sectors < was.max_sectors && !layout.limits.can_cut() {
        let (now, was) = (size(now.max_sectors.into()), size(was.max_sectors.into()));
        Some(format!("they take requests of {now}, and the device up to {was}"))
    } else if has_now(sys::UBLK_ATTR_READ_ONLY) {
        Some("they are read-only now".to_owned())
    } else if has_now(sys::UBLK_ATTR_VOLATILE_CACHE) {
        // The device's users send no flushes, so nothing would be durable.
        Some(
            "they have a volatile write cache, and the device has none (set the drive's to `write \
             through` again, in queue/write_cache)"
                .to_owned(),
        )
    } else if layout.limits.dma_alignment > params_were.dma_alignment().unwrap_or(512) {
        let (now, was) = (layout.limits.dma_alignment, params_were.dma_alignment().unwrap_or(512));
        Some(format!(
            "their buffers begin at multiples of {now} bytes, and those of the device of {was}"
        ))
    } else if layout.has_namespace() {
        segments_stricter(now_params.segments()?, params_were.segments()?)
    } else {
        None
    }
}

/// The kernel neither splits nor copies commands to a namespace, as it does other operations.
fn segments_stricter(
    now: &sys::ublk_param_segment,
    was: &sys::ublk_param_segment,
) -> Option<String> {
    let differs = |what: &str, now: u32, was: u32| {
        (now < was).then(|| format!("they take {now} {what}, and the device sends up to {was}"))
    };
    differs("segments", now.max_segments.into(), was.max_segments.into())
        .or_else(|| differs("bytes in a segment", now.max_segment_size, was.max_segment_size))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::TargetConfig;

    #[test]
    fn a_state_file_of_another_device_is_told() {
        let target = TargetConfig::Null { size: Bytes(1 << 20) };
        let config = DeviceConfig {
            on_death: OnDeath::Wait,
            lend: LendMode::Copy.into(),
            queues: 2,
            ..DeviceConfig::of_target(target)
        };
        let mut record = StateFile::new(3, Vec::new(), config);
        record.diskseq = Some(17);
        record.nonce = Some(Nonce::own());
        let info = sys::ublksrv_ctrl_dev_info {
            nr_hw_queues: 2,
            queue_depth: 128,
            ublksrv_flags: Nonce::own().flags(),
            flags: uring_ext::feature::USER_RECOVERY.bit,
            ..Default::default()
        };
        assert_eq!(difference(&record, &info, Some(17)), None);
        // An older kernel has no disk sequence number.
        assert_eq!(difference(&record, &info, None), None);
        let differs = |record: &StateFile, info: &sys::ublksrv_ctrl_dev_info, diskseq| {
            difference(record, info, Some(diskseq)).unwrap()
        };
        assert!(differs(&record, &info, 18).contains("disk 17"));
        let other = |change: fn(&mut sys::ublksrv_ctrl_dev_info)| {
            let mut info = info;
            change(&mut info);
            differs(&record, &info, 17)
        };
        assert!(other(|info| info.nr_hw_queues = 3).contains("queues 2"));
        assert!(other(|info| info.queue_depth = 64).contains("depth 128"));
        // Devices of other programs have no mark.
        assert!(other(|info| info.ublksrv_flags = 0).contains("mark"));
        let reissue = |info: &mut sys::ublksrv_ctrl_dev_info| {
            info.flags |= uring_ext::feature::USER_RECOVERY_REISSUE.bit;
        };
        assert_eq!(other(reissue), "it says --on-death wait, and the driver reissue");
        assert!(other(|info| info.flags |= IO_DESC_SIZE.bit).contains("descriptors"));
        record.diskseq = None;
        assert_eq!(difference(&record, &info, Some(17)), None);
        record.nonce = Some(Nonce::draw());
        assert!(difference(&record, &info, Some(17)).unwrap().contains("mark"));
    }
}

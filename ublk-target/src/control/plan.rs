//! The plan of a device, made before the driver is asked for anything, and its use with the driver.

use std::ops::ControlFlow;
use std::time::Duration;

use ublk_engine::engine::SlotTable;
use ublk_engine::lane::fault::Faults;
use ublk_engine::lend::LendMode;
use uring_ext::control::Control;
use uring_ext::feature::{self, Feature, Features};
use uring_ext::{Errno, sys};

use crate::backing::identity::Known;
use crate::backing::limits::MAX_BLOCK;
use crate::config::DeviceConfig;
use crate::config::lend::{self, Choice};
use crate::control::error::{AddError, LayoutError, PlanError};
use crate::control::layout::{Layout, slot_table};
use crate::control::polling;
use crate::device::description;
use crate::device::mark::Nonce;
use crate::device::paths::MAX_ID;
use crate::os::kernel;
use crate::os::memory;
use crate::os::wait::Wait;

/// The decisions before the driver is asked for anything.
pub(super) struct Plan {
    pub config: DeviceConfig,
    pub choice: Choice,
    pub layout: Layout,
    pub slots: SlotTable,
    pub faults: Option<Faults>,
    /// Number of servers that the device has had before.
    pub incarnation: u32,
}

impl Plan {
    /// Makes a plan for a driver with these features, on any thread. `known` are the backings of a
    /// device to recover.
    pub fn for_driver(
        config: &DeviceConfig,
        features: Features,
        known: Option<&[Known]>,
    ) -> Result<Self, PlanError> {
        Self::with(config, features, known, true)
    }

    /// As [`Plan::for_driver`], but only checks the backings: they are not claimed, and may be in
    /// use.
    pub fn look(
        config: &DeviceConfig,
        features: Features,
        known: Option<&[Known]>,
    ) -> Result<Self, PlanError> {
        Self::with(config, features, known, false)
    }

    fn with(
        config: &DeviceConfig,
        features: Features,
        known: Option<&[Known]>,
        claims: bool,
    ) -> Result<Self, PlanError> {
        // The driver would take the largest number for any id.
        if let Some(id) = config.id.filter(|id| *id > MAX_ID) {
            return Err(PlanError::IdTooBig(id));
        }
        let is_block = |bytes: &u32| (512..=MAX_BLOCK).contains(bytes) && bytes.is_power_of_two();
        if let Some(bytes) = config.block_size.filter(|bytes| !is_block(bytes)) {
            return Err(PlanError::BlockSize(bytes));
        }
        let mut choice = config.lend.choose(features)?;
        choice.flags |= config.on_death.flags(features)?;
        if config.no_part_scan {
            choice.flags |= needed("--no-part-scan", feature::NO_AUTO_PART_SCAN, features)?;
        }
        if config.io_lane {
            lend::check_io_lane(features)?;
            if choice.mode != LendMode::Slot {
                return Err(PlanError::Mismatch {
                    option: "--io-lane",
                    needs: "registration by command",
                    lend: choice.mode,
                    instead: "leave it out, or use `--lend slot`",
                });
            }
        }
        polling::check(config).map_err(LayoutError::from)?;
        let faults = faults_asked_for()?;
        let layout = Layout::open(config, choice.mode, known, claims)?;
        if let Some(id) = config.id.filter(|id| layout.below.has(*id)) {
            return Err(PlanError::OnItself(id));
        }
        let slots = slot_table(config, &choice, &layout.target)?;
        // An existing device must not be lost because of an estimate.
        let program = if known.is_some() { 0 } else { memory::PROGRAM };
        layout.check_memory(config.queues, config.depth, choice.mode, &slots, program)?;
        log::info!("lend mode {}: {}", choice.mode, choice.reason);
        let mut config = DeviceConfig { lend: choice.mode.into(), ..config.clone() };
        config.target.absolute();
        Ok(Self { config, choice, layout, slots, faults, incarnation: 0 })
    }
}

/// The faults in `UBLK_TARGET_FAULT`: names, separated by commas.
#[cfg(feature = "test-hooks")]
fn faults_asked_for() -> Result<Option<Faults>, PlanError> {
    let list = std::env::var("UBLK_TARGET_FAULT").ok();
    Ok(list.map(|list| Faults::parse(&list)).transpose()?)
}

/// This build has no faults.
#[cfg(not(feature = "test-hooks"))]
const fn faults_asked_for() -> Result<Option<Faults>, PlanError> {
    Ok(None)
}

/// The features that a device may ask for. The driver adds some by itself.
const SERVED: &[Feature] = &[
    feature::SUPPORT_ZERO_COPY,
    feature::USER_RECOVERY,
    feature::USER_RECOVERY_REISSUE,
    feature::CMD_IOCTL_ENCODE,
    feature::USER_COPY,
    feature::USER_RECOVERY_FAIL_IO,
    feature::AUTO_BUF_REG,
    feature::QUIESCE,
    feature::NO_AUTO_PART_SCAN,
];

/// The flag of a feature that an option needs.
fn needed(option: &'static str, feature: Feature, features: Features) -> Result<u64, PlanError> {
    if features.has(feature) {
        return Ok(feature.bit);
    }
    let release = kernel::release().unwrap_or_default();
    Err(PlanError::Lacks { option, feature, release })
}

/// The flags of `ADD_DEV`. Other features of a driver may change the form of its requests.
fn asked_for(choice: &Choice) -> u64 {
    let flags = choice.flags | feature::CMD_IOCTL_ENCODE.bit;
    let served = SERVED.iter().fold(0, |bits, feature| bits | feature.bit);
    debug_assert_eq!(flags & !served, 0, "not served");
    flags & served
}

/// Lets the driver check a device: adds one of any id, sets the parameters, and deletes it.
///
/// # Errors
/// Errors of [`add`], and of setting the parameters.
pub(super) fn try_on(control: &Control, plan: &Plan) -> Result<(), AddError> {
    let added = add(control, plan, None)?;
    let layout = &plan.layout;
    let params = layout.limits.params(layout.size, layout.buffer_bytes);
    let taken = control.set_params(added.dev_id, params);
    control.delete(added.dev_id).and_then(|pending| control.finish(pending))?;
    Ok(taken?)
}

/// Adds a device with this id, or any.
pub(super) fn add(
    control: &Control,
    plan: &Plan,
    id: Option<u32>,
) -> Result<sys::ublksrv_ctrl_dev_info, AddError> {
    let config = &plan.config;
    let info = sys::ublksrv_ctrl_dev_info {
        dev_id: id.unwrap_or(u32::MAX),
        nr_hw_queues: config.queues,
        queue_depth: config.depth,
        max_io_buf_bytes: plan.layout.buffer_bytes,
        ublksrv_pid: i32::try_from(std::process::id()).unwrap_or(0),
        flags: asked_for(&plan.choice),
        ublksrv_flags: Nonce::own().flags(),
        ..Default::default()
    };
    // A deleted device keeps its id for a moment, while the driver removes it (`ublk_cdev_rel`),
    // and nothing reports the end.
    let is_gone = |id| control.info(id).is_err_and(|error| description::is_missing(&error));
    let mut wait = Wait::at_most(Duration::from_secs(5)).every(Duration::from_millis(5));
    let added = wait.until(|| match control.add(info) {
        Err(error) if error.errno() == Some(Errno::EEXIST) && id.is_some_and(is_gone) => {
            ControlFlow::Continue(error)
        }
        added => ControlFlow::Break(added),
    });
    let added = added.unwrap_or_else(|unmet| Err(unmet.reason));
    added.map_err(|error| match (error.errno(), id) {
        (Some(Errno::EEXIST), Some(id)) => AddError::IdTaken(id),
        (Some(Errno::EACCES | Errno::ENOSPC), _) => AddError::NoRoom,
        _ => AddError::Control(error),
    })
}

#[cfg(test)]
mod tests {
    use std::ops::ControlFlow;
    use std::time::Duration;

    use serde_json::{Value, json};
    use ublk_engine::plan::Planner;
    use ublk_engine::request::{Request, RequestKind};
    use ublk_engine::units::Bytes;

    use super::*;
    use crate::config::lend::LendRequest;
    use crate::config::on_death::OnDeath;
    use crate::config::{LayerKind, Layers, TargetConfig};
    use crate::device::state_file::StateFile;
    use crate::os::wait;

    /// A future driver offers all possible features.
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

    #[test]
    fn partitions_are_left_to_others_only_by_drivers_that_can() {
        let null = DeviceConfig::of_target(TargetConfig::Null { size: Bytes(4096) });
        let config = DeviceConfig { no_part_scan: true, ..null.clone() };
        let flag = |config: &DeviceConfig, features: u64| {
            let plan = Plan::for_driver(config, Features(features), None)?;
            Ok::<_, PlanError>(Features(asked_for(&plan.choice)).has(feature::NO_AUTO_PART_SCAN))
        };
        assert!(flag(&config, u64::MAX).unwrap() && !flag(&null, u64::MAX).unwrap());
        let old = !feature::NO_AUTO_PART_SCAN.bit;
        let refused = flag(&config, old).unwrap_err().to_string();
        assert!(refused.contains("NO_AUTO_PART_SCAN (Linux 7.0 or newer)"), "{refused}");
        assert!(!flag(&null, old).unwrap());
        // The next server knows the fault. A server that does not know it still reads the rest.
        let read = |config: &DeviceConfig| {
            let text = serde_json::to_string(config).unwrap();
            (text.contains("no_part_scan"), serde_json::from_str::<DeviceConfig>(&text).unwrap())
        };
        assert_eq!((read(&config), read(&null)), ((true, config), (false, null)));
    }

    /// All places in a value where something else may be.
    fn places(value: &Value, at: &str, found: &mut Vec<String>) {
        found.push(at.to_owned());
        match value {
            Value::Object(fields) => {
                fields.iter().for_each(|(name, it)| places(it, &format!("{at}/{name}"), found));
            }
            Value::Array(items) => {
                (0..).zip(items).for_each(|(n, it)| places(it, &format!("{at}/{n}"), found));
            }
            Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
        }
    }

    /// Plans a device. A child that another test has just forked may still have the files of an
    /// earlier plan, until it executes its program.
    fn plan_of(config: &DeviceConfig) -> Plan {
        let wait =
            &mut wait::Wait::at_most(Duration::from_secs(60)).every(Duration::from_millis(1));
        let plan = wait.until(|| match Plan::for_driver(config, Features(u64::MAX), None) {
            Err(error) if error.is_in_use() => ControlFlow::Continue(error),
            made => ControlFlow::Break(made),
        });
        plan.unwrap().unwrap()
    }

    /// A device may have larger blocks than its backing, and all its operations are whole blocks.
    #[test]
    fn short_transfers_are_whole_blocks_of_the_device() {
        let file = tempfile::NamedTempFile::new_in(".").unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        let kind = LayerKind::Fault { rules: vec!["short".parse().unwrap()], seed: 7 };
        let layers = Layers::named([(None, kind)]).unwrap();
        let target = TargetConfig::Loop { file: file.path().to_owned() };
        let config = DeviceConfig { block_size: Some(4096), ..DeviceConfig::of_target(target) };
        let changed = plan_of(&config).layout.with_layers(&layers);
        let layout = plan_of(&DeviceConfig { layers, ..config }).layout;
        for target in [layout.target, changed] {
            for len in (2..100).map(|blocks| blocks * 4096) {
                let (mut plan, kind) = (ublk_engine::plan::Plan::default(), RequestKind::Read);
                target.plan(&Request { kind, offset: 0, len }, 0, &mut plan).unwrap();
                let at_first = plan.at_first().unwrap();
                assert!(at_first % 4096 == 0 && at_first < len, "{at_first} of {len}");
            }
        }
    }

    /// For any valid form of a state file, the next server reports an error or serves the device:
    /// it does not panic.
    #[test]
    fn any_record_is_planned_or_refused() {
        let directory = tempfile::tempdir_in(".").unwrap();
        let files: Vec<_> = (0..3).map(|n| directory.path().join(format!("{n}"))).collect();
        for file in &files {
            std::fs::File::create(file).unwrap().set_len(1 << 20).unwrap();
        }
        let extents = files.iter().map(|file| crate::config::ExtentConfig {
            file: file.clone(),
            offset: Bytes(0),
            len: Some(Bytes(1 << 19)),
        });
        let stripe = TargetConfig::Stripe { chunk: Bytes(65536), files: files.clone() };
        let rules = vec!["p=0.5,error=EIO".parse().unwrap()];
        let fault = (None, LayerKind::Fault { rules, seed: 7 });
        let layers = Layers::named([fault.clone(), fault]).unwrap();
        let targets = [
            (TargetConfig::Loop { file: files[0].clone() }, Layers::none()),
            (TargetConfig::Linear { extents: extents.collect() }, Layers::none()),
            (TargetConfig::Null { size: Bytes(1 << 20) }, Layers::none()),
            (stripe.clone(), Layers::none()),
            (stripe, layers),
        ];
        let others = [
            json!(null),
            json!([]),
            json!({}),
            json!(0),
            json!(1),
            json!(-1),
            json!(u64::MAX),
            json!(1_u64 << 62),
            json!(""),
            json!("auto"),
            json!("/"),
            json!(true),
        ];
        let features = Features(u64::MAX);
        let (mut planned, mut refused) = (0, 0);
        for (target, layers) in targets {
            let id = Some(3);
            let config = DeviceConfig { id, layers, ..DeviceConfig::of_target(target) };
            let plan = plan_of(&config);
            let record = StateFile::new(3, plan.layout.known(), config);
            drop(plan);
            let good = serde_json::to_value(record).unwrap();
            let mut at = Vec::new();
            places(&good, "", &mut at);
            for (place, other) in at.iter().flat_map(|at| others.iter().map(move |it| (at, it))) {
                let mut value: Value = good.clone();
                *value.pointer_mut(place).unwrap() = other.clone();
                let Ok(record) = serde_json::from_value::<StateFile>(value) else { continue };
                match Plan::for_driver(&record.config, features, Some(&record.backings)) {
                    Ok(_) => planned += 1,
                    Err(_) => refused += 1,
                }
            }
        }
        assert!(planned > 50 && refused > 50, "{planned} planned, {refused} refused");
    }
}

//! Checks a configuration without adding devices.

use std::collections::BTreeSet;

use uring_ext::control::Control;
use uring_ext::feature::Features;

use crate::config::DeviceConfig;
use crate::control::fleet::error::MemberError;
use crate::control::fleet::member::check_apart;
use crate::control::fleet::{FleetConfig, id_of};
use crate::control::plan::Plan;
use crate::os::kernel;

/// Finds the errors of a configuration: in the devices' options for this driver, and in their
/// backings. It opens the backings without claiming them, so they may be in use. If the driver
/// cannot be asked, it returns the error, and assumes a driver with all features.
///
/// # Errors
/// One line per error.
pub fn check(config: &FleetConfig) -> Result<Option<String>, Vec<String>> {
    let asked = Control::open().and_then(|control| kernel::features(&control));
    let (features, unknown) = match asked {
        Ok(features) => (features, None),
        Err(error) => (Features(u64::MAX), Some(error.to_string())),
    };
    let ids = config.devices.iter().map(id_of).collect();
    let fault = |device: &DeviceConfig| {
        let error = look(device, features, &ids).err()?;
        Some(format!("device {}: {error}", id_of(device)))
    };
    let faults: Vec<_> = config.devices.iter().filter_map(fault).collect();
    if faults.is_empty() { Ok(unknown) } else { Err(faults) }
}

fn look(device: &DeviceConfig, features: Features, ids: &BTreeSet<u32>) -> Result<(), MemberError> {
    let plan = Plan::look(device, features, None)?;
    check_apart(id_of(device), &plan.layout.below, ids)
}

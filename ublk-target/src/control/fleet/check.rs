//! Looking at a configuration without making anything.

use std::collections::BTreeSet;

use uring_ext::control::Control;
use uring_ext::feature::Features;

use crate::config::DeviceConfig;
use crate::control::fleet::error::MemberError;
use crate::control::fleet::member::check_apart;
use crate::control::fleet::{FleetConfig, id_of};
use crate::control::plan::Plan;
use crate::os::kernel;

/// Finds what is wrong with the devices of a configuration: with their options for this driver, and with
/// their backings, which are opened but not claimed, so they may be in use. Returns why the driver could
/// not be asked; it is then taken for one that offers everything.
///
/// # Errors
/// A line for each fault.
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

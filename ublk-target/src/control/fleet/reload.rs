//! Applies a changed configuration to a running fleet.

use std::collections::BTreeSet;

use uring_ext::feature::Features;

use crate::config::{DeviceConfig, Layers};
use crate::control::error::{PlanError, RecoverError};
use crate::control::fleet::error::MemberError;
use crate::control::fleet::member::{Preparation, check_apart};
use crate::control::fleet::{Fleet, FleetConfig, FleetEvent, FleetHooks, id_of};
use crate::control::plan::{self, Plan};
use crate::os::protection::among_present_mounts;

/// The differences of a configuration.
#[derive(Debug, Default, PartialEq)]
struct Changes {
    /// Ids of devices that are not in it any more.
    gone: Vec<u32>,
    /// Existing devices with a different configuration, apart from their layers.
    changed: Vec<DeviceConfig>,
    /// Existing devices of which only the layers are different.
    layers: Vec<DeviceConfig>,
    /// New devices.
    new: Vec<DeviceConfig>,
}

impl Changes {
    fn between(now: &[&DeviceConfig], wanted: &[DeviceConfig]) -> Self {
        let find = |device: &DeviceConfig| now.iter().find(|it| it.id == device.id);
        let is_wanted = |id| wanted.iter().any(|it| id_of(it) == id);
        let is_changed = |device: &&DeviceConfig| find(device).is_some_and(|it| *it != *device);
        let has_other_layers = |device: &DeviceConfig| {
            let of = |it: &DeviceConfig| DeviceConfig { layers: Layers::none(), ..it.clone() };
            find(device).is_some_and(|it| of(it) == of(device))
        };
        let changed = wanted.iter().filter(is_changed).cloned();
        let (layers, changed) = changed.partition(has_other_layers);
        Self {
            gone: now.iter().map(|it| id_of(it)).filter(|id| !is_wanted(*id)).collect(),
            changed,
            layers,
            new: wanted.iter().filter(|device| find(device).is_none()).cloned().collect(),
        }
    }
}

impl Fleet {
    /// Reads the configuration again and applies it. If it has an error, nothing changes.
    pub(super) fn reload(&mut self, hooks: &FleetHooks<'_>) {
        (hooks.tell)(&FleetEvent::Reloading);
        let made = match self.find_changes(hooks) {
            Err(faults) => {
                faults.iter().for_each(|fault| log::error!("{fault}"));
                log::error!("the configuration has errors; nothing has changed");
                Vec::new()
            }
            Ok(found) => self.carry_out(found, hooks),
        };
        (hooks.tell)(&FleetEvent::Reloaded(made, self.members.len()));
    }

    /// The changes, after a check of all of them by this program and by the driver.
    fn find_changes(&self, hooks: &FleetHooks<'_>) -> Result<Found, Vec<String>> {
        let now: Vec<_> = self.members.iter().map(|member| &member.config).collect();
        let features = self.features;
        // The file and new backings may be on file systems outside this process's mounts.
        let read = &*hooks.read;
        let (wanted, plans) = among_present_mounts(|| {
            let wanted: FleetConfig = read()?;
            let changes = Changes::between(&now, &wanted.devices);
            let frees = !changes.gone.is_empty() || !changes.changed.is_empty();
            let plan = |device: &DeviceConfig| (device.clone(), plan(device, features, frees));
            let plans: Vec<_> = changes.changed.iter().chain(&changes.new).map(plan).collect();
            Ok::<_, Vec<String>>((wanted, plans))
        })?;
        if wanted.lanes != self.lanes {
            log::warn!("`lanes` has changed; this takes effect at the next start");
        }
        let changes = Changes::between(&now, &wanted.devices);
        let (mut opened, mut faults) = (Vec::new(), Vec::new());
        let ids = wanted.devices.iter().map(id_of).chain(self.ids()).collect();
        for (device, plan) in plans {
            match self.check(&device, plan, changes.new.contains(&device), &ids) {
                Ok(preparation) => opened.extend(preparation),
                // It cannot be added, and the log says so. The others can.
                Err(MemberError::Recover(RecoverError::Served { .. })) => {}
                Err(error) => faults.push(format!("device {}: {error}", id_of(&device))),
            }
        }
        if faults.is_empty() { Ok(Found { changes, opened }) } else { Err(faults) }
    }

    /// The start state of a device, if everything that it needs is free already.
    fn check(
        &self,
        device: &DeviceConfig,
        plan: Planned,
        is_new: bool,
        ids: &BTreeSet<u32>,
    ) -> Result<Option<Preparation>, MemberError> {
        if is_new {
            if let Some(preparation) = Preparation::waiting(device, &self.control)? {
                self.check_apart(&preparation, ids)?;
                return Ok(Some(preparation));
            }
        }
        let (plan, is_claimed) = match plan {
            Planned::Claimed(plan) => (plan, true),
            Planned::LookedAt(plan) => (plan, false),
            Planned::Refused(error) => return Err(error.into()),
        };
        check_apart(id_of(device), &plan.layout.below, ids)?;
        plan::try_on(&self.control, &plan)?;
        if !is_claimed || !is_new {
            return Ok(None);
        }
        Preparation::with(device, Ok(*plan), &self.control).map(Some)
    }

    /// Deletes removed and changed devices that are not in use, then adds the new ones. If one
    /// cannot be added after all, the old one is restored. Returns the ids of the added devices.
    fn carry_out(&mut self, found: Found, hooks: &FleetHooks<'_>) -> Vec<u32> {
        let Found { changes, opened } = found;
        for device in &changes.layers {
            self.change_layers(device);
        }
        let mut stays = Vec::new();
        let (mut before, mut made) = (Vec::new(), Vec::new());
        let changed = changes.changed.iter().map(id_of);
        for id in changes.gone.iter().copied().chain(changed.clone()) {
            match self.remove_unused(id, hooks) {
                Removed::Gone(config) => before.extend(config),
                Removed::Stays => stays.push(id),
            }
            if !stays.contains(&id) && changes.gone.contains(&id) {
                log::info!("device {id} is deleted");
            }
        }
        let features = self.features;
        let again = |device: &DeviceConfig| {
            among_present_mounts(|| Plan::for_driver(device, features, None))
        };
        let comes = |device: &&DeviceConfig| !stays.contains(&id_of(device));
        for device in changes.changed.iter().filter(comes) {
            let id = id_of(device);
            let Err(error) = self.add_now(device, again(device), hooks) else {
                made.push(id);
                continue;
            };
            log::error!("device {id} cannot be changed: {error}");
            if let Some(old) = before.iter().find(|old| id_of(old) == id) {
                match self.add_now(old, again(old), hooks) {
                    Ok(()) => {
                        made.push(id);
                        log::error!("device {id} is restored with its old options");
                    }
                    Err(error) => {
                        log::error!("device {id} cannot be restored and is deleted: {error}")
                    }
                }
            }
        }
        let is_opened = |device: &DeviceConfig| opened.iter().any(|it| it.config.id == device.id);
        let late: Vec<_> = changes.new.iter().filter(|device| !is_opened(device)).collect();
        let late: Vec<_> = late.into_iter().map(|device| (device, again(device))).collect();
        made.extend(self.add_all(opened, hooks).iter().map(|description| description.id));
        for (device, plan) in late {
            let id = id_of(device);
            match self.add_now(device, plan, hooks) {
                Ok(()) => made.push(id),
                Err(error) => log::error!("device {id} cannot be added: {error}"),
            }
        }
        made
    }

    /// Changes the layers of a device while it is used.
    fn change_layers(&mut self, wanted: &DeviceConfig) {
        let id = id_of(wanted);
        let members = &mut self.members;
        let Some(member) = members.iter_mut().find(|it| id_of(&it.config) == id) else { return };
        if let Err(error) = member.change_layers(&wanted.layers) {
            log::error!("device {id} keeps its layers: {error}");
        }
    }

    fn add_now(
        &mut self,
        device: &DeviceConfig,
        plan: Result<Plan, PlanError>,
        hooks: &FleetHooks<'_>,
    ) -> Result<(), MemberError> {
        let preparation = Preparation::with(device, plan, &self.control)?;
        let ids = self.ids();
        self.begin(preparation, &ids, hooks).map(drop)
    }

    /// Deletes a device that is not in use.
    fn remove_unused(&mut self, id: u32, hooks: &FleetHooks<'_>) -> Removed {
        let Some(at) = self.members.iter().position(|it| id_of(&it.config) == id) else {
            return Removed::Gone(None);
        };
        if let Err(users) = self.members[at].stop_unused(hooks, self.features) {
            log::error!("device {id} is in use and has not changed: {users}");
            return Removed::Stays;
        }
        let member = self.members.remove(at);
        let config = member.config.clone();
        match member.stop(hooks) {
            Ok(()) => Removed::Gone(Some(config)),
            Err(error) => {
                log::error!("device {id}: {error}");
                Removed::Stays
            }
        }
    }
}

/// The result of a check of a configuration.
struct Found {
    changes: Changes,
    /// New devices whose backings are claimed already.
    opened: Vec<Preparation>,
}

/// What happened to a device that had to go.
enum Removed {
    /// Its former configuration.
    Gone(Option<DeviceConfig>),
    Stays,
}

/// The result of planning a device.
enum Planned {
    Claimed(Box<Plan>),
    /// Its backings are in use, perhaps by a device that has to go.
    LookedAt(Box<Plan>),
    Refused(PlanError),
}

/// Plans a device. `frees` says that other devices go, which may use its backings.
fn plan(device: &DeviceConfig, features: Features, frees: bool) -> Planned {
    match Plan::for_driver(device, features, None) {
        Ok(plan) => Planned::Claimed(Box::new(plan)),
        Err(error) if frees && error.is_in_use() => match Plan::look(device, features, None) {
            Ok(plan) => Planned::LookedAt(Box::new(plan)),
            Err(error) => Planned::Refused(error),
        },
        Err(error) => Planned::Refused(error),
    }
}

#[cfg(test)]
mod tests {
    use ublk_engine::units::Bytes;

    use super::*;
    use crate::config::{LayerKind, TargetConfig};

    fn device(id: u32, size: u64) -> DeviceConfig {
        let target = TargetConfig::Null { size: Bytes(size) };
        DeviceConfig { id: Some(id), ..DeviceConfig::of_target(target) }
    }

    #[test]
    fn devices_are_told_by_their_ids() {
        let now = [device(0, 1), device(1, 1), device(2, 1)];
        let wanted = [device(3, 1), device(2, 2), device(1, 1)];
        let changes = Changes::between(&now.iter().collect::<Vec<_>>(), &wanted);
        let (changed, new) = (vec![device(2, 2)], vec![device(3, 1)]);
        assert_eq!(changes, Changes { gone: vec![0], changed, layers: Vec::new(), new });
        let rules = vec!["short".parse().unwrap()];
        let layers = Layers::named([(None, LayerKind::Fault { rules, seed: 0 })]).unwrap();
        let layered = |id, size| DeviceConfig { layers: layers.clone(), ..device(id, size) };
        let wanted = [layered(0, 1), layered(1, 2), device(2, 1)];
        let changes = Changes::between(&now.iter().collect::<Vec<_>>(), &wanted);
        let (layers, changed) = (vec![layered(0, 1)], vec![layered(1, 2)]);
        assert_eq!(changes, Changes { changed, layers, ..Changes::default() });
        let same = Changes::between(&now.iter().collect::<Vec<_>>(), &now);
        assert_eq!(same, Changes::default());
    }
}

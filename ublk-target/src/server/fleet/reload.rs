//! Another configuration for a fleet that serves.

use super::member::Outset;
use super::{Fleet, FleetConfig, News, Orders, id_of};
use crate::server::config::DeviceConfig;
use crate::server::plan::Plan;
use crate::server::protection::among_present_mounts;

/// What a configuration changes.
#[derive(Debug, Default, PartialEq)]
struct Changes {
    /// Ids of devices that are not wanted any more.
    gone: Vec<u32>,
    /// Devices that are there, but made otherwise.
    changed: Vec<DeviceConfig>,
    /// Devices that there are not yet.
    new: Vec<DeviceConfig>,
}

impl Changes {
    fn between(now: &[&DeviceConfig], wanted: &[DeviceConfig]) -> Self {
        let find = |device: &DeviceConfig| now.iter().find(|it| it.id == device.id);
        let is_wanted = |id| wanted.iter().any(|it| id_of(it) == id);
        let is_changed = |device: &&DeviceConfig| find(device).is_some_and(|it| *it != *device);
        Self {
            gone: now.iter().map(|it| id_of(it)).filter(|id| !is_wanted(*id)).collect(),
            changed: wanted.iter().filter(is_changed).cloned().collect(),
            new: wanted.iter().filter(|device| find(device).is_none()).cloned().collect(),
        }
    }
}

impl Fleet {
    /// Reads the configuration again and does what it says. One with a fault changes nothing.
    pub(super) fn reload(&mut self, orders: &Orders<'_>) {
        (orders.tell)(&News::Reloading);
        match self.find_changes(orders) {
            Err(faults) => {
                faults.iter().for_each(|fault| log::error!("{fault}"));
                log::error!("the configuration has faults; all stays as it was");
            }
            Ok((changes, outsets)) => self.carry_out(changes, outsets, orders),
        }
        (orders.tell)(&News::Reloaded(self.members.len()));
    }

    /// What is to be done, with all that is new opened.
    fn find_changes(&self, orders: &Orders<'_>) -> Result<(Changes, Vec<Outset>), Vec<String>> {
        let now: Vec<_> = self.members.iter().map(|member| &member.config).collect();
        let features = self.features;
        // The file and new backings may be on file systems that this process has left.
        let read = &*orders.read;
        let (wanted, plans) = among_present_mounts(|| {
            let wanted: FleetConfig = read()?;
            let changes = Changes::between(&now, &wanted.devices);
            let plan = |device: &DeviceConfig| Plan::for_driver(device, features, None);
            let plans: Vec<_> = changes.new.iter().map(plan).collect();
            Ok::<_, Vec<String>>((wanted, plans))
        })?;
        if wanted.lanes != self.lanes {
            log::warn!("`lanes` has changed, which takes effect at the next start");
        }
        let changes = Changes::between(&now, &wanted.devices);
        let (mut outsets, mut faults) = (Vec::new(), Vec::new());
        for (device, plan) in changes.new.iter().zip(plans) {
            match Outset::with(device, plan, &self.control) {
                Ok(outset) => outsets.push(outset),
                Err(error) => faults.push(format!("device {}: {error}", id_of(device))),
            }
        }
        if faults.is_empty() { Ok((changes, outsets)) } else { Err(faults) }
    }

    fn carry_out(&mut self, changes: Changes, outsets: Vec<Outset>, orders: &Orders<'_>) {
        for id in &changes.gone {
            if self.remove_unused(*id, orders) {
                log::info!("device {id} is deleted");
            }
        }
        for device in changes.changed {
            let id = id_of(&device);
            if !self.remove_unused(id, orders) {
                continue;
            }
            // Its backings are free only now.
            let features = self.features;
            let plan = among_present_mounts(|| Plan::for_driver(&device, features, None));
            match Outset::with(&device, plan, &self.control) {
                Ok(outset) => drop(self.add_all(vec![outset], orders)),
                Err(error) => log::error!("device {id} is deleted, and cannot be added: {error}"),
            }
        }
        let _ = self.add_all(outsets, orders);
    }

    /// Deletes a device that nobody uses; whether it is gone.
    fn remove_unused(&mut self, id: u32, orders: &Orders<'_>) -> bool {
        let Some(at) = self.members.iter().position(|it| id_of(&it.config) == id) else {
            return true;
        };
        if let Err(users) = self.members[at].stop_unused(orders, self.features) {
            log::error!("device {id} is in use and stays as it was: {users}");
            return false;
        }
        match self.members.remove(at).stop(orders) {
            Ok(()) => true,
            Err(error) => {
                log::error!("device {id}: {error}");
                false
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::server::config::TargetConfig;
    use crate::units::Bytes;

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
        assert_eq!(changes, Changes { gone: vec![0], changed, new });
        let same = Changes::between(&now.iter().collect::<Vec<_>>(), &now);
        assert_eq!(same, Changes::default());
    }
}

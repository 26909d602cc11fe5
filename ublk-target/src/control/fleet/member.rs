//! One device of a fleet.

use std::collections::BTreeSet;
use std::fs::File;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;

use uring_ext::control::Control;
use uring_ext::feature::{Features, SAFE_STOP_DEV};
use uring_ext::sys;

use crate::backing::below::Below;
use crate::config::lend::LendRequest;
use crate::config::{DeviceConfig, LayerEdit, Layers};
use crate::control::deletion::{self, Deletion};
use crate::control::error::{
    AddError, LayersError, PlanError, QueueError, RecoverError, ServeError,
};
use crate::control::fleet::error::MemberError;
use crate::control::fleet::{Fleet, FleetHooks, cpus, id_of};
use crate::control::plan::{self, Plan};
use crate::control::recoverable;
use crate::control::recovery;
use crate::control::server::{Server, told};
use crate::device::description::{self, Description};
use crate::device::mark::Nonce;
use crate::device::paths;
use crate::device::standing::Recorded;
use crate::device::state_file::StateFile;
use crate::os::procfs;
use crate::os::wait::Wait;
use crate::socket::control_request::ControlRequest;

/// A device that has been checked and can be started.
pub(super) struct Preparation {
    pub config: DeviceConfig,
    /// The devices that it may wait for.
    below: Below,
    found: Found,
}

/// The state of a device before it is started.
enum Found {
    /// It does not exist.
    Nothing(Box<Plan>),
    /// A device of a dead server. It waits for this server.
    Waiting(Box<StateFile>),
    /// Leftovers of a device that ended with its server.
    Remains(Box<Plan>),
}

impl Preparation {
    /// Finds out how to start a device. Opens the backings of a new one.
    pub fn of(
        config: &DeviceConfig,
        control: &Control,
        features: Features,
    ) -> Result<Self, MemberError> {
        if let Some(preparation) = Self::waiting(config, control)? {
            return Ok(preparation);
        }
        // The files of a dead server are closed some time after its end, and nothing reports that.
        let is_left = control.info(id_of(config)).is_ok();
        let mut wait = Wait::at_most(PATIENCE).every(Duration::from_millis(10));
        let plan = wait.until(|| match Plan::for_driver(config, features, None) {
            Err(error) if is_left && error.is_in_use() => ControlFlow::Continue(error),
            made => ControlFlow::Break(made),
        });
        Self::with(config, plan.unwrap_or_else(|unmet| Err(unmet.reason)), control)
    }

    /// The same with the result of opening its backings. Those of a device that waits for a server
    /// are opened when it is taken over.
    pub fn with(
        config: &DeviceConfig,
        plan: Result<Plan, PlanError>,
        control: &Control,
    ) -> Result<Self, MemberError> {
        if let Some(preparation) = Self::waiting(config, control)? {
            return Ok(preparation);
        }
        let plan = Box::new(plan?);
        let below = plan.layout.below.clone();
        let found = match control.info(id_of(config)) {
            Err(_) => Found::Nothing(plan),
            Ok(_) => Found::Remains(plan),
        };
        Ok(Self { config: config.clone(), below, found })
    }

    /// Whether the device waits for a server.
    pub const fn is_of_waiting(&self) -> bool {
        matches!(self.found, Found::Waiting(_))
    }

    /// Checks that it waits for no device of this fleet, running or planned.
    pub fn check_apart(&self, ids: &BTreeSet<u32>) -> Result<(), MemberError> {
        check_apart(id_of(&self.config), &self.below, ids)
    }

    /// The devices below an existing device that waits for a server.
    pub fn waiting(config: &DeviceConfig, control: &Control) -> Result<Option<Self>, MemberError> {
        let id = id_of(config);
        let info = match control.info(id) {
            Err(error) if description::is_missing(&error) => {
                recoverable::refuse_new_on_unserved(control, &config.target.files())?;
                return Ok(None);
            }
            info => info.map_err(AddError::from)?,
        };
        match recoverable::check(control, id) {
            Ok(record) => {
                let paths: Vec<_> = record.backings.iter().map(|it| it.path.clone()).collect();
                let below = Below::paths(&paths, &Recorded::default());
                let found = Found::Waiting(Box::new(record));
                Ok(Some(Self { config: config.clone(), below, found }))
            }
            Err(_) if !is_served(&info) && is_dead_ones(&info) => Ok(None),
            Err(error @ RecoverError::Served { .. }) => Err(error.into()),
            Err(_) => Err(AddError::IdTaken(id).into()),
        }
    }
}

/// Checks that a device does not wait for another one of these.
pub(super) fn check_apart(id: u32, below: &Below, ids: &BTreeSet<u32>) -> Result<(), MemberError> {
    let mut others = ids.clone();
    others.remove(&id);
    below.any_of(&others).map_or(Ok(()), |lower| Err(MemberError::Beside { upper: id, lower }))
}

/// Whether a device was added as the configuration says, apart from its layers. A null device may have
/// been resized since.
fn is_as_wanted(recorded: &DeviceConfig, wanted: &DeviceConfig) -> bool {
    let mut target = wanted.target.clone();
    target.absolute();
    if let (Some(size), Some(now)) = (target.null_size(), recorded.target.clone().null_size()) {
        *size = *now;
    }
    // The record has the selected lend mode, and the number of queues that the driver gave: at most
    // one per CPU.
    let lend = if wanted.lend == LendRequest::Auto { recorded.lend } else { wanted.lend };
    let cpus = u16::try_from(cpus()).unwrap_or(u16::MAX);
    let is_same = recorded.queues.min(cpus) == wanted.queues.min(cpus);
    let queues = if is_same { recorded.queues } else { wanted.queues };
    let layers = recorded.layers.clone();
    *recorded == DeviceConfig { lend, queues, target, layers, ..wanted.clone() }
}

/// Whether a device has a live server.
fn is_served(info: &sys::ublksrv_ctrl_dev_info) -> bool {
    u32::try_from(info.ublksrv_pid).is_ok_and(procfs::is_alive) && description::has_disk(info)
}

/// Whether a device is one of this program's, without a disk and without an owner. Only one process
/// can have a character device open. So opening it tells, even if its owner is in another
/// namespace.
fn is_dead_ones(info: &sys::ublksrv_ctrl_dev_info) -> bool {
    let is_ours = Nonce::of(info).is_some();
    let opened = || File::options().read(true).write(true).open(paths::char_path(info.dev_id));
    is_ours && !description::has_disk(info) && opened().is_ok()
}

/// A device that is served.
pub(super) struct Member {
    /// Its configuration.
    pub config: DeviceConfig,
    plan: Plan,
    server: Server,
}

/// How a device ends that this process has not ended.
pub(super) enum End {
    /// It was stopped.
    Stopped,
    /// No lane serves it any more, and it waits for a server.
    Waits(QueueError),
    /// It cannot be served any more.
    Failed(QueueError),
}

impl Member {
    /// Adds the device, or takes it over.
    pub fn begin(
        preparation: Preparation,
        fleet: &Fleet,
        hooks: &FleetHooks<'_>,
    ) -> Result<(Self, Description), MemberError> {
        let Preparation { mut config, found, .. } = preparation;
        let (plan, mut server) = match found {
            Found::Nothing(plan) => add(*plan, fleet)?,
            Found::Remains(plan) => {
                clear(id_of(&config), fleet, hooks)?;
                add(*plan, fleet)?
            }
            Found::Waiting(record) => {
                if !is_as_wanted(&record.config, &config) {
                    let id = record.id;
                    log::warn!(
                        "device {id} is taken over with its old options, which differ from the file; \
                         a reload changes it when it is unused"
                    );
                    config = record.config.clone();
                } else if record.config.layers != config.layers {
                    let id = record.id;
                    log::warn!(
                        "device {id} is taken over with its old layers, which differ from the file; a \
                         reload changes them"
                    );
                    config.layers.clone_from(&record.config.layers);
                }
                take_over(&record, fleet)?
            }
        };
        match server.describe_live() {
            Ok(description) => Ok((Self { config, plan, server }, description)),
            Err(error) => Err(server.take_down().err().unwrap_or(error).into()),
        }
    }

    /// The devices that it may wait for now: its backings may be stacked on others since.
    pub fn below(&self) -> Below {
        Below::backings(&self.plan.layout.backings, &Recorded::default())
    }

    /// Carries out the control requests of clients that still wait.
    pub fn carry_out_control_requests(&mut self) {
        while let Some(control_request) = self.server.control_request() {
            match control_request {
                ControlRequest::Grow { size, reply } if reply.begin() => {
                    let grown = self.server.grow(&mut self.plan, size);
                    reply.send(grown.map_err(|error| error.to_string()));
                }
                ControlRequest::ChangeLayers { limit, reply, .. } if limit > MAX_LIMIT => {
                    reply.send(Err(format!(
                        "the other devices of `ublk-target serve` would have to wait, too; use a \
                         --timeout of at most {} s",
                        MAX_LIMIT.as_secs()
                    )));
                }
                ControlRequest::ChangeLayers { edit, limit, reply } if reply.begin() => {
                    let (server, plan) = (&mut self.server, &mut self.plan);
                    let changed = server.change_layers(plan, &edit, limit, || reply.is_wanted());
                    reply.send(told(changed));
                }
                ControlRequest::Grow { .. } | ControlRequest::ChangeLayers { .. } => {
                    log::warn!("the client has given up on its request; nothing is done");
                }
                ControlRequest::Upgrade { program: _, reply } => {
                    reply.send(Err(NO_UPGRADE.to_owned()));
                }
            }
        }
    }

    /// Changes the layers to those of the file, while the device is used.
    pub fn change_layers(&mut self, layers: &Layers) -> Result<(), LayersError> {
        let edit = LayerEdit::Replace { layers: layers.clone() };
        self.server.change_layers(&mut self.plan, &edit, PATIENCE, || true)?;
        self.config.layers.clone_from(layers);
        Ok(())
    }

    /// Whether the device has ended, or must end.
    pub fn look(&mut self, hooks: &FleetHooks<'_>) -> Option<End> {
        if self.server.lanes.are_withdrawn() {
            self.have_rest_taken_back(hooks);
        }
        if let Some(error) = self.server.lanes.take_failure() {
            return Some(End::Failed(error));
        }
        if !self.server.lanes.has_ended() {
            return None;
        }
        let info = self.server.control.info(self.server.id);
        if info.map_or(true, |info| !description::has_disk(&info)) {
            return Some(End::Stopped);
        }
        let is_over = self.server.lanes.have_all_ended();
        let error = self.server.lanes.failure();
        if is_over && self.plan.config.on_death.is_recoverable() {
            return Some(End::Waits(error));
        }
        Some(End::Failed(error))
    }

    /// Another process has quiesced the device while a request was open. That request has been
    /// answered. Its tag is with the driver again, which delivers nothing to it.
    fn have_rest_taken_back(&self, hooks: &FleetHooks<'_>) {
        let id = self.server.id;
        let info = self.server.control.info(id);
        if !info.is_ok_and(|info| u32::from(info.state) == sys::UBLK_S_DEV_LIVE) {
            return;
        }
        log::warn!("device {id}: another process has quiesced it");
        // No request is open, so this is fast.
        let status = (hooks.quiesce)(id).and_then(|mut process| process.wait());
        match status {
            Ok(status) if status.success() => {}
            Ok(status) => log::error!("device {id}: its I/O could not be quiesced: {status}"),
            Err(error) => log::error!("device {id}: its I/O could not be quiesced: {error}"),
        }
    }

    /// Stops and deletes the device.
    pub fn stop(self, hooks: &FleetHooks<'_>) -> Result<(), ServeError> {
        let stopped = self.server.stop(&|id| (hooks.command)(id, deletion::Command::Stop));
        let ended = self.server.take_down();
        stopped.and(ended)
    }

    /// Lets the driver stop the device if nobody has it open. Otherwise returns its users, in
    /// words. Waits for processes that only look at it, such as udev.
    pub fn stop_unused(&self, hooks: &FleetHooks<'_>, features: Features) -> Result<(), String> {
        // Nothing reports when a device is closed.
        let stopped = Wait::at_most(PATIENCE).every(Duration::from_millis(10)).until(|| {
            let users = deletion::users(self.server.id);
            if !users.is_empty() {
                return ControlFlow::Break(Err(users.join(", ")));
            }
            // Before Linux 7.0 the driver stops it even if it was opened meanwhile.
            let can_try = features.has(SAFE_STOP_DEV);
            let stop = |id| (hooks.command)(id, deletion::Command::StopUnused);
            if !can_try || self.server.stop(&stop).is_ok() {
                ControlFlow::Break(Ok(()))
            } else {
                ControlFlow::Continue(deletion::UNSEEN)
            }
        });
        stopped.unwrap_or_else(|unmet| Err(unmet.reason.to_owned()))
    }
}

/// The time that processes may take to close a device or a backing by themselves, and requests to end.
const PATIENCE: Duration = Duration::from_secs(5);

/// The longest wait for the requests of one device. Nobody looks after the other devices meanwhile.
const MAX_LIMIT: Duration = Duration::from_secs(10);

const NO_UPGRADE: &str = "the device belongs to `ublk-target serve`, which cannot be upgraded \
                          while its devices are used: kill it with SIGKILL and start the new \
                          version, which takes over the devices";

impl End {
    /// Deletes the device, or adds it again; then it returns the new one.
    pub fn carry_out(
        self,
        mut member: Member,
        fleet: &Fleet,
        hooks: &FleetHooks<'_>,
    ) -> Option<Member> {
        let id = member.server.id;
        match self {
            Self::Stopped => {
                log::info!("device {id} was deleted");
                if let Err(error) = member.server.take_down() {
                    log::error!("device {id}: {error}");
                }
                None
            }
            Self::Failed(error) => {
                log::error!("device {id}: {error}; it is stopped");
                if let Err(error) = member.stop(hooks) {
                    log::error!("device {id}: {error}");
                }
                None
            }
            Self::Waits(error) => {
                log::error!("device {id}: {error}; recovering it");
                let config = member.config.clone();
                member.server.leave();
                let _ = member.server.lanes.join();
                let left = member.server.take_down();
                drop(member.plan);
                let again = left
                    .map_err(MemberError::from)
                    .and_then(|()| Preparation::of(&config, &fleet.control, fleet.features))
                    .and_then(|preparation| Member::begin(preparation, fleet, hooks));
                match again {
                    Ok((member, _)) => Some(member),
                    Err(error) => {
                        log::error!("device {id}: {error}");
                        None
                    }
                }
            }
        }
    }
}

fn server(id: u32, fleet: &Fleet) -> Server {
    let (control, wakeups) = (fleet.control.clone(), Arc::clone(&fleet.wakeups));
    let mut server = Server::new(control, wakeups, id, None);
    server.services = Some(fleet.services.clone());
    server
}

fn add(plan: Plan, fleet: &Fleet) -> Result<(Plan, Server), AddError> {
    let added = plan::add(&fleet.control, &plan, plan.config.id)?;
    let mut server = server(added.dev_id, fleet);
    match server.go_live(&plan, &added) {
        Ok(()) => Ok((plan, server)),
        Err(error) => {
            server.take_down()?;
            Err(error)
        }
    }
}

fn take_over(record: &StateFile, fleet: &Fleet) -> Result<(Plan, Server), RecoverError> {
    recoverable::refuse_unserved(&fleet.control, record.id, record)?;
    let mut server = server(record.id, fleet);
    server.leave();
    let mut progress = |what: &str| log::warn!("{what}");
    let taken = recovery::take_over(&mut server, record, true, &mut progress)?;
    server.keep();
    log::info!("device {} is recovered: {}", record.id, taken.times);
    Ok((taken.plan, server))
}

/// Deletes the leftovers of a device.
fn clear(id: u32, fleet: &Fleet, hooks: &FleetHooks<'_>) -> Result<(), MemberError> {
    let progress = &mut |what: &str| log::warn!("{what}");
    let helper = &*hooks.command;
    let mut deletion = Deletion { control: &fleet.control, force: false, helper, progress };
    deletion.delete(id).map_err(|error| MemberError::Remains { id, error })
}

#[cfg(test)]
mod tests {
    use ublk_engine::lend::LendMode;
    use ublk_engine::units::Bytes;

    use super::*;
    use crate::config::{LayerKind, TargetConfig};

    #[test]
    fn a_device_that_is_taken_over_is_compared_with_the_file() {
        let null = |size| DeviceConfig {
            id: Some(3),
            ..DeviceConfig::of_target(TargetConfig::Null { size: Bytes(size) })
        };
        let recorded = DeviceConfig { lend: LendMode::Fused.into(), ..null(4096) };
        assert!(is_as_wanted(&recorded, &null(8192)));
        assert!(is_as_wanted(&recorded, &DeviceConfig { lend: recorded.lend, ..null(4096) }));
        let others = [
            DeviceConfig { lend: LendMode::Copy.into(), ..null(4096) },
            DeviceConfig { depth: 64, ..null(4096) },
            DeviceConfig { queues: 0, ..null(4096) },
            DeviceConfig { target: TargetConfig::Loop { file: "/x".into() }, ..null(4096) },
        ];
        for other in others {
            assert!(!is_as_wanted(&recorded, &other), "{other:?}");
        }
        let rules = vec!["short".parse().unwrap()];
        let layers = Layers::named([(None, LayerKind::Fault { rules, seed: 0 })]).unwrap();
        let layered = DeviceConfig { layers, ..recorded.clone() };
        // Layers are changed while the device is used.
        assert!(is_as_wanted(&layered, &null(8192)) && is_as_wanted(&recorded, &layered));
    }
}

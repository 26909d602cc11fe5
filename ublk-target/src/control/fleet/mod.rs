//! Many devices in one process. They share the lanes, the thread that answers, and the main thread,
//! which adds and deletes them.

mod check;
mod error;
mod member;
mod reload;

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::io;
use std::process::Child;
use std::rc::Rc;
use std::sync::Arc;

use nix::poll::PollTimeout;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use uring_ext::Errno;
use uring_ext::control::Control;
use uring_ext::feature::Features;

use crate::config::DeviceConfig;
use crate::control::deletion;
use crate::control::error::{RecoverError, SetupError};
use crate::control::helpers::{protect_server, ready};
use crate::control::server::SharedServices;
use crate::device::description::Description;
use crate::io_thread::lanes::SharedLanes;
use crate::os::kernel;
use crate::os::steps::step;
use crate::os::wakeups::{Hangup, Wake, Wakeups};
use crate::socket::StatsThread;
pub use check::check;
pub use error::FleetError;
use error::MemberError;
use member::{Member, Preparation, check_apart};

/// The devices of a process.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct FleetConfig {
    /// Maximum number of shared lanes, 1 to 1,024; by default one per CPU.
    pub lanes: Option<u16>,
    /// The devices. Each has an id, and ids are unique.
    pub devices: Vec<DeviceConfig>,
}

/// Callbacks of a fleet.
pub struct FleetHooks<'a> {
    /// Reads the configuration again, or returns its errors.
    pub read: Box<dyn Fn() -> Result<FleetConfig, Vec<String>> + Sync + 'a>,
    /// Starts a process that gives the driver a command ([`deletion::command`]).
    pub command: Box<dyn Fn(u32, deletion::Command) -> io::Result<Child> + 'a>,
    /// Starts a process that quiesces a device ([`quiesce`](crate::control::upgrade::quiesce)).
    pub quiesce: Box<dyn Fn(u32) -> io::Result<Child> + 'a>,
    /// Called with each event of the fleet.
    pub tell: Box<dyn Fn(&FleetEvent) + 'a>,
}

/// An event of a fleet.
#[derive(Debug)]
pub enum FleetEvent {
    /// It starts the next device: number and total. Until the next event, it may take as long as the
    /// deletion of a dead server's leftovers, or a recovery.
    Begins(usize, usize),
    /// It serves these devices, of this total.
    Ready(Vec<Description>, usize),
    /// It is reading its configuration again.
    Reloading,
    /// It has done so: the ids of the devices that it has added, and the number that it serves.
    Reloaded(Vec<u32>, usize),
}

/// Serves devices until a signal ends the process.
///
/// # Errors
/// [`FleetError`].
pub fn serve(config: FleetConfig, hooks: &FleetHooks<'_>) -> Result<(), FleetError> {
    let node = Control::open_node()?;
    // There is only one thread at this point: the control ring has kernel workers.
    let backings = config.devices.iter().flat_map(|device| device.target.files());
    protect_server(&backings.collect::<Vec<_>>());
    let control = Control::with(node)?;
    let wakeups = ready(Hangup::IsApart)?;
    step("signals-blocked");
    open_many_files();
    let features = kernel::features(&control)?;
    // Checks all devices before it adds any.
    let begins = |done| (hooks.tell)(&FleetEvent::Begins(done, config.devices.len()));
    let preparations = preparations(&config.devices, &control, features, begins);
    let preparations = preparations.map_err(FleetError::Faults)?;
    let stats = StatsThread::start("ublk-stats")
        .map_err(|error| SetupError::new("cannot start a thread", Errno::of(&error)))?;
    let limit = config.lanes.map_or_else(cpus, usize::from);
    let lanes = Rc::new(RefCell::new(SharedLanes::new(limit)));
    let mut fleet = Fleet {
        control: Rc::new(control),
        features,
        wakeups,
        services: SharedServices { lanes, stats },
        members: Vec::new(),
        lanes: config.lanes,
    };
    let described = fleet.add_all(preparations, hooks);
    let wanted = config.devices.len();
    if described.is_empty() && wanted > 0 {
        return Err(FleetError::None);
    }
    (hooks.tell)(&FleetEvent::Ready(described, wanted));
    fleet.run(hooks);
    fleet.end(hooks)
}

/// Raises the limit of open files as far as allowed: each device has some, and the lanes' file
/// tables are limited by it.
fn open_many_files() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(errno) = raised {
        log::warn!("cannot raise the limit of open files: {errno}");
    }
}

/// The start states of all devices, or all errors.
fn preparations(
    devices: &[DeviceConfig],
    control: &Control,
    features: Features,
    begins: impl Fn(usize),
) -> Result<Vec<Preparation>, Vec<String>> {
    let (mut preparations, mut faults) = (Vec::new(), Vec::new());
    let ids = devices.iter().map(id_of).collect();
    for device in devices {
        // Each may have to wait until a backing is closed.
        begins(0);
        let preparation = Preparation::of(device, control, features).and_then(|preparation| {
            // A device that waits does not delay the others.
            let checked =
                if preparation.is_of_waiting() { Ok(()) } else { preparation.check_apart(&ids) };
            checked.map(|()| preparation)
        });
        match preparation {
            Ok(preparation) => preparations.push(preparation),
            // The server may have been started by hand. The others need not wait for it.
            Err(error @ MemberError::Recover(RecoverError::Served { .. })) => {
                log::error!("{error}; the other devices are served");
            }
            Err(error) => faults.push(format!("device {}: {error}", id_of(device))),
        }
    }
    if faults.is_empty() { Ok(preparations) } else { Err(faults) }
}

fn cpus() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Its id. The configuration guarantees that there is one.
fn id_of(device: &DeviceConfig) -> u32 {
    device.id.unwrap_or(u32::MAX)
}

/// The devices of this process.
struct Fleet {
    control: Rc<Control>,
    features: Features,
    wakeups: Arc<Wakeups>,
    services: SharedServices,
    /// In the order in which they were added.
    members: Vec<Member>,
    lanes: Option<u16>,
}

impl Fleet {
    /// Adds devices, or takes them over from a dead server. Logs those that cannot be added.
    fn add_all(
        &mut self,
        preparations: Vec<Preparation>,
        hooks: &FleetHooks<'_>,
    ) -> Vec<Description> {
        let mut described = Vec::new();
        let wanted = preparations.len();
        let ids =
            self.ids().into_iter().chain(preparations.iter().map(|it| id_of(&it.config))).collect();
        for (done, preparation) in preparations.into_iter().enumerate() {
            let id = id_of(&preparation.config);
            (hooks.tell)(&FleetEvent::Begins(done, wanted));
            if self.wakeups.last_signal().is_some() {
                break;
            }
            match self.begin(preparation, &ids, hooks) {
                Ok(description) => described.push(description),
                Err(error) => log::error!("device {id}: {error}"),
            }
        }
        let lanes = self.services.lanes.borrow().count();
        log::info!("{} devices, {lanes} lanes", self.members.len());
        described
    }

    /// Adds a device, or takes it over. Checks it against these and the existing ones.
    fn begin(
        &mut self,
        preparation: Preparation,
        ids: &BTreeSet<u32>,
        hooks: &FleetHooks<'_>,
    ) -> Result<Description, MemberError> {
        self.check_apart(&preparation, ids)?;
        let (member, description) = Member::begin(preparation, self, hooks)?;
        self.members.push(member);
        Ok(description)
    }

    /// Checks that no device of this process waits for another one of it. Waiting operations hold a
    /// lane's workers. A killed thread waits for its workers before its process closes the other
    /// device.
    fn check_apart(
        &self,
        preparation: &Preparation,
        ids: &BTreeSet<u32>,
    ) -> Result<(), MemberError> {
        preparation.check_apart(ids)?;
        if preparation.is_of_waiting() {
            // Others may be stacked on it already.
            let id = BTreeSet::from([id_of(&preparation.config)]);
            for member in &self.members {
                check_apart(id_of(&member.config), &member.below(), &id)?;
            }
        }
        Ok(())
    }

    fn ids(&self) -> BTreeSet<u32> {
        self.members.iter().map(|member| id_of(&member.config)).collect()
    }

    /// Serves until a signal ends the process.
    fn run(&mut self, hooks: &FleetHooks<'_>) {
        // Waits during the start may have consumed wake-ups, so the first check comes at once.
        let mut timeout = PollTimeout::ZERO;
        loop {
            // A signal may have come during another wait.
            if let Some(signal) = self.wakeups.last_signal() {
                return log::info!("{signal}: ending");
            }
            // Whatever the wake-up was, everything is checked below.
            let woken = self.wakeups.wait_or_hangup(None, timeout);
            if matches!(woken, Wake::Signal(_)) {
                continue;
            }
            let has_acted = self.look_after_members(hooks);
            let is_asked = self.wakeups.take_hangup() || woken == Wake::Hangup;
            if is_asked {
                self.reload(hooks);
            }
            // A wake-up during this may have been consumed by another wait.
            timeout = if has_acted || is_asked { PollTimeout::ZERO } else { PollTimeout::NONE };
        }
    }

    /// Whether one of them has ended.
    fn look_after_members(&mut self, hooks: &FleetHooks<'_>) -> bool {
        let mut has_acted = false;
        for mut member in std::mem::take(&mut self.members) {
            member.carry_out_control_requests();
            match member.look(hooks) {
                None => self.members.push(member),
                Some(end) => {
                    has_acted = true;
                    self.members.extend(end.carry_out(member, self, hooks));
                }
            }
        }
        has_acted
    }

    /// Stops all devices, the last first.
    fn end(mut self, hooks: &FleetHooks<'_>) -> Result<(), FleetError> {
        let mut failed = 0;
        while let Some(member) = self.members.pop() {
            let id = id_of(&member.config);
            if let Err(error) = member.stop(hooks) {
                log::error!("device {id}: {error}");
                failed += 1;
            }
        }
        if failed > 0 { Err(FleetError::NotEnded(failed)) } else { Ok(()) }
    }
}

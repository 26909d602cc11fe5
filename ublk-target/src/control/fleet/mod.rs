//! Many devices in one process: they share lanes, a thread that answers, and the main thread, which
//! makes them and takes them down.

mod check;
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
use crate::control::error::DeviceError;
use crate::control::helpers::{protect_server, ready};
use crate::control::recoverable::CannotRecoverDevice;
use crate::control::server::SharedServices;
use crate::device::description::Description;
use crate::io_thread::shared::SharedLanes;
use crate::os::kernel;
use crate::os::steps::step;
use crate::os::wakeups::{Hangup, Wake, Wakeups};
use crate::socket::StatsThread;
pub use check::check;
use member::{Member, Preparation, check_apart};

/// The devices of a process.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct FleetConfig {
    /// How many lanes they share at most, 1 to 1,024; one for each CPU if it is left out.
    pub lanes: Option<u16>,
    /// The devices. Each has an id, and no two have the same.
    pub devices: Vec<DeviceConfig>,
}

/// Why there is no fleet.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum FleetError {
    /// Some devices cannot be made, each of these for its own reason. Nothing has been made.
    #[error("{}", .0.join("\n"))]
    Faults(Vec<String>),
    /// What all of them need is unavailable.
    #[error(transparent)]
    Setup(#[from] DeviceError),
    /// None could be made.
    #[error("no device could be added; the log says why")]
    None,
    /// Not all could be taken down in order.
    #[error("{0} devices could not be stopped; the log says why")]
    NotEnded(usize),
}

/// Callbacks of a fleet.
pub struct FleetHooks<'a> {
    /// Reads the configuration again; or says what is wrong with it.
    pub read: Box<dyn Fn() -> Result<FleetConfig, Vec<String>> + Sync + 'a>,
    /// Starts a process that gives the driver a command ([`deletion::command`]).
    pub command: Box<dyn Fn(u32, deletion::Command) -> io::Result<Child> + 'a>,
    /// Starts a process that makes the I/O of a device wait ([`quiesce`](crate::control::upgrade::quiesce)).
    pub quiesce: Box<dyn Fn(u32) -> io::Result<Child> + 'a>,
    /// Is told what happens to all of them.
    pub tell: Box<dyn Fn(&FleetEvent) + 'a>,
}

/// What happens to a fleet.
#[derive(Debug)]
pub enum FleetEvent {
    /// It begins the next device, after so many of so many. Until the next news it may take as long as
    /// the deletion of what a dead server has left may, or the recovery.
    Begins(usize, usize),
    /// It serves these devices, of so many that it should.
    Ready(Vec<Description>, usize),
    /// It reads its configuration again.
    Reloading,
    /// It has done so, has made the devices with these ids, and serves so many.
    Reloaded(Vec<u32>, usize),
}

/// Serves devices until a signal ends the process.
///
/// # Errors
/// [`FleetError`].
pub fn serve(config: FleetConfig, hooks: &FleetHooks<'_>) -> Result<(), FleetError> {
    let node = Control::open_node().map_err(DeviceError::from)?;
    // While there is one thread: the control ring has workers of the kernel's.
    let backings = config.devices.iter().flat_map(|device| device.target.files());
    protect_server(&backings.collect::<Vec<_>>());
    let control = Control::with(node).map_err(DeviceError::from)?;
    let wakeups = ready(Hangup::IsApart)?;
    step("signals-blocked");
    open_many_files();
    let features = kernel::features(&control).map_err(DeviceError::from)?;
    // All of them before any is made.
    let begins = |done| (hooks.tell)(&FleetEvent::Begins(done, config.devices.len()));
    let preparations = preparations(&config.devices, &control, features, begins);
    let preparations = preparations.map_err(FleetError::Faults)?;
    let stats = StatsThread::start("ublk-stats")
        .map_err(|error| DeviceError::setup("cannot start a thread", Errno::of(&error)))?;
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

/// Lets the process have as many files open as it may: each device has some, and the lanes' tables of
/// files are no greater than that.
fn open_many_files() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(errno) = raised {
        log::warn!("cannot raise the limit of open files: {errno}");
    }
}

/// What the devices are begun with, or all that is wrong with them.
fn preparations(
    devices: &[DeviceConfig],
    control: &Control,
    features: Features,
    begins: impl Fn(usize),
) -> Result<Vec<Preparation>, Vec<String>> {
    let (mut preparations, mut faults) = (Vec::new(), Vec::new());
    let ids = devices.iter().map(id_of).collect();
    for device in devices {
        // Each may have to wait for a backing to be let go of.
        begins(0);
        let preparation = Preparation::of(device, control, features).and_then(|preparation| {
            // One that waits keeps nobody from the others.
            let checked =
                if preparation.is_of_waiting() { Ok(()) } else { preparation.check_apart(&ids) };
            checked.map(|()| preparation)
        });
        match preparation {
            Ok(preparation) => preparations.push(preparation),
            // Its server may be one that was started by hand. The others need not wait for that.
            Err(error @ DeviceError::Recover(CannotRecoverDevice::Served { .. })) => {
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

/// Its id; the configuration has seen to it that there is one.
fn id_of(device: &DeviceConfig) -> u32 {
    device.id.unwrap_or(u32::MAX)
}

/// The devices of this process.
struct Fleet {
    control: Rc<Control>,
    features: Features,
    wakeups: Arc<Wakeups>,
    services: SharedServices,
    /// In the order in which they were made.
    members: Vec<Member>,
    lanes: Option<u16>,
}

impl Fleet {
    /// Makes devices, or takes them over from a dead server. Those that cannot be made are logged.
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

    /// Makes a device, or takes it over, beside these and those that there are.
    fn begin(
        &mut self,
        preparation: Preparation,
        ids: &BTreeSet<u32>,
        hooks: &FleetHooks<'_>,
    ) -> Result<Description, DeviceError> {
        self.check_apart(&preparation, ids)?;
        let (member, description) = Member::begin(preparation, self, hooks)?;
        self.members.push(member);
        Ok(description)
    }

    /// Sees to it that no device of this process waits for another one of it. A lane's workers are held by
    /// what waits; and a thread that is killed waits for its workers before its process lets go of the
    /// other device.
    fn check_apart(
        &self,
        preparation: &Preparation,
        ids: &BTreeSet<u32>,
    ) -> Result<(), DeviceError> {
        preparation.check_apart(ids)?;
        if preparation.is_of_waiting() {
            // Others may stand on it already.
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

    /// Serves until a signal asks for the end.
    fn run(&mut self, hooks: &FleetHooks<'_>) {
        // What came while devices were made has been heard there.
        let mut timeout = PollTimeout::ZERO;
        loop {
            // One may have come while something else was waited for.
            if let Some(signal) = self.wakeups.last_signal() {
                return log::info!("{signal}: ending");
            }
            // Whatever it was: all is looked at below.
            let woken = self.wakeups.wait_or_hangup(None, timeout);
            if matches!(woken, Wake::Signal(_)) {
                continue;
            }
            let has_acted = self.look_after_members(hooks);
            let is_asked = self.wakeups.take_hangup() || woken == Wake::Hangup;
            if is_asked {
                self.reload(hooks);
            }
            // What came meanwhile may have been heard by who waited for something else.
            timeout = if has_acted || is_asked { PollTimeout::ZERO } else { PollTimeout::NONE };
        }
    }

    /// Whether one of them has come to its end.
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

    /// Takes all devices down, the last first.
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

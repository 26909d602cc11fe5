//! A device's life: it is added, served, stopped and deleted.

use std::cell::RefCell;
use std::fs::File;
use std::ops::ControlFlow;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver};
use std::time::Duration;

use ublk_engine::units::Bytes;
use uring_ext::control::{Control, Pending};
use uring_ext::feature::{self, Features};
use uring_ext::{Errno, sys};

use crate::backing::usage;
use crate::config::DeviceConfig;
use crate::config::lend::Choice;
use crate::control::error::{
    AddError, AnnounceError, LayersError, LayoutError, PlanError, QueueError, ServeError,
    SetupError,
};
use crate::control::helpers::{Helpers, protect_server, ready};
use crate::control::lanes::{DeviceLanes, LaneSetup};
use crate::control::plan::{Plan, add};
use crate::control::recoverable;
use crate::control::recovery;
use crate::control::supervision::Supervision;
use crate::device::description::{self, Description};
use crate::device::mark::Nonce;
use crate::device::paths::{self, RUN_DIR};
use crate::device::state_file::StateFile;
use crate::io_thread::lanes::SharedLanes;
use crate::io_thread::message::LaneMessage;
use crate::os::kernel;
use crate::os::process::Watch;
use crate::os::steps::step;
use crate::os::wait::{Wait, Words};
use crate::os::wakeups::{Wake, Wakeups};
use crate::socket;
use crate::socket::control_request::{ControlRequest, ControlSender};
use crate::socket::{Limits, StatsServer, StatsThread};

/// Adds a device, calls `on_live` when it is live, and serves it until a signal ends the server or
/// another process stops the device. If `on_live` fails, the device is deleted.
///
/// # Errors
/// [`AddError`]. The device is deleted. Exception: if a lane has failed, a device that outlives its
/// server ([`OnDeath`](crate::config::on_death::OnDeath)) waits for recovery.
pub fn serve(
    config: &DeviceConfig,
    supervisor: Option<u32>,
    helpers: &Helpers<'_>,
    on_live: impl FnOnce(&Description, &Choice) -> Result<(), AnnounceError>,
) -> Result<(), AddError> {
    let mut config = config.clone();
    config.target.begin_at_root();
    // Otherwise a wrong path would be reported only after the driver is loaded.
    let node = Control::open_node().map_err(|error| match config.target.missing_file() {
        Some(path) => AddError::from(PlanError::from(LayoutError::missing(path))),
        None => error.into(),
    })?;
    // There is only one thread at this point: the control ring has kernel workers.
    protect_server(&config.target.files());
    let control = Control::with(node)?;
    recoverable::refuse_new_on_unserved(&control, &config.target.files())?;
    // No signal ends the process between two steps.
    let wakeups = ready(helpers.hangup())?;
    step("signals-blocked");
    let plan = Plan::for_driver(&config, kernel::features(&control)?, None)?;
    step("planned");
    refuse_signal(&wakeups)?;
    let added = add(&control, &plan, plan.config.id)?;
    step("added");
    let mut server = Server::new(Rc::new(control), wakeups, added.dev_id, supervisor);
    let is_live = server.go_live(&plan, &added).and_then(|()| refuse_signal(&server.wakeups));
    let served = is_live.and_then(|()| Ok(server.live(plan, helpers, on_live)?));
    let ended = server.take_down();
    served.and(ended.map_err(AddError::from))
}

/// Takes a pending signal. All other events stay for later.
///
/// # Errors
/// [`AddError::Interrupted`] if there is one.
fn refuse_signal(wakeups: &Wakeups) -> Result<(), AddError> {
    wakeups.take_signal().map_or(Ok(()), |_| Err(AddError::Interrupted))
}

fn write(record: &StateFile) -> Result<(), SetupError> {
    let written = record.write(Path::new(RUN_DIR));
    written.map_err(|error| SetupError::of_io(&format!("cannot write to {RUN_DIR}"), &error))
}

/// Changes a record and its file. If the file cannot be written, the record stays as it was.
pub(super) fn rewrite(
    record: &mut Option<StateFile>,
    change: impl FnOnce(&mut StateFile),
) -> Result<(), SetupError> {
    let Some(record) = record else { return Ok(()) };
    let mut changed = record.clone();
    change(&mut changed);
    write(&changed)?;
    *record = changed;
    Ok(())
}

/// The answer to a client, which may be gone.
pub(super) fn told<T>(changed: Result<T, LayersError>) -> Result<T, String> {
    changed.map_err(|error| {
        if matches!(error, LayersError::Unwanted) {
            log::warn!("{error}");
        }
        error.to_string()
    })
}

/// What the devices of a fleet share.
#[derive(Clone)]
pub(super) struct SharedServices {
    pub lanes: Rc<RefCell<SharedLanes>>,
    pub stats: Arc<StatsThread>,
}

/// A device that has been added, with everything that serves it.
pub(super) struct Server {
    pub control: Rc<Control>,
    pub wakeups: Arc<Wakeups>,
    pub id: u32,
    pub lanes: DeviceLanes,
    pub(super) stats: Option<StatsServer>,
    pub cdev: Option<Arc<File>>,
    pub record: Option<StateFile>,
    pub supervisor: Option<u32>,
    pub(super) control_requests: Option<Receiver<ControlRequest>>,
    /// How often the layers were changed, or almost.
    pub(super) layer_changes: u64,
    /// It is left to the next server.
    pub(super) is_left: bool,
    /// What it shares with other devices of the process.
    pub services: Option<SharedServices>,
}

impl Server {
    pub fn new(
        control: Rc<Control>,
        wakeups: Arc<Wakeups>,
        id: u32,
        supervisor: Option<u32>,
    ) -> Self {
        Self {
            control,
            wakeups,
            id,
            lanes: DeviceLanes::default(),
            stats: None,
            cdev: None,
            record: None,
            supervisor,
            control_requests: None,
            layer_changes: 0,
            is_left: false,
            services: None,
        }
    }

    /// Starts the added device.
    pub fn go_live(
        &mut self,
        plan: &Plan,
        added: &sys::ublksrv_ctrl_dev_info,
    ) -> Result<(), AddError> {
        let (wanted, given) = (Features(plan.choice.flags), Features(added.flags));
        if let Some(feature) = feature::ALL.iter().find(|it| wanted.has(**it) && !given.has(**it)) {
            return Err(AddError::TakenBack { feature: feature.name });
        }
        if added.nr_hw_queues < plan.config.queues {
            log::warn!("the driver allows only {} queues, one per CPU", added.nr_hw_queues);
        }
        let cdev = Arc::new(self.open_cdev()?);
        self.cdev = Some(Arc::clone(&cdev));
        step("opened");
        self.start_lanes(added, plan, &cdev)?;
        step("lanes-up");
        let layout = &plan.layout;
        self.control.set_params(self.id, layout.limits.params(layout.size, layout.buffer_bytes))?;
        step("parameters-set");
        self.take_charge(plan)?;
        // Otherwise the driver would start a device that another process has deleted.
        if self.is_removed() {
            return Err(AddError::Deleted(self.id));
        }
        let start = self.control.start(self.id, std::process::id())?;
        step("start-sent");
        self.await_start(start)
    }

    /// Writes the state file with this server, and starts to answer on the socket.
    pub fn take_charge(&mut self, plan: &Plan) -> Result<(), ServeError> {
        let (layout, config) = (&plan.layout, plan.config.clone());
        let config = DeviceConfig { id: Some(self.id), ..config };
        let mut record = StateFile::new(self.id, layout.known(), config);
        record.supervisor = self.supervisor;
        record.incarnation = plan.incarnation;
        record.diskseq = description::diskseq(self.id);
        record.nonce = Nonce::of(&self.control.info(self.id)?);
        self.record = Some(record);
        self.write_record()?;
        step("recorded");
        self.start_stats()?;
        step("listening");
        Ok(())
    }

    pub fn write_record(&self) -> Result<(), SetupError> {
        self.record.as_ref().map_or(Ok(()), write)
    }

    /// Tells the user that the device is live, and serves it.
    pub fn live(
        &mut self,
        plan: Plan,
        helpers: &Helpers<'_>,
        on_live: impl FnOnce(&Description, &Choice) -> Result<(), AnnounceError>,
    ) -> Result<(), ServeError> {
        let description = self.describe_live()?;
        on_live(&description, &plan.choice)?;
        step("announced");
        self.wait_for_the_end(plan, helpers)
    }

    /// Records the disk in the state file, and describes the device.
    pub fn describe_live(&mut self) -> Result<Description, ServeError> {
        if let Some(record) = self.record.as_mut().filter(|record| record.diskseq.is_none()) {
            record.diskseq = description::diskseq(self.id);
            self.write_record()?;
        }
        step("live");
        let description = Description::of(&self.control, self.id)?;
        log::info!("{} is live", description.device.display());
        Ok(description)
    }

    /// Opens the character device. devtmpfs makes its node at once. In other places (containers, a
    /// slow udev) it may take a moment.
    fn open_cdev(&self) -> Result<File, AddError> {
        let path = paths::char_path(self.id);
        let failed = |errno| SetupError::new(format!("cannot open {}", path.display()), errno);
        let wait = Wait::at_most(Duration::from_secs(5)).every(Duration::from_millis(10));
        let opened = wait.or_signal(&self.wakeups).until(|| {
            let error = match File::options().read(true).write(true).open(&path) {
                Ok(file) if usage::is_char_device_of(&file, self.id) => {
                    return ControlFlow::Break(Ok(file));
                }
                Ok(_) => return ControlFlow::Break(Err(recovery::wrong_node(&path).into())),
                Err(error) => Errno::of(&error),
            };
            if self.is_deleted() {
                // Another process has deleted it.
                return ControlFlow::Break(Err(AddError::Deleted(self.id)));
            }
            match error {
                Errno::ENOENT => ControlFlow::Continue(error),
                _ => ControlFlow::Break(Err(failed(error).into())),
            }
        });
        opened.unwrap_or_else(|unmet| match unmet.signal {
            Some(_) => Err(AddError::Interrupted),
            None => Err(failed(unmet.reason).into()),
        })
    }

    /// Whether the driver has deleted the device, although it is still open here.
    pub(super) fn is_removed(&self) -> bool {
        let node = self.cdev.as_ref().and_then(|cdev| cdev.metadata().ok());
        node.is_some_and(|node| node.nlink() == 0)
    }

    pub(super) fn is_deleted(&self) -> bool {
        let Ok(info) = self.control.info(self.id) else { return true };
        Nonce::of(&info) != Some(Nonce::own())
    }

    pub fn start_lanes(
        &mut self,
        info: &sys::ublksrv_ctrl_dev_info,
        plan: &Plan,
        cdev: &Arc<File>,
    ) -> Result<(), QueueError> {
        let (control, wakeups) = (&*self.control, &self.wakeups);
        let shared = self.services.as_ref().map(|services| &services.lanes);
        self.lanes.start(&LaneSetup { control, info, plan, cdev, wakeups, shared })
    }

    fn start_stats(&mut self) -> Result<(), SetupError> {
        let path = socket::socket_path(Path::new(RUN_DIR), self.id);
        let lanes = self.lanes.handles();
        let (control_sender, control_requests) = ControlSender::new(Arc::clone(&self.wakeups));
        self.control_requests = Some(control_requests);
        let limits = Limits::default();
        let started = match &self.services {
            None => StatsServer::start(path.clone(), self.id, lanes, control_sender, limits),
            Some(services) => {
                services.stats.listen(path.clone(), self.id, lanes, control_sender, limits)
            }
        };
        let started = started.map_err(|error| {
            SetupError::new(format!("cannot listen on {}", path.display()), Errno::of(&error))
        });
        self.stats = Some(started?);
        Ok(())
    }

    /// Waits until the device is live. Meanwhile the driver scans for partitions, and the lanes
    /// serve the scan.
    fn await_start(&mut self, start: Pending) -> Result<(), AddError> {
        let is_live = self.await_driver(start, true)?;
        if is_live { Ok(()) } else { Err(AddError::Interrupted) }
    }

    /// As [`Server::await_start`], for a device that was live before: signals wait until it is live
    /// again.
    pub fn await_recovery(&mut self, end: Pending) -> Result<(), ServeError> {
        self.await_driver(end, false).map(drop)
    }

    /// Waits until the device is live. With `heed`, a signal ends the wait. Returns whether the device
    /// is live.
    fn await_driver(&mut self, mut start: Pending, heed: bool) -> Result<bool, ServeError> {
        let (id, control, lanes) = (self.id, &self.control, &mut self.lanes);
        let words = Duration::from_secs(10);
        // The check itself waits.
        let mut wait = Wait::endless().every(Duration::ZERO).reporting(words, words, |what, _| {
            log::warn!("waiting for {what}");
        });
        if heed {
            wait = wait.or_signal(&self.wakeups);
        }
        let what = Words(|| format!("the driver to start device {id}"));
        let started = wait.until(|| {
            if let Some(answer) = control.wait(&mut start, Duration::from_millis(200)) {
                return ControlFlow::Break(answer.map(drop).map_err(ServeError::from));
            }
            if lanes.has_ended() {
                return ControlFlow::Break(Err(lanes.failure().into()));
            }
            ControlFlow::Continue(&what)
        });
        match started {
            Ok(started) => started.map(|()| true),
            // Only a signal ends the wait.
            Err(_) => Ok(false),
        }
    }

    /// Serves until a signal comes, or the lanes end because the device was stopped.
    fn wait_for_the_end(
        &mut self,
        mut plan: Plan,
        helpers: &Helpers<'_>,
    ) -> Result<(), ServeError> {
        let mut supervision = Supervision::of(self.supervisor);
        loop {
            let pause = supervision.pause();
            let supervisor = supervision.watch.as_ref().and_then(Watch::fd);
            let woken = self.wakeups.wait_or_hangup(supervisor, pause);
            match woken {
                Wake::Signal(signal) => {
                    log::info!("{signal}: stopping");
                    step("stopping");
                    return self.stop(&*helpers.stop);
                }
                Wake::LaneEnded if !self.wakeups.take_undelivered() => break,
                Wake::LaneEnded | Wake::Undelivered => {
                    // Stopping a device also takes fetches back.
                    if self.is_live() {
                        log::warn!("another process has quiesced the device");
                        plan = self.hand_over_to_self(plan)?;
                    } else if woken == Wake::LaneEnded {
                        break;
                    }
                }
                Wake::ControlRequest => {
                    while let Some(control_request) = self.control_request() {
                        plan = self.carry_out(control_request, plan, helpers)?;
                    }
                }
                Wake::Hangup => {
                    if let Some(reopen) = &helpers.reopen_log {
                        reopen(self.id);
                    }
                }
                Wake::Other => supervision.has_died(),
                Wake::TimedOut => {
                    self.supervisor = supervision.revive(|| (helpers.supervise)(self.id));
                    if let Some(record) = &mut self.record {
                        record.supervisor = self.supervisor;
                    }
                    if let Err(error) = self.write_record() {
                        log::error!("{error}");
                    }
                }
            }
        }
        let is_stopped =
            self.control.info(self.id).map_or(true, |info| !description::has_disk(&info));
        if is_stopped {
            return Ok(());
        }
        let error = self.lanes.failure();
        if plan.config.on_death.is_recoverable() {
            log::error!("{error}; the device waits for recovery");
            self.is_left = true;
        }
        Err(error.into())
    }

    /// Carries out a control request, if its client still waits.
    fn carry_out(
        &mut self,
        control_request: ControlRequest,
        mut plan: Plan,
        helpers: &Helpers<'_>,
    ) -> Result<Plan, ServeError> {
        match control_request {
            ControlRequest::Grow { size, reply } if reply.begin() => {
                let grown = self.grow(&mut plan, size);
                reply.send(grown.map_err(|error| error.to_string()));
                Ok(plan)
            }
            // The device was stopped meanwhile: nobody can serve it any more.
            ControlRequest::Upgrade { reply, .. } if !self.is_live() => {
                reply.send(Err("the device is stopped".to_owned()));
                Ok(plan)
            }
            ControlRequest::Upgrade { program, reply } if reply.begin() => {
                self.hand_over(plan, &program, reply, helpers)
            }
            ControlRequest::ChangeLayers { edit, limit, reply } if reply.begin() => {
                let changed = self.change_layers(&mut plan, &edit, limit, || reply.is_wanted());
                reply.send(told(changed));
                Ok(plan)
            }
            ControlRequest::Grow { .. }
            | ControlRequest::Upgrade { .. }
            | ControlRequest::ChangeLayers { .. } => {
                log::warn!("the client has given up on its request; nothing is done");
                Ok(plan)
            }
        }
    }

    /// Whether the device is neither stopped nor without a server, according to the driver.
    fn is_live(&self) -> bool {
        let info = self.control.info(self.id);
        info.is_ok_and(|info| u32::from(info.state) == sys::UBLK_S_DEV_LIVE)
    }

    /// A control request.
    pub fn control_request(&self) -> Option<ControlRequest> {
        self.control_requests.as_ref()?.try_recv().ok()
    }

    /// Serves the bytes by which the backings have grown. Returns the new maximum size of the
    /// device. `size` is the size of a null device.
    pub fn grow(&mut self, plan: &mut Plan, size: Option<Bytes>) -> Result<Bytes, ServeError> {
        let mut target = plan.config.target.clone();
        if let (Some(null_size), Some(size)) = (target.null_size(), size) {
            *null_size = size.max(*null_size);
        }
        let grown = plan.layout.grown(&target)?;
        // The next server must know what this one serves.
        rewrite(&mut self.record, |record| {
            record.backings.clone_from(&grown.known);
            record.config.target.clone_from(&target);
        })?;
        let (reply, done) = mpsc::sync_channel(self.lanes.count());
        self.lanes.send(|| {
            let (base, reply) = (Box::new(grown.base.clone()), reply.clone());
            LaneMessage::Grow { base, size: grown.size.0, reply }
        });
        drop(reply);
        for _ in 0..self.lanes.count() {
            // Lanes answer between two batches. A lane that has ended closes the channel.
            done.recv().map_err(|_| SetupError::new("a lane has ended", Errno::ENODEV))?;
        }
        plan.layout.target.replace_base(&grown.base);
        plan.layout.size = grown.size;
        plan.config.target = target;
        log::info!("the device may grow to {}", grown.size);
        Ok(grown.size)
    }
}

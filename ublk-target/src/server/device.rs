//! A device's life: added, served, stopped, deleted.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::Child;
use std::sync::Arc;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bufreg::Incarnation;
use nix::poll::PollTimeout;
use nix::sys::mman::{MlockAllFlags, mlockall};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use uring_ext::control::{Control, ControlError, Pending};
use uring_ext::feature::Features;
use uring_ext::{Errno, sys};

use super::config::{DeviceConfig, DeviceError};
use super::lane::{self, LaneConfig, LaneReport};
use super::layout::{Layout, slot_table};
use super::message::{LaneHandle, LaneMessage};
use super::polling;
use super::signals::{Wake, Wakeups};
use crate::engine::{EngineConfig, QueueIdentity, SlotTable};
use crate::kernel;
use crate::lane::LaneError;
use crate::lane::fault::{self, Faults, Injected};
use crate::lend::{self, Choice, LendMode};
use crate::state::{self, Description, RUN_DIR, StateFile};
use crate::stats::{self, Limits, StatsServer};
use crate::units::Qid;

/// Starts a process that stops the device with an id.
pub type Stopper<'a> = dyn Fn(u32) -> std::io::Result<Child> + 'a;

/// Stops a device and waits until its outstanding I/O is completed or failed. One that is gone is
/// stopped.
///
/// # Errors
/// Those of the driver.
pub fn stop(id: u32) -> Result<(), ControlError> {
    let control = Control::open()?;
    let stopped = control.stop(id).and_then(|mut pending| {
        loop {
            if let Some(answer) = control.wait(&mut pending, Duration::from_secs(10)) {
                return answer;
            }
        }
    });
    match stopped {
        Err(error) if !state::is_missing(&error) => Err(error),
        Ok(_) | Err(_) => Ok(()),
    }
}

/// The driver's device numbers have 20 bits (`UBLK_MINORS`).
const MAX_ID: u32 = (1 << 20) - 1;

/// Adds a device, calls `on_live` when it is, and serves it until a signal ends the server or
/// somebody stops the device. If `on_live` fails, the device is taken back.
///
/// `stopper` starts a process that stops a device (see [`stop`]).
///
/// # Errors
/// [`DeviceError`]; nothing is left of the device.
pub fn serve(
    config: &DeviceConfig,
    stopper: &Stopper<'_>,
    on_live: impl FnOnce(&Description, &Choice) -> Result<(), DeviceError>,
) -> Result<(), DeviceError> {
    if let Some(id) = config.id.filter(|id| *id > MAX_ID) {
        return Err(DeviceError::IdTooBig(id));
    }
    let control = Control::open()?;
    let plan = Plan::make(config, &control)?;
    lock_memory();
    log::info!("lend mode {}: {}", plan.choice.mode, plan.choice.reason);
    let wakeups =
        Wakeups::new().map_err(|errno| DeviceError::setup("cannot wait for signals", errno))?;
    let wakeups = Arc::new(wakeups);
    let added = add(&control, config, &plan)?;
    let id = added.dev_id;
    let mut server = Server { control, wakeups, id, lanes: Vec::new(), stats: None, cdev: None };
    let served = server.go_live(config, &plan, added).and_then(|()| {
        let description = Description::of(&server.control, id)?;
        log::info!("{} is live", description.device.display());
        on_live(&description, &plan.choice)?;
        server.wait_for_the_end(stopper)
    });
    let ended = server.take_down();
    served.and(ended)
}

/// Keeps the program in memory. When memory is short and all that could be freed is dirty, pages
/// come free by writing through devices such as ours; a server whose own code was evicted could not
/// run to write them. What is mapped later (stacks of threads) is locked as it is used.
///
/// Not vital, so a failure is logged and no more.
fn lock_memory() {
    let on_fault = MlockAllFlags::from_bits_retain(libc::MCL_ONFAULT);
    let locked = mlockall(MlockAllFlags::MCL_CURRENT)
        .and_then(|()| mlockall(MlockAllFlags::MCL_FUTURE | on_fault));
    if let Err(errno) = locked {
        log::warn!("cannot lock the server's memory: {errno}");
    }
}

/// What is decided before the driver is asked for anything.
struct Plan {
    choice: Choice,
    layout: Layout,
    slots: SlotTable,
    faults: Option<Faults>,
}

impl Plan {
    fn make(config: &DeviceConfig, control: &Control) -> Result<Self, DeviceError> {
        let features = kernel::features(control)?;
        let choice = config.lend.choose(features)?;
        if config.io_lane {
            lend::check_io_lane(features)?;
            if choice.mode != LendMode::Slot {
                return Err(DeviceError::Mismatch {
                    option: "--io-lane",
                    needs: "registration by command",
                    lend: choice.mode,
                    instead: "leave it out, or use `--lend slot`",
                });
            }
        }
        polling::check(config)?;
        let faults = match std::env::var(fault::VARIABLE) {
            Ok(list) => Some(Faults::parse(&list)?),
            Err(_) => None,
        };
        let layout = Layout::open(config, choice.mode)?;
        let slots = slot_table(config, &choice, &layout.target)?;
        layout.check_memory(config.queues, config.depth, choice.mode, &slots)?;
        Ok(Self { choice, layout, slots, faults })
    }
}

fn add(
    control: &Control,
    config: &DeviceConfig,
    plan: &Plan,
) -> Result<sys::ublksrv_ctrl_dev_info, DeviceError> {
    let info = sys::ublksrv_ctrl_dev_info {
        dev_id: config.id.unwrap_or(u32::MAX),
        nr_hw_queues: config.queues,
        queue_depth: config.depth,
        max_io_buf_bytes: plan.layout.buffer_bytes,
        ublksrv_pid: i32::try_from(std::process::id()).unwrap_or(0),
        flags: plan.choice.flags | uring_ext::feature::CMD_IOCTL_ENCODE.bit,
        ..Default::default()
    };
    let mut added = control.add(info);
    // A device that is gone keeps its id for a moment, while the driver takes it apart
    // (`ublk_cdev_rel`), and nobody tells when that is over.
    let deadline = Instant::now() + Duration::from_secs(5);
    while let (Err(error), Some(id)) = (&added, config.id) {
        let is_taken = error.errno() == Some(Errno::EEXIST);
        let is_gone = || control.info(id).is_err_and(|error| state::is_missing(&error));
        if !is_taken || !is_gone() || Instant::now() > deadline {
            break;
        }
        std::thread::sleep(Duration::from_millis(5));
        added = control.add(info);
    }
    added.map_err(|error| match (error.errno(), config.id) {
        (Some(Errno::EEXIST), Some(id)) => DeviceError::IdTaken(id),
        (Some(Errno::EACCES | Errno::ENOSPC), _) => DeviceError::NoRoom,
        _ => DeviceError::Control(error),
    })
}

struct LaneThread {
    handle: LaneHandle,
    thread: JoinHandle<Result<LaneReport, LaneError>>,
}

/// A device that has been added, and what serves it.
struct Server {
    control: Control,
    wakeups: Arc<Wakeups>,
    id: u32,
    lanes: Vec<LaneThread>,
    stats: Option<StatsServer>,
    cdev: Option<Arc<File>>,
}

impl Server {
    fn go_live(
        &mut self,
        config: &DeviceConfig,
        plan: &Plan,
        added: sys::ublksrv_ctrl_dev_info,
    ) -> Result<(), DeviceError> {
        if let Some(feature) = Features(added.flags).first_missing(plan.choice.mode.needs()) {
            return Err(DeviceError::TakenBack { feature: feature.name });
        }
        if added.nr_hw_queues < config.queues {
            log::warn!("the driver gives {} queues, one for each CPU", added.nr_hw_queues);
        }
        let cdev = Arc::new(self.open_cdev()?);
        self.cdev = Some(Arc::clone(&cdev));
        self.start_lanes(&added, config, plan, &cdev)?;
        let (layout, lend) = (&plan.layout, plan.choice.mode);
        self.control.set_params(self.id, layout.limits.params(layout.size, layout.buffer_bytes))?;
        StateFile::new(self.id, &layout.name, lend, layout.backing_paths())
            .write(Path::new(RUN_DIR))
            .map_err(|error| {
                DeviceError::setup(format!("cannot write to {RUN_DIR}"), Errno::of(&error))
            })?;
        self.start_stats()?;
        let start = self.control.start(self.id, std::process::id())?;
        self.await_start(start)
    }

    /// Opens the character device. Its node is made by devtmpfs at once, but elsewhere (in
    /// containers, under a slow udev) it may take a moment.
    fn open_cdev(&self) -> Result<File, DeviceError> {
        let path = format!("/dev/ublkc{}", self.id);
        let deadline = Instant::now() + Duration::from_secs(5);
        loop {
            match File::options().read(true).write(true).open(&path) {
                Ok(file) => return Ok(file),
                Err(error) if Errno::of(&error) == Errno::ENOENT && Instant::now() < deadline => {
                    if let Wake::Signal(_) = self.wakeups.wait(PollTimeout::from(10_u8)) {
                        return Err(DeviceError::Interrupted);
                    }
                }
                Err(error) => {
                    let doing = format!("cannot open {path}");
                    return Err(DeviceError::setup(doing, Errno::of(&error)));
                }
            }
        }
    }

    fn start_lanes(
        &mut self,
        info: &sys::ublksrv_ctrl_dev_info,
        config: &DeviceConfig,
        plan: &Plan,
        cdev: &Arc<File>,
    ) -> Result<(), DeviceError> {
        let mut waiting = Vec::new();
        for qid in (0..info.nr_hw_queues).map(Qid) {
            let (handle, inbox, wake) = LaneHandle::new(qid, info.queue_depth)
                .map_err(|errno| DeviceError::setup("cannot make a lane", errno))?;
            let config = LaneConfig {
                engine: EngineConfig {
                    queue: QueueIdentity { device: self.id, qid, depth: info.queue_depth },
                    incarnation: Incarnation(0),
                    lend: plan.choice.mode,
                    slots: plan.slots,
                    geometry: plan.layout.geometry(),
                    deadline: config.io_timeout.map(as_ns),
                },
                io_lane: config.io_lane,
                polling: plan.layout.polling,
                faults: plan.faults,
                buffer_bytes: plan.layout.pool_bytes(),
                target: plan.layout.target.for_queue(qid),
                cdev: Arc::clone(cdev),
                backings: Arc::clone(&plan.layout.backings),
                cpus: self.control.queue_affinity(self.id, qid.0).unwrap_or_default(),
                wake,
            };
            let (ready, is_ready) = mpsc::sync_channel(1);
            let wakeups = Arc::clone(&self.wakeups);
            let thread = std::thread::Builder::new()
                .name(format!("ublkb{}-q{}", self.id, qid.0))
                .spawn(move || {
                    let served = lane::serve(&config, inbox, &ready);
                    // The files go before the end is announced.
                    drop(config);
                    wakeups.lane_ended();
                    served
                })
                .map_err(|error| DeviceError::setup("cannot start a lane", Errno::of(&error)))?;
            self.lanes.push(LaneThread { handle, thread });
            waiting.push((qid, is_ready));
        }
        for (qid, is_ready) in waiting {
            // A closed channel is a lane that panicked.
            let died = Err(LaneError::Ring(Errno::EIO));
            is_ready.recv().unwrap_or(died).map_err(|error| DeviceError::Lane { qid, error })?;
        }
        Ok(())
    }

    fn start_stats(&mut self) -> Result<(), DeviceError> {
        let path = stats::socket_path(Path::new(RUN_DIR), self.id);
        let lanes = self.lanes.iter().map(|lane| lane.handle.clone()).collect();
        let started = StatsServer::start(path.clone(), self.id, lanes, Limits::default());
        let started = started.map_err(|error| {
            DeviceError::setup(format!("cannot listen on {}", path.display()), Errno::of(&error))
        });
        self.stats = Some(started?);
        Ok(())
    }

    /// Waits until the device is live. The driver scans for partitions meanwhile, which the
    /// lanes serve.
    fn await_start(&mut self, mut start: Pending) -> Result<(), DeviceError> {
        let began = Instant::now();
        let mut said = 0;
        loop {
            if let Some(answer) = self.control.wait(&mut start, Duration::from_millis(200)) {
                return answer.map(drop).map_err(DeviceError::Control);
            }
            match self.wakeups.wait(PollTimeout::ZERO) {
                Wake::Signal(_) => return Err(DeviceError::Interrupted),
                Wake::LaneEnded => return Err(self.lane_failure()),
                Wake::Other | Wake::TimedOut => {}
            }
            if began.elapsed().as_secs() / 10 > said {
                said += 1;
                log::warn!("waiting for the driver to start device {}", self.id);
            }
        }
    }

    /// The error of the first lane that has ended with one.
    fn lane_failure(&mut self) -> DeviceError {
        let ended = self.lanes.iter().position(|lane| lane.thread.is_finished());
        let Some(lane) = ended.map(|index| self.lanes.swap_remove(index)) else {
            return DeviceError::setup("a lane ended early", Errno::EIO);
        };
        let ended = lane.thread.join().unwrap_or(Err(LaneError::Ring(Errno::EIO)));
        let error = ended.err().unwrap_or(LaneError::Ring(Errno::ENODEV));
        DeviceError::Lane { qid: lane.handle.qid, error }
    }

    /// Serves until a signal comes, or the lanes end because the device was stopped.
    fn wait_for_the_end(&mut self, stopper: &Stopper<'_>) -> Result<(), DeviceError> {
        match self.wakeups.wait(PollTimeout::NONE) {
            Wake::Signal(signal) => {
                log::info!("{signal}: stopping");
                self.stop(stopper)
            }
            Wake::LaneEnded | Wake::Other | Wake::TimedOut => Ok(()),
        }
    }

    /// Stops the device, which completes or fails outstanding I/O. It may take as long as that
    /// I/O; a second signal cancels what is in flight on the backings, and a third ends the wait
    /// and leaves the rest to the kernel and to `del`.
    ///
    /// Another process does it. A server that is killed while a command of its own waits for
    /// outstanding I/O would wait for itself, for ever: the command keeps its files open, so the
    /// driver never learns of its death and fails no I/O.
    fn stop(&self, stopper: &Stopper<'_>) -> Result<(), DeviceError> {
        let failed = |error: std::io::Error| {
            DeviceError::setup("cannot start a process that stops the device", Errno::of(&error))
        };
        let mut process = stopper(self.id).map_err(failed)?;
        let pidfd = pidfd_open(Pid::from_child(&process), PidfdFlags::empty())
            .map_err(|errno| failed(errno.into()))?;
        let mut cancelled = false;
        let began = Instant::now();
        let mut said = 0;
        loop {
            match process.try_wait().map_err(failed)? {
                Some(status) if status.success() => return Ok(()),
                // It has said why.
                Some(_) => return Err(DeviceError::NotStopped),
                None => {}
            }
            let woken = self.wakeups.wait_or(pidfd.as_fd(), PollTimeout::from(10_000_u16));
            if let Wake::Signal(signal) = woken {
                if cancelled {
                    log::error!("{signal} again: ending with I/O outstanding");
                    std::process::exit(1);
                }
                log::warn!("{signal} again: cancelling the I/O on the backings");
                cancelled = true;
                for lane in &self.lanes {
                    lane.handle.send(LaneMessage::CancelAll);
                }
            }
            if began.elapsed().as_secs() / 10 > said {
                said += 1;
                log::warn!(
                    "waiting for the outstanding I/O of {}",
                    state::block_path(self.id).display()
                );
            }
        }
    }

    /// Deletes the device and waits for the lanes, whose fetches thereby end. The character
    /// device stays open until the deletion is under way, so that the id cannot have passed to
    /// another device.
    fn take_down(mut self) -> Result<(), DeviceError> {
        let deleted = self.control.delete(self.id).and_then(|pending| self.control.finish(pending));
        let mut result = match deleted {
            Err(error) if !state::is_missing(&error) => Err(DeviceError::Control(error)),
            Ok(_) | Err(_) => Ok(()),
        };
        for lane in self.lanes.drain(..) {
            let qid = lane.handle.qid;
            match lane.thread.join().unwrap_or(Err(LaneError::Ring(Errno::EIO))) {
                Ok(report) => report_lane(qid, &report),
                Err(error) => result = result.and(Err(DeviceError::Lane { qid, error })),
            }
        }
        // It tells of the lanes until they have ended. The id is still this device's, so that no
        // other server can have made a socket of this name.
        drop(self.stats.take());
        StateFile::remove(Path::new(RUN_DIR), self.id);
        drop(self.cdev.take());
        result
    }
}

fn report_lane(qid: Qid, report: &LaneReport) {
    log::info!("queue {}: {}", qid.0, report.stats);
    let Injected { short, again } = report.injected;
    if short + again > 0 {
        log::warn!("queue {}: faults asked for: {short} short, {again} again", qid.0);
    }
    for leak in &report.leaks {
        log::error!("queue {}: leaked: {leak}", qid.0);
    }
    if report.quarantined > 0 {
        log::warn!("queue {}: {} slots in quarantine at the end", qid.0, report.quarantined);
    }
    if report.stats.unexpected > 0 {
        log::error!("queue {}: {} unexpected events", qid.0, report.stats.unexpected);
    }
}

fn as_ns(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

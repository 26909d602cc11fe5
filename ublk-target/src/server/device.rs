//! A device's life: added, served, stopped, deleted.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::poll::PollTimeout;
use uring_ext::control::{Control, Pending};
use uring_ext::{Errno, sys};

use super::config::{DeviceConfig, DeviceError};
use super::lane::{self, LaneConfig, LaneError, LaneReport};
use super::layout::Layout;
use super::signals::{Wake, Wakeups};
use crate::engine::QueueIdentity;
use crate::lend::{Choice, LendMode};
use crate::state::{self, Description, RUN_DIR, StateFile};
use crate::units::Qid;

/// The driver's device numbers have 20 bits (`UBLK_MINORS`).
const MAX_ID: u32 = (1 << 20) - 1;

/// Adds a device, calls `on_live` when it is, and serves it until a signal ends the server or
/// somebody stops the device. If `on_live` fails, the device is taken back.
///
/// # Errors
/// [`DeviceError`]; nothing is left of the device.
pub fn serve(
    config: &DeviceConfig,
    on_live: impl FnOnce(&Description, &Choice) -> Result<(), DeviceError>,
) -> Result<(), DeviceError> {
    if let Some(id) = config.id.filter(|id| *id > MAX_ID) {
        return Err(DeviceError::IdTooBig(id));
    }
    let control = Control::open()?;
    let choice = config.lend.choose(control.features()?)?;
    log::info!("lend mode {}: {}", choice.mode, choice.reason);
    let layout = Layout::open(config, choice.mode)?;
    let wakeups =
        Wakeups::new().map_err(|errno| DeviceError::setup("cannot wait for signals", errno))?;
    let wakeups = Arc::new(wakeups);
    let id = add(&control, config, &layout, choice.mode)?;
    let mut server = Server { control, wakeups, id, lanes: Vec::new(), cdev: None };
    let served = server.go_live(config, &layout, choice.mode).and_then(|()| {
        let description = Description::of(&server.control, id)?;
        log::info!("{} is live", description.device.display());
        on_live(&description, &choice)?;
        server.wait_for_the_end()
    });
    let ended = server.take_down();
    served.and(ended)
}

fn add(
    control: &Control,
    config: &DeviceConfig,
    layout: &Layout,
    lend: LendMode,
) -> Result<u32, DeviceError> {
    let info = sys::ublksrv_ctrl_dev_info {
        dev_id: config.id.unwrap_or(u32::MAX),
        nr_hw_queues: config.queues,
        queue_depth: config.depth,
        max_io_buf_bytes: layout.buffer_bytes,
        ublksrv_pid: i32::try_from(std::process::id()).unwrap_or(0),
        flags: lend.flags() | uring_ext::feature::CMD_IOCTL_ENCODE.bit,
        ..Default::default()
    };
    let added = control.add(info).map_err(|error| match (error.errno(), config.id) {
        (Some(Errno::EEXIST), Some(id)) => DeviceError::IdTaken(id),
        (Some(Errno::EACCES | Errno::ENOSPC), _) => DeviceError::NoRoom,
        _ => DeviceError::Control(error),
    })?;
    Ok(added.dev_id)
}

struct LaneThread {
    qid: Qid,
    thread: JoinHandle<Result<LaneReport, LaneError>>,
}

/// A device that has been added, and what serves it.
struct Server {
    control: Control,
    wakeups: Arc<Wakeups>,
    id: u32,
    lanes: Vec<LaneThread>,
    cdev: Option<Arc<File>>,
}

impl Server {
    fn go_live(
        &mut self,
        config: &DeviceConfig,
        layout: &Layout,
        lend: LendMode,
    ) -> Result<(), DeviceError> {
        let info = self.control.info(self.id)?;
        if info.nr_hw_queues < config.queues {
            log::warn!("the driver gives {} queues, one for each CPU", info.nr_hw_queues);
        }
        let cdev = Arc::new(self.open_cdev()?);
        self.cdev = Some(Arc::clone(&cdev));
        self.start_lanes(&info, layout, lend, &cdev)?;
        self.control.set_params(self.id, layout.limits.params(layout.size, layout.buffer_bytes))?;
        StateFile::new(self.id, layout.name, lend, layout.backing_paths())
            .write(Path::new(RUN_DIR))
            .map_err(|error| {
                DeviceError::setup(format!("cannot write to {RUN_DIR}"), Errno::of(&error))
            })?;
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
        layout: &Layout,
        lend: LendMode,
        cdev: &Arc<File>,
    ) -> Result<(), DeviceError> {
        let mut waiting = Vec::new();
        for qid in 0..info.nr_hw_queues {
            let config = LaneConfig {
                queue: QueueIdentity { device: self.id, qid: Qid(qid), depth: info.queue_depth },
                lend,
                buffer_bytes: layout.buffer_bytes,
                target: layout.target,
                cdev: Arc::clone(cdev),
                backings: Arc::clone(&layout.backings),
                cpus: self.control.queue_affinity(self.id, qid).unwrap_or_default(),
            };
            let (ready, is_ready) = mpsc::sync_channel(1);
            let wakeups = Arc::clone(&self.wakeups);
            let thread = std::thread::Builder::new()
                .name(format!("ublkb{}-q{qid}", self.id))
                .spawn(move || {
                    let served = lane::serve(&config, &ready);
                    // The files go before the end is announced.
                    drop(config);
                    wakeups.lane_ended();
                    served
                })
                .map_err(|error| DeviceError::setup("cannot start a lane", Errno::of(&error)))?;
            self.lanes.push(LaneThread { qid: Qid(qid), thread });
            waiting.push((Qid(qid), is_ready));
        }
        for (qid, is_ready) in waiting {
            // A closed channel is a lane that panicked.
            let died = Err(LaneError::Ring(Errno::EIO));
            is_ready.recv().unwrap_or(died).map_err(|error| DeviceError::Lane { qid, error })?;
        }
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
                Wake::TimedOut => {}
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
        DeviceError::Lane { qid: lane.qid, error }
    }

    /// Serves until a signal comes, or the lanes end because the device was stopped.
    fn wait_for_the_end(&mut self) -> Result<(), DeviceError> {
        match self.wakeups.wait(PollTimeout::NONE) {
            Wake::Signal(signal) => {
                log::info!("{signal}: stopping");
                self.stop()
            }
            Wake::LaneEnded | Wake::TimedOut => Ok(()),
        }
    }

    /// Stops the device, which completes or fails outstanding I/O. It may take as long as that
    /// I/O; a second signal ends the wait and leaves the rest to the kernel and to `del`.
    fn stop(&self) -> Result<(), DeviceError> {
        let mut stop = self.control.stop(self.id)?;
        let began = Instant::now();
        let mut said = 0;
        loop {
            match self.control.wait(&mut stop, Duration::from_millis(200)) {
                Some(Err(error)) if state::is_missing(&error) => return Ok(()),
                Some(answer) => return answer.map(drop).map_err(DeviceError::Control),
                None => {}
            }
            if let Wake::Signal(signal) = self.wakeups.wait(PollTimeout::ZERO) {
                log::error!("{signal} again: ending with I/O outstanding");
                std::process::exit(1);
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
            let qid = lane.qid;
            match lane.thread.join().unwrap_or(Err(LaneError::Ring(Errno::EIO))) {
                Ok(report) => report_lane(qid, &report),
                Err(error) => result = result.and(Err(DeviceError::Lane { qid, error })),
            }
        }
        StateFile::remove(Path::new(RUN_DIR), self.id);
        drop(self.cdev.take());
        result
    }
}

fn report_lane(qid: Qid, report: &LaneReport) {
    log::info!("queue {}: {}", qid.0, report.stats);
    if report.leaked_slots > 0 || report.stats.unexpected > 0 {
        log::error!("queue {}: {} slots still lent", qid.0, report.leaked_slots);
    }
}

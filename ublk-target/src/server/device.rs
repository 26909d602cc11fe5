//! A device's life: added, served, stopped, deleted.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::poll::PollTimeout;
use uring_ext::control::{Control, ControlError, Pending};
use uring_ext::iod::page_size;
use uring_ext::{Errno, sys};

use super::lane::{self, LaneConfig, LaneError, LaneReport};
use super::signals::{Wake, Wakeups};
use crate::backing::limits::Limits;
use crate::backing::{Backing, BackingError};
use crate::engine::QueueIdentity;
use crate::lend::{CannotLend, Choice, LendMode, LendRequest};
use crate::state::{self, Description, RUN_DIR, StateFile};
use crate::target::{AnyTarget, LoopTarget, NullTarget};
use crate::units::{Bytes, Qid};

/// What a device is made of.
#[derive(Clone, Debug)]
pub struct DeviceConfig {
    /// The id asked for; the driver chooses one otherwise.
    pub id: Option<u32>,
    /// Number of queues, 1 to 4,096. The driver takes no more than there are CPUs.
    pub queues: u16,
    /// Tags of each queue, 1 to 4,096.
    pub depth: u16,
    /// How to lend.
    pub lend: LendRequest,
    /// The target.
    pub target: TargetConfig,
}

/// A target and its backings.
#[derive(Clone, Debug)]
pub enum TargetConfig {
    /// Forgets writes, reads as zeros.
    Null {
        /// Size of the device.
        size: Bytes,
    },
    /// A file or block device, block for block.
    Loop {
        /// The backing.
        file: std::path::PathBuf,
    },
}

/// Why a device could not be served.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// A backing cannot be used.
    #[error(transparent)]
    Backing(#[from] BackingError),
    /// The lend mode is not to be had.
    #[error(transparent)]
    Lend(#[from] CannotLend),
    /// The driver said no.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// The id is taken.
    #[error("device id {0} is taken; choose another one, or let the driver choose without -n")]
    IdTaken(u32),
    /// The id is beyond the driver's limit.
    #[error("device id {0} is beyond the driver's limit of 1048575")]
    IdTooBig(u32),
    /// The driver has as many devices as it allows.
    #[error(
        "the driver has no room for another device; delete one, or raise its limit in \
         /sys/module/ublk_drv/parameters/ublks_max"
    )]
    NoRoom,
    /// The buffers of copy mode would not fit.
    #[error(
        "copy mode with {queues} queues of depth {depth} needs {needed} for buffers, more than \
         half of the {available} that are available; lower -q or -d"
    )]
    BuffersTooBig {
        /// Number of queues.
        queues: u16,
        /// Tags of each queue.
        depth: u16,
        /// Bytes of all buffers.
        needed: Bytes,
        /// Bytes of available memory.
        available: Bytes,
    },
    /// The size asked for is less than a block.
    #[error("a device of {0} bytes is less than one block of 512; give it a greater --size")]
    TooSmall(u64),
    /// Part of the set-up failed.
    #[error("{doing}: {errno}")]
    Setup {
        /// What was tried.
        doing: String,
        /// Why it failed.
        errno: Errno,
    },
    /// A lane could not serve, or failed later.
    #[error("queue {}: {error}", qid.0)]
    Lane {
        /// The queue.
        qid: Qid,
        /// Why.
        error: LaneError,
    },
    /// A signal came before the device was live.
    #[error("interrupted before the device was live; nothing is left of it")]
    Interrupted,
    /// Whoever asked for the device went away before it was live.
    #[error("nobody waits for the device any more; nothing is left of it")]
    Abandoned,
}

impl DeviceError {
    fn setup(doing: impl Into<String>, errno: Errno) -> Self {
        Self::Setup { doing: doing.into(), errno }
    }
}

/// The driver's device numbers have 20 bits (`UBLK_MINORS`).
const MAX_ID: u32 = (1 << 20) - 1;
/// The greatest request in copy mode, whose buffers take memory.
const COPY_MAX_IO: u32 = 512 << 10;

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

/// Target, backings and limits of a device.
struct Layout {
    name: &'static str,
    target: AnyTarget,
    backings: Arc<[Backing]>,
    limits: Limits,
    size: Bytes,
    buffer_bytes: u32,
}

impl Layout {
    fn open(config: &DeviceConfig, lend: LendMode) -> Result<Self, DeviceError> {
        let (name, target, backing, limits, size) = match &config.target {
            TargetConfig::Null { size } if size.sectors().0 == 0 => {
                return Err(DeviceError::TooSmall(size.0));
            }
            TargetConfig::Null { size } => {
                let backing = Backing::zero()?;
                let limits =
                    Limits { discard: None, physical_block: 512, io_min: 512, ..*backing.limits() };
                ("null", AnyTarget::Null(NullTarget), backing, limits, *size)
            }
            TargetConfig::Loop { file } => {
                let backing = Backing::open(file)?;
                let (limits, size) = (*backing.limits(), backing.size());
                ("loop", AnyTarget::Loop(LoopTarget { size: size.0 }), backing, limits, size)
            }
        };
        let page = u32::try_from(page_size()).unwrap_or(4096);
        let cap = match lend {
            LendMode::Fused => u32::MAX,
            LendMode::Copy => COPY_MAX_IO,
        };
        let buffer_bytes = limits.buffer_bytes(cap, page);
        let layout = Self { name, target, backings: [backing].into(), limits, size, buffer_bytes };
        layout.check_memory(config, lend)?;
        Ok(layout)
    }

    /// Buffers that do not fit would bring the machine down instead of failing.
    fn check_memory(&self, config: &DeviceConfig, lend: LendMode) -> Result<(), DeviceError> {
        let (queues, depth) = (config.queues, config.depth);
        let needed = u64::from(queues) * u64::from(depth) * u64::from(self.buffer_bytes);
        let Some(available) = available_memory() else { return Ok(()) };
        if lend == LendMode::Copy && needed > available / 2 {
            let (needed, available) = (Bytes(needed), Bytes(available));
            return Err(DeviceError::BuffersTooBig { queues, depth, needed, available });
        }
        Ok(())
    }

    /// The paths that the user gave, canonical.
    fn backing_paths(&self) -> Vec<std::path::PathBuf> {
        match self.target {
            AnyTarget::Null(_) => Vec::new(),
            AnyTarget::Loop(_) => self.backings.iter().map(|b| b.path().to_owned()).collect(),
        }
    }
}

/// `MemAvailable` in bytes.
fn available_memory() -> Option<u64> {
    let meminfo = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
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

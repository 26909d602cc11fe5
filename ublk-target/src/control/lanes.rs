//! The lanes of a device: threads of its own, or stations in shared lanes.

use std::cell::RefCell;
use std::fs::File;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bufreg::Incarnation;
use ublk_engine::engine::{EngineConfig, QueueIdentity};
use ublk_engine::lane::LaneError;
use ublk_engine::lane::fault::Injected;
use ublk_engine::units::Qid;
use uring_ext::control::Control;
use uring_ext::ring::Polling;
use uring_ext::{Errno, sys};

use crate::config::busy_wait::BusyWait;
use crate::control::error::{QueueError, SetupError};
use crate::control::plan::Plan;
use crate::io_thread::lanes::{self, SharedLanes, StationHandle};
use crate::io_thread::message::{LaneHandle, LaneMessage};
use crate::io_thread::setup::{LaneConfig, LaneReport};
use crate::os::steps::step;
use crate::os::wakeups::Wakeups;

/// The inputs of a device's lanes.
pub(super) struct LaneSetup<'a> {
    pub control: &'a Control,
    pub info: &'a sys::ublksrv_ctrl_dev_info,
    pub plan: &'a Plan,
    pub cdev: &'a Arc<File>,
    pub wakeups: &'a Arc<Wakeups>,
    /// Lanes that the device may share with others.
    pub shared: Option<&'a Rc<RefCell<SharedLanes>>>,
}

/// The lanes of a device.
#[derive(Default)]
pub(super) struct DeviceLanes {
    queues: Vec<Queue>,
    /// The shared lanes of the process.
    shared_lanes: Option<Rc<RefCell<SharedLanes>>>,
}

struct Queue {
    handle: LaneHandle,
    station: Box<StationHandle>,
}

impl DeviceLanes {
    /// Starts to serve all queues. If some fail, the others stay started.
    pub fn start(&mut self, setup: &LaneSetup<'_>) -> Result<(), QueueError> {
        // A ring that polls, takes double entries or has a second ring serves one device; so does a
        // lane with an idle policy of its own.
        let is_alone = setup.plan.config.io_lane
            || setup.plan.layout.polling != Polling::Off
            || matches!(setup.plan.config.busy_wait, BusyWait::Limit(_))
            || setup.plan.layout.backings.iter().any(|backing| backing.route().is_namespace());
        let shared_lanes = setup.shared.filter(|_| !is_alone).cloned();
        self.shared_lanes.clone_from(&shared_lanes);
        for qid in (0..setup.info.nr_hw_queues).map(Qid) {
            let started = match &shared_lanes {
                None => {
                    let id = setup.info.dev_id;
                    let cpus = setup.control.queue_affinity(id, qid.0).unwrap_or_default();
                    lanes::start_own(setup.lane(qid, cpus))
                }
                Some(shared) => shared.borrow_mut().start(&setup.lane(qid, Vec::new())),
            };
            let (handle, station) = started.map_err(|error| QueueError::of_lane(qid, error))?;
            self.queues.push(Queue { handle, station: Box::new(station) });
        }
        for queue in &self.queues {
            let is_ready = queue.station.await_ready();
            is_ready.map_err(|error| QueueError::of_lane(queue.handle.qid, error))?;
            step("lane-up");
        }
        Ok(())
    }

    /// The handles of the lanes.
    pub fn handles(&self) -> Vec<LaneHandle> {
        self.queues.iter().map(|queue| queue.handle.clone()).collect()
    }

    pub fn count(&self) -> usize {
        self.queues.len()
    }

    /// Their queues, in the order of the messages of [`DeviceLanes::send`].
    pub fn qids(&self) -> impl Iterator<Item = Qid> + '_ {
        self.queues.iter().map(|queue| queue.handle.qid)
    }

    /// Sends a message to each of them.
    pub fn send(&self, mut message: impl FnMut() -> LaneMessage) {
        for queue in &self.queues {
            queue.handle.send(message());
        }
    }

    /// Whether one of them has ended.
    pub fn has_ended(&mut self) -> bool {
        self.queues.iter_mut().any(|queue| queue.station.has_ended())
    }

    /// Whether all of them have ended.
    pub fn have_all_ended(&mut self) -> bool {
        self.queues.iter_mut().all(|queue| queue.station.has_ended())
    }

    /// Whether the driver has taken back some fetches of a shared lane, and no request is open
    /// there. The other fetches must be taken back too before the device can have another server.
    pub fn are_withdrawn(&mut self) -> bool {
        let mut stations = self.queues.iter_mut().map(|queue| &mut queue.station);
        stations.any(|station| station.is_withdrawn() && !station.has_ended())
    }

    /// Why a shared lane must stop serving this device; returned once.
    pub fn take_failure(&self) -> Option<QueueError> {
        let mut failures = self.queues.iter().filter_map(|queue| {
            let error = queue.station.take_failure()?;
            Some(QueueError::Lane { qid: queue.handle.qid, error })
        });
        failures.next()
    }

    /// The error of the first lane that has ended with one.
    pub fn failure(&mut self) -> QueueError {
        let ended = self.queues.iter_mut().position(|queue| queue.station.has_ended());
        let Some(queue) = ended.map(|index| self.queues.swap_remove(index)) else {
            return SetupError::new("a lane ended early", Errno::EIO).into();
        };
        let qid = queue.handle.qid;
        let error = self.join_one(queue).err().unwrap_or(LaneError::Ring(Errno::ENODEV));
        QueueError::Lane { qid, error }
    }

    /// Waits for the end of all lanes, and logs their statistics.
    pub fn join(&mut self) -> Result<(), QueueError> {
        let mut result = Ok(());
        for queue in std::mem::take(&mut self.queues) {
            let qid = queue.handle.qid;
            match self.join_one(queue) {
                Ok(report) => report_lane(qid, &report),
                Err(error) => result = result.and(Err(QueueError::Lane { qid, error })),
            }
        }
        result
    }

    fn join_one(&self, queue: Queue) -> Result<LaneReport, LaneError> {
        match &self.shared_lanes {
            Some(shared) => shared.borrow_mut().join(*queue.station),
            None => queue.station.join(),
        }
    }
}

impl LaneSetup<'_> {
    fn lane(&self, qid: Qid, cpus: Vec<usize>) -> LaneConfig {
        let (info, plan) = (self.info, self.plan);
        LaneConfig {
            engine: EngineConfig {
                queue: QueueIdentity { device: info.dev_id, qid, depth: info.queue_depth },
                incarnation: Incarnation(plan.incarnation),
                lend: plan.choice.mode,
                slots: plan.slots,
                geometry: plan.layout.geometry(),
                deadline: plan.config.io_timeout.map(as_ns),
            },
            io_lane: plan.config.io_lane,
            polling: plan.layout.polling,
            busy_wait: plan.config.busy_wait,
            faults: plan.faults,
            buffer_bytes: plan.layout.pool_bytes(),
            target: plan.layout.target.for_queue(qid),
            cdev: Arc::clone(self.cdev),
            backings: Arc::clone(&plan.layout.backings),
            cpus,
            wakeups: Arc::clone(self.wakeups),
        }
    }
}

fn report_lane(qid: Qid, report: &LaneReport) {
    log::info!("queue {}: {}", qid.0, report.stats);
    if report.injected != Injected::default() {
        log::warn!("queue {}: faults asked for: {}", qid.0, report.injected);
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

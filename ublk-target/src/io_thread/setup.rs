//! The setup of a lane, and its ring.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;

use nix::sys::eventfd::EventFd;
use ublk_engine::engine::{EngineConfig, EngineStats};
use ublk_engine::lane::fault::{Faults, Injected};
use ublk_engine::lane::{Lane, LaneError};
use ublk_engine::plan::WINDOW_OPS;
use ublk_engine::target::AnyTarget;
use uring_ext::Errno;
use uring_ext::ring::{Polling, Ring, RingSetup};
use uring_ext::sqe::FixedFile;

use crate::backing::Backing;
use crate::config::busy_wait::BusyWait;
use crate::os::wakeups::Wakeups;

/// Everything that a lane needs to serve its queue.
#[derive(Clone, Debug)]
pub struct LaneConfig {
    /// The configuration of its engine.
    pub engine: EngineConfig,
    /// Issue operations from an I/O lane.
    pub io_lane: bool,
    /// How completions of operations are found.
    pub polling: Polling,
    /// Whether to spin for completions before sleeping.
    pub busy_wait: BusyWait,
    /// Test faults to inject.
    pub faults: Option<Faults>,
    /// Size of each of the server's buffers in bytes.
    pub buffer_bytes: u32,
    /// The mapping policy.
    pub target: AnyTarget,
    /// The device's character node.
    pub cdev: Arc<File>,
    /// The backings, in the order of their index.
    pub backings: Arc<[Backing]>,
    /// CPUs that the lane may run on; empty for any.
    pub cpus: Vec<usize>,
    /// Notified when the driver takes fetches back.
    pub wakeups: Arc<Wakeups>,
}

/// Statistics of a lane's life.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LaneReport {
    /// The engine's counters.
    pub stats: EngineStats,
    /// Operations that met an injected test fault.
    pub injected: Injected,
    /// Slots that were still lent at the end without an owner.
    pub leaks: Vec<String>,
    /// Slots in an unknown state at the end. The end of the ring settles it.
    pub quarantined: u32,
}

impl LaneReport {
    /// The statistics of a lane up to now.
    pub(crate) fn of(lane: &Lane<AnyTarget>) -> Self {
        let engine = lane.engine();
        Self {
            stats: *engine.stats(),
            injected: lane.injected(),
            leaks: engine.leaks().map(|leak| leak.to_string()).collect(),
            quarantined: engine.registry().counts().quarantined,
        }
    }
}

/// Makes the error for a failed part of a lane's set-up.
pub(crate) fn failed(doing: &'static str) -> impl Fn(Errno) -> LaneError {
    move |errno| LaneError::Setup { doing, errno }
}

impl LaneConfig {
    pub(crate) fn has_namespace(&self) -> bool {
        self.backings.iter().any(|backing| backing.route().is_namespace())
    }

    /// For every tag: a commit, and a full window with its cancellations.
    pub(crate) fn entries_in_flight(&self) -> usize {
        usize::from(self.engine.queue.depth) * (2 * WINDOW_OPS + 2)
    }

    /// Whether the queue's pool is the spare buffer of its lane. It has no other buffer then.
    pub(crate) fn shares_spare(&self) -> bool {
        let pool = self.engine.slots.pool;
        let shares = self.engine.lend.is_zero_copy() && pool > 0;
        debug_assert!(!shares || pool == 1, "{pool} buffers of one that is shared");
        shares
    }

    /// The number of buffers of the queue's own.
    pub(crate) fn own_buffers(&self) -> u16 {
        let slots = &self.engine.slots;
        if self.shares_spare() { slots.scratch } else { slots.buffers() }
    }

    /// The number of slots of the queue's own.
    pub(crate) fn own_slots(&self) -> u16 {
        self.engine.slots.lent.saturating_add(self.own_buffers())
    }
}

/// Completions that are taken off the queue before the kernel is informed.
pub(crate) const REAP_BATCH: usize = 64;
/// The fixed file of a ring's own event descriptor.
pub(crate) const EVENT: FixedFile = FixedFile(0);

/// The capacity of a ring. Its tables of files and buffers are empty at first.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RingNeeds {
    /// Entries that are submitted at a time.
    pub sq_entries: u32,
    /// Completions that the queue holds.
    pub cq_entries: u32,
    /// Fixed files.
    pub files: u16,
    /// Slots of the buffer table.
    pub slots: u16,
    /// The ring takes NVMe commands.
    pub mixed_sizes: bool,
    /// How to find completions.
    pub polling: Polling,
    /// The ring shows pending kernel work for its thread.
    pub show_work: bool,
}

impl RingNeeds {
    /// The capacity for one queue. The completion queue never overflows. The queue's files follow
    /// [`EVENT`], and one more fits behind them.
    pub fn of_queue(config: &LaneConfig) -> Self {
        let completions = u32::try_from(config.entries_in_flight()).unwrap_or(u32::MAX);
        let spare = u16::from(config.shares_spare());
        Self {
            // A chain has three entries.
            sq_entries: 3 * u32::from(config.engine.queue.depth),
            cq_entries: completions + 8,
            files: u16::try_from(config.backings.len() + 3).unwrap_or(u16::MAX),
            slots: config.own_slots().saturating_add(spare),
            mixed_sizes: config.has_namespace(),
            polling: Polling::Off,
            show_work: false,
        }
    }

    /// Makes the ring and its file table. `event` is its [`EVENT`].
    ///
    /// # Errors
    /// [`LaneError::Setup`].
    pub fn make(&self, event: &EventFd) -> Result<Ring, LaneError> {
        let setup = RingSetup {
            sq_entries: self.sq_entries,
            cq_entries: self.cq_entries,
            mixed_sizes: self.mixed_sizes,
            polling: self.polling,
            show_work: self.show_work,
        };
        let mut ring = Ring::new(&setup).map_err(failed("making the ring"))?;
        ring.register_empty_files(self.files).map_err(failed("registering files"))?;
        let set = ring.queues().set_files(EVENT, &[event.as_fd().as_raw_fd()]);
        set.map_err(failed("registering files"))?;
        Ok(ring)
    }

    /// Registers the buffer table of a ring that issues operations.
    ///
    /// # Errors
    /// [`LaneError::Setup`].
    pub fn make_slots(&self, ring: &Ring) -> Result<(), LaneError> {
        ring.register_slots(self.slots.into()).map_err(failed("registering the buffer table"))
    }
}

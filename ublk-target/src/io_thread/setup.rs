//! What a lane is made for, and its ring.

use std::fs::File;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use nix::sys::eventfd::EventFd;
use ublk_engine::engine::{EngineConfig, EngineStats};
use ublk_engine::lane::fault::{Faults, Injected};
use ublk_engine::lane::{Lane, LaneError};
use ublk_engine::plan::WINDOW_OPS;
use ublk_engine::target::AnyTarget;
use uring_ext::Errno;
use uring_ext::pool::BufferPool;
use uring_ext::ring::{Polling, Ring, RingSetup};

use crate::backing::Backing;
use crate::config::busy_wait::BusyWait;
use crate::os::wakeups::Wakeups;

/// Everything that a lane needs to serve its queue.
#[derive(Clone, Debug)]
pub struct LaneConfig {
    /// What its engine is made for.
    pub engine: EngineConfig,
    /// Issue operations from a lane of their own.
    pub io_lane: bool,
    /// How completions of operations are found.
    pub polling: Polling,
    /// Whether to look for completions for a while before sleeping.
    pub busy_wait: BusyWait,
    /// Faults that a test asked for.
    pub faults: Option<Faults>,
    /// Bytes of each of the server's buffers.
    pub buffer_bytes: u32,
    /// The mapping policy.
    pub target: AnyTarget,
    /// The device's character node.
    pub cdev: Arc<File>,
    /// The backings, in the order of their index.
    pub backings: Arc<[Backing]>,
    /// CPUs that the lane may run on; empty for any.
    pub cpus: Vec<usize>,
    /// Written to after a message was sent.
    pub wake: Arc<EventFd>,
    /// Told when the driver takes fetches back.
    pub wakeups: Arc<Wakeups>,
}

/// What a lane did in its life.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LaneReport {
    /// The engine's counters.
    pub stats: EngineStats,
    /// Operations that met a fault which a test asked for.
    pub injected: Injected,
    /// Slots that were still lent at the end, and nothing answered for them.
    pub leaks: Vec<String>,
    /// Slots whose fate was not known at the end; the end of the ring settles it.
    pub quarantined: u32,
}

impl LaneReport {
    /// What a lane has done until now.
    pub(crate) fn of<Io>(lane: &Lane<AnyTarget, Io>) -> Self {
        let engine = lane.engine();
        Self {
            stats: *engine.stats(),
            injected: lane.injected(),
            leaks: engine.leaks().map(|leak| leak.to_string()).collect(),
            quarantined: engine.registry().counts().quarantined,
        }
    }
}

/// How the lane may wait. One whose ring polls has its own way.
/// Part of the set-up of a lane failed.
pub(crate) fn failed(doing: &'static str) -> impl Fn(Errno) -> LaneError {
    move |errno| LaneError::Setup { doing, errno }
}

pub(crate) fn has_namespace(config: &LaneConfig) -> bool {
    config.backings.iter().any(|backing| backing.route().is_namespace())
}

/// A commit, and a full window with its cancelling, of every tag.
pub(crate) fn entries_in_flight(config: &LaneConfig) -> usize {
    usize::from(config.engine.queue.depth) * (2 * WINDOW_OPS + 2)
}

/// A ring with the device, the backings and some more files as its fixed files. Its queues never
/// overflow.
pub(crate) fn make_ring(
    config: &LaneConfig,
    last_files: &[RawFd],
    setup: RingSetup,
) -> Result<Ring, LaneError> {
    let depth = u32::from(config.engine.queue.depth);
    let completions = u32::try_from(entries_in_flight(config)).unwrap_or(u32::MAX);
    // A chain has three entries.
    let setup = RingSetup {
        sq_entries: 3 * depth,
        cq_entries: completions + 8,
        mixed_sizes: has_namespace(config),
        ..setup
    };
    let mut ring = Ring::new(&setup).map_err(failed("making the ring"))?;
    let backings = config.backings.iter().map(AsRawFd::as_raw_fd);
    let files: Vec<_> = std::iter::once(config.cdev.as_raw_fd())
        .chain(backings)
        .chain(last_files.iter().copied())
        .collect();
    ring.register_files(&files).map_err(failed("registering files"))?;
    Ok(ring)
}

/// Registers the buffer table: empty slots, and behind them the buffers of the server.
pub(crate) fn register_buffers(
    config: &LaneConfig,
    ring: &Ring,
    pool: Option<BufferPool>,
) -> Result<(), LaneError> {
    let lent = config.engine.slots.lent;
    match pool {
        None => ring.register_slots(lent.into()),
        Some(pool) => ring.register_slots_and_pool(lent, &pool),
    }
    .map_err(failed("registering the buffer table"))
}

//! The threads of lanes: their rings, and the loop on them.

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender};

use nix::sys::eventfd::EventFd;
use ublk_engine::lane::LaneError;
use uring_ext::ring::{Polling, Ring};

use crate::config::busy_wait::BusyWait;
use crate::io_thread::event_loop::EventLoop;
use crate::io_thread::idle_policy::may_look;
use crate::io_thread::io_lane::{IoLane, IoTables};
use crate::io_thread::rings::Rings;
use crate::io_thread::setup::{EVENT, LaneConfig, RingNeeds};
use crate::io_thread::side_ring::SideRing;
use crate::io_thread::spare::SpareBuffer;
use crate::io_thread::spawn::{prepare_lane_thread, prepare_thread};
use crate::io_thread::station::{
    Arrival, Berth, Leaving, MAX_STATIONS, StationChannels, own_pool, spare_pool,
};

/// Serves one queue on its own thread and rings, until the device is stopped or the lane is
/// drained.
///
/// # Errors
/// [`LaneError`]. Errors of the set-up are also sent to `channels.ready`.
pub(crate) fn serve_one(
    config: LaneConfig,
    wake: Arc<EventFd>,
    channels: StationChannels,
) -> Result<(), LaneError> {
    prepare_thread(&config);
    let ready = channels.ready.clone();
    let OwnRings { mut ring, mut side, io_lane, arrival } = OwnRings::new(&config, &wake, channels)
        .inspect_err(|error| {
            // The receiver may have stopped at another lane's error.
            let _ = ready.send(Err(*error));
        })?;
    let busy_wait = busy_wait(&config);
    // The station has its files now.
    drop(config);
    let (ended, left) = {
        let mut queues = ring.queues();
        let side = side.as_mut().map(|side| side.queues(&mut queues)).transpose();
        let side = side.inspect_err(|error| {
            let _ = ready.send(Err(*error));
        })?;
        let rings = Rings::new(queues, side, io_lane, 1);
        let mut lane = EventLoop::alone(rings, wake, busy_wait);
        let watched = lane.watch().inspect_err(|error| {
            let _ = ready.send(Err(*error));
        });
        let begun = watched.and_then(|()| lane.take_in(arrival));
        let ended = begun.and_then(|()| lane.run());
        (ended, lane.end_all(ended.err()))
    };
    // The rings close their files before the end is announced.
    drop((ring, side));
    left.into_iter().for_each(Leaving::announce);
    ended
}

/// Serves the stations that arrive, with this many fixed files and slots, until no sender can send
/// more and all have ended.
///
/// # Errors
/// [`LaneError`]. Errors of the set-up are also sent to `ready`.
pub(crate) fn serve_many(
    arrivals: Receiver<Arrival>,
    wake: Arc<EventFd>,
    needs: &RingNeeds,
    ready: &SyncSender<Result<(), LaneError>>,
) -> Result<(), LaneError> {
    prepare_lane_thread();
    let needs = RingNeeds { show_work: may_look(BusyWait::Auto), ..*needs };
    let made = needs.make(&wake).and_then(|ring| needs.make_slots(&ring).map(|()| ring));
    let mut ring = made.inspect_err(|error| {
        let _ = ready.send(Err(*error));
    })?;
    let (ended, left) = {
        let rings = Rings::new(ring.queues(), None, None, MAX_STATIONS);
        let mut lane = EventLoop::shared(rings, arrivals, wake);
        let watched = lane.watch();
        let _ = ready.send(watched);
        let ended = watched.and_then(|()| lane.run());
        (ended, lane.end_all(ended.err()))
    };
    drop(ring);
    left.into_iter().for_each(Leaving::announce);
    ended
}

/// The rings of a lane of one queue, and the queue's station.
struct OwnRings {
    ring: Ring,
    side: Option<SideRing>,
    io_lane: Option<IoLane>,
    arrival: Arrival,
}

impl OwnRings {
    fn new(
        config: &LaneConfig,
        wake: &Arc<EventFd>,
        channels: StationChannels,
    ) -> Result<Self, LaneError> {
        let polling = config.polling;
        let show_work = may_look(busy_wait(config));
        let needs = RingNeeds { polling, show_work, ..RingNeeds::of_queue(config) };
        let ring = needs.make(wake)?;
        let side = (polling != Polling::Off).then(|| SideRing::new(&needs, wake)).transpose()?;
        let pool = own_pool(config)?;
        // The spare buffer follows the slots of the queue.
        let spare = if config.shares_spare() {
            let pool = spare_pool(config.buffer_bytes)?;
            Some(SpareBuffer { index: 0, slot: config.own_slots(), pool })
        } else {
            None
        };
        let berth = Berth { name: 1, first_file: EVENT.0 + 1, first_slot: 0, spare };
        // The buffer table belongs to the ring that issues the operations.
        let io_lane = if config.io_lane {
            let tables = IoTables { berth, pool };
            Some(IoLane::start(config, tables, ring.as_raw_fd(), wake)?)
        } else {
            needs.make_slots(&ring)?;
            None
        };
        let qid = config.engine.queue.qid.0;
        log::debug!("lane {qid}: ring {:?}, {polling:?}", ring.mode());
        let arrival = Arrival::new(config, berth, pool, channels)?;
        Ok(Self { ring, side, io_lane, arrival })
    }
}

/// The idle policy of a lane of one queue. If its ring polls, the ring decides.
fn busy_wait(config: &LaneConfig) -> BusyWait {
    if config.polling == Polling::Off { config.busy_wait } else { BusyWait::Off }
}

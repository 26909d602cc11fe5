//! Lanes that serve queues of many devices: which lane a queue goes to, and what it has there.

mod io;
mod runs;
mod thread;

use std::collections::VecDeque;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel, sync_channel};
use std::thread::JoinHandle;

use bufreg::Incarnation;
use nix::sys::eventfd::EventFd;
use nix::sys::resource::{Resource, getrlimit};
use ublk_engine::engine::{EngineConfig, SlotTable};
use ublk_engine::lane::{Lane, LaneError, PortConfig, TableRange};
use ublk_engine::target::AnyTarget;
use uring_ext::Errno;
use uring_ext::iod::IoDescArray;
use uring_ext::pool::BufferPool;
use uring_ext::ring::MAX_BUFFER_SLOTS;

use crate::backing::Backing;
use crate::config::busy_wait::BusyWait;
use crate::io_thread::message::LaneHandle;
use crate::io_thread::ring_io::Parts;
use crate::io_thread::setup::{LaneConfig, LaneReport, failed};
use crate::io_thread::thread::{prepare_lane_thread, spawn_lane};
use crate::os::wakeups::event_descriptor;
use runs::Runs;
use thread::{Arrival, Ended};

/// Fixed files of a lane, if a process may have as many open (`io_sqe_files_register`).
const MAX_FILES: u16 = 1 << 14;
/// Slots of a lane's buffer table.
const SLOTS: u16 = 1 << 14;
const _: () = assert!(MAX_BUFFER_SLOTS == 1 << 14);
/// Names of stations: the lower bits of an incarnation, which completions carry. 0 is the lane's.
const NAMES: u16 = 1 << 12;
/// Stations that a lane may have.
const MAX_STATIONS: usize = 1024;

/// The lanes of a process, which its devices share.
#[derive(Debug)]
pub(crate) struct SharedLanes {
    /// How many there are at most.
    limit: usize,
    /// Fixed files of each.
    files: u16,
    /// One that has failed leaves its place empty.
    lanes: Vec<Option<SharedLane>>,
    /// Buffers that stations have left: their memory is never given back, so the next ones use it.
    pools: Vec<(u32, BufferPool)>,
}

/// A lane, and what of it is taken.
#[derive(Debug)]
struct SharedLane {
    arrivals: Sender<Arrival>,
    wake: Arc<EventFd>,
    thread: JoinHandle<Result<(), LaneError>>,
    files: Runs,
    slots: Runs,
    /// Names that nobody has, the one longest unused first: what comes late for a station that has
    /// gone meets no other for long.
    names: VecDeque<u16>,
    stations: usize,
    tags: u32,
}

/// What a station has of its lane.
#[derive(Debug)]
pub(crate) struct Holding {
    lane: usize,
    files: Range<u32>,
    slots: Range<u32>,
    name: u16,
    tags: u32,
}

/// A queue's station, as others see it.
pub(crate) struct StationHandle {
    holding: Holding,
    buffer_bytes: u32,
    ready: Receiver<Result<(), LaneError>>,
    end: Receiver<Ended>,
    ended: Option<Ended>,
    is_withdrawn: Arc<AtomicBool>,
}

impl SharedLanes {
    /// Up to `limit` lanes, none of which is started before it is needed.
    pub fn new(limit: usize) -> Self {
        let open = getrlimit(Resource::RLIMIT_NOFILE).map_or(0, |(soft, _)| soft);
        let files = u16::try_from(open).unwrap_or(MAX_FILES).min(MAX_FILES);
        let (lanes, pools) = (Vec::new(), Vec::new());
        Self { limit: limit.max(1), files, lanes, pools }
    }

    /// Finds a place for a queue, and what wakes its lane.
    ///
    /// # Errors
    /// Those of starting a lane; `ENOSPC` if no lane has room.
    pub fn hold(
        &mut self,
        backings: usize,
        slots: &SlotTable,
        depth: u16,
    ) -> Result<(Holding, Arc<EventFd>), LaneError> {
        let files = u32::try_from(backings + 1).unwrap_or(u32::MAX);
        let holding = self.hold_place(files, slots.capacity().into(), depth.into())?;
        match &self.lanes[holding.lane] {
            Some(lane) => Ok((holding, Arc::clone(&lane.wake))),
            None => Err(no_room()),
        }
    }

    /// Sends a queue to its lane.
    ///
    /// # Errors
    /// `EMFILE`, `ENOMEM` and the like.
    pub fn start(
        &mut self,
        holding: Holding,
        config: &LaneConfig,
    ) -> Result<(LaneHandle, StationHandle), LaneError> {
        let parts = match self.parts(config) {
            Ok(parts) => parts,
            Err(error) => {
                self.give_back(holding);
                return Err(error);
            }
        };
        let (ready, is_ready) = sync_channel(1);
        let (end, has_ended) = sync_channel(1);
        let queue = config.engine.queue;
        let (handle, inbox) = LaneHandle::on(queue.qid, queue.depth, &config.wake);
        let place = TableRange {
            first_file: holding.files.start,
            first_slot: u16::try_from(holding.slots.start).unwrap_or(0),
        };
        let is_withdrawn = Arc::new(AtomicBool::new(false));
        let arrival = Arrival {
            name: holding.name,
            lane: new_lane(config, holding.name, place, parts),
            place,
            files: std::iter::once(config.cdev.as_raw_fd())
                .chain(config.backings.iter().map(AsRawFd::as_raw_fd))
                .collect(),
            backings: Arc::clone(&config.backings),
            inbox,
            ready,
            end,
            wakeups: Arc::clone(&config.wakeups),
            looks: config.busy_wait != BusyWait::Off,
            is_withdrawn: Arc::clone(&is_withdrawn),
        };
        if let Some(Some(lane)) = self.lanes.get(holding.lane) {
            // One that has ended leaves the channels, and is found so.
            let _ = lane.arrivals.send(arrival);
            let _ = lane.wake.write(1);
        }
        let buffer_bytes = config.buffer_bytes;
        let (ready, end) = (is_ready, has_ended);
        let station =
            StationHandle { holding, buffer_bytes, ready, end, ended: None, is_withdrawn };
        Ok((handle, station))
    }

    fn parts(&mut self, config: &LaneConfig) -> Result<Parts, LaneError> {
        let queue = config.engine.queue;
        let iods = IoDescArray::map(&config.cdev, queue.qid.0, queue.depth)
            .map_err(failed("mapping the request descriptors"))?;
        let pool = self.pool(config.engine.slots.buffers(), config.buffer_bytes)?;
        let cdev = Arc::clone(&config.cdev);
        let backings = Arc::clone(&config.backings);
        Ok(Parts { qid: queue.qid.0, iods, pool, ranges: None, cdev, io_lane: None, backings })
    }

    fn pool(&mut self, count: u16, bytes: u32) -> Result<Option<BufferPool>, LaneError> {
        if count == 0 {
            return Ok(None);
        }
        let left = self.pools.iter().position(|(size, it)| (*size, it.count()) == (bytes, count));
        match left {
            Some(at) => Ok(Some(self.pools.swap_remove(at).1)),
            None => BufferPool::new(count, bytes).map(Some).map_err(failed("allocating buffers")),
        }
    }

    /// A place in the lane that has least to do.
    fn hold_place(&mut self, files: u32, slots: u32, tags: u32) -> Result<Holding, LaneError> {
        let is_any_empty = self.lanes.iter().flatten().any(|lane| lane.stations == 0);
        if !is_any_empty && self.count() < self.limit {
            self.start_lane()?;
        }
        let lanes = self.lanes.iter_mut().enumerate();
        let fitting = lanes.filter_map(|(index, lane)| Some((index, lane.as_mut()?)));
        let fitting = fitting.filter(|(_, lane)| lane.fits(files, slots));
        let Some((index, lane)) = fitting.min_by_key(|(_, lane)| lane.tags) else {
            return Err(no_room());
        };
        let (Some(files), Some(slots), Some(name)) =
            (lane.files.take(files), lane.slots.take(slots), lane.names.pop_front())
        else {
            return Err(no_room());
        };
        lane.stations += 1;
        lane.tags += tags;
        Ok(Holding { lane: index, files, slots, name, tags })
    }

    fn start_lane(&mut self) -> Result<(), LaneError> {
        let free = self.lanes.iter().position(Option::is_none);
        let index = free.unwrap_or(self.lanes.len());
        let wake = Arc::new(event_descriptor().map_err(failed("making an event descriptor"))?);
        let (arrivals, inbox) = channel();
        let (ready, is_ready) = sync_channel(1);
        let (own, files) = (Arc::clone(&wake), self.files);
        let thread = spawn_lane(format!("ublk-lane{index}"), move || {
            prepare_lane_thread();
            thread::serve(inbox, own, files, &ready)
        });
        let thread = thread.map_err(|error| failed("starting a lane")(Errno::of(&error)))?;
        is_ready.recv().unwrap_or(Err(LaneError::Ring(Errno::EIO)))?;
        let lane = SharedLane {
            arrivals,
            wake,
            thread,
            // The first file is the lane's own.
            files: Runs::new(1..files.into()),
            slots: Runs::new(0..SLOTS.into()),
            names: (1..NAMES).collect(),
            stations: 0,
            tags: 0,
        };
        match free {
            Some(index) => self.lanes[index] = Some(lane),
            None => self.lanes.push(Some(lane)),
        }
        Ok(())
    }

    /// How many lanes there are.
    pub fn count(&self) -> usize {
        self.lanes.iter().flatten().count()
    }

    /// Takes back what a station had, and says what it did. Waits for its end.
    pub fn join(&mut self, station: StationHandle) -> Result<LaneReport, LaneError> {
        let StationHandle { holding, buffer_bytes, end, ended, .. } = station;
        let Some(Ended { lane, backings, error }) = ended.or_else(|| end.recv().ok()) else {
            // Its lane has gone with all that was there.
            self.forget_ended_lanes();
            return Err(LaneError::Ring(Errno::EIO));
        };
        drop(backings);
        let report = LaneReport::of(&lane);
        // What is in quarantine may still be used by an operation, and its end still come.
        if report.quarantined == 0 {
            let count = lane.engine().config().slots.buffers();
            let _ = lane.with_io(|Parts { pool, .. }| {
                let left = pool.filter(|pool| pool.count() == count);
                self.pools.extend(left.map(|pool| (buffer_bytes, pool)));
            });
            self.give_back(holding);
        }
        self.forget_ended_lanes();
        error.map_or(Ok(report), Err)
    }

    fn give_back(&mut self, holding: Holding) {
        let Some(Some(lane)) = self.lanes.get_mut(holding.lane) else { return };
        lane.files.give_back(holding.files);
        lane.slots.give_back(holding.slots);
        lane.names.push_back(holding.name);
        lane.stations -= 1;
        lane.tags -= holding.tags;
    }

    fn forget_ended_lanes(&mut self) {
        for (index, place) in self.lanes.iter_mut().enumerate() {
            if let Some(lane) = place.take_if(|lane| lane.thread.is_finished()) {
                let ended = lane.thread.join().unwrap_or(Err(LaneError::Ring(Errno::EIO)));
                log::error!("lane {index} has ended: {ended:?}");
            }
        }
    }
}

impl SharedLane {
    fn fits(&self, files: u32, slots: u32) -> bool {
        self.stations < MAX_STATIONS && self.files.has(files) && self.slots.has(slots)
    }
}

impl StationHandle {
    /// Waits until all tags are with the driver.
    pub fn await_ready(&self) -> Result<(), LaneError> {
        // A closed channel is a lane that has ended.
        self.ready.recv().unwrap_or(Err(LaneError::Ring(Errno::EIO)))
    }

    /// Whether it has ended.
    pub fn has_ended(&mut self) -> bool {
        if self.ended.is_some() {
            return true;
        }
        match self.end.try_recv() {
            Ok(ended) => self.ended = Some(ended),
            // Its lane has gone.
            Err(TryRecvError::Disconnected) => return true,
            Err(TryRecvError::Empty) => return false,
        }
        true
    }

    /// Whether the driver has taken back some of its fetches, and the others stay with it.
    pub fn is_withdrawn(&self) -> bool {
        self.is_withdrawn.load(Ordering::Acquire)
    }

    /// Why the driver refused one of its tags, if it did and nobody has asked before.
    pub fn take_failure(&self) -> Option<LaneError> {
        self.ready.try_recv().ok()?.err()
    }
}

fn new_lane(
    config: &LaneConfig,
    name: u16,
    place: TableRange,
    parts: Parts,
) -> Lane<AnyTarget, Parts> {
    // No process lives long enough for the upper bits to be used up.
    let life = config.engine.incarnation.0 << NAMES.trailing_zeros();
    let engine = EngineConfig { incarnation: Incarnation(life | u32::from(name)), ..config.engine };
    let port = PortConfig {
        routes: config.backings.iter().map(Backing::route).collect(),
        polled: false,
        faults: config.faults,
        place,
    };
    Lane::new(config.target.clone(), engine, port, parts)
}

fn no_room() -> LaneError {
    LaneError::Setup { doing: "finding a lane with room", errno: Errno::ENOSPC }
}

#[cfg(test)]
mod tests;

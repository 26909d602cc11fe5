//! Lanes: the assignment of queues to lanes, and the ranges of each queue in its lane. A lane
//! serves one queue, or is shared by queues of many devices.

mod runs;

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel, sync_channel};
use std::thread::JoinHandle;

use nix::sys::eventfd::EventFd;
use nix::sys::resource::{Resource, getrlimit};
use ublk_engine::lane::LaneError;
use uring_ext::Errno;
use uring_ext::pool::BufferPool;
use uring_ext::ring::{MAX_BUFFER_SLOTS, Polling};

use crate::io_thread::message::LaneHandle;
use crate::io_thread::setup::{EVENT, LaneConfig, LaneReport, RingNeeds, failed};
use crate::io_thread::spare::{MAX_SPARES, SpareBuffer};
use crate::io_thread::spawn::spawn_lane;
use crate::io_thread::station::{
    Arrival, Berth, Ended, MAX_STATIONS, NAMES, StationChannels, spare_pool,
};
use crate::io_thread::thread;
use crate::os::wakeups::event_descriptor;
use runs::Runs;

/// Entries that a shared lane submits at a time. If more are queued, it submits earlier.
const SQ_ENTRIES: u32 = 1024;
/// Completions that the queue of a shared lane holds: one for each slot of the largest buffer
/// table. A tag with one operation in flight uses one of each. If more completions arrive in one
/// call, the kernel keeps the rest until there is room.
const CQ_ENTRIES: u32 = 16 << 10;
/// Fixed files of a lane, if the process may open as many (`io_sqe_files_register`).
const MAX_FILES: u16 = 1 << 14;
/// Slots of a lane's buffer table.
const SLOTS: u16 = 1 << 14;
const _: () = assert!(MAX_BUFFER_SLOTS == 1 << 14);
/// The lanes of a process. Its devices share them.
#[derive(Debug)]
pub(crate) struct SharedLanes {
    /// The maximum number of shared lanes.
    limit: usize,
    /// Fixed files of each lane.
    files: u16,
    /// A failed lane leaves an empty entry.
    lanes: Vec<Option<SharedLane>>,
    /// Buffers of removed stations. Their memory is never unmapped, so later stations use it.
    pools: Vec<(u32, BufferPool)>,
}

/// A lane, and the allocated ranges of its tables.
#[derive(Debug)]
struct SharedLane {
    arrivals: Sender<Arrival>,
    wake: Arc<EventFd>,
    thread: JoinHandle<Result<(), LaneError>>,
    files: Runs,
    slots: Runs,
    /// Free station names, the one that was unused longest first, so that a late completion for a
    /// removed station does not soon find another.
    names: VecDeque<u16>,
    /// Its spare buffers. The lane keeps them.
    spares: Vec<Spare>,
    stations: usize,
    tags: u32,
}

/// A spare buffer for the stations of its lane.
#[derive(Debug)]
struct Spare {
    bytes: u32,
    buffer: SpareBuffer,
}

/// The share of a station in its lane.
#[derive(Debug)]
struct Holding {
    lane: usize,
    files: Range<u32>,
    slots: Range<u32>,
    name: u16,
    spare: Option<SpareBuffer>,
    tags: u32,
}

/// A queue's station, from the outside.
pub(crate) struct StationHandle {
    served_by: ServedBy,
    buffer_bytes: u32,
    ready: Receiver<Result<(), LaneError>>,
    end: Receiver<Ended>,
    ended: Option<Ended>,
    is_withdrawn: Arc<AtomicBool>,
}

/// The lane of a station.
enum ServedBy {
    /// A lane of its own.
    Own(JoinHandle<Result<(), LaneError>>),
    /// A shared lane.
    Shared(Holding),
}

impl SharedLanes {
    /// Up to `limit` shared lanes. Each is started when it is first needed.
    pub fn new(limit: usize) -> Self {
        let open = getrlimit(Resource::RLIMIT_NOFILE).map_or(0, |(soft, _)| soft);
        let files = u16::try_from(open).unwrap_or(MAX_FILES).min(MAX_FILES);
        let (lanes, pools) = (Vec::new(), Vec::new());
        Self { limit: limit.max(1), files, lanes, pools }
    }

    /// Starts a station for a queue in the lane with the least load.
    ///
    /// # Errors
    /// Those of starting a lane; `ENOSPC` if no lane has room; `EMFILE`, `ENOMEM` and others of the
    /// set-up.
    pub fn start(&mut self, config: &LaneConfig) -> Result<(LaneHandle, StationHandle), LaneError> {
        let holding = self.hold(config)?;
        let Some(Some(lane)) = self.lanes.get(holding.lane) else { return Err(no_room()) };
        let (wake, arrivals) = (Arc::clone(&lane.wake), lane.arrivals.clone());
        let (handle, station, channels) = channels(config, &wake);
        let berth = Berth {
            name: holding.name,
            first_file: holding.files.start,
            first_slot: u16::try_from(holding.slots.start).unwrap_or(0),
            spare: holding.spare,
        };
        let pool = self.pool(config.own_buffers(), config.buffer_bytes);
        let arrival = pool.and_then(|pool| Arrival::new(config, berth, pool, channels));
        let arrival = match arrival {
            Ok(arrival) => arrival,
            Err(error) => {
                self.give_back(holding);
                return Err(error);
            }
        };
        // A lane that has ended closes the channel, and is detected this way.
        let _ = arrivals.send(arrival);
        let _ = wake.write(1);
        Ok((handle, station.in_lane(ServedBy::Shared(holding))))
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

    /// Ranges in the lane with the least load.
    fn hold(&mut self, config: &LaneConfig) -> Result<Holding, LaneError> {
        let files = u32::try_from(config.backings.len() + 1).unwrap_or(u32::MAX);
        let (slots, tags) = (config.own_slots().into(), config.engine.queue.depth.into());
        let spare = config.shares_spare().then_some(config.buffer_bytes);
        let mut lanes = self.lanes.iter().flatten();
        let has_empty = lanes.any(|lane| lane.stations == 0 && lane.fits(files, slots, spare));
        if !has_empty && self.count() < self.limit {
            self.start_lane()?;
        }
        let lanes = self.lanes.iter_mut().enumerate();
        let fitting = lanes.filter_map(|(index, lane)| Some((index, lane.as_mut()?)));
        let fitting = fitting.filter(|(_, lane)| lane.fits(files, slots, spare));
        let Some((index, lane)) = fitting.min_by_key(|(_, lane)| lane.tags) else {
            return Err(no_room());
        };
        let spare = spare.map(|bytes| lane.spare(bytes)).transpose()?;
        let (Some(files), Some(slots), Some(name)) =
            (lane.files.take(files), lane.slots.take(slots), lane.names.pop_front())
        else {
            return Err(no_room());
        };
        lane.stations += 1;
        lane.tags += tags;
        Ok(Holding { lane: index, files, slots, name, spare, tags })
    }

    fn start_lane(&mut self) -> Result<(), LaneError> {
        let free = self.lanes.iter().position(Option::is_none);
        let index = free.unwrap_or(self.lanes.len());
        let wake = Arc::new(event_descriptor().map_err(failed("making an event descriptor"))?);
        let (arrivals, inbox) = channel();
        let (ready, is_ready) = sync_channel(1);
        let needs = RingNeeds {
            sq_entries: SQ_ENTRIES,
            cq_entries: CQ_ENTRIES,
            files: self.files,
            slots: SLOTS,
            mixed_sizes: false,
            polling: Polling::Off,
            show_work: false,
        };
        let own = Arc::clone(&wake);
        let thread = spawn_lane(format!("ublk-lane{index}"), move || {
            thread::serve_many(inbox, own, &needs, &ready)
        });
        let thread = thread.map_err(|error| failed("starting a lane")(Errno::of(&error)))?;
        is_ready.recv().unwrap_or(Err(GONE))?;
        let lane = SharedLane {
            arrivals,
            wake,
            thread,
            // The first file belongs to the lane.
            files: Runs::new(EVENT.0 + 1..self.files.into()),
            slots: Runs::new(0..SLOTS.into()),
            names: (1..NAMES).collect(),
            spares: Vec::new(),
            stations: 0,
            tags: 0,
        };
        match free {
            Some(index) => self.lanes[index] = Some(lane),
            None => self.lanes.push(Some(lane)),
        }
        Ok(())
    }

    /// The number of lanes.
    pub fn count(&self) -> usize {
        self.lanes.iter().flatten().count()
    }

    /// Takes back the share of a station, and returns its statistics. Waits for its end.
    pub fn join(&mut self, station: StationHandle) -> Result<LaneReport, LaneError> {
        let StationHandle { served_by, buffer_bytes, end, ended, .. } = station;
        let ended = ended.or_else(|| end.recv().ok());
        let holding = match served_by {
            ServedBy::Own(thread) => return ended_alone(thread, ended),
            ServedBy::Shared(holding) => holding,
        };
        let Some(Ended { lane, parts, error }) = ended else {
            // Its lane has ended, and its tables are gone.
            self.forget_ended_lanes();
            return Err(GONE);
        };
        let report = LaneReport::of(&lane);
        // A quarantined buffer may still be used by an operation, and the completion may still
        // come.
        if report.quarantined == 0 {
            self.pools.extend(parts.pool.map(|pool| (buffer_bytes, pool)));
            drop(parts);
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
                let ended = lane.thread.join().unwrap_or(Err(GONE));
                log::error!("lane {index} has ended: {ended:?}");
            }
        }
    }
}

impl SharedLane {
    fn fits(&self, files: u32, slots: u32, spare: Option<u32>) -> bool {
        let has_spare = |bytes| self.spares.iter().any(|spare| spare.bytes >= bytes);
        let needs_spare = spare.is_some_and(|bytes| !has_spare(bytes));
        // A new spare buffer takes a slot at the end of the table.
        let slots_with_spare = slots + u32::from(needs_spare);
        let has_room_for_spare = !needs_spare || self.spares.len() < MAX_SPARES;
        let has_slots = self.slots.has(slots_with_spare);
        self.stations < MAX_STATIONS && self.files.has(files) && has_slots && has_room_for_spare
    }

    /// The shortest spare buffer of at least `bytes`; a new one if there is none.
    fn spare(&mut self, bytes: u32) -> Result<SpareBuffer, LaneError> {
        let fitting = self.spares.iter().filter(|spare| spare.bytes >= bytes);
        if let Some(spare) = fitting.min_by_key(|spare| spare.bytes) {
            return Ok(spare.buffer);
        }
        let pool = spare_pool(bytes)?;
        let slot = self.slots.take_last().ok_or_else(no_room)?;
        let slot = u16::try_from(slot).unwrap_or(u16::MAX);
        let buffer = SpareBuffer { index: self.spares.len(), slot, pool };
        self.spares.push(Spare { bytes, buffer });
        Ok(buffer)
    }
}

/// A [`StationHandle`] of a station that has no lane yet.
struct Unserved {
    buffer_bytes: u32,
    ready: Receiver<Result<(), LaneError>>,
    end: Receiver<Ended>,
    is_withdrawn: Arc<AtomicBool>,
}

/// The channels between a queue's station and others: the outer ends, and the station's ends.
fn channels(config: &LaneConfig, wake: &Arc<EventFd>) -> (LaneHandle, Unserved, StationChannels) {
    let (ready, is_ready) = sync_channel(1);
    let (end, has_ended) = sync_channel(1);
    let queue = config.engine.queue;
    let (handle, inbox) = LaneHandle::new(queue.qid, queue.depth, wake);
    let is_withdrawn = Arc::new(AtomicBool::new(false));
    let station = Unserved {
        buffer_bytes: config.buffer_bytes,
        ready: is_ready,
        end: has_ended,
        is_withdrawn: Arc::clone(&is_withdrawn),
    };
    (handle, station, StationChannels { inbox, ready, end, is_withdrawn })
}

impl Unserved {
    fn in_lane(self, served_by: ServedBy) -> StationHandle {
        let Self { buffer_bytes, ready, end, is_withdrawn } = self;
        StationHandle { served_by, buffer_bytes, ready, end, ended: None, is_withdrawn }
    }
}

/// Starts a lane of its own for a queue.
///
/// # Errors
/// `EMFILE` at the limit of open files, `EAGAIN` at that of threads.
pub(crate) fn start_own(config: LaneConfig) -> Result<(LaneHandle, StationHandle), LaneError> {
    let wake = Arc::new(event_descriptor().map_err(failed("making an event descriptor"))?);
    let (handle, station, channels) = channels(&config, &wake);
    let queue = config.engine.queue;
    let name = format!("ublkb{}-q{}", queue.device, queue.qid.0);
    let thread = spawn_lane(name, move || thread::serve_one(config, wake, channels));
    let thread = thread.map_err(|error| failed("starting its thread")(Errno::of(&error)))?;
    Ok((handle, station.in_lane(ServedBy::Own(thread))))
}

/// Waits for the end of a lane of one queue, and returns its statistics.
fn ended_alone(
    thread: JoinHandle<Result<(), LaneError>>,
    ended: Option<Ended>,
) -> Result<LaneReport, LaneError> {
    let served = thread.join().unwrap_or(Err(GONE));
    match ended {
        Some(Ended { lane, error, .. }) => error.map_or_else(|| Ok(LaneReport::of(&lane)), Err),
        // Its set-up has failed.
        None => Err(served.err().unwrap_or(GONE)),
    }
}

/// A lane has ended without a result.
const GONE: LaneError = LaneError::Ring(Errno::EIO);

impl StationHandle {
    /// Waits until all tags are fetched.
    pub fn await_ready(&self) -> Result<(), LaneError> {
        // A closed channel means that the lane has ended.
        self.ready.recv().unwrap_or(Err(GONE))
    }

    /// Waits for the end of a station with a lane of its own, and returns its statistics.
    pub fn join(self) -> Result<LaneReport, LaneError> {
        let ended = self.ended.or_else(|| self.end.recv().ok());
        match self.served_by {
            ServedBy::Own(thread) => ended_alone(thread, ended),
            ServedBy::Shared(_) => Err(GONE),
        }
    }

    /// Whether it has ended.
    pub fn has_ended(&mut self) -> bool {
        if self.ended.is_some() {
            return true;
        }
        match self.end.try_recv() {
            Ok(ended) => self.ended = Some(ended),
            // Its lane has ended.
            Err(TryRecvError::Disconnected) => return true,
            Err(TryRecvError::Empty) => return false,
        }
        true
    }

    /// Whether its lane is shared.
    pub const fn is_shared(&self) -> bool {
        matches!(self.served_by, ServedBy::Shared(_))
    }

    /// Whether the driver has taken back some fetches only. The others stay with it, since the ring
    /// of a shared lane stays open.
    pub fn is_withdrawn(&self) -> bool {
        self.is_shared() && self.is_withdrawn.load(Ordering::Acquire)
    }

    /// The errno with which the driver refused one of its tags, if it did; returned once. A lane of
    /// its own ends in that case.
    pub fn take_failure(&self) -> Option<LaneError> {
        self.ready.try_recv().ok()?.err().filter(|_| self.is_shared())
    }
}

fn no_room() -> LaneError {
    LaneError::Setup { doing: "finding a lane with room", errno: Errno::ENOSPC }
}

#[cfg(test)]
mod tests;

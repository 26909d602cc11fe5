//! The thread of a shared lane: one ring, and the stations on it, which come and go.
//!
//! Each completion says by its incarnation which station it is for; number 0 is the lane's own. The
//! loop looks only at stations that something has happened to. It does not allocate, lock, log or
//! block: what a station is made of comes with it, and goes with it.

use std::cell::RefCell;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError};
use std::time::Duration;

use bufreg::Incarnation;
use nix::sys::eventfd::EventFd;
use ublk_engine::lane::event::Event;
use ublk_engine::lane::{Lane, LaneError, TableRange};
use ublk_engine::target::AnyTarget;
use uring_ext::ring::{Cqe, Queues, Ring, RingSetup};
use uring_ext::sqe::{FixedFile, Sqe};

use crate::backing::Backing;
use crate::config::busy_wait::BusyWait;
use crate::io_thread::idle_policy::{IdlePolicy, may_look};
use crate::io_thread::lane::attend;
use crate::io_thread::message::LaneMessage;
use crate::io_thread::ring_io::Parts;
use crate::io_thread::setup::failed;
use crate::io_thread::shared::io::SharedIo;
use crate::io_thread::shared::{MAX_STATIONS, NAMES, SLOTS};
use crate::io_thread::thread::REAP_BATCH;
use crate::os::clock::{coarse_now, precise_now};
use crate::os::wakeups::Wakeups;

/// Entries that are submitted at a time; what does not fit is submitted earlier.
const SQ_ENTRIES: u32 = 1024;
/// Completions that the queue holds: one for each slot of the greatest buffer table. A tag with one
/// operation in flight has one of either; should more than these come in a single call, the kernel
/// keeps the rest until there is room.
const CQ_ENTRIES: u32 = 16 << 10;
/// The fixed file that wakes the lane.
const WAKE: FixedFile = FixedFile(0);
/// What the lane's own completions carry.
const OWN: Incarnation = Incarnation(0);
/// No station has this index.
const NOBODY: u16 = u16::MAX;

/// A station on its way to its lane, with all the memory that it needs.
pub(crate) struct Arrival {
    /// The incarnation's lower bits.
    pub name: u16,
    pub lane: Lane<AnyTarget, Parts>,
    pub place: TableRange,
    /// The character device and the backings.
    pub files: Box<[RawFd]>,
    pub backings: Arc<[Backing]>,
    pub inbox: Receiver<LaneMessage>,
    /// Told when all tags are with the driver, and once more if the driver refuses one later.
    pub ready: SyncSender<Result<(), LaneError>>,
    pub end: SyncSender<Ended>,
    pub wakeups: Arc<Wakeups>,
    /// Its lane may look for completions for a while before it sleeps.
    pub looks: bool,
    /// Set when the driver has taken some fetches back, and no request is in hand.
    pub is_withdrawn: Arc<AtomicBool>,
}

/// A station that has left its lane.
pub(crate) struct Ended {
    pub lane: Lane<AnyTarget, Parts>,
    pub backings: Arc<[Backing]>,
    pub error: Option<LaneError>,
}

/// A queue that the lane serves.
struct Station<'lane, 'ring> {
    name: u16,
    lane: Lane<AnyTarget, SharedIo<'lane, 'ring>>,
    place: TableRange,
    backings: Arc<[Backing]>,
    inbox: Receiver<LaneMessage>,
    ready: SyncSender<Result<(), LaneError>>,
    end: SyncSender<Ended>,
    wakeups: Arc<Wakeups>,
    looks: bool,
    is_withdrawn: Arc<AtomicBool>,
    /// Reads and writes in flight when it was looked at last.
    in_flight: usize,
    /// Something has happened to it since it was looked at.
    is_due: bool,
    /// Why it has to end, as soon as the driver has taken its fetches back.
    failure: Option<LaneError>,
}

struct Thread<'lane, 'ring> {
    queues: &'lane RefCell<Queues<'ring>>,
    stations: Vec<Station<'lane, 'ring>>,
    /// Index of the station of each name.
    at: Box<[u16]>,
    /// Names of the stations that are due.
    due: Vec<u16>,
    arrivals: Receiver<Arrival>,
    wake: Arc<EventFd>,
    /// When completions were reaped last.
    now: u64,
    /// A station measures latencies, which takes a better clock.
    measures: bool,
    idle_policy: IdlePolicy,
    /// Reads and writes in flight, of all stations together.
    in_flight: usize,
    /// Nobody can send stations any more.
    is_closed: bool,
}

/// Serves the stations that arrive, with so many fixed files, until nobody can send any more and all have ended.
///
/// # Errors
/// [`LaneError`]. One of the set-up is also sent to `ready`.
pub(crate) fn serve(
    arrivals: Receiver<Arrival>,
    wake: Arc<EventFd>,
    files: u16,
    ready: &SyncSender<Result<(), LaneError>>,
) -> Result<(), LaneError> {
    let mut ring = match set_up(&wake, files) {
        Ok(ring) => ring,
        Err(error) => {
            let _ = ready.send(Err(error));
            return Err(error);
        }
    };
    let queues = RefCell::new(ring.queues());
    let mut thread = Thread {
        queues: &queues,
        stations: Vec::with_capacity(MAX_STATIONS),
        at: vec![NOBODY; usize::from(NAMES)].into(),
        due: Vec::with_capacity(MAX_STATIONS),
        arrivals,
        wake,
        now: coarse_now(),
        measures: false,
        idle_policy: IdlePolicy::new(BusyWait::Auto),
        in_flight: 0,
        is_closed: false,
    };
    let watched = thread.watch();
    let _ = ready.send(watched);
    let ended = watched.and_then(|()| thread.run());
    if let Err(error) = ended {
        thread.end_all(error);
    }
    ended
}

fn set_up(wake: &EventFd, files: u16) -> Result<Ring, LaneError> {
    let setup = RingSetup {
        sq_entries: SQ_ENTRIES,
        cq_entries: CQ_ENTRIES,
        show_work: may_look(BusyWait::Auto),
        ..RingSetup::default()
    };
    let mut ring = Ring::new(&setup).map_err(failed("making the ring"))?;
    ring.register_empty_files(files).map_err(failed("registering files"))?;
    ring.register_slots(SLOTS.into()).map_err(failed("registering the buffer table"))?;
    let set = ring.queues().set_files(WAKE, &[wake.as_fd().as_raw_fd()]);
    set.map_err(failed("registering files"))?;
    Ok(ring)
}

impl<'lane, 'ring> Thread<'lane, 'ring> {
    fn run(&mut self) -> Result<(), LaneError> {
        let mut batch = [Cqe::default(); REAP_BATCH];
        while !(self.is_closed && self.stations.is_empty()) {
            self.look_after_due();
            let in_flight = self.in_flight;
            self.submit_and_wait()?;
            self.idle_policy.ended(in_flight);
            loop {
                let count = self.queues.borrow_mut().reap(&mut batch);
                self.now = if self.measures { precise_now() } else { coarse_now() };
                for cqe in &batch[..count] {
                    self.handle(*cqe)?;
                }
                if count < batch.len() {
                    break;
                }
            }
        }
        Ok(())
    }

    fn submit_and_wait(&self) -> Result<(), LaneError> {
        let mut queues = self.queues.borrow_mut();
        let look_for = self.idle_policy.look_for();
        if look_for > 0 && queues.submit_and_poll(look_for).map_err(LaneError::Ring)? {
            return Ok(());
        }
        match self.patience() {
            None => queues.submit_and_wait(),
            Some(limit) => queues.submit_and_wait_for(limit),
        }
        .map_err(LaneError::Ring)
    }

    /// How long there may be nothing to do. Stations with deadlines are always due.
    fn patience(&self) -> Option<Duration> {
        let due = self.due.iter().filter_map(|name| self.station(*name));
        due.filter_map(|station| station.lane.engine().patience()).min()
    }

    fn station(&self, name: u16) -> Option<&Station<'lane, 'ring>> {
        self.stations.get(usize::from(self.at[usize::from(name)]))
    }

    fn handle(&mut self, cqe: Cqe) -> Result<(), LaneError> {
        let name = Event::whose(cqe.user_data);
        let Some(station) = self.stations.get_mut(usize::from(self.at[usize::from(name)])) else {
            // What comes late for a station that has gone is for nobody.
            let is_wake = Event::decode(cqe.user_data, OWN) == Some(Event::Wake);
            return if is_wake { self.read_messages() } else { Ok(()) };
        };
        station.lane.set_now(self.now);
        // No station asks to be woken, or has a second ring.
        let _ = station.lane.handle(cqe);
        if !station.is_due {
            station.is_due = true;
            self.due.push(name);
        }
        Ok(())
    }

    /// Looks at the stations that something has happened to, before what they have decided is
    /// submitted.
    fn look_after_due(&mut self) {
        let mut at = 0;
        while let Some(name) = self.due.get(at) {
            match self.look_after(*name) {
                Standing::Idle => {
                    self.due.swap_remove(at);
                }
                Standing::Due => at += 1,
                Standing::Over(name) => {
                    self.due.swap_remove(at);
                    self.end(name);
                }
            }
        }
    }

    fn look_after(&mut self, name: u16) -> Standing {
        let index = usize::from(self.at[usize::from(name)]);
        let Some(station) = self.stations.get_mut(index) else { return Standing::Idle };
        station.lane.set_now(self.now);
        station.lane.before_submit();
        if let Err(error) = station.lane.check() {
            if station.failure.is_none() {
                station.failure = Some(error);
                let _ = station.ready.try_send(Err(error));
                station.wakeups.lane_ended();
            }
        }
        let engine = station.lane.engine();
        let before = std::mem::replace(&mut station.in_flight, engine.transfers_in_flight());
        self.in_flight = self.in_flight - before + station.in_flight;
        if engine.is_finished() {
            return Standing::Over(name);
        }
        // The other fetches stay with the driver, which delivers no more: somebody has made the device
        // wait for another server while a request was in hand.
        if engine.has_ended_tags()
            && !station.is_withdrawn.load(Ordering::Relaxed)
            && engine.holdings().requests == 0
        {
            station.is_withdrawn.store(true, Ordering::Release);
            station.wakeups.undelivered();
        }
        station.is_due = engine.config().deadline.is_some() || station.lane.backlog() > 0;
        if station.is_due { Standing::Due } else { Standing::Idle }
    }

    /// Asks to be woken by the next message.
    fn watch(&self) -> Result<(), LaneError> {
        let sqe = Sqe::poll_readable(WAKE).user_data(Event::Wake.encode(OWN));
        self.queues.borrow_mut().push(&[sqe]).map_err(LaneError::Ring)
    }

    fn read_messages(&mut self) -> Result<(), LaneError> {
        // Nothing to read is no error: the descriptor only wakes.
        let _ = self.wake.read();
        self.watch()?;
        for station in &mut self.stations {
            while let Ok(message) = station.inbox.try_recv() {
                // Nobody has such a station drained: its fetches would stay with the ring.
                let _drains = attend(&mut station.lane, message);
                if !station.is_due {
                    station.is_due = true;
                    self.due.push(station.name);
                }
            }
        }
        loop {
            match self.arrivals.try_recv() {
                Ok(arrival) => self.take_in(arrival)?,
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => {
                    self.is_closed = true;
                    break;
                }
            }
        }
        let mut stations = self.stations.iter();
        self.measures = stations.any(|station| station.lane.engine().recorder().is_some());
        Ok(())
    }

    /// Hands the tags of a new station to the driver.
    fn take_in(&mut self, arrival: Arrival) -> Result<(), LaneError> {
        let Arrival { name, lane, place, files, backings, inbox, ready, end, wakeups, .. } =
            arrival;
        let (looks, is_withdrawn) = (arrival.looks, arrival.is_withdrawn);
        let queues = self.queues;
        let mut lane = lane.with_io(|parts| SharedIo { queues, parts });
        if let Err(error) = fill_tables(&mut lane, place, &files) {
            empty_tables(&mut lane, place, backings.len());
            let _ = ready.send(Err(error));
            // Its place is free again once it is sent back.
            let lane = lane.with_io(|io| io.parts);
            let _ = end.try_send(Ended { lane, backings, error: Some(error) });
            wakeups.lane_ended();
            return Ok(());
        }
        lane.fetch_all();
        lane.before_submit();
        let fetched = queues.borrow_mut().submit().map_err(LaneError::Ring);
        let _ = ready.send(fetched.and_then(|()| lane.check()));
        self.at[usize::from(name)] = u16::try_from(self.stations.len()).unwrap_or(NOBODY);
        let is_due = lane.backlog() > 0 || lane.engine().config().deadline.is_some();
        if is_due {
            self.due.push(name);
        }
        let station = Station {
            name,
            lane,
            place,
            backings,
            inbox,
            ready,
            end,
            wakeups,
            looks,
            is_withdrawn,
            in_flight: 0,
            is_due,
            failure: None,
        };
        self.stations.push(station);
        self.allow_looks();
        fetched
    }

    /// Lets go of all that a station has, and sends it back.
    fn end(&mut self, name: u16) {
        let index = self.at[usize::from(name)];
        self.at[usize::from(name)] = NOBODY;
        let mut station = self.stations.swap_remove(usize::from(index));
        self.in_flight -= station.in_flight;
        if let Some(moved) = self.stations.get(usize::from(index)) {
            self.at[usize::from(moved.name)] = index;
        }
        self.allow_looks();
        empty_tables(&mut station.lane, station.place, station.backings.len());
        let lane = station.lane.with_io(|io| io.parts);
        let ended = Ended { lane, backings: station.backings, error: station.failure };
        // There is room for the only one.
        let _ = station.end.try_send(ended);
        station.wakeups.lane_ended();
    }

    /// One station is enough to have the lane do without busy waits.
    fn allow_looks(&mut self) {
        let are_allowed = self.stations.iter().all(|station| station.looks);
        self.idle_policy.allow(are_allowed);
    }

    /// The ring does not work any more.
    fn end_all(&mut self, error: LaneError) {
        while let Some(station) = self.stations.last_mut() {
            station.failure.get_or_insert(error);
            let name = station.name;
            self.end(name);
        }
    }
}

/// What is to be done about a station.
enum Standing {
    Idle,
    Due,
    Over(u16),
}

type StationLane<'lane, 'ring> = Lane<AnyTarget, SharedIo<'lane, 'ring>>;

fn fill_tables(
    lane: &mut StationLane<'_, '_>,
    place: TableRange,
    files: &[RawFd],
) -> Result<(), LaneError> {
    let lent = lane.engine().config().slots.lent;
    let io = lane.io();
    let mut queues = io.queues.borrow_mut();
    queues.set_files(place.cdev(), files).map_err(failed("registering files"))?;
    let Some(pool) = &io.parts.pool else { return Ok(()) };
    let set = queues.set_buffers(place.first_slot + lent, pool);
    set.map_err(failed("registering buffers"))
}

/// The kernel can only refuse places that are beyond the tables.
fn empty_tables(lane: &mut StationLane<'_, '_>, place: TableRange, backings: usize) {
    let slots = lane.engine().config().slots;
    let mut queues = lane.io().queues.borrow_mut();
    let _ = queues.clear_files(place.cdev(), backings + 1);
    let _ = queues.clear_buffers(place.first_slot + slots.lent, slots.buffers());
}

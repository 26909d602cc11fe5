//! The loop that serves queues: the rings of one thread, and the stations on them.
//!
//! A lane of its own has one station for life. In a shared lane, stations come and go. Each
//! completion names its station by the incarnation; number 0 is the lane itself. One round of the
//! loop: handle the stations that have an event, submit and wait, reap, let the engines decide.
//! Nothing in it allocates, locks, logs or blocks: a station brings all its memory, and takes it
//! away.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError};
use std::time::Duration;

use nix::sys::eventfd::EventFd;
use slab::Slab;
use ublk_engine::lane::event::Event;
use ublk_engine::lane::{Hold, Lane, LaneError, TableRange};
use ublk_engine::target::AnyTarget;
use uring_ext::Errno;
use uring_ext::ring::Cqe;
use uring_ext::sqe::Sqe;

use crate::config::busy_wait::BusyWait;
use crate::io_thread::hold::LaneToken;
use crate::io_thread::idle_policy::IdlePolicy;
use crate::io_thread::message::{LaneMessage, attend};
use crate::io_thread::rings::{Rings, StationIo};
use crate::io_thread::setup::{EVENT, REAP_BATCH};
use crate::io_thread::spare::{MAX_SPARES, Spare};
use crate::io_thread::station::{
    Arrival, Ended, Leaving, MAX_STATIONS, NAMES, OWN, Parts, StationChannels,
};
use crate::os::clock::{coarse_now, precise_now};
use crate::os::wakeups::Wakeups;

/// The longest wait for a completion while entries have no room in the ring.
const FOR_ROOM: Duration = Duration::from_millis(1);
/// No station has this key.
const NOBODY: u16 = u16::MAX;

/// A queue that the lane serves.
struct Station {
    lane: Lane<AnyTarget>,
    parts: Parts,
    place: TableRange,
    inbox: Receiver<LaneMessage>,
    ready: SyncSender<Result<(), LaneError>>,
    end: SyncSender<Ended>,
    wakeups: Arc<Wakeups>,
    looks: bool,
    is_withdrawn: Arc<AtomicBool>,
    hold: Hold<LaneToken>,
    /// It must be handled before the next submission.
    is_due: bool,
    /// The reason why it must end. It ends when the driver has taken its fetches back.
    failure: Option<LaneError>,
}

/// A lane's loop.
pub(crate) struct EventLoop<'ring> {
    rings: Rings<'ring>,
    stations: Slab<Station>,
    /// The key of the station for each name.
    at: Box<[u16; NAMES as usize]>,
    /// Names of the stations that have an event.
    due: Vec<u16>,
    /// The source of stations, while it has a sender.
    arrivals: Option<Receiver<Arrival>>,
    wake: Arc<EventFd>,
    /// The time of the last reaping.
    now: u64,
    /// A station measures latencies, so the lane reads the precise clock.
    measures: bool,
    /// A station has requests that wait for their time, so the lane reads the precise clock.
    throttles: bool,
    idle_policy: IdlePolicy,
    /// Reads and writes in flight, of all stations.
    in_flight: usize,
    /// The lane belongs to one station, and ends with it.
    is_alone: bool,
    /// The lane ends once no request is in hand.
    is_draining: bool,
    /// Stations of a lane of one queue, kept until its rings are closed.
    left: Vec<Leaving>,
}

impl<'ring> EventLoop<'ring> {
    /// The loop of a shared lane, which serves the stations that arrive. It runs on the calling
    /// thread.
    pub fn shared(rings: Rings<'ring>, arrivals: Receiver<Arrival>, wake: Arc<EventFd>) -> Self {
        Self::new(rings, Some(arrivals), wake, BusyWait::Auto, MAX_STATIONS)
    }

    /// The loop of a lane with one station, which [arrives](EventLoop::take_in) before the loop
    /// runs.
    pub fn alone(rings: Rings<'ring>, wake: Arc<EventFd>, busy_wait: BusyWait) -> Self {
        Self::new(rings, None, wake, busy_wait, 1)
    }

    fn new(
        rings: Rings<'ring>,
        arrivals: Option<Receiver<Arrival>>,
        wake: Arc<EventFd>,
        busy_wait: BusyWait,
        stations: usize,
    ) -> Self {
        let is_alone = arrivals.is_none();
        Self {
            rings,
            stations: Slab::with_capacity(stations),
            at: Box::new([NOBODY; NAMES as usize]),
            due: Vec::with_capacity(stations),
            arrivals,
            wake,
            now: coarse_now(),
            measures: false,
            throttles: false,
            idle_policy: IdlePolicy::new(busy_wait),
            in_flight: 0,
            is_alone,
            is_draining: false,
            left: Vec::with_capacity(1),
        }
    }

    /// Serves until no sender can send stations any more and all stations have ended, or the lane
    /// is drained.
    ///
    /// # Errors
    /// [`LaneError::Ring`] if the ring does not work any more. If the lane has one station only,
    /// also the errors of the station.
    pub fn run(&mut self) -> Result<(), LaneError> {
        loop {
            self.look_after_due()?;
            if self.arrivals.is_none() && self.stations.is_empty() {
                return Ok(());
            }
            let is_idle = self.is_draining && self.is_idle();
            let in_flight = self.in_flight;
            self.submit_and_wait(is_idle)?;
            self.idle_policy.ended(in_flight);
            let reaped = self.reap()?;
            // All deliveries have been seen: there was a submission after the driver had stopped
            // delivering, and it has brought no completion.
            if is_idle && reaped == 0 {
                return Ok(());
            }
        }
    }

    fn submit_and_wait(&mut self, is_idle: bool) -> Result<(), LaneError> {
        if is_idle {
            return self.rings.submit_and_wait(Some(Duration::ZERO), self.in_flight);
        }
        // The time of a request may come earlier than a completion.
        let look_for = if self.throttles { 0 } else { self.idle_policy.look_for() };
        if look_for > 0 && self.rings.submit_and_poll(look_for)? {
            return Ok(());
        }
        self.rings.submit_and_wait(self.patience(), self.in_flight)
    }

    /// Handles all available completions in batches, and returns their number. The kernel is
    /// informed after each batch, so that it has room for more.
    fn reap(&mut self) -> Result<usize, LaneError> {
        let mut reaped = 0;
        loop {
            self.rings.sync();
            // Without measuring, the coarse clock is enough: it costs no system call and no clock
            // read.
            let is_precise = self.measures || self.throttles;
            self.now = if is_precise { precise_now() } else { coarse_now() };
            let mut count = 0;
            let mut next = self.rings.take();
            while let Some(cqe) = next {
                next = self.handle_run(cqe, &mut count)?;
            }
            self.rings.sync();
            reaped += count;
            if count < REAP_BATCH {
                return Ok(reaped);
            }
        }
    }

    /// Whether no request is open and every commit has been submitted.
    fn is_idle(&self) -> bool {
        let mut stations = self.stations.iter().map(|(_, station)| &station.lane);
        stations.all(|lane| lane.engine().holdings().requests == 0 && lane.backlog() == 0)
    }

    /// The longest wait for a completion. Stations with deadlines always have an event.
    fn patience(&self) -> Option<Duration> {
        let keys = self.due.iter().map(|name| usize::from(self.at[usize::from(*name)]));
        let due = keys.filter_map(|key| self.stations.get(key));
        // Entries that have no room now may be what its clients wait for.
        let patience = |lane: &Lane<AnyTarget>| {
            if lane.backlog() > 0 { Some(FOR_ROOM) } else { lane.engine().patience() }
        };
        due.filter_map(|station| patience(&station.lane)).min()
    }

    /// Handles a completion and the following ones of the same station, up to the end of the batch.
    /// Returns the first one of another station.
    #[inline(always)]
    fn handle_run(&mut self, first: Cqe, count: &mut usize) -> Result<Option<Cqe>, LaneError> {
        let name = Event::whose(first.user_data);
        let Some(station) = self.stations.get_mut(usize::from(self.at[usize::from(name)])) else {
            *count += 1;
            self.handle_own(first)?;
            return Ok(if *count < REAP_BATCH { self.rings.take() } else { None });
        };
        station.lane.set_now(self.now);
        let before = station.lane.engine().transfers_in_flight();
        let mut cqe = first;
        let next = loop {
            let mut io = StationIo { rings: &mut self.rings, parts: &mut station.parts };
            if !station.lane.handle_common(cqe, &mut io) {
                if Event::whose(cqe.user_data) != name {
                    break Some(cqe);
                }
                station.lane.handle_other(cqe, &mut io);
            }
            *count += 1;
            if *count == REAP_BATCH {
                break None;
            }
            match self.rings.take() {
                Some(next) => cqe = next,
                None => break None,
            }
        };
        self.in_flight = self.in_flight - before + station.lane.engine().transfers_in_flight();
        if station.lane.needs_attention() && !station.is_due {
            station.is_due = true;
            self.due.push(name);
        }
        Ok(next)
    }

    /// Handles a completion of the lane itself.
    #[cold]
    fn handle_own(&mut self, cqe: Cqe) -> Result<(), LaneError> {
        match Event::decode(cqe.user_data, OWN) {
            Some(Event::Wake) => self.read_messages(),
            Some(Event::Notified) => self.take_of_io_lane(),
            Some(Event::Unsent) => {
                Err(LaneError::Ring(Errno::from_result(cqe.res).err().unwrap_or(Errno::EIO)))
            }
            // A late completion for a removed station is dropped.
            Some(
                Event::Fetched(_)
                | Event::Op(_)
                | Event::Command(_)
                | Event::Registered(_)
                | Event::Unregistered(_)
                | Event::Cancelled
                | Event::Injected(_),
            )
            | None => Ok(()),
        }
    }

    fn take_of_io_lane(&mut self) -> Result<(), LaneError> {
        while let Some(cqe) = self.rings.take_of_io_lane() {
            // A full batch: no completion of the first ring comes in between.
            let mut count = REAP_BATCH - 1;
            self.handle_run(cqe, &mut count)?;
        }
        Ok(())
    }

    /// Handles the stations that have an event, before their entries are submitted.
    fn look_after_due(&mut self) -> Result<(), LaneError> {
        if self.rings.is_spare_wanted {
            self.pass_spares_on();
        }
        let mut at = 0;
        self.throttles = false;
        while let Some(name) = self.due.get(at).copied() {
            match self.look_after(name)? {
                Standing::Idle => {
                    self.due.swap_remove(at);
                }
                Standing::Due => at += 1,
                Standing::Over => {
                    self.due.swap_remove(at);
                    self.end(name);
                }
            }
        }
        Ok(())
    }

    fn look_after(&mut self, name: u16) -> Result<Standing, LaneError> {
        let key = usize::from(self.at[usize::from(name)]);
        let Some(station) = self.stations.get_mut(key) else { return Ok(Standing::Idle) };
        let mut io = StationIo { rings: &mut self.rings, parts: &mut station.parts };
        station.lane.set_now(self.now);
        let before = station.lane.engine().transfers_in_flight();
        station.lane.before_submit(&mut io);
        self.in_flight = self.in_flight - before + station.lane.engine().transfers_in_flight();
        if let Err(error) = station.lane.check() {
            if self.is_alone {
                return Err(error);
            }
            if station.failure.is_none() {
                station.failure = Some(error);
                let _ = station.ready.try_send(Err(error));
                station.wakeups.lane_ended();
            }
        }
        let engine = station.lane.engine();
        let is_finished = engine.is_finished();
        // The device was quiesced. On a shared ring the other fetches stay with the driver, which
        // delivers no more. A lane of its own says so even if all its fetches have ended: control
        // finds out whether the device was stopped or will be served again.
        let is_withdrawn = if self.is_alone {
            engine.has_ended_tags()
        } else {
            !is_finished && engine.has_ended_tags() && engine.holdings().requests == 0
        };
        if is_withdrawn && !station.is_withdrawn.swap(true, Ordering::AcqRel) {
            station.wakeups.undelivered();
        }
        if is_finished {
            return Ok(Standing::Over);
        }
        station.hold.check(&station.lane);
        if engine.has_throttled() {
            self.throttles = true;
            self.now = precise_now();
            station.lane.set_now(self.now);
        }
        let engine = station.lane.engine();
        let has_limit = engine.config().deadline.is_some() || station.hold.is_waited_for();
        station.is_due = has_limit || engine.has_throttled() || station.lane.backlog() > 0;
        Ok(if station.is_due { Standing::Due } else { Standing::Idle })
    }

    /// Gives free spare buffers to the stations that wait for them.
    #[cold]
    fn pass_spares_on(&mut self) {
        for index in 0..MAX_SPARES {
            while let Some(name) = self.rings.spares[index].next_turn() {
                let key = usize::from(self.at[usize::from(name)]);
                let Some(station) = self.stations.get_mut(key) else { continue };
                let mut io = StationIo { rings: &mut self.rings, parts: &mut station.parts };
                station.lane.set_now(self.now);
                let before = station.lane.engine().transfers_in_flight();
                station.lane.serve_waiting(&mut io);
                let after = station.lane.engine().transfers_in_flight();
                self.in_flight = self.in_flight - before + after;
                if !station.is_due {
                    station.is_due = true;
                    self.due.push(name);
                }
            }
        }
        self.rings.is_spare_wanted = self.rings.spares.iter().any(Spare::is_wanted);
    }

    /// Asks for a wake-up by the next message.
    pub fn watch(&mut self) -> Result<(), LaneError> {
        self.rings.push_own(Sqe::poll_readable(EVENT).user_data(Event::Wake.encode(OWN)))
    }

    fn read_messages(&mut self) -> Result<(), LaneError> {
        // An empty descriptor is no error: it only wakes.
        let _ = self.wake.read();
        self.watch()?;
        // The I/O lane wakes its lane this way if its own ring has failed.
        self.take_of_io_lane()?;
        for (_, station) in &mut self.stations {
            while let Ok(message) = station.inbox.try_recv() {
                let mut io = StationIo { rings: &mut self.rings, parts: &mut station.parts };
                station.lane.set_now(self.now);
                // A station of a shared lane is never drained: its fetches would stay with the
                // ring.
                let (lane, hold) = (&mut station.lane, &mut station.hold);
                let before = lane.engine().transfers_in_flight();
                self.is_draining |= attend(lane, hold, &mut io, message) && self.is_alone;
                self.in_flight = self.in_flight - before + lane.engine().transfers_in_flight();
                if !station.is_due {
                    station.is_due = true;
                    self.due.push(station.parts.name);
                }
            }
        }
        while let Some(arrivals) = &self.arrivals {
            match arrivals.try_recv() {
                Ok(arrival) => self.take_in(arrival)?,
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => self.arrivals = None,
            }
        }
        let mut stations = self.stations.iter();
        self.measures = stations.any(|(_, station)| station.lane.engine().recorder().is_some());
        Ok(())
    }

    /// Hands the tags of a new station to the driver.
    pub fn take_in(&mut self, arrival: Arrival) -> Result<(), LaneError> {
        let filled = self.rings.fill_tables(&arrival);
        let Arrival { lane, parts, place, channels, wakeups, looks, .. } = arrival;
        let StationChannels { inbox, ready, end, is_withdrawn } = channels;
        let name = parts.name;
        let mut station = Station {
            lane,
            parts,
            place,
            inbox,
            ready,
            end,
            wakeups,
            looks,
            is_withdrawn,
            hold: Hold::default(),
            is_due: false,
            failure: filled.err(),
        };
        if let Err(error) = filled {
            let _ = station.ready.send(Err(error));
            self.let_go(station);
            return Ok(());
        }
        let mut io = StationIo { rings: &mut self.rings, parts: &mut station.parts };
        station.lane.fetch_all(&mut io);
        station.lane.before_submit(&mut io);
        let fetched = self.rings.submit();
        let _ = station.ready.send(fetched.and_then(|()| station.lane.check()));
        station.is_due = true;
        self.due.push(name);
        let key = self.stations.insert(station);
        self.at[usize::from(name)] = u16::try_from(key).unwrap_or(NOBODY);
        self.allow_looks();
        fetched
    }

    /// Ends a station that has no operation in flight.
    fn end(&mut self, name: u16) {
        let key = std::mem::replace(&mut self.at[usize::from(name)], NOBODY);
        let Some(station) = self.stations.try_remove(key.into()) else { return };
        self.in_flight -= station.lane.engine().transfers_in_flight();
        self.rings.spares.iter_mut().for_each(|spare| spare.forget(name));
        self.allow_looks();
        self.let_go(station);
    }

    /// Removes a station from the tables and sends it back. Its ranges are then free again.
    fn let_go(&mut self, station: Station) {
        if self.is_alone {
            // The tables are closed with the rings.
            return self.left.push(station.leave());
        }
        let lent = station.lane.engine().config().slots.lent;
        self.rings.empty_tables(station.place, &station.parts, lent);
        station.leave().announce();
    }

    /// One station with this setting is enough to disable busy polling in the lane.
    fn allow_looks(&mut self) {
        let are_allowed = self.stations.iter().all(|(_, station)| station.looks);
        self.idle_policy.allow(are_allowed);
    }

    /// The end of the lane: the remains of its stations. If it ends with an error, its stations do
    /// too.
    pub fn end_all(mut self, error: Option<LaneError>) -> Vec<Leaving> {
        let mut left = std::mem::take(&mut self.left);
        for mut station in self.stations.drain() {
            station.failure = station.failure.or(error);
            left.push(station.leave());
        }
        left
    }
}

impl Station {
    fn leave(self) -> Leaving {
        let ended = Ended { lane: self.lane, parts: self.parts, error: self.failure };
        Leaving { ended, end: self.end, wakeups: self.wakeups }
    }
}

/// What to do with a station.
enum Standing {
    Idle,
    Due,
    Over,
}

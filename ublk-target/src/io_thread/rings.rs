//! The rings of a lane, and a station's access to the kernel through them.

use std::os::fd::RawFd;
use std::time::Duration;

use ublk_engine::lane::{LaneError, LaneIo, RingRole, TableRange};
use ublk_engine::plan::BackingIndex;
use ublk_engine::units::Tag;
use uring_ext::Errno;
use uring_ext::iod::IoDesc;
use uring_ext::nvme::{Namespace, RangeAddr};
use uring_ext::pool::{BufferPool, Direction, PoolAddr};
use uring_ext::ring::{Cqe, Queues};
use uring_ext::sqe::{FixedFile, Sqe};

use crate::io_thread::io_lane::IoLane;
use crate::io_thread::setup::failed;
use crate::io_thread::side_ring::SideQueues;
use crate::io_thread::spare::{MAX_SPARES, Spare, SpareBuffer};
use crate::io_thread::station::{Arrival, Parts};
use crate::os::clock::precise_now;

/// The rings of a lane. Most have one. There is a second ring if the first one polls, or if an I/O
/// lane issues the operations.
pub(crate) struct Rings<'ring> {
    pub queues: Queues<'ring>,
    /// The side ring, if `queues` polls.
    pub side: Option<SideQueues<'ring>>,
    pub io_lane: Option<IoLane>,
    /// The spare buffers, by number.
    pub spares: [Spare; MAX_SPARES],
    /// A station waits for a spare buffer.
    pub is_spare_wanted: bool,
}

impl<'ring> Rings<'ring> {
    /// Rings for `stations` stations, without spare buffers.
    pub fn new(
        queues: Queues<'ring>,
        side: Option<SideQueues<'ring>>,
        io_lane: Option<IoLane>,
        stations: usize,
    ) -> Self {
        let spares = std::array::from_fn(|_| Spare::new(stations));
        Self { queues, side, io_lane, spares, is_spare_wanted: false }
    }

    /// Submits the queued entries.
    pub fn submit(&mut self) -> Result<(), LaneError> {
        self.notify_io_lane()?;
        match &mut self.side {
            None => self.queues.submit(),
            Some(side) => side.poll(&mut self.queues),
        }
        .map_err(LaneError::Ring)
    }

    /// Submits the queued entries and waits for a completion, at most `patience`. If the ring polls
    /// and `transfers` are in flight, it polls once and does not wait.
    pub fn submit_and_wait(
        &mut self,
        patience: Option<Duration>,
        transfers: usize,
    ) -> Result<(), LaneError> {
        self.notify_io_lane()?;
        match (&mut self.side, patience) {
            (Some(side), _) if transfers > 0 => side.poll(&mut self.queues),
            (Some(side), limit) => side.sleep(&mut self.queues, limit),
            (None, None) => self.queues.submit_and_wait(),
            (None, Some(limit)) => self.queues.submit_and_wait_for(limit),
        }
        .map_err(LaneError::Ring)
    }

    /// Submits the queued entries, and polls for completions for at most `ns` nanoseconds. Returns
    /// whether there are any.
    pub fn submit_and_poll(&mut self, ns: u64) -> Result<bool, LaneError> {
        self.notify_io_lane()?;
        self.queues.submit_and_poll(ns).map_err(LaneError::Ring)
    }

    /// Makes new completions visible; see [`Queues::sync`].
    pub fn sync(&mut self) {
        self.queues.sync();
        if let Some(side) = &mut self.side {
            side.sync();
        }
    }

    /// Takes a completion that the last [`Rings::sync`] has made visible.
    #[inline(always)]
    pub fn take(&mut self) -> Option<Cqe> {
        self.queues.take().or_else(|| self.side.as_mut().and_then(SideQueues::take))
    }

    /// The next completion of the I/O lane.
    pub fn take_of_io_lane(&mut self) -> Option<Cqe> {
        self.io_lane.as_mut().and_then(IoLane::reap)
    }

    /// Queues an entry of the lane itself, on the ring on which the lane sleeps.
    pub fn push_own(&mut self, sqe: Sqe) -> Result<(), LaneError> {
        match &mut self.side {
            None => self.queues.push(&[sqe]),
            Some(side) => side.push(&[sqe]),
        }
        .map_err(LaneError::Ring)
    }

    /// Puts a station's files into the file table, from `first` on.
    pub fn set_files(&mut self, first: FixedFile, files: &[RawFd]) -> Result<(), LaneError> {
        let set = self.queues.set_files(first, files).and_then(|()| match &mut self.side {
            None => Ok(()),
            Some(side) => side.set_files(first, files),
        });
        set.map_err(failed("registering files"))
    }

    /// Puts buffers into the buffer table, from slot `first` on. An I/O lane has its own table, and
    /// has done so already.
    pub fn set_buffers(&mut self, first: u16, pool: &BufferPool) -> Result<(), LaneError> {
        if self.io_lane.is_some() {
            return Ok(());
        }
        self.queues.set_buffers(first, pool).map_err(failed("registering buffers"))
    }

    /// Puts a station's files and buffers into the tables.
    pub fn fill_tables(&mut self, arrival: &Arrival) -> Result<(), LaneError> {
        self.set_files(arrival.place.cdev(), &arrival.files)?;
        if let Some(SpareBuffer { index, slot, pool }) = arrival.spare {
            if self.spares[index].pool.is_none() {
                self.set_buffers(slot, &pool)?;
                self.spares[index].pool = Some(pool);
            }
        }
        let Some(pool) = &arrival.parts.pool else { return Ok(()) };
        let lent = arrival.lane.engine().config().slots.lent;
        self.set_buffers(arrival.place.first_slot + lent, pool)
    }

    /// Removes a station's files and buffers from the tables, `lent` slots after its first one.
    pub fn empty_tables(&mut self, place: TableRange, parts: &Parts, lent: u16) {
        let own = parts.pool.as_ref().map_or(0, |pool| pool.count());
        // The kernel can refuse only ranges beyond the tables.
        let _ = self.queues.clear_files(place.cdev(), parts.backings.len() + 1);
        let _ = self.queues.clear_buffers(place.first_slot + lent, own);
    }

    fn notify_io_lane(&mut self) -> Result<(), LaneError> {
        let message = self.io_lane.as_mut().and_then(IoLane::message);
        message.map_or(Ok(()), |sqe| self.queues.push(&[sqe]).map_err(LaneError::Ring))
    }
}

/// The lane's rings with the data of one station, for one call.
pub(crate) struct StationIo<'a, 'ring> {
    pub rings: &'a mut Rings<'ring>,
    pub parts: &'a mut Parts,
}

impl StationIo<'_, '_> {
    /// The pool with a buffer of the station, and the buffer's index there.
    fn pool(&self, buffer: u16) -> Option<(&BufferPool, u16)> {
        let Some(spare) = self.parts.spare else {
            return self.parts.pool.as_ref().map(|pool| (pool, buffer));
        };
        match buffer.checked_sub(1) {
            None => self.rings.spares[spare].pool.as_ref().map(|pool| (pool, 0)),
            Some(own) => self.parts.pool.as_ref().map(|pool| (pool, own)),
        }
    }
}

impl LaneIo for StationIo<'_, '_> {
    #[inline(always)]
    fn push(&mut self, role: RingRole, sqes: &[Sqe]) -> Result<(), Errno> {
        match (role, &mut self.rings.io_lane, &mut self.rings.side) {
            (RingRole::Io, Some(io_lane), _) => io_lane.push(sqes),
            (RingRole::Side, _, Some(side)) => side.push(sqes),
            (RingRole::Fetch | RingRole::Io | RingRole::Side, _, _) => self.rings.queues.push(sqes),
        }
    }

    #[inline]
    fn iod(&self, tag: Tag) -> IoDesc {
        self.parts.iods.get(tag.0)
    }

    fn copy(&mut self, tag: Tag, buffer: u16, direction: Direction, from: u32, to: u32) -> i32 {
        let Some((pool, buffer)) = self.pool(buffer) else { return Errno::EINVAL.negated() };
        self.parts.copy(tag, pool, buffer, direction, from..to)
    }

    fn pool_addr(&self, buffer: u16, offset: u32) -> PoolAddr {
        match self.pool(buffer) {
            Some((pool, buffer)) => pool.addr(buffer, offset),
            // The slot table says how many buffers there are, and the pools were made by it.
            None => unreachable!("a table without a pool has no pool slots"),
        }
    }

    fn range(&mut self, place: u16, namespace: Namespace, offset: u64, len: u64) -> RangeAddr {
        self.parts.range(place, namespace, offset, len)
    }

    fn has_shrunk(&mut self, backing: BackingIndex, end: u64) -> bool {
        self.parts.has_shrunk(backing, end)
    }

    fn take_spare(&mut self) -> bool {
        let (name, spare) = (self.parts.name, self.parts.spare);
        // Without a spare buffer, the buffers of the pool are the station's own.
        let is_taken = spare.is_none_or(|spare| self.rings.spares[spare].take(name));
        self.rings.is_spare_wanted |= !is_taken;
        is_taken
    }

    fn give_spare(&mut self) {
        let (name, spare) = (self.parts.name, self.parts.spare);
        if let Some(spare) = spare {
            self.rings.spares[spare].give(name);
        }
    }

    fn now(&mut self) -> u64 {
        precise_now()
    }
}

//! What a lane asks of the kernel, on real rings.

use std::fs::File;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use ublk_engine::lane::{LaneError, LaneIo, RingRole};
use ublk_engine::plan::BackingIndex;
use ublk_engine::units::Tag;
use uring_ext::Errno;
use uring_ext::iod::{IoDesc, IoDescArray};
use uring_ext::nvme::{Namespace, RangeAddr, Ranges};
use uring_ext::pool::{BufferPool, Direction, PoolAddr, RequestAddr};
use uring_ext::ring::{Cqe, Queues};
use uring_ext::sqe::Sqe;

use crate::backing::Backing;
use crate::io_thread::io_lane::IoLane;
use crate::io_thread::side_ring::SideQueues;

/// What a queue's lane works with, beside its rings.
pub(crate) struct Parts {
    pub qid: u16,
    pub iods: IoDescArray,
    pub pool: Option<BufferPool>,
    pub ranges: Option<Ranges>,
    pub cdev: Arc<File>,
    pub io_lane: Option<IoLane>,
    pub backings: Arc<[Backing]>,
}

/// The lane's ring, or rings.
pub(crate) struct RingIo<'ring> {
    pub queues: Queues<'ring>,
    /// Where `queues` polls.
    pub side: Option<SideQueues<'ring>>,
    pub parts: Parts,
}

impl RingIo<'_> {
    /// Submits what is queued.
    pub fn submit(&mut self) -> Result<(), LaneError> {
        self.tell_io_lane()?;
        match &mut self.side {
            None => self.queues.submit(),
            Some(side) => side.poll(&mut self.queues),
        }
        .map_err(LaneError::Ring)
    }

    /// Submits what is queued and waits for a completion, no longer than `patience`. Where the ring
    /// polls and there are `transfers` in flight, it looks once and does not wait.
    pub fn submit_and_wait(
        &mut self,
        patience: Option<Duration>,
        transfers: usize,
    ) -> Result<(), LaneError> {
        self.tell_io_lane()?;
        match (&mut self.side, patience) {
            (Some(side), _) if transfers > 0 => side.poll(&mut self.queues),
            (Some(side), limit) => side.sleep(&mut self.queues, limit),
            (None, None) => self.queues.submit_and_wait(),
            (None, Some(limit)) => self.queues.submit_and_wait_for(limit),
        }
        .map_err(LaneError::Ring)
    }

    /// Submits what is queued, and looks for completions for so many nanoseconds at most. Says
    /// whether there are any.
    pub fn submit_and_look(&mut self, ns: u64) -> Result<bool, LaneError> {
        self.tell_io_lane()?;
        self.queues.submit_and_poll(ns).map_err(LaneError::Ring)
    }

    /// Sees what has come; see [`Queues::look`].
    pub fn look(&mut self) {
        self.queues.sync();
        if let Some(side) = &mut self.side {
            side.look();
        }
    }

    /// Takes a completion of those that were there at the last look.
    #[inline(always)]
    pub fn take(&mut self) -> Option<Cqe> {
        self.queues.take().or_else(|| self.side.as_mut().and_then(SideQueues::take))
    }

    fn tell_io_lane(&mut self) -> Result<(), LaneError> {
        let message = self.parts.io_lane.as_mut().and_then(IoLane::message);
        message.map_or(Ok(()), |sqe| self.queues.push(&[sqe]).map_err(LaneError::Ring))
    }
}

impl LaneIo for RingIo<'_> {
    #[inline(always)]
    fn push(&mut self, role: RingRole, sqes: &[Sqe]) -> Result<(), Errno> {
        match (role, &mut self.parts.io_lane, &mut self.side) {
            (RingRole::Io, Some(io_lane), _) => io_lane.push(sqes),
            (RingRole::Side, _, Some(side)) => side.push(sqes),
            (RingRole::Fetch | RingRole::Io | RingRole::Side, _, _) => self.queues.push(sqes),
        }
    }

    #[inline]
    fn iod(&self, tag: Tag) -> IoDesc {
        self.parts.iods.get(tag.0)
    }

    fn copy(&mut self, tag: Tag, buffer: u16, direction: Direction, from: u32, to: u32) -> i32 {
        self.parts.copy(tag, buffer, direction, from, to)
    }

    fn pool_addr(&self, buffer: u16, offset: u32) -> PoolAddr {
        self.parts.pool_addr(buffer, offset)
    }

    fn range(&mut self, place: u16, namespace: Namespace, offset: u64, len: u64) -> RangeAddr {
        self.parts.range(place, namespace, offset, len)
    }

    fn has_shrunk(&mut self, backing: BackingIndex, end: u64) -> bool {
        self.parts.has_shrunk(backing, end)
    }

    fn now(&mut self) -> u64 {
        crate::os::clock::precise_now()
    }
}

impl Parts {
    pub fn copy(&self, tag: Tag, buffer: u16, direction: Direction, from: u32, to: u32) -> i32 {
        let Some(pool) = &self.pool else { return Errno::EINVAL.negated() };
        let request = RequestAddr { qid: self.qid, tag: tag.0 };
        match pool.copy(self.cdev.as_fd(), request, direction, buffer, from, to - from) {
            Ok(copied) => i32::try_from(copied).unwrap_or(i32::MAX),
            Err(errno) => errno.negated(),
        }
    }

    pub fn pool_addr(&self, buffer: u16, offset: u32) -> PoolAddr {
        match &self.pool {
            Some(pool) => pool.addr(buffer, offset),
            // The slot table says how many buffers there are, and they were made by it.
            None => unreachable!("a table without a pool has no pool slots"),
        }
    }

    pub fn has_shrunk(&self, backing: BackingIndex, end: u64) -> bool {
        self.backings.get(usize::from(backing.0)).is_some_and(|backing| backing.has_shrunk(end))
    }

    pub fn range(&mut self, place: u16, namespace: Namespace, offset: u64, len: u64) -> RangeAddr {
        match &mut self.ranges {
            Some(ranges) => ranges.set(place, namespace, offset, len),
            // They are made for lanes that have a namespace among their backings.
            None => unreachable!("a lane without a namespace deallocates nothing"),
        }
    }
}

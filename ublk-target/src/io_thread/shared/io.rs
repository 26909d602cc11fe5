//! What a station asks of the kernel, on the ring that it shares.

use std::cell::RefCell;

use ublk_engine::lane::{LaneIo, RingRole};
use ublk_engine::plan::BackingIndex;
use ublk_engine::units::Tag;
use uring_ext::Errno;
use uring_ext::iod::IoDesc;
use uring_ext::nvme::{Namespace, RangeAddr};
use uring_ext::pool::{Direction, PoolAddr};
use uring_ext::ring::Queues;
use uring_ext::sqe::Sqe;

use crate::io_thread::ring_io::Parts;
use crate::os::clock::precise_now;

/// The lane's ring, and what is the station's own. Nobody holds the ring while a station decides.
pub(crate) struct SharedIo<'lane, 'ring> {
    pub queues: &'lane RefCell<Queues<'ring>>,
    pub parts: Parts,
}

impl LaneIo for SharedIo<'_, '_> {
    #[inline]
    fn push(&mut self, _role: RingRole, sqes: &[Sqe]) -> Result<(), Errno> {
        self.queues.borrow_mut().push(sqes)
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
        precise_now()
    }
}

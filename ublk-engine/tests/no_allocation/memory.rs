//! A ring, a driver and planners that allocate nothing themselves.

use std::cell::Cell;
use std::collections::VecDeque;
use std::num::NonZeroU64;

use ublk_engine::lane::{LaneIo, RingRole};
use ublk_engine::plan::{BackingIndex, Op, OpKind, Plan, Planner, Verdict};
use ublk_engine::request::{Request, RequestKind};
use ublk_engine::target::{FaultLayer, Layered, LinearTarget, Rate, Rates, ThrottleLayer};
use ublk_engine::units::{Nanos, Tag};
use uring_ext::iod::IoDesc;
use uring_ext::nvme::{Namespace, RangeAddr, Ranges};
use uring_ext::pool::{BufferPool, Direction, PoolAddr};
use uring_ext::sqe::Sqe;
use uring_ext::{Errno, sys};

use super::DEPTH;

/// Plans an operation for every sector, alternating between two backings, so that requests need
/// several windows. FUA is a second stage.
#[derive(Clone, Copy, Debug)]
pub struct Sectors;

impl Planner for Sectors {
    fn plan(&self, request: &Request, from: u64, plan: &mut Plan) -> Result<(), Errno> {
        let kind = match request.kind {
            RequestKind::Read => OpKind::Read,
            RequestKind::Write { .. } => OpKind::Write { fua: false },
            RequestKind::Flush => return Ok(()),
            RequestKind::Discard => OpKind::Discard,
            RequestKind::WriteZeroes { may_unmap } => OpKind::WriteZeroes { may_unmap },
        };
        let mut done = from;
        while done < request.len && plan.ops().count() < 7 {
            let offset = request.offset + done;
            let backing = BackingIndex(u16::from(offset / 512 % 2 == 1));
            let buf_offset = if request.has_data() { u32::try_from(done).unwrap() } else { 0 };
            plan.push(Op { kind, backing, offset, len: 512, buf_offset }).unwrap();
            done += 512;
        }
        if done < request.len {
            plan.continue_at(done);
        }
        if request.kind == (RequestKind::Write { fua: true }) {
            plan.next_stage();
            let (kind, backing) = (OpKind::Flush, BackingIndex(0));
            plan.push(Op { kind, backing, offset: 0, len: 0, buf_offset: 0 }).unwrap();
        }
        Ok(())
    }
}

/// Short transfers, errors and delays from two layers, on pieces of two sectors, alternating between
/// two backings.
pub fn faults() -> Layered<FaultLayer, LinearTarget> {
    let rules = [
        &["p=0.2,short", "p=0.3,delay=1ms", "p=0.1,delay=1ms,error=EIO", "p=0.1,error=EIO"][..],
        &["p=0.1,short", "p=0.1,delay=1ms"],
    ];
    let layers = rules.map(|rules| {
        let rules: Vec<_> = rules.iter().map(|rule| rule.parse().unwrap()).collect();
        FaultLayer::new(rules, 1, 512)
    });
    let extents =
        (0..1024_u64).map(|number| (BackingIndex(u16::from(number % 2 == 1)), number << 10, 1024));
    Layered::new(layers, LinearTarget::new(extents).unwrap())
}

/// Pieces as of [`faults`], and more requests than two throttles let pass.
pub fn throttle() -> Layered<ThrottleLayer, Sectors> {
    let rate = Rate { iops: NonZeroU64::new(4000), bps: NonZeroU64::new(64 << 20) };
    let layer = |burst| ThrottleLayer::new(Rates { read: rate, write: rate, burst: Nanos(burst) });
    Layered::new([layer(1_000_000), layer(0)], Sectors)
}

/// Copies on write, one request at a time. Failed operations are issued elsewhere or ignored.
#[derive(Clone, Debug, Default)]
pub struct Turns {
    taken: Cell<bool>,
}

impl Planner for Turns {
    fn plan(&self, request: &Request, from: u64, plan: &mut Plan) -> Result<(), Errno> {
        if matches!(request.kind, RequestKind::Write { .. }) {
            if self.taken.replace(true) {
                plan.wait_at(from);
                return Ok(());
            }
            let (backing, offset, buf_offset) = (BackingIndex(0), request.offset, 0);
            for kind in [OpKind::ReadScratch, OpKind::WriteScratch { fua: true }] {
                plan.push(Op { kind, backing, offset, len: 512, buf_offset }).unwrap();
                plan.next_stage();
            }
        }
        Sectors.plan(&Request { len: request.len.min(512), ..*request }, from, plan)
    }

    fn scratch_bytes(&self) -> u32 {
        512
    }

    fn failed(&self, _: &Request, op: &Op, _: Errno) -> Verdict {
        match op.backing {
            BackingIndex(0) => Verdict::Instead { backing: BackingIndex(1), offset: op.offset },
            _ => Verdict::Ignore,
        }
    }

    fn settled(&self, request: &Request, _: Result<(), Errno>) {
        if matches!(request.kind, RequestKind::Write { .. }) {
            self.taken.set(false);
        }
    }
}

/// The kind of an entry, as far as its result depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Fetch,
    Register,
    Unregister,
    Transfer,
    Delay,
    Other,
    Cancel { user_data: u64 },
}

#[derive(Clone, Copy, Debug)]
pub struct Entry {
    pub user_data: u64,
    pub kind: Kind,
    pub len: i32,
    pub skip_success: bool,
}

impl Entry {
    fn decode(sqe: &Sqe) -> Self {
        let raw = sqe.as_bytes();
        let u32_at = |at: usize| u32::from_ne_bytes(raw[at..at + 4].try_into().unwrap());
        let u64_at = |at: usize| u64::from_ne_bytes(raw[at..at + 8].try_into().unwrap());
        let kind = match (raw[0], u32_at(8)) {
            (46, sys::UBLK_U_IO_FETCH_REQ | sys::UBLK_U_IO_COMMIT_AND_FETCH_REQ) => Kind::Fetch,
            (46, sys::UBLK_U_IO_REGISTER_IO_BUF) => Kind::Register,
            (46, sys::UBLK_U_IO_UNREGISTER_IO_BUF) => Kind::Unregister,
            (4 | 5, _) => Kind::Transfer,
            (11, _) => Kind::Delay,
            (14, _) => Kind::Cancel { user_data: u64_at(16) },
            _ => Kind::Other,
        };
        let len = i32::try_from(u32_at(24)).unwrap_or(i32::MAX);
        Self { user_data: u64_at(32), kind, len, skip_success: raw[1] & 1 << 6 != 0 }
    }
}

/// Stores pushed entries in memory that was allocated before the measurement.
pub struct Memory {
    pub pool: BufferPool,
    pub ranges: Ranges,
    pub queue: VecDeque<Entry>,
    /// The ring takes nothing.
    pub full: bool,
    pub iods: [IoDesc; DEPTH as usize],
    pub copies: u32,
    pub now: u64,
}

impl LaneIo for Memory {
    fn push(&mut self, _role: RingRole, sqes: &[Sqe]) -> Result<(), Errno> {
        if self.full || self.queue.len() + sqes.len() > self.queue.capacity() {
            return Err(Errno::EBUSY);
        }
        let mut rest = sqes;
        while let Some(sqe) = rest.first() {
            self.queue.push_back(Entry::decode(sqe));
            rest = &rest[sqe.width()..];
        }
        Ok(())
    }

    fn iod(&self, tag: Tag) -> IoDesc {
        self.iods[tag.index()]
    }

    fn copy(&mut self, _: Tag, _: u16, _: Direction, from: u32, to: u32) -> i32 {
        self.copies += 1;
        let all = i32::try_from(to - from).unwrap();
        match self.copies % 16 {
            1 => Errno::EAGAIN.negated(),
            2 => Errno::EFAULT.negated(),
            3 => 0,
            4..8 => all.min(300),
            _ => all,
        }
    }

    fn pool_addr(&self, buffer: u16, offset: u32) -> PoolAddr {
        self.pool.addr(buffer, offset)
    }

    fn range(&mut self, place: u16, namespace: Namespace, offset: u64, len: u64) -> RangeAddr {
        self.ranges.set(place, namespace, offset, len)
    }

    fn now(&mut self) -> u64 {
        self.now += 100;
        self.now
    }
}

//! A drive, a driver and a client, which track where each byte of a request is.

use std::collections::VecDeque;
use std::ops::Range;

use bufreg::{Incarnation, SlotIndex};
use ublk_engine::engine::{
    Answer, Engine, EngineConfig, OpKey, Port, QueueIdentity, SlotChoice, SlotTable, TagKey,
};
use ublk_engine::lend::LendMode;
use ublk_engine::plan::{BackingIndex, Op, OpKind, Plan, Planner};
use ublk_engine::request::{Geometry, Request};
use ublk_engine::units::{Qid, Tag};
use uring_ext::iod::IoDesc;
use uring_ext::pool::Direction;
use uring_ext::{Errno, sys};

/// Bytes of each request.
pub const LEN: u32 = 16 << 10;
const BLOCK: u32 = 512;
/// The result of an operation that fails after all retries that the drive demands: `ENODATA`,
/// negated.
pub const NO_DATA: i32 = -61;

/// Divides a request into `count` equal pieces, which are first issued for at most `at_first`
/// bytes.
#[derive(Clone, Copy, Debug)]
pub struct Pieces {
    pub count: u64,
    pub at_first: Option<u64>,
    pub delay_ns: u64,
}

impl Planner for Pieces {
    fn plan(&self, request: &Request, from: u64, plan: &mut Plan) -> Result<(), Errno> {
        if from == 0 {
            plan.delay(self.delay_ns);
            if let Some(bytes) = self.at_first {
                plan.transfer_at_first(bytes);
            }
        }
        let (kind, len) = (OpKind::of_request(request.kind), request.len / self.count);
        for piece in from..self.count {
            let buf_offset = request.buf_offset(request.offset + piece * len)?;
            let offset = request.offset + piece * len;
            if plan.push(Op { kind, backing: BackingIndex(0), offset, len, buf_offset }).is_err() {
                plan.continue_at(piece);
                break;
            }
        }
        Ok(())
    }
}

/// What happens to an operation, a registration or a copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It succeeds.
    Whole,
    /// It moves this many 256ths of its bytes.
    Part(u8),
    /// It moves nothing.
    Nothing,
    /// It fails with a transient error.
    Again,
    /// It fails.
    Error,
    /// The drive demands a retry after this many nanoseconds.
    Retry(u64),
}

impl Fate {
    /// The result of an operation that moves `len` bytes.
    fn of(self, len: u64) -> i32 {
        let len = i32::try_from(len).unwrap();
        match self {
            Self::Whole => len,
            Self::Part(part) => (len / 256 * i32::from(part)).max(1),
            Self::Nothing => 0,
            Self::Again => -11,
            Self::Error => -5,
            Self::Retry(_) => NO_DATA,
        }
    }

    /// The result of a command that moves no bytes.
    fn of_command(self) -> i32 {
        match self {
            Self::Whole | Self::Part(_) | Self::Nothing => 0,
            Self::Again => -12,
            Self::Error | Self::Retry(_) => -22,
        }
    }
}

/// What the engine waits for.
#[derive(Debug)]
enum Wanted {
    Op(OpKey, Op, Option<SlotIndex>),
    /// Register, operation and unregister.
    Chain(TagKey, SlotIndex, OpKey, Op),
    Register(TagKey),
    Unregister(TagKey),
}

/// Tracks where the bytes of a request are, and determines the results of operations.
#[derive(Debug, Default)]
pub struct Drive {
    /// The first slot of the pool.
    lent: u16,
    fetch: Option<TagKey>,
    wanted: VecDeque<Wanted>,
    fates: VecDeque<Fate>,
    answer: Option<i32>,
    /// For each byte of the request: whether its data is in the client's buffer, ...
    client: Vec<bool>,
    /// ... in the server's own, ...
    pool: Vec<bool>,
    /// ... and on the backing.
    backing: Vec<bool>,
    /// Lengths of the operations, in order.
    pub asked: Vec<u64>,
    /// Delays, in nanoseconds.
    pub paused: Vec<u64>,
}

impl Drive {
    fn fate(&mut self) -> Fate {
        self.fates.pop_front().unwrap_or(Fate::Whole)
    }

    /// Moves as many bytes of an operation as its result says.
    fn transfer(&mut self, op: &Op, slot: Option<SlotIndex>, res: i32) {
        let pooled = slot.expect("it has a buffer").0 >= self.lent;
        let buffer = if pooled { &mut self.pool } else { &mut self.client };
        let start = op.buf_offset as usize;
        let range = start..start + usize::try_from(res).unwrap_or(0);
        if op.is_read() {
            buffer[range.clone()].copy_from_slice(&self.backing[range]);
        } else {
            let missing = buffer[range.clone()].iter().position(|is_there| !is_there);
            assert_eq!(missing, None, "a byte of {op:?} is written and is not there");
            self.backing[range].fill(true);
        }
    }

    fn fill(&mut self, op_flags: u32) {
        let is_write = op_flags == sys::UBLK_IO_OP_WRITE;
        let all = |is: bool| vec![is; LEN as usize];
        (self.client, self.backing) = (all(is_write), all(!is_write));
        self.pool = all(false);
    }

    fn bytes(range: Range<u32>) -> Range<usize> {
        range.start as usize..range.end as usize
    }
}

impl Port for Drive {
    fn fetch(&mut self, key: TagKey, _slot: SlotIndex) {
        self.fetch = Some(key);
    }
    fn commit(&mut self, key: TagKey, answer: Answer, _slot: SlotIndex) {
        self.fetch = Some(key);
        assert_eq!(self.answer.replace(answer.result()), None, "answered twice");
    }
    fn register(&mut self, key: TagKey, _: SlotIndex) {
        self.wanted.push_back(Wanted::Register(key));
    }
    fn unregister(&mut self, key: TagKey, _: SlotIndex) {
        self.wanted.push_back(Wanted::Unregister(key));
    }
    fn submit(&mut self, key: OpKey, op: &Op, slot: Option<SlotIndex>) {
        self.wanted.push_back(Wanted::Op(key, *op, slot));
    }
    fn submit_chain(&mut self, tag: TagKey, slot: SlotIndex, key: OpKey, op: &Op) {
        self.wanted.push_back(Wanted::Chain(tag, slot, key, *op));
    }
    fn copy(&mut self, _: Tag, _: SlotIndex, direction: Direction, from: u32, to: u32) -> i32 {
        let res = self.fate().of((to - from).into());
        let moved = Self::bytes(from..from + u32::try_from(res).unwrap_or(0));
        match direction {
            Direction::FromRequest => self.pool[moved.clone()].copy_from_slice(&self.client[moved]),
            Direction::ToRequest => self.client[moved.clone()].copy_from_slice(&self.pool[moved]),
        }
        res
    }
    fn cancel(&mut self, _: OpKey, _: &Op) {}
    fn now(&mut self) -> u64 {
        0
    }
}

/// The lend modes, each with its buffer table.
pub fn modes() -> [(LendMode, SlotTable); 5] {
    let own = SlotTable { lent: 2, pool: 1, scratch: 0, choice: SlotChoice::From(0) };
    let any = SlotTable { choice: SlotChoice::AnyFree, ..own };
    let pool = SlotTable { lent: 0, pool: 2, ..own };
    [
        (LendMode::Fused, own),
        (LendMode::Slot, own),
        (LendMode::Slot, any),
        (LendMode::UserCopy, pool),
        (LendMode::Copy, pool),
    ]
}

/// An engine with one tag on this drive.
pub struct Play {
    pub engine: Engine<Pieces>,
    pub drive: Drive,
    /// Operations are commands. Their results do not contain the number of bytes moved.
    pub commands: bool,
}

impl Play {
    pub fn new(planner: Pieces, (lend, slots): (LendMode, SlotTable)) -> Self {
        let config = EngineConfig {
            queue: QueueIdentity { device: 0, qid: Qid(0), depth: 1 },
            incarnation: Incarnation(0),
            lend,
            slots,
            geometry: Geometry { size: 1 << 20, block: BLOCK, max_bytes: 1 << 20 },
            deadline: None,
        };
        let drive = Drive { lent: slots.lent, ..Drive::default() };
        let mut play = Self { engine: Engine::new(planner, config), drive, commands: false };
        play.engine.fetch_all(&mut play.drive);
        play
    }

    /// Serves a request with these fates; later operations succeed. Returns the answer, and checks
    /// that a success is the whole request.
    pub fn serve(&mut self, op_flags: u32, fates: &[Fate]) -> i32 {
        let key = self.drive.fetch.take().expect("the driver has the tag");
        self.drive.fates = fates.iter().copied().collect();
        self.drive.fill(op_flags);
        self.drive.asked.clear();
        self.drive.paused.clear();
        let is_write = op_flags == sys::UBLK_IO_OP_WRITE;
        let driver_copies = self.engine.config().lend == LendMode::Copy;
        if driver_copies && is_write {
            self.drive.pool.copy_from_slice(&self.drive.client);
        }
        let iod = IoDesc { op_flags, nr_sectors: LEN / 512, start_sector: 64 };
        self.engine.delivered(key, iod, &mut self.drive);
        while let Some(wanted) = self.drive.wanted.pop_front() {
            self.carry_out(wanted);
        }
        let answer = self.drive.answer.take().expect("it is answered");
        if driver_copies && !is_write && answer > 0 {
            self.drive.client.copy_from_slice(&self.drive.pool);
        }
        if answer >= 0 {
            assert_eq!(i64::from(answer), i64::from(LEN), "a part of {iod:?}");
            let moved = if is_write { &self.drive.backing } else { &self.drive.client };
            let missing = moved.iter().position(|is_there| !is_there);
            assert_eq!(missing, None, "a success of which a byte was not moved");
        }
        answer
    }

    fn carry_out(&mut self, wanted: Wanted) {
        let (engine, drive) = (&mut self.engine, &mut self.drive);
        match wanted {
            Wanted::Op(key, op, slot) if op.has_data() => self.transfer(key, &op, slot),
            Wanted::Op(key, op, _) => {
                drive.paused.push(op.len);
                engine.completed(key, Errno::ETIME.negated(), drive);
            }
            Wanted::Register(key) => engine.registered(key, drive.fate().of_command(), drive),
            Wanted::Unregister(key) => engine.unregistered(key, drive.fate().of_command(), drive),
            Wanted::Chain(tag, slot, key, op) => match drive.fate().of_command() {
                0 => {
                    self.transfer(key, &op, Some(slot));
                    let res = self.drive.fate().of_command();
                    self.engine.unregistered(tag, res, &mut self.drive);
                }
                errno => {
                    engine.registered(tag, errno, drive);
                    engine.completed(key, Errno::EFAULT.negated(), drive);
                    engine.unregistered(tag, Errno::EINVAL.negated(), drive);
                }
            },
        }
    }

    fn transfer(&mut self, key: OpKey, op: &Op, slot: Option<SlotIndex>) {
        self.drive.asked.push(op.len);
        let res = match self.drive.fate() {
            // A command is carried out as a whole or not at all.
            Fate::Whole | Fate::Part(_) | Fate::Nothing if self.commands => {
                let whole = self.engine.whole(key);
                assert_eq!(u64::try_from(whole), Ok(op.len), "what was issued");
                whole
            }
            Fate::Retry(pause_ns) => {
                let errno = Errno::new(-NO_DATA);
                return self.engine.asked_again(key, errno, pause_ns, &mut self.drive);
            }
            fate @ (Fate::Whole | Fate::Part(_) | Fate::Nothing | Fate::Again | Fate::Error) => {
                fate.of(op.len)
            }
        };
        self.drive.transfer(op, slot, res);
        self.engine.completed(key, res, &mut self.drive);
    }
}

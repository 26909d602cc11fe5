//! A seeded simulator: the real engine against a world that plays a faulty kernel.
//!
//! The world holds backings, request buffers and the buffer table as bytes. It delivers requests,
//! completes operations in any order, short, failed or not yet, repeats old completions, and
//! fails registrations. It checks at every step what the engine promises (see the list in the
//! module above), and at each commit that the bytes are what the answer says.

use std::collections::HashMap;

use bufreg::SlotIndex;
use uring_ext::iod::IoDesc;
use uring_ext::{Errno, sys};

use super::{Engine, MAX_RETRIES, OpKey, Port, QueueIdentity};
use crate::plan::{BackingIndex, Op, OpKind, Plan, Planner};
use crate::request::{Request, RequestKind};
use crate::units::{Qid, Tag};

const DEPTH: u16 = 8;
/// Each tag has a region of its own, so that requests never overlap and an oracle is exact.
const REGION: u64 = 64 << 10;
const CHUNK: u64 = 1024;
/// What buffers hold before a read: never a byte of a backing.
const GARBAGE: u8 = 0xee;

/// Stripes over two backings, so that requests need many operations, several windows, and, for
/// FUA, a second stage.
#[derive(Clone, Copy, Debug)]
struct Striper;

impl Planner for Striper {
    fn plan(&self, request: &Request, from: u64, plan: &mut Plan) -> Result<(), Errno> {
        let kind = match request.kind {
            RequestKind::Read => OpKind::Read,
            RequestKind::Write { .. } => OpKind::Write { fua: false },
            RequestKind::Discard => OpKind::Discard,
            RequestKind::WriteZeroes { may_unmap } => OpKind::WriteZeroes { may_unmap },
            RequestKind::Flush => return self.flush(plan),
        };
        let mut done = 0;
        while from + done < request.len {
            let at = request.offset + from + done;
            let len = (CHUNK - at % CHUNK).min(request.len - from - done);
            let chunk = at / CHUNK;
            let op = Op {
                kind,
                backing: BackingIndex(u16::from(chunk % 2 == 1)),
                offset: chunk / 2 * CHUNK + at % CHUNK,
                len,
                buf_offset: u32::try_from(from + done).unwrap(),
            };
            if plan.push(op).is_err() {
                break;
            }
            done += len;
        }
        plan.cover(done);
        if request.kind == (RequestKind::Write { fua: true }) && from + done == request.len {
            plan.next_stage();
            if self.flush(plan).is_err() {
                // No room for the flushes: leave the last sector to a window of its own.
                plan.clear();
                return self.plan(
                    &Request {
                        len: request.len - 512,
                        kind: RequestKind::Write { fua: false },
                        ..*request
                    },
                    from,
                    plan,
                );
            }
        }
        Ok(())
    }
}

impl Striper {
    fn flush(self, plan: &mut Plan) -> Result<(), Errno> {
        for backing in [BackingIndex(0), BackingIndex(1)] {
            let op = Op { kind: OpKind::Flush, backing, offset: 0, len: 0, buf_offset: 0 };
            plan.push(op).map_err(|_full| Errno::EIO)?;
        }
        Ok(())
    }
}

/// splitmix64.
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }
}

enum Pending {
    Op { key: OpKey, op: Op, tag: Tag },
    Registered { tag: Tag, res: i32 },
    Unregistered { tag: Tag, res: i32 },
}

impl Pending {
    const fn tag(&self) -> Tag {
        match self {
            Self::Op { tag, .. }
            | Self::Registered { tag, .. }
            | Self::Unregistered { tag, .. } => *tag,
        }
    }
}

/// A request under way, as the world sees it.
struct Open {
    request: Request,
    /// Errors that the world gave to its operations or registration.
    errors: u32,
    transient: u32,
    flushes: u32,
}

struct World {
    rng: Rng,
    /// Whether operations and registrations may fail; short transfers there are always.
    faulty: bool,
    backings: [Vec<u8>; 2],
    /// What the device must read as; `None` where a failed or discarding request left it open.
    oracle: Vec<Option<u8>>,
    buffers: Vec<Vec<u8>>,
    slots: Vec<Option<Tag>>,
    /// Tags whose buffer the engine registered by a command of its own.
    explicit: Vec<bool>,
    open: Vec<Option<Open>>,
    pending: Vec<Pending>,
    /// The tags of keys that are out, and keys that have been used up.
    keys: HashMap<OpKey, Tag>,
    spent: Vec<OpKey>,
    submitting: Option<Tag>,
    commits: u64,
    succeeded: u64,
}

impl Port for World {
    fn commit(&mut self, tag: Tag, result: i32) {
        let open = self.open[tag.index()].take().expect("committed once, after delivery");
        assert!(self.pending.iter().all(|p| p.tag() != tag), "committed with work in flight");
        assert!(!self.explicit[tag.index()], "committed with its own registration in place");
        if let Some(slot) = self.slots.iter_mut().find(|slot| **slot == Some(tag)) {
            *slot = None; // What the commit of an automatically registered buffer does.
        }
        self.commits += 1;
        let range = range(&open.request);
        if result < 0 {
            assert!(
                open.errors > 0 || open.transient > u32::from(MAX_RETRIES),
                "{:?} failed with {result} though nothing went wrong",
                open.request
            );
            if open.request.kind != RequestKind::Read {
                self.oracle[range].fill(None);
            }
            return;
        }
        assert_eq!(open.errors, 0, "{:?} succeeded in spite of an error", open.request);
        self.succeeded += 1;
        let moved = if open.request.has_data() { open.request.len } else { 0 };
        assert_eq!(u64::try_from(result).unwrap(), moved, "{:?}", open.request);
        self.check_bytes(tag, &open);
    }

    fn register(&mut self, tag: Tag, slot: SlotIndex) {
        let res = match self.rng.below(10) {
            _ if !self.faulty => 0,
            0 => Errno::ENOMEM.negated(),
            1 => Errno::EBUSY.negated(),
            _ => 0,
        };
        let open = self.open[tag.index()].as_mut().unwrap();
        if res == 0 {
            assert_eq!(self.slots[usize::from(slot.0)].replace(tag), None, "slot is taken");
            self.explicit[tag.index()] = true;
        } else if res == Errno::EBUSY.negated() {
            open.errors += 1;
        } else {
            open.transient += 1;
        }
        self.pending.push(Pending::Registered { tag, res });
    }

    fn unregister(&mut self, tag: Tag, slot: SlotIndex) {
        assert_eq!(self.slots[usize::from(slot.0)].take(), Some(tag));
        assert!(std::mem::take(&mut self.explicit[tag.index()]));
        self.pending.push(Pending::Unregistered { tag, res: 0 });
    }

    fn submit(&mut self, key: OpKey, op: &Op, slot: Option<SlotIndex>) {
        assert_eq!(op.has_data(), slot.is_some());
        let tag = match slot {
            Some(slot) => self.slots[usize::from(slot.0)].expect("the buffer is registered"),
            None => self.submitting.expect("an operation without data has a request"),
        };
        assert!(self.open[tag.index()].is_some(), "an operation after the commit");
        assert!(self.keys.insert(key, tag).is_none(), "a key is out twice");
        self.pending.push(Pending::Op { key, op: *op, tag });
    }
}

fn range(request: &Request) -> std::ops::Range<usize> {
    let start = usize::try_from(request.offset).unwrap();
    start..start + usize::try_from(request.len).unwrap()
}

impl World {
    fn new(seed: u64) -> Self {
        let bytes = usize::try_from(REGION * u64::from(DEPTH)).unwrap();
        Self {
            rng: Rng(seed),
            // Every fourth kernel is a sound one, under which every request must succeed.
            faulty: seed % 4 != 0,
            backings: [vec![0; bytes / 2], vec![0; bytes / 2]],
            oracle: vec![Some(0); bytes],
            buffers: vec![Vec::new(); usize::from(DEPTH)],
            slots: vec![None; usize::from(DEPTH)],
            explicit: vec![false; usize::from(DEPTH)],
            open: (0..DEPTH).map(|_| None).collect(),
            pending: Vec::new(),
            keys: HashMap::new(),
            spent: Vec::new(),
            submitting: None,
            commits: 0,
            succeeded: 0,
        }
    }

    /// A random request of a tag, as the driver would deliver it.
    fn deliver(&mut self, tag: Tag) -> IoDesc {
        let rng = &mut self.rng;
        let nr_sectors = u32::try_from(1 + rng.below(40)).unwrap();
        let first = u64::from(tag.0) * (REGION / 512);
        let start_sector = first + rng.below(REGION / 512 - u64::from(nr_sectors));
        let mut op_flags = match rng.below(10) {
            0..4 => sys::UBLK_IO_OP_READ,
            4..7 => sys::UBLK_IO_OP_WRITE,
            7 => sys::UBLK_IO_OP_FLUSH,
            8 => sys::UBLK_IO_OP_DISCARD,
            _ => sys::UBLK_IO_OP_WRITE_ZEROES,
        };
        if op_flags == sys::UBLK_IO_OP_WRITE && rng.chance(30) {
            op_flags |= sys::UBLK_IO_F_FUA;
        }
        let mut iod = IoDesc { op_flags, nr_sectors, start_sector };
        let request = Request::decode(iod).unwrap();
        let mut fill = GARBAGE;
        if op_flags & 0xff == sys::UBLK_IO_OP_WRITE {
            fill = u8::try_from(rng.below(0xe0)).unwrap();
        }
        if request.has_data() {
            self.buffers[tag.index()] = vec![fill; range(&request).len()];
            if rng.chance(15) {
                iod.op_flags |= sys::UBLK_IO_F_NEED_REG_BUF;
            } else {
                self.slots[tag.index()] = Some(tag);
            }
        }
        self.open[tag.index()] = Some(Open { request, errors: 0, transient: 0, flushes: 0 });
        iod
    }

    /// Decides how an operation ends and does what it then has done.
    fn carry_out(&mut self, op: &Op, tag: Tag) -> i32 {
        let open = self.open[tag.index()].as_mut().unwrap();
        match self.rng.below(100) {
            _ if !self.faulty => {}
            0..3 => {
                open.errors += 1;
                return Errno::EIO.negated();
            }
            3..10 => {
                open.transient += 1;
                return Errno::EAGAIN.negated();
            }
            10 if op.has_data() => {
                open.errors += 1;
                return 0;
            }
            _ => {}
        }
        open.flushes += u32::from(op.kind == OpKind::Flush);
        let mut len = usize::try_from(op.len).unwrap();
        if op.has_data() && len > 512 && self.rng.chance(20) {
            len = 512 * usize::try_from(1 + self.rng.below(op.len / 512 - 1)).unwrap();
            len = len.min(usize::try_from(op.len).unwrap());
        }
        let at = usize::try_from(op.offset).unwrap();
        let buf = usize::try_from(op.buf_offset).unwrap();
        let bytes = &mut self.backings[usize::from(op.backing.0)][..];
        let buffer = &mut self.buffers[tag.index()];
        match op.kind {
            OpKind::Read => buffer[buf..buf + len].copy_from_slice(&bytes[at..at + len]),
            OpKind::Write { .. } => bytes[at..at + len].copy_from_slice(&buffer[buf..buf + len]),
            OpKind::Discard | OpKind::WriteZeroes { .. } => bytes[at..at + len].fill(0),
            OpKind::Flush => {}
        }
        if op.has_data() { i32::try_from(len).unwrap() } else { 0 }
    }

    fn check_bytes(&mut self, tag: Tag, open: &Open) {
        let range = range(&open.request);
        let buffer = &self.buffers[tag.index()];
        match open.request.kind {
            RequestKind::Read => {
                for (byte, expected) in buffer.iter().zip(&self.oracle[range]) {
                    assert_ne!(*byte, GARBAGE, "a successful read left a hole");
                    assert!(expected.is_none_or(|expected| expected == *byte));
                }
            }
            RequestKind::Write { fua } => {
                assert!(!fua || open.flushes >= 2, "FUA without both flushes");
                for (known, byte) in self.oracle[range].iter_mut().zip(buffer) {
                    *known = Some(*byte);
                }
            }
            RequestKind::Discard => self.oracle[range].fill(None),
            RequestKind::WriteZeroes { .. } => self.oracle[range].fill(Some(0)),
            RequestKind::Flush => assert_eq!(open.flushes, 2),
        }
    }
}

struct Simulation {
    world: World,
    engine: Engine<Striper>,
    delivered: u64,
    /// Events that belong to nothing.
    spurious: u64,
}

impl Simulation {
    fn new(seed: u64) -> Self {
        let queue = QueueIdentity { device: 0, qid: Qid(0), depth: DEPTH };
        Self {
            world: World::new(seed),
            engine: Engine::new(Striper, queue),
            delivered: 0,
            spurious: 0,
        }
    }

    fn deliver(&mut self) {
        let tag = Tag(u16::try_from(self.world.rng.below(u64::from(DEPTH))).unwrap());
        if self.world.open[tag.index()].is_some() {
            return;
        }
        let iod = self.world.deliver(tag);
        self.delivered += 1;
        self.world.submitting = Some(tag);
        self.engine.delivered(tag, iod, self.delivered, &mut self.world);
    }

    fn complete_one(&mut self) {
        let Some(count) = u64::try_from(self.world.pending.len()).ok().filter(|n| *n > 0) else {
            return;
        };
        let at = usize::try_from(self.world.rng.below(count)).unwrap();
        let pending = self.world.pending.swap_remove(at);
        self.world.submitting = Some(pending.tag());
        match pending {
            Pending::Op { key, op, tag } => {
                let res = self.world.carry_out(&op, tag);
                self.world.keys.remove(&key);
                self.world.spent.push(key);
                self.engine.completed(key, res, &mut self.world);
            }
            Pending::Registered { tag, res } => self.engine.registered(tag, res, &mut self.world),
            Pending::Unregistered { tag, res } => {
                self.engine.unregistered(tag, res, &mut self.world);
            }
        }
    }

    fn repeat_an_old_completion(&mut self) {
        let spent = self.world.spent.len() as u64;
        if spent > 0 {
            let at = usize::try_from(self.world.rng.below(spent)).unwrap();
            let before = self.engine.stats().stale;
            let (key, commits) = (self.world.spent[at], self.world.commits);
            self.engine.completed(key, 4096, &mut self.world);
            assert_eq!(self.engine.stats().stale, before + 1, "a stale completion is counted");
            assert_eq!(self.world.commits, commits, "and changes nothing");
        }
    }

    /// Events of a confused driver: a second delivery, answers to commands that are not out, the
    /// end of a tag that is being served. They are counted and change nothing.
    fn confuse(&mut self) {
        let tag = Tag(u16::try_from(self.world.rng.below(u64::from(DEPTH))).unwrap());
        let is_open = self.world.open[tag.index()].is_some();
        let waits_for = |wanted: fn(&Pending) -> bool| {
            self.world.pending.iter().any(|pending| pending.tag() == tag && wanted(pending))
        };
        let registering = waits_for(|pending| matches!(pending, Pending::Registered { .. }));
        let unregistering = waits_for(|pending| matches!(pending, Pending::Unregistered { .. }));
        let before = (self.world.pending.len(), self.world.commits);
        match self.world.rng.below(4) {
            0 if !registering => self.engine.registered(tag, 0, &mut self.world),
            1 if !unregistering => self.engine.unregistered(tag, 0, &mut self.world),
            2 if is_open => {
                let iod = IoDesc { op_flags: 0, nr_sectors: 8, start_sector: 0 };
                self.engine.delivered(tag, iod, 0, &mut self.world);
            }
            3 if is_open => self.engine.fetch_ended(tag),
            _ => return,
        }
        self.spurious += 1;
        assert_eq!((self.world.pending.len(), self.world.commits), before);
    }

    fn drain(&mut self) {
        let mut left = 1_000_000_u32;
        while !self.world.pending.is_empty() {
            self.complete_one();
            left = left.checked_sub(1).expect("requests come to an end");
        }
        assert!(self.world.open.iter().all(Option::is_none), "every request is answered");
        assert_eq!(self.world.commits, self.delivered);
        assert_eq!(self.engine.registry().lent().count(), 0, "no slot is missing");
        for tag in 0..DEPTH {
            assert!(!self.engine.is_finished());
            self.engine.fetch_ended(Tag(tag));
        }
        assert!(self.engine.is_finished());
        assert_eq!(self.engine.stats().unexpected, self.spurious);
    }
}

fn simulate(seed: u64, steps: u32) -> (u64, u64) {
    let mut simulation = Simulation::new(seed);
    for _ in 0..steps {
        match simulation.world.rng.below(100) {
            0..20 => simulation.deliver(),
            20..95 => simulation.complete_one(),
            95..97 => simulation.confuse(),
            _ => simulation.repeat_an_old_completion(),
        }
    }
    simulation.drain();
    assert!(simulation.world.faulty || simulation.world.succeeded == simulation.delivered);
    (simulation.delivered, simulation.world.succeeded)
}

/// The long run plays more seeds of the same code.
fn seeds() -> u64 {
    if std::env::var_os("UBLK_VM_LONG").is_some() { 4_000 } else { 60 }
}

#[test]
fn every_request_is_answered_once_and_rightly_by_a_faulty_kernel() {
    let (mut delivered, mut succeeded) = (0, 0);
    for seed in 0..seeds() {
        let run = std::panic::catch_unwind(|| simulate(seed, 5_000));
        let (more, well) = run.unwrap_or_else(|_| panic!("seed {seed} failed"));
        delivered += more;
        succeeded += well;
    }
    println!("{delivered} requests, {succeeded} without an error");
    assert!(delivered > seeds() * 200, "the world delivers enough to mean something");
    assert!(succeeded > delivered / 4 && succeeded < delivered, "and some, not all, succeed");
}

//! What the engine guarantees to planners, and what it does not let them do.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;

use bufreg::{Incarnation, SlotIndex};
use ublk_engine::engine::{
    Answer, Engine, EngineConfig, MAX_SUBSTITUTES, OpKey, Port, QueueIdentity, SlotChoice,
    SlotTable, TagKey,
};
use ublk_engine::lend::LendMode;
use ublk_engine::plan::{BackingIndex, BackingPosition, Op, OpKind, Plan, Planner, Verdict};
use ublk_engine::request::{Geometry, Request};
use ublk_engine::units::{Qid, Tag};
use uring_ext::iod::IoDesc;
use uring_ext::pool::Direction;
use uring_ext::{Errno, sys};

#[path = "planners/hold.rs"]
mod hold;
#[path = "planners/throttle.rs"]
mod throttle;

const DEPTH: u16 = 4;
const EIO: i32 = -5;

type Planning = dyn Fn(&Request, u64, &mut Plan) -> Result<(), Errno>;

/// A planner that a test controls. Records its calls.
struct RecordingPlanner {
    planning: Box<Planning>,
    verdict: Cell<Verdict>,
    scratch: u32,
    /// Reads and writes need no planning.
    is_single: bool,
    asked: RefCell<Vec<(u64, u64)>>,
    failed: RefCell<Vec<(u16, Errno)>>,
    settled: RefCell<Vec<(u64, Result<(), Errno>)>>,
    withdrawn: RefCell<Vec<(u64, u64)>>,
    /// Set by the test, reset when a request settles.
    busy: Rc<Cell<bool>>,
}

impl RecordingPlanner {
    fn new(planning: impl Fn(&Request, u64, &mut Plan) -> Result<(), Errno> + 'static) -> Self {
        Self {
            planning: Box::new(planning),
            verdict: Cell::new(Verdict::Fail),
            scratch: 0,
            is_single: false,
            asked: RefCell::default(),
            failed: RefCell::default(),
            settled: RefCell::default(),
            withdrawn: RefCell::default(),
            busy: Rc::default(),
        }
    }
}

impl Planner for RecordingPlanner {
    fn plan(&self, request: &Request, from: u64, plan: &mut Plan) -> Result<(), Errno> {
        assert!(plan.is_empty() && plan.next().is_none() && plan.delay_ns() == 0);
        self.asked.borrow_mut().push((request.offset, from));
        (self.planning)(request, from, plan)
    }

    fn single(&self, request: &Request) -> Option<BackingPosition> {
        let position = BackingPosition { backing: BackingIndex(0), offset: 0 };
        (self.is_single && request.has_data()).then_some(position)
    }

    fn scratch_bytes(&self) -> u32 {
        self.scratch
    }

    fn failed(&self, _request: &Request, op: &Op, errno: Errno) -> Verdict {
        self.failed.borrow_mut().push((op.backing.0, errno));
        self.verdict.get()
    }

    fn withdrawn(&self, request: &Request, from: u64) {
        self.withdrawn.borrow_mut().push((request.offset, from));
    }

    fn settled(&self, request: &Request, result: Result<(), Errno>) {
        self.settled.borrow_mut().push((request.offset, result));
        self.busy.set(false);
    }
}

/// A port that records the engine's calls.
#[derive(Default)]
struct Wanted {
    fetches: [Option<TagKey>; DEPTH as usize],
    ops: VecDeque<(OpKey, Op, Option<SlotIndex>)>,
    answers: Vec<(Tag, i32)>,
}

impl Port for Wanted {
    fn fetch(&mut self, key: TagKey, _slot: SlotIndex) {
        self.fetches[key.tag.index()] = Some(key);
    }
    fn commit(&mut self, key: TagKey, answer: Answer, _slot: SlotIndex) {
        self.fetches[key.tag.index()] = Some(key);
        self.answers.push((key.tag, answer.result()));
    }
    fn register(&mut self, _: TagKey, _: SlotIndex) {}
    fn unregister(&mut self, _: TagKey, _: SlotIndex) {}
    fn submit(&mut self, key: OpKey, op: &Op, slot: Option<SlotIndex>) {
        self.ops.push_back((key, *op, slot));
    }
    fn submit_chain(&mut self, _: TagKey, _: SlotIndex, _: OpKey, _: &Op) {}
    fn copy(&mut self, _: Tag, _: SlotIndex, _: Direction, from: u32, to: u32) -> i32 {
        i32::try_from(to - from).unwrap()
    }
    fn cancel(&mut self, _: OpKey, _: &Op) {}
    fn now(&mut self) -> u64 {
        0
    }
}

/// An engine in fused mode, and its port.
struct Play {
    engine: Engine<RecordingPlanner>,
    wanted: Wanted,
}

impl Play {
    fn new(planner: RecordingPlanner) -> Self {
        let scratch = if planner.scratch > 0 { DEPTH } else { 0 };
        let config = EngineConfig {
            queue: QueueIdentity { device: 0, qid: Qid(0), depth: DEPTH },
            incarnation: Incarnation(0),
            lend: LendMode::Fused,
            slots: SlotTable { lent: DEPTH, pool: 1, scratch, choice: SlotChoice::From(0) },
            geometry: Geometry { size: 1 << 20, block: 4096, max_bytes: 1 << 20 },
            deadline: None,
        };
        let mut play = Self { engine: Engine::new(planner, config), wanted: Wanted::default() };
        play.engine.fetch_all(&mut play.wanted);
        play
    }

    /// Delivers a request of 16 KiB that begins at `number` times 16 KiB.
    fn deliver(&mut self, tag: u16, op_flags: u32, number: u64) {
        let key = self.wanted.fetches[usize::from(tag)].take().unwrap();
        let iod = IoDesc { op_flags, nr_sectors: 32, start_sector: number * 32 };
        self.engine.delivered(key, iod, &mut self.wanted);
    }

    /// Completes the operation that was issued first.
    fn complete(&mut self, res: i32) -> Op {
        let (key, op, _) = self.wanted.ops.pop_front().unwrap();
        self.engine.completed(key, res, &mut self.wanted);
        op
    }

    fn answers(&mut self) -> Vec<(u16, i32)> {
        self.wanted.answers.drain(..).map(|(tag, result)| (tag.0, result)).collect()
    }

    fn settled(&self) -> Vec<(u64, Result<(), Errno>)> {
        self.engine.planner().settled.take()
    }
}

const READ: u32 = sys::UBLK_IO_OP_READ;
const WRITE: u32 = sys::UBLK_IO_OP_WRITE;

fn op(kind: OpKind, len: u64) -> Op {
    Op { kind, backing: BackingIndex(0), offset: 0, len, buf_offset: 0 }
}

fn push(plan: &mut Plan, kind: OpKind, len: u64) {
    plan.push(op(kind, len)).unwrap();
}

fn single(verdict: Verdict) -> Play {
    let mut told = RecordingPlanner::new(|request, _, plan| {
        push(plan, OpKind::Read, request.len);
        Ok(())
    });
    told.is_single = true;
    told.verdict.set(verdict);
    Play::new(told)
}

#[test]
fn requests_that_need_no_planning_end_like_others() {
    let elsewhere = Verdict::Instead { backing: BackingIndex(3), offset: 4096 };
    let (fine, failed) = (16384, EIO);
    for (results, verdict, answer) in [
        (&[fine][..], Verdict::Fail, fine),
        (&[4096, 12288], Verdict::Fail, fine),
        (&[4096, EIO], Verdict::Fail, failed),
        (&[EIO, fine], elsewhere, fine),
        (&[EIO, 512, fine - 512], elsewhere, fine),
        (&[Errno::EAGAIN.negated(), fine], Verdict::Fail, fine),
        (&[fine + 1], Verdict::Fail, failed),
        (&[0], Verdict::Fail, failed),
    ] {
        let mut play = single(verdict);
        for turn in 1..3 {
            play.deliver(1, READ, 5);
            let ops: Vec<_> = results.iter().map(|res| play.complete(*res)).collect();
            assert_eq!(ops[0], op(OpKind::Read, 16384));
            assert_eq!(play.answers(), [(1, answer)], "{results:?}");
            let ended = if answer == fine { Ok(()) } else { Err(Errno::EIO) };
            assert_eq!(play.settled(), [(5 << 14, ended)], "{results:?}");
            assert!(play.wanted.ops.is_empty() && play.engine.planner().asked.borrow().is_empty());
            let told = play.engine.planner().failed.take().len();
            assert_eq!(told, usize::from(answer != fine || verdict == elsewhere));
            let holdings = play.engine.holdings();
            assert_eq!((holdings.requests, holdings.slots.free, holdings.leaked), (0, 5, 0));
            let stats = play.engine.stats();
            assert_eq!((stats.commits, stats.requests[0], stats.ops), (turn, turn, turn));
            assert_eq!(stats.bytes[0], turn * 16384);
        }
    }
}

#[test]
fn what_is_unusual_is_planned_all_the_same() {
    // Delivered again without an answer.
    let mut play = single(Verdict::Fail);
    let key = play.wanted.fetches[0].unwrap();
    play.deliver(0, READ, 0);
    play.wanted.fetches[0] = Some(key);
    play.deliver(0, READ, 0);
    assert_eq!((play.wanted.ops.len(), play.engine.stats().unexpected), (1, 1));
    // Of an earlier submission.
    play.complete(16384);
    play.wanted.fetches[0] = Some(key);
    play.deliver(0, READ, 0);
    assert_eq!((play.wanted.ops.len(), play.engine.stats().stale), (0, 1));
    // One that the driver did not lend, and one beyond the end.
    play.deliver(1, READ | sys::UBLK_IO_F_NEED_REG_BUF, 0);
    assert_eq!((play.wanted.ops.len(), play.engine.stats().need_reg_buf), (0, 1));
    assert_eq!(play.engine.planner().asked.take().len(), 1);
    play.deliver(2, READ, 64);
    assert_eq!(play.answers(), [(0, 16384), (2, EIO)]);
}

#[test]
fn a_delay_holds_operations_back() {
    let mut play = Play::new(RecordingPlanner::new(|request, _, plan| {
        plan.delay(500);
        plan.delay(200);
        push(plan, OpKind::Read, request.len);
        Ok(())
    }));
    play.deliver(0, READ, 0);
    assert_eq!(play.wanted.ops.len(), 1);
    let delay = play.complete(Errno::ETIME.negated());
    assert_eq!((delay.kind, delay.len), (OpKind::Delay, 700));
    assert_eq!(play.complete(16384).kind, OpKind::Read);
    assert_eq!(play.answers(), [(0, 16384)]);
    // A cancelled delay fails the request, and the planner is not asked.
    play.deliver(0, READ, 0);
    play.complete(Errno::ECANCELED.negated());
    assert_eq!(play.answers(), [(0, Errno::ECANCELED.negated())]);
    assert!(play.wanted.ops.is_empty() && play.engine.planner().failed.borrow().is_empty());
    let all = [(0, Ok(())), (0, Err(Errno::ECANCELED))];
    assert_eq!((play.settled(), play.engine.stats().delays), (all.into(), 2));
}

#[test]
fn an_error_can_come_late() {
    let mut play = Play::new(RecordingPlanner::new(|_, _, plan| {
        plan.delay(500);
        push(plan, OpKind::Read, 512);
        Err(Errno::ENOSPC)
    }));
    play.deliver(0, READ, 0);
    assert!(play.answers().is_empty());
    assert_eq!(play.complete(Errno::ETIME.negated()).kind, OpKind::Delay);
    assert_eq!(play.answers(), [(0, Errno::ENOSPC.negated())]);
    assert!(play.wanted.ops.is_empty(), "nothing of the window is issued");
    assert_eq!((play.settled(), play.engine.stats().planned_errors), (vec![], 1));
}

#[test]
fn who_waits_is_asked_again_when_another_has_settled() {
    let busy: Rc<Cell<bool>> = Rc::default();
    let mut told = RecordingPlanner::new({
        let busy = Rc::clone(&busy);
        move |_, _, plan| {
            if busy.replace(true) {
                plan.wait_at(7);
            } else {
                push(plan, OpKind::Flush, 0);
            }
            Ok(())
        }
    });
    told.busy = busy;
    let mut play = Play::new(told);
    for tag in 0..DEPTH {
        play.deliver(tag, WRITE, u64::from(tag));
    }
    let asked = |play: &Play| play.engine.planner().asked.take();
    let at = |tag: u64, from| (tag << 14, from);
    assert_eq!(asked(&play), [at(0, 0), at(1, 0), at(2, 0), at(3, 0)]);
    assert_eq!((play.wanted.ops.len(), play.engine.holdings().requests), (1, 4));
    play.complete(0);
    assert_eq!(asked(&play), [at(1, 7), at(2, 7), at(3, 7)], "in order");
    play.complete(0);
    assert_eq!(asked(&play), [at(2, 7), at(3, 7)]);
    play.complete(0);
    // A new request has to wait.
    play.deliver(0, WRITE, 0);
    assert_eq!(asked(&play), [at(3, 7), at(0, 0)]);
    play.complete(0);
    play.complete(0);
    let all = [(0, 16384), (1, 16384), (2, 16384), (3, 16384), (0, 16384)];
    assert_eq!((play.answers(), play.settled().len()), (all.into(), 5));
    assert_eq!((play.engine.stats().deferred, play.engine.holdings().slots.free), (7, 5));
}

#[test]
fn nobody_waits_alone_or_late() {
    let mut play = Play::new(RecordingPlanner::new(|_, _, plan| {
        plan.wait_at(0);
        Ok(())
    }));
    play.deliver(0, READ, 0);
    assert_eq!((play.answers(), play.settled()), (vec![(0, EIO)], vec![]));
    let mut play = Play::new(RecordingPlanner::new(|_, from, plan| {
        match from {
            0 => plan.continue_at(1),
            _ => plan.wait_at(1),
        }
        Ok(())
    }));
    play.deliver(0, READ, 0);
    assert_eq!((play.answers(), play.settled()), (vec![(0, EIO)], vec![(0, Err(Errno::EIO))]));
}

#[test]
fn who_is_held_back_does_not_miss_what_it_waits_for() {
    let busy = Cell::new(false);
    let mut play = Play::new(RecordingPlanner::new(move |_, from, plan| {
        if from == 0 && busy.replace(true) {
            plan.delay(100);
            plan.wait_at(1);
        } else {
            push(plan, OpKind::Read, 16384);
        }
        Ok(())
    }));
    play.deliver(0, READ, 0);
    play.deliver(1, READ, 1);
    play.complete(16384);
    assert_eq!(play.complete(Errno::ETIME.negated()).kind, OpKind::Delay);
    // The request that it waits for has settled meanwhile.
    assert_eq!(play.complete(16384).kind, OpKind::Read);
    assert_eq!(play.answers(), [(0, 16384), (1, 16384)]);
}

#[test]
fn a_write_may_be_ignored_and_a_read_may_not() {
    let both = |request: &Request, _: u64, plan: &mut Plan| {
        let kind = match request.offset {
            0 => OpKind::Read,
            _ => OpKind::Write { fua: false },
        };
        push(plan, kind, request.len);
        plan.next_stage();
        push(plan, OpKind::Flush, 0);
        Ok(())
    };
    let mut play = Play::new(RecordingPlanner::new(both));
    play.engine.planner().verdict.set(Verdict::Ignore);
    play.deliver(0, WRITE, 1);
    play.complete(EIO);
    assert_eq!(play.complete(0).kind, OpKind::Flush, "the next stage comes all the same");
    assert_eq!((play.answers(), play.engine.stats().ignored), (vec![(0, 16384)], 1));
    play.deliver(0, READ, 0);
    play.complete(EIO);
    assert_eq!((play.answers(), play.engine.stats().ignored), (vec![(0, EIO)], 1));
}

#[test]
fn what_is_left_of_an_operation_is_issued_elsewhere() {
    let mut play = Play::new(RecordingPlanner::new(|request, _, plan| {
        push(plan, OpKind::Read, request.len);
        Ok(())
    }));
    play.engine.planner().verdict.set(Verdict::Instead { backing: BackingIndex(1), offset: 99 });
    play.deliver(0, READ, 0);
    play.complete(4096);
    play.complete(EIO);
    let rest =
        Op { backing: BackingIndex(1), offset: 99, buf_offset: 4096, ..op(OpKind::Read, 12288) };
    assert_eq!(play.complete(12288), rest);
    assert_eq!(play.answers(), [(0, 16384)]);
    // The number of substitutes is limited.
    play.deliver(0, READ, 0);
    for _ in 0..MAX_SUBSTITUTES {
        play.complete(EIO);
        assert!(play.answers().is_empty());
    }
    play.complete(EIO);
    assert_eq!(play.answers(), [(0, EIO)]);
    assert_eq!(play.engine.stats().substituted, u64::from(MAX_SUBSTITUTES) + 1);
    assert_eq!(play.engine.planner().failed.borrow().last(), Some(&(1, Errno::EIO)));
}

#[test]
fn a_request_that_has_failed_issues_nothing_more() {
    let mut play = Play::new(RecordingPlanner::new(|_, _, plan| {
        push(plan, OpKind::Read, 4096);
        plan.push(Op { backing: BackingIndex(1), buf_offset: 4096, ..op(OpKind::Read, 4096) })
            .unwrap();
        Ok(())
    }));
    play.deliver(0, READ, 0);
    play.complete(EIO);
    play.engine.planner().verdict.set(Verdict::Instead { backing: BackingIndex(2), offset: 0 });
    play.complete(Errno::ENXIO.negated());
    assert!(play.wanted.ops.is_empty());
    assert_eq!(play.answers(), [(0, EIO)]);
    // The planner is still notified.
    assert_eq!(play.engine.planner().failed.take(), [(0, Errno::EIO), (1, Errno::ENXIO)]);
}

#[test]
fn each_tag_has_its_scratch_buffer_for_as_long_as_its_request() {
    let mut told = RecordingPlanner::new(|_, _, plan| {
        push(plan, OpKind::ReadScratch, 4096);
        plan.next_stage();
        push(plan, OpKind::WriteScratch { fua: false }, 4096);
        Ok(())
    });
    told.scratch = 4096;
    let mut play = Play::new(told);
    for tag in 0..DEPTH {
        play.deliver(tag, WRITE, u64::from(tag));
    }
    let slots: Vec<_> = play.wanted.ops.iter().map(|(_, _, slot)| slot.unwrap().0).collect();
    assert_eq!(slots, [5, 6, 7, 8], "behind the slots that lend and the pool");
    for _ in 0..2 * DEPTH {
        play.complete(4096);
    }
    assert_eq!(play.answers().len(), 4);
    assert_eq!(play.engine.holdings().slots.free, 9);
}

#[test]
fn a_planner_is_replaced_only_while_no_request_has_begun() {
    let read = |request: &Request, _: u64, plan: &mut Plan| {
        push(plan, OpKind::Read, request.len);
        Ok(())
    };
    let mut play = Play::new(RecordingPlanner::new(read));
    play.deliver(0, READ, 0);
    let refuses = |_: &Request, _: u64, _: &mut Plan| Err(Errno::ENOSPC);
    let mut other = RecordingPlanner::new(refuses);
    assert_eq!(play.engine.exchange_planner(&mut other), Err(Errno::EBUSY));
    play.complete(16384);
    assert_eq!(play.answers(), [(0, 16384)]);
    let mut greedy = RecordingPlanner::new(refuses);
    greedy.scratch = 512;
    let refused = play.engine.exchange_planner(&mut greedy);
    assert_eq!(refused, Err(Errno::EINVAL), "the table has no scratch buffers");
    assert_eq!(play.engine.exchange_planner(&mut other), Ok(()));
    assert_eq!(other.settled.take(), [(0, Ok(()))], "it is the planner of before");
    play.deliver(0, READ, 0);
    assert_eq!(play.answers(), [(0, Errno::ENOSPC.negated())]);
}

//! A lane allocates nothing after construction, whatever requests do.

#[path = "no_allocation/memory.rs"]
mod memory;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::collections::VecDeque;

use bufreg::Incarnation;
use ublk_engine::engine::{EngineConfig, EngineStats, QueueIdentity, Recorder};
use ublk_engine::engine::{SlotChoice, SlotTable};
use ublk_engine::lane::event::Event;
use ublk_engine::lane::{Lane, PortConfig};
use ublk_engine::lend::LendMode;
use ublk_engine::plan::Planner;
use ublk_engine::request::Geometry;
use ublk_engine::route::{DiscardCall, Route};
use ublk_engine::target::{LoopTarget, NullTarget};
use ublk_engine::units::Qid;
use uring_ext::iod::IoDesc;
use uring_ext::nvme::{Namespace, Ranges, RetryDelays};
use uring_ext::pool::BufferPool;
use uring_ext::ring::Cqe;
use uring_ext::{Errno, sys};

use memory::{Entry, Kind, Memory, Sectors, Turns, faults, throttle};

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

struct Counting;

// SAFETY: forwards everything to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.with(|count| count.set(count.get() + 1));
        // SAFETY: the caller meets the contract of `alloc`, which is the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the memory came from `System.alloc` with this layout.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const DEPTH: u16 = 16;
const DEADLINE: u64 = 1_000_000;
const BUFFER_BYTES: u32 = 16 << 10;
const ROUNDS: u64 = 300;

/// A lane, and the state of its kernel.
struct Play<P> {
    lane: Lane<P>,
    io: Memory,
    /// For each tag: the `user_data` of its fetch, while the driver has it.
    fetches: [Option<u64>; DEPTH as usize],
    /// Operations that do not complete.
    held: Vec<Entry>,
    /// The registration of the current chain has failed.
    unregistered: bool,
    answers: u64,
}

impl<P: Planner> Play<P> {
    fn new(planner: P, lend: LendMode, slots: SlotTable) -> Self {
        let config = EngineConfig {
            queue: QueueIdentity { device: 0, qid: Qid(0), depth: DEPTH },
            incarnation: Incarnation(5),
            lend,
            slots,
            geometry: Geometry { size: 1 << 20, block: 512, max_bytes: BUFFER_BYTES },
            deadline: Some(DEADLINE),
        };
        let room = usize::from(DEPTH) * 32;
        let mut io = Memory {
            ranges: Ranges::new(DEPTH * 8).unwrap(),
            pool: BufferPool::new(slots.buffers().max(1), BUFFER_BYTES).unwrap(),
            queue: VecDeque::with_capacity(room),
            full: false,
            iods: [IoDesc { op_flags: 0, nr_sectors: 0, start_sector: 0 }; DEPTH as usize],
            copies: 0,
            now: 1,
        };
        let namespace = Namespace { nsid: 1, block_shift: 9, retry_delays: RetryDelays::default() };
        let command = Route::Namespace { namespace, deallocates_zeroes: true };
        let routes = [Route::File(DiscardCall::BlockCommand), command].into();
        let port = PortConfig { routes, ..PortConfig::default() };
        let mut lane = Lane::new(planner, config, port);
        lane.engine_mut().measure(Some(Box::new(Recorder::new())));
        lane.fetch_all(&mut io);
        let held = Vec::with_capacity(room);
        let fetches = [None; DEPTH as usize];
        Self { lane, io, fetches, held, unregistered: false, answers: 0 }
    }

    /// Delivers a request of each kind to the tags that the driver has.
    fn deliver(&mut self, round: u64) {
        for tag in 0..DEPTH {
            let Some(user_data) = self.fetches[usize::from(tag)].take() else { continue };
            let ops = [
                sys::UBLK_IO_OP_READ,
                sys::UBLK_IO_OP_WRITE | sys::UBLK_IO_F_FUA,
                sys::UBLK_IO_OP_FLUSH,
                sys::UBLK_IO_OP_WRITE,
                sys::UBLK_IO_OP_DISCARD,
                sys::UBLK_IO_OP_WRITE_ZEROES,
                sys::UBLK_IO_OP_READ,
                sys::UBLK_IO_OP_REPORT_ZONES,
            ];
            let mut op_flags =
                ops[(usize::from(tag) + usize::try_from(round).unwrap()) % ops.len()];
            let fused = self.lane.engine().config().lend == LendMode::Fused;
            if fused && (u64::from(tag) + round) % 5 == 0 {
                op_flags |= sys::UBLK_IO_F_NEED_REG_BUF;
            }
            // Sometimes a request beyond the end.
            let start_sector = if (round + u64::from(tag)) % 23 == 0 { 1 << 40 } else { 32 };
            let nr_sectors = 1 + u32::from(tag) % 20;
            self.io.iods[usize::from(tag)] = IoDesc { op_flags, nr_sectors, start_sector };
            self.lane.handle(Cqe { user_data, res: 0 }, &mut self.io);
            // A duplicate, and a completion of an earlier incarnation: both change nothing.
            self.lane.handle(Cqe { user_data, res: 0 }, &mut self.io);
            self.lane.handle(Cqe { user_data: 1 << 48, res: 0 }, &mut self.io);
        }
    }

    /// Makes the kernel carry out everything that it can.
    fn serve(&mut self, turn: &mut u64) {
        loop {
            self.lane.before_submit(&mut self.io);
            let Some(entry) = self.io.queue.pop_front() else { return };
            *turn += 1;
            self.carry_out(entry, *turn);
        }
    }

    fn carry_out(&mut self, entry: Entry, turn: u64) {
        let res = match entry.kind {
            Kind::Fetch => {
                let Some(Event::Fetched(key)) = Event::decode(entry.user_data, Incarnation(5))
                else {
                    panic!("a fetch is named as such")
                };
                self.fetches[key.tag.index()] = Some(entry.user_data);
                self.answers += u64::from(key.seq > 0);
                return;
            }
            Kind::Register => {
                let res = match turn % 7 {
                    0 => Errno::ENOMEM.negated(),
                    1 => Errno::EBUSY.negated(),
                    _ => 0,
                };
                self.unregistered = res < 0;
                res
            }
            Kind::Unregister if std::mem::take(&mut self.unregistered) => Errno::EINVAL.negated(),
            Kind::Unregister => match turn % 11 {
                0 => Errno::EAGAIN.negated(),
                1 => Errno::EIO.negated(),
                _ => 0,
            },
            Kind::Transfer if self.unregistered => Errno::EFAULT.negated(),
            Kind::Delay if turn % 5 > 0 => Errno::ETIME.negated(),
            Kind::Transfer | Kind::Delay | Kind::Other => match turn % 19 {
                0 => return self.held.push(entry),
                1 | 2 => Errno::EAGAIN.negated(),
                3 => Errno::EIO.negated(),
                4 => 0,
                5 | 6 if entry.kind == Kind::Transfer => 100.min(entry.len),
                _ if entry.kind == Kind::Transfer => entry.len,
                _ => 0,
            },
            Kind::Cancel { user_data } => {
                let held = self.held.iter().position(|held| held.user_data == user_data);
                match held.filter(|_| turn % 2 == 0) {
                    Some(at) => {
                        let held = self.held.swap_remove(at);
                        self.complete(held, Errno::ECANCELED.negated());
                        0
                    }
                    None => Errno::EALREADY.negated(),
                }
            }
        };
        self.complete(entry, res);
    }

    fn complete(&mut self, entry: Entry, res: i32) {
        if !(entry.skip_success && res >= 0) {
            self.lane.handle(Cqe { user_data: entry.user_data, res }, &mut self.io);
        }
    }

    fn let_deadlines_pass(&mut self) {
        self.io.now += 2 * DEADLINE;
        let now = self.io.now;
        self.lane.set_now(now);
        self.lane.before_submit(&mut self.io);
    }

    fn round(&mut self, round: u64, turn: &mut u64) {
        // Some are held back before any has begun, others after they have.
        if round % 4 == 3 {
            self.lane.engine_mut().hold();
        }
        self.deliver(round);
        if round % 4 == 1 {
            self.lane.engine_mut().hold();
            let _ = self.lane.engine_mut().oldest_begun();
        }
        if self.lane.engine().is_holding() {
            self.lane.release(&mut self.io);
        }
        self.serve(turn);
        // Some operations are cancelled, and the others are lost; then they complete after all.
        self.let_deadlines_pass();
        self.serve(turn);
        self.let_deadlines_pass();
        self.serve(turn);
        while let Some(entry) = self.held.pop() {
            let res = if entry.kind == Kind::Transfer { entry.len } else { 0 };
            self.complete(entry, res);
            self.serve(turn);
        }
    }

    fn stats(&self) -> EngineStats {
        *self.lane.engine().stats()
    }
}

fn allocations() -> u64 {
    ALLOCATIONS.with(Cell::get)
}

/// Serves requests of all kinds in one mode. Returns the engine's counters.
fn play(planner: impl Planner, lend: LendMode, slots: SlotTable) -> EngineStats {
    let mut play = Play::new(planner, lend, slots);
    let mut turn = 0;
    play.serve(&mut turn);
    let before = allocations();
    for round in 0..ROUNDS {
        play.round(round, &mut turn);
    }
    assert_eq!(allocations() - before, 0, "{lend}, {slots:?}: {}", play.stats());
    assert_eq!(play.answers, ROUNDS * u64::from(DEPTH), "every request was answered");
    play.stats()
}

/// The lend modes, each with its buffer table.
fn modes() -> [(LendMode, SlotTable); 5] {
    let from_zero = SlotChoice::From(0);
    let own = SlotTable { lent: DEPTH, pool: 1, scratch: 0, choice: from_zero };
    let any = SlotTable { choice: SlotChoice::AnyFree, ..own };
    let pool = SlotTable { lent: 0, pool: DEPTH, scratch: 0, choice: from_zero };
    [
        (LendMode::Fused, own),
        (LendMode::Slot, own),
        (LendMode::Slot, any),
        (LendMode::UserCopy, pool),
        (LendMode::Copy, pool),
    ]
}

#[test]
fn serving_requests_allocates_nothing() {
    for (lend, slots) in modes() {
        let all = [
            play(LoopTarget::new(1 << 20), lend, slots),
            play(NullTarget, lend, slots),
            play(Sectors, lend, slots),
            play(faults(), lend, slots),
            play(throttle(), lend, slots),
            play(Turns::default(), lend, SlotTable { scratch: DEPTH, ..slots }),
        ];
        // The run did include retries, short transfers, errors and deadlines.
        for stats in &all {
            assert!(stats.retries > 0 && stats.partial > 0 && stats.failed > 0, "{lend}: {stats}");
            assert!(stats.timed_out > 0 && stats.lost_ops > 0, "{lend}: {stats}");
            assert!(stats.refused_unknown > 0 && stats.refused_malformed > 0, "{lend}: {stats}");
            assert!(stats.stale > 0 && stats.held_back > 0, "{lend}: {stats}");
        }
        let sum = |count: fn(&EngineStats) -> u64| all.iter().map(count).sum::<u64>();
        assert!(sum(|stats| stats.throttled) > 0, "{lend}");
        assert!(sum(|stats| stats.delays) > 0 && sum(|stats| stats.planned_short) > 0, "{lend}");
        assert!(sum(|stats| stats.planned_errors) > 0 && sum(|stats| stats.deferred) > 0, "{lend}");
        assert!(sum(|stats| stats.substituted) > 0 && sum(|stats| stats.ignored) > 0, "{lend}");
        if lend.is_zero_copy() {
            assert!(sum(|stats| stats.registered) > 0 && sum(|stats| stats.copied) > 0, "{lend}");
            assert!(sum(|stats| stats.failed_registrations) > 0, "{lend}");
            assert!(sum(|stats| stats.failed_unregistrations) > 0, "{lend}");
            assert!(sum(|stats| stats.waited) > 0, "{lend}: some wait for the one spare buffer");
        }
        assert_eq!(lend == LendMode::Fused, sum(|stats| stats.need_reg_buf) > 0, "{lend}");
    }
}

/// The longest possible backlog of a lane: while the ring takes nothing, the operations of a window
/// are cancelled but complete, then those of the next window are issued and cancelled too.
#[test]
fn a_ring_that_takes_nothing_makes_nobody_allocate() {
    let slots = SlotTable { lent: DEPTH, pool: 0, scratch: 0, choice: SlotChoice::From(0) };
    let mut play = Play::new(Sectors, LendMode::Fused, slots);
    let mut turn = 0;
    play.serve(&mut turn);
    let mut inflight = Vec::with_capacity(usize::from(DEPTH) * 8);
    let before = allocations();
    for tag in 0..DEPTH {
        let user_data = play.fetches[usize::from(tag)].take().unwrap();
        let op_flags = sys::UBLK_IO_OP_READ;
        play.io.iods[usize::from(tag)] = IoDesc { op_flags, nr_sectors: 20, start_sector: 0 };
        play.lane.handle(Cqe { user_data, res: 0 }, &mut play.io);
    }
    inflight.extend(play.io.queue.drain(..));
    play.io.full = true;
    play.let_deadlines_pass();
    for entry in inflight.drain(..) {
        play.complete(entry, entry.len);
    }
    play.let_deadlines_pass();
    // Four operations of the second window are commands, which are double entries.
    let (waiting, per_tag) = (play.lane.backlog(), 7 + (3 + 2 * 4) + 7);
    assert_eq!(waiting, usize::from(DEPTH) * per_tag);
    assert_eq!(allocations() - before, 0);
    play.io.full = false;
    play.serve(&mut turn);
    while let Some(entry) = play.held.pop() {
        play.complete(entry, entry.len);
        play.serve(&mut turn);
    }
    assert_eq!(play.answers, u64::from(DEPTH));
}

#[test]
fn the_counter_counts() {
    let before = allocations();
    drop(std::hint::black_box(Box::new(7)));
    assert_eq!(allocations(), before + 1);
}

//! After its construction the engine allocates nothing, whatever requests do.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use bufreg::SlotIndex;
use ublk_target::engine::{Engine, OpKey, Port, QueueIdentity};
use ublk_target::plan::Op;
use ublk_target::target::{AnyTarget, LoopTarget, NullTarget};
use ublk_target::units::{Qid, Tag};
use uring_ext::iod::IoDesc;
use uring_ext::sys;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

struct Counting;

// SAFETY: passes everything on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.with(|count| count.set(count.get() + 1));
        // SAFETY: the caller keeps the contract of `alloc`, which is the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the memory came from `System.alloc` with this layout.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const DEPTH: u16 = 64;

/// Keeps what the engine decided in memory set aside before the measurement.
struct Kept {
    ops: Vec<(OpKey, Op)>,
    registrations: Vec<Tag>,
    unregistrations: Vec<Tag>,
    commits: u64,
}

impl Port for Kept {
    fn commit(&mut self, _tag: Tag, _result: i32) {
        self.commits += 1;
    }
    fn register(&mut self, tag: Tag, _slot: SlotIndex) {
        self.registrations.push(tag);
    }
    fn unregister(&mut self, tag: Tag, _slot: SlotIndex) {
        self.unregistrations.push(tag);
    }
    fn submit(&mut self, key: OpKey, op: &Op, _slot: Option<SlotIndex>) {
        self.ops.push((key, *op));
    }
}

/// Plays requests of all kinds, short transfers, retries, errors and explicit registrations.
fn play(engine: &mut Engine<AnyTarget>, kept: &mut Kept, rounds: u32) {
    for round in 0..rounds {
        for tag in 0..DEPTH {
            let ops = [
                sys::UBLK_IO_OP_READ,
                sys::UBLK_IO_OP_WRITE | sys::UBLK_IO_F_FUA,
                sys::UBLK_IO_OP_FLUSH,
                sys::UBLK_IO_OP_DISCARD,
                sys::UBLK_IO_OP_WRITE_ZEROES,
                sys::UBLK_IO_OP_READ | sys::UBLK_IO_F_NEED_REG_BUF,
                sys::UBLK_IO_OP_REPORT_ZONES,
            ];
            let op_flags = ops[usize::from(tag) % ops.len()];
            let iod = IoDesc { op_flags, nr_sectors: 8, start_sector: u64::from(tag) * 8 };
            engine.delivered(Tag(tag), iod, u64::from(round), kept);
        }
        while let Some(tag) = kept.registrations.pop() {
            engine.registered(tag, 0, kept);
        }
        let mut turn = round;
        while let Some((key, op)) = kept.ops.pop() {
            turn += 1;
            let all = i32::try_from(op.len).unwrap();
            let res = match turn % 8 {
                0 if op.len > 512 => 512,
                1 => -libc::EAGAIN,
                2 => -libc::EIO,
                _ => all,
            };
            engine.completed(key, res, kept);
        }
        while let Some(tag) = kept.unregistrations.pop() {
            engine.unregistered(tag, 0, kept);
        }
    }
}

#[test]
fn serving_requests_allocates_nothing() {
    for target in [AnyTarget::Loop(LoopTarget { size: 1 << 20 }), AnyTarget::Null(NullTarget)] {
        let queue = QueueIdentity { device: 0, qid: Qid(0), depth: DEPTH };
        let mut engine = Engine::new(target, queue);
        let room = usize::from(DEPTH) * 8;
        let mut kept = Kept {
            ops: Vec::with_capacity(room),
            registrations: Vec::with_capacity(room),
            unregistrations: Vec::with_capacity(room),
            commits: 0,
        };
        let before = ALLOCATIONS.with(Cell::get);
        play(&mut engine, &mut kept, 1000);
        let allocations = ALLOCATIONS.with(Cell::get) - before;
        assert_eq!(kept.commits, 1000 * u64::from(DEPTH), "every request was answered");
        assert_eq!(allocations, 0, "{target:?}");
    }
}

#[test]
fn the_counter_counts() {
    let before = ALLOCATIONS.with(Cell::get);
    drop(std::hint::black_box(Box::new(7)));
    assert_eq!(ALLOCATIONS.with(Cell::get), before + 1);
}

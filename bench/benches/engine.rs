//! The cost of a request in user space: the registry, the planners and the building of entries
//! separately, and the engine with the loop target in each lend mode.

#![allow(missing_docs, reason = "the macros of criterion make public items without docs")]

use std::hint::black_box;

use bufreg::{Borrower, Incarnation, Owner, Registry, SlotIndex};
use criterion::{Criterion, criterion_group, criterion_main};
use ublk_engine::engine::{
    Answer, Engine, EngineConfig, OpKey, Port, QueueIdentity, SlotChoice, SlotTable, TagKey,
};
use ublk_engine::lend::LendMode;
use ublk_engine::plan::{Op, Plan, Planner};
use ublk_engine::request::{Geometry, Request, RequestKind};
use ublk_engine::target::{LoopTarget, StripeTarget};
use ublk_engine::units::{Qid, Tag};
use uring_ext::iod::IoDesc;
use uring_ext::pool::Direction;
use uring_ext::sqe::{Delivery, FixedBuffer, FixedFile, Sqe};
use uring_ext::sys;

const DEPTH: u16 = 128;

fn lend_and_return(criterion: &mut Criterion) {
    let mut registry = Registry::new(DEPTH, Incarnation(0));
    let owner = Owner { device: 0, qid: 0, tag: 5 };
    criterion.bench_function("registry: lend, borrow, give back, release", |bencher| {
        bencher.iter(|| {
            let lease = registry.reserve(SlotIndex(5), owner, 0).expect("the slot is free");
            let lease = registry.activate(lease);
            let borrow = registry.borrow(&lease, Borrower(7)).expect("nothing borrows it");
            registry.give_back(borrow).expect("the borrow is live");
            let lease = registry.retire(lease).expect("no borrow is left");
            registry.release(lease);
        });
    });
}

fn plan(criterion: &mut Criterion) {
    const CHUNK: u64 = 64 << 10;
    let whole = LoopTarget::new(1 << 30);
    let stripe = StripeTarget::new(CHUNK, &[1 << 30; 4]).expect("the stripe is valid");
    let (inside, across) = (3 * CHUNK, 3 * CHUNK - 2048);
    one(criterion, "loop, 4 KiB", &whole, inside);
    one(criterion, "stripe, 4 KiB in one chunk", &stripe, inside);
    one(criterion, "stripe, 4 KiB in two chunks", &stripe, across);

    fn one(criterion: &mut Criterion, name: &str, planner: &impl Planner, offset: u64) {
        let request = Request { kind: RequestKind::Read, offset, len: 4096 };
        let mut plan = Plan::default();
        criterion.bench_function(&format!("planner: {name}"), |bencher| {
            bencher.iter(|| {
                let request = black_box(&request);
                planner.single(request).map_or_else(
                    || {
                        plan.clear();
                        planner
                            .plan(request, 0, &mut plan)
                            .expect("the request is within the device");
                        plan.len()
                    },
                    |place| usize::from(black_box(place).backing.0),
                )
            });
        });
    }
}

fn entries(criterion: &mut Criterion) {
    criterion.bench_function("entries: a read and a commit", |bencher| {
        bencher.iter(|| {
            let (slot, offset) = (black_box(5), black_box(1 << 20));
            let buffer = FixedBuffer::Lent { slot, offset: 0 };
            let read = Sqe::read_fixed(FixedFile(1), buffer, 4096, offset).user_data(offset);
            let delivery = Delivery::AutoRegister { slot };
            let commit = Sqe::commit_and_fetch(FixedFile(0), 0, slot, 4096, delivery);
            (read, commit.user_data(offset))
        });
    });
}

/// A port that records what the benchmark needs to complete a request of the loop target.
#[derive(Default)]
struct Last {
    /// The tag's last fetch or commit.
    fetch: Option<TagKey>,
    op: Option<OpKey>,
    /// The chain that the operation is part of.
    chain: Option<TagKey>,
}

impl Port for Last {
    fn fetch(&mut self, key: TagKey, _slot: SlotIndex) {
        self.fetch = Some(key);
    }
    fn commit(&mut self, key: TagKey, answer: Answer, _slot: SlotIndex) {
        black_box(answer);
        self.fetch = Some(key);
    }
    fn register(&mut self, _key: TagKey, _slot: SlotIndex) {}
    fn unregister(&mut self, _key: TagKey, _slot: SlotIndex) {}
    fn submit(&mut self, key: OpKey, _op: &Op, _slot: Option<SlotIndex>) {
        self.op = Some(key);
    }
    fn submit_chain(&mut self, tag: TagKey, _slot: SlotIndex, key: OpKey, _op: &Op) {
        (self.op, self.chain) = (Some(key), Some(tag));
    }
    fn copy(&mut self, _: Tag, _: SlotIndex, _: Direction, from: u32, to: u32) -> i32 {
        i32::try_from(to - from).unwrap_or(i32::MAX)
    }
    fn cancel(&mut self, _key: OpKey, _op: &Op) {}
    fn now(&mut self) -> u64 {
        0
    }
}

fn request(criterion: &mut Criterion) {
    let lent = SlotTable { lent: DEPTH, pool: 2, scratch: 0, choice: SlotChoice::From(0) };
    let any = SlotTable { choice: SlotChoice::AnyFree, ..lent };
    let pool = SlotTable { lent: 0, pool: DEPTH, scratch: 0, choice: SlotChoice::From(0) };
    let modes = [
        (LendMode::Fused, lent),
        (LendMode::Slot, any),
        (LendMode::UserCopy, pool),
        (LendMode::Copy, pool),
    ];
    for (lend, slots) in modes {
        let config = EngineConfig {
            queue: QueueIdentity { device: 0, qid: Qid(0), depth: DEPTH },
            incarnation: Incarnation(0),
            lend,
            slots,
            geometry: Geometry { size: 1 << 30, block: 512, max_bytes: 1 << 20 },
            deadline: None,
        };
        let mut engine = Engine::new(LoopTarget::new(1 << 30), config);
        let mut port = Last::default();
        engine.fetch_all(&mut port);
        let iod = IoDesc { op_flags: sys::UBLK_IO_OP_READ, nr_sectors: 8, start_sector: 64 };
        criterion.bench_function(&format!("engine: 4 KiB read of the loop target, {lend}"), |it| {
            it.iter(|| {
                let fetch = port.fetch.take().expect("the tag is with the driver");
                engine.delivered(fetch, iod, &mut port);
                let key = port.op.take().expect("a read needs an operation");
                engine.completed(key, 4096, &mut port);
                if let Some(chain) = port.chain.take() {
                    engine.unregistered(chain, 0, &mut port);
                }
            });
        });
    }
}

criterion_group!(benches, lend_and_return, plan, entries, request);
criterion_main!(benches);

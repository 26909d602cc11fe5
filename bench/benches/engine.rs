//! What a request costs in user space: the registry alone, and the engine with the loop target.

#![allow(missing_docs, reason = "the macros of criterion make public items without docs")]

use bufreg::{Owner, Registry, SlotIndex};
use criterion::{Criterion, criterion_group, criterion_main};
use ublk_target::engine::{Engine, OpKey, Port, QueueIdentity};
use ublk_target::plan::Op;
use ublk_target::target::LoopTarget;
use ublk_target::units::{Qid, Tag};
use uring_ext::iod::IoDesc;
use uring_ext::sys;

fn lend_and_return(criterion: &mut Criterion) {
    let mut registry = Registry::new(128);
    let owner = Owner { device: 0, qid: 0, tag: 5 };
    criterion.bench_function("registry: lend, borrow, give back, release", |bencher| {
        bencher.iter(|| {
            let lease = registry.reserve(SlotIndex(5), owner, 0).expect("the slot is free");
            let lease = registry.activate(lease);
            let borrow = registry.borrow(&lease).expect("nothing borrows it");
            registry.give_back(borrow).expect("the borrow is live");
            let lease = registry.retire(lease).expect("no borrow is left");
            registry.release(lease);
        });
    });
}

/// Remembers the one operation that a request of the loop target needs.
#[derive(Default)]
struct LastOp(Option<OpKey>);

impl Port for LastOp {
    fn commit(&mut self, _tag: Tag, _result: i32) {}
    fn register(&mut self, _tag: Tag, _slot: SlotIndex) {}
    fn unregister(&mut self, _tag: Tag, _slot: SlotIndex) {}
    fn submit(&mut self, key: OpKey, _op: &Op, _slot: Option<SlotIndex>) {
        self.0 = Some(key);
    }
}

fn request(criterion: &mut Criterion) {
    let queue = QueueIdentity { device: 0, qid: Qid(0), depth: 128 };
    let mut engine = Engine::new(LoopTarget { size: 1 << 30 }, queue);
    let mut port = LastOp::default();
    let iod = IoDesc { op_flags: sys::UBLK_IO_OP_READ, nr_sectors: 8, start_sector: 64 };
    criterion.bench_function("engine: 4 KiB read of the loop target", |bencher| {
        bencher.iter(|| {
            engine.delivered(Tag(5), iod, 0, &mut port);
            let key = port.0.take().expect("a read needs an operation");
            engine.completed(key, 4096, &mut port);
        });
    });
}

criterion_group!(benches, lend_and_return, request);
criterion_main!(benches);

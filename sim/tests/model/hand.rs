//! A server that tests control by hand.

use std::cell::RefCell;
use std::rc::Rc;

use ublk_engine::engine::{OpKey, SlotChoice, SlotTable, TagKey};
use ublk_engine::lane::event::Event;
use ublk_engine::lane::{LaneIo, RingRole, TableRange, backing_file};
use ublk_engine::lend::LendMode;
use ublk_engine::request::{Request, RequestKind};
use ublk_engine::target::{BaseTarget, Decision, LoopTarget};
use ublk_engine::units::Tag;
use ublk_sim::fault::Fault;
use ublk_sim::kernel::{Ask, Kernel, Phase, QID, SimIo};
use ublk_sim::mapping::Mapping;
use ublk_sim::setup::{Hostility, Recovery, Setup, ShortResults};
use ublk_sim::trace::Trace;
use uring_ext::sqe::{Delivery, FixedBuffer, FixedFile, Sqe};

/// A server without an engine: a test pushes its entries.
pub struct ManualServer {
    pub kernel: Rc<RefCell<Kernel>>,
    pub io: SimIo,
    lend: LendMode,
}

impl ManualServer {
    /// A server that has fetched its two tags from a sound kernel.
    pub fn new(lend: LendMode) -> Self {
        let size = 1 << 16;
        let from_zero = SlotChoice::From(0);
        let mut setup = Setup::of(0, Hostility::None);
        setup.depth = 2;
        setup.lend = lend;
        setup.slots = match lend {
            LendMode::Fused | LendMode::Slot => {
                SlotTable { lent: 3, pool: 1, scratch: 0, choice: from_zero }
            }
            LendMode::UserCopy | LendMode::Copy => {
                SlotTable { lent: 0, pool: 2, scratch: 0, choice: from_zero }
            }
        };
        setup.mapping = Mapping::Target(BaseTarget::Loop(LoopTarget::new(size)).into());
        setup.backings = vec![size];
        setup.geometry.size = size;
        (setup.queue_entries, setup.io_lane) = (8, false);
        setup.recovery = Recovery::Reissue;
        // The entries are for a queue with its own tables.
        setup.table_range = TableRange::default();
        let kernel = Rc::new(RefCell::new(Kernel::new(0, setup, Trace::new(false))));
        let mut hand = Self { io: SimIo(Rc::clone(&kernel)), kernel, lend };
        for tag in 0..2 {
            hand.fetch(tag);
        }
        hand
    }

    /// A server on a kernel that handles short results as its driver would.
    pub fn with_short_results(lend: LendMode, short_results: ShortResults) -> Self {
        let hand = Self::new(lend);
        let mut kernel = hand.kernel.borrow_mut();
        (kernel.allows_short, kernel.setup.short_results) = (true, short_results);
        drop(kernel);
        hand
    }

    fn delivery(&self, tag: u16) -> Delivery {
        match self.lend {
            LendMode::Fused => Delivery::AutoRegister { slot: tag },
            LendMode::Slot | LendMode::UserCopy => Delivery::ByServer,
            LendMode::Copy => Delivery::Copy(self.io.pool_addr(tag, 0)),
        }
    }

    pub fn named(&self, sqe: Sqe, event: Event) -> Sqe {
        sqe.user_data(event.encode(self.kernel.borrow().incarnation))
    }

    /// Pushes entries and makes the kernel take them.
    pub fn push(&mut self, sqes: &[Sqe]) {
        assert_eq!(self.io.push(role(&sqes[0]), sqes), Ok(()));
        let mut kernel = self.kernel.borrow_mut();
        // As the checker does with the engine's help.
        for entry in kernel.queues[0].iter_mut().filter(|entry| entry.is_operation()) {
            entry.tag = Some(0);
        }
        kernel.submit();
    }

    /// Delivers a request of a tag, and records that it was handled.
    pub fn deliver(&mut self, tag: u16, ask: Ask) {
        let mut kernel = self.kernel.borrow_mut();
        let model = &mut kernel.tags[usize::from(tag)];
        model.ask = Some(ask);
        model.data.fill(0x11);
        kernel.deliver(tag);
        kernel.posted.clear();
        kernel.tags[usize::from(tag)].handled = true;
    }

    pub fn ask(&mut self, tag: u16, kind: RequestKind) {
        let len = if kind == RequestKind::Flush { 0 } else { 1024 };
        self.deliver(tag, Ask::sound(Request { kind, offset: 0, len }));
    }

    /// Sets the fault target's decision on a tag's request, which was just delivered.
    pub fn decide(&mut self, tag: usize, decision: Decision) {
        let mut kernel = self.kernel.borrow_mut();
        let now = kernel.now;
        let faults_met = &mut kernel.tags[tag].faults_met;
        (faults_met.decision, faults_met.since) = (decision, now);
    }

    pub fn fetch(&mut self, tag: u16) {
        let fetch = Sqe::fetch(FixedFile(0), QID, tag, self.delivery(tag));
        self.push(&[self.named(fetch, Event::Fetched(key(tag)))]);
    }

    pub fn commit(&mut self, tag: u16, result: i32) {
        let commit = Sqe::commit_and_fetch(FixedFile(0), QID, tag, result, self.delivery(tag));
        self.push(&[self.named(commit, Event::Fetched(key(tag)))]);
    }

    pub fn read(&self, buffer: FixedBuffer, at: u64) -> Sqe {
        self.named(Sqe::read_fixed(backing_file(0), buffer, 1024, at), OP)
    }

    /// Without FUA.
    pub fn write(&self, buffer: FixedBuffer) -> Sqe {
        self.named(Sqe::write_fixed(backing_file(0), buffer, 1024, 0, false), OP)
    }

    /// Serves half of a request of tag 0, and commits half.
    pub fn serve_half(&mut self, kind: RequestKind, buffer: FixedBuffer) {
        self.ask(0, kind);
        let (file, len) = (backing_file(0), 512);
        let half = if kind == RequestKind::Read {
            Sqe::read_fixed(file, buffer, len, 0)
        } else {
            Sqe::write_fixed(file, buffer, len, 0, false)
        };
        assert_eq!(self.carry_out(self.named(half, OP)), [(OP, 512)]);
        self.commit(0, 512);
    }

    /// The next request that a tag will deliver.
    pub fn asked(&self, tag: usize) -> Option<Request> {
        self.kernel.borrow().tags[tag].ask.and_then(|ask| ask.request)
    }

    /// A buffer of the pool in a lend mode without lent slots.
    pub fn pooled(&self, index: u16) -> FixedBuffer {
        FixedBuffer::Pool { slot: index, addr: self.io.pool_addr(index, 0) }
    }

    pub fn register(&self, tag: u16, slot: u16) -> Sqe {
        self.named(Sqe::register_buffer(FixedFile(0), QID, tag, slot), Event::Registered(key(tag)))
    }

    pub fn unregister(&self, tag: u16, slot: u16) -> Sqe {
        self.named(
            Sqe::unregister_buffer(FixedFile(0), QID, tag, slot),
            Event::Unregistered(key(tag)),
        )
    }

    /// Completes everything that was submitted. Returns events and results.
    pub fn run(&mut self) -> Vec<(Event, i32)> {
        let mut kernel = self.kernel.borrow_mut();
        let count = kernel.running.iter().chain(&kernel.queued).count();
        for _ in 0..3 * count {
            if !kernel.queued.is_empty() {
                kernel.start_one();
            }
            if !kernel.running.is_empty() {
                kernel.finish(0);
            }
        }
        let incarnation = kernel.incarnation;
        let event = |user_data| Event::decode(user_data, incarnation).expect("an event of ours");
        kernel.posted.drain(..).map(|it| (event(it.cqe.user_data), it.cqe.res)).collect()
    }

    /// Pushes an entry and completes it.
    pub fn carry_out(&mut self, sqe: Sqe) -> Vec<(Event, i32)> {
        self.push(&[sqe]);
        self.run()
    }

    /// Delivers a request of tag 0, serves it by an operation that succeeds, and commits it.
    pub fn serve(&mut self, kind: RequestKind, sqe: Sqe) {
        self.ask(0, kind);
        assert_eq!(self.carry_out(sqe), [(OP, 1024)]);
        self.commit(0, 1024);
    }

    pub fn phase(&self, tag: usize) -> Phase {
        self.kernel.borrow().tags[tag].phase
    }

    /// Makes a fault happen every time from now on, for tag 0.
    pub fn always(&mut self, fault: Fault) {
        let mut kernel = self.kernel.borrow_mut();
        kernel.setup.hostile = true;
        kernel.setup.rates.set(fault, 1024);
    }
}

/// Fetches and commits (`_IOWR('u', 0x20 or 0x21)`) go to the ring that fetched.
fn role(sqe: &Sqe) -> RingRole {
    let (raw, commands) = (sqe.as_bytes(), [0x20, 0x21]);
    let is_fetch = raw[0] == 46 && raw[9] == b'u' && commands.contains(&raw[8]);
    if is_fetch { RingRole::Fetch } else { RingRole::Io }
}

pub const OP: Event = Event::Op(OpKey { index: 0, serial: 7 });

/// The buffer in a slot.
pub fn lent(slot: u16) -> FixedBuffer {
    FixedBuffer::Lent { slot, offset: 0 }
}

pub fn key(tag: u16) -> TagKey {
    TagKey { tag: Tag(tag), seq: 0 }
}

//! The simulated kernel has teeth: entries made by hand that a correct engine would never push,
//! and answers that it would never give, are found out; and what is right is let through.

use std::cell::RefCell;
use std::rc::Rc;

use bufreg::Incarnation;
use ublk_sim::fault::Fault;
use ublk_sim::kernel::{Ask, Kernel, Phase, QID, SimIo};
use ublk_sim::mapping::Mapping;
use ublk_sim::setup::{Hostility, Recovery, Setup};
use ublk_sim::trace::Trace;
use ublk_target::engine::{OpKey, SlotChoice, SlotTable, TagKey};
use ublk_target::lane::event::Event;
use ublk_target::lane::{CDEV, LaneIo, RingRole, backing_file};
use ublk_target::lend::LendMode;
use ublk_target::request::{Request, RequestKind};
use ublk_target::target::{AnyTarget, LoopTarget};
use ublk_target::units::Tag;
use uring_ext::Errno;
use uring_ext::iod::IoDesc;
use uring_ext::pool::Direction;
use uring_ext::sqe::{Delivery, FixedBuffer, Sqe};

const READ: RequestKind = RequestKind::Read;
const WRITE: RequestKind = RequestKind::Write { fua: false };

/// A server that does by hand what it is told.
struct Hand {
    kernel: Rc<RefCell<Kernel>>,
    io: SimIo,
    lend: LendMode,
}

impl Hand {
    /// A server that has fetched both its tags from a sound kernel.
    fn new(lend: LendMode) -> Self {
        let size = 1 << 16;
        let from_zero = SlotChoice::From(0);
        let mut setup = Setup::of(0, Hostility::None);
        setup.depth = 2;
        setup.lend = lend;
        setup.slots = match lend {
            LendMode::Fused | LendMode::Slot => SlotTable { lent: 3, pool: 1, choice: from_zero },
            LendMode::UserCopy | LendMode::Copy => {
                SlotTable { lent: 0, pool: 2, choice: from_zero }
            }
        };
        setup.mapping = Mapping::Target(AnyTarget::Loop(LoopTarget { size }));
        setup.backings = vec![size];
        setup.geometry.size = size;
        (setup.queue_entries, setup.io_lane) = (8, false);
        setup.recovery = Recovery::Reissue;
        let kernel = Rc::new(RefCell::new(Kernel::new(0, setup, Trace::new(false))));
        let mut hand = Self { io: SimIo(Rc::clone(&kernel)), kernel, lend };
        for tag in 0..2 {
            let fetch = Sqe::fetch(CDEV, QID, tag, hand.delivery(tag));
            hand.push(&[hand.named(fetch, Event::Fetched(key(tag)))]);
        }
        hand
    }

    fn delivery(&self, tag: u16) -> Delivery {
        match self.lend {
            LendMode::Fused => Delivery::AutoRegister { slot: tag },
            LendMode::Slot | LendMode::UserCopy => Delivery::ByServer,
            LendMode::Copy => Delivery::Copy(self.io.pool_addr(tag, 0)),
        }
    }

    fn named(&self, sqe: Sqe, event: Event) -> Sqe {
        sqe.user_data(event.encode(self.kernel.borrow().incarnation))
    }

    /// Pushes entries and has the kernel take them.
    fn push(&mut self, sqes: &[Sqe]) {
        assert_eq!(self.io.push(role(&sqes[0]), sqes), Ok(()));
        let mut kernel = self.kernel.borrow_mut();
        // As the checker does, which asks the engine whose operation it is.
        for entry in kernel.queues[0].iter_mut().filter(|entry| entry.is_operation()) {
            entry.tag = Some(0);
        }
        kernel.submit();
    }

    /// Has a tag deliver a request, and takes note of that.
    fn deliver(&mut self, tag: u16, ask: Ask) {
        let mut kernel = self.kernel.borrow_mut();
        let model = &mut kernel.tags[usize::from(tag)];
        model.ask = Some(ask);
        model.data.fill(0x11);
        kernel.deliver(tag);
        kernel.posted.clear();
        kernel.tags[usize::from(tag)].handled = true;
    }

    fn ask(&mut self, tag: u16, kind: RequestKind) {
        let len = if kind == RequestKind::Flush { 0 } else { 1024 };
        self.deliver(tag, Ask::sound(Request { kind, offset: 0, len }));
    }

    fn commit(&mut self, tag: u16, result: i32) {
        let commit = Sqe::commit_and_fetch(CDEV, QID, tag, result, self.delivery(tag));
        self.push(&[self.named(commit, Event::Fetched(key(tag)))]);
    }

    fn read(&self, slot: u16, offset: u32, at: u64) -> Sqe {
        let buffer = FixedBuffer::Lent { slot, offset };
        self.named(Sqe::read_fixed(backing_file(0), buffer, 1024, at), OP)
    }

    fn write(&self, slot: u16, dsync: bool) -> Sqe {
        let buffer = FixedBuffer::Lent { slot, offset: 0 };
        self.named(Sqe::write_fixed(backing_file(0), buffer, 1024, 0, dsync), OP)
    }

    fn register(&self, tag: u16, slot: u16) -> Sqe {
        self.named(Sqe::register_buffer(CDEV, QID, tag, slot), Event::Registered(key(tag)))
    }

    fn unregister(&self, tag: u16, slot: u16) -> Sqe {
        self.named(Sqe::unregister_buffer(CDEV, QID, tag, slot), Event::Unregistered(key(tag)))
    }

    /// Lets everything that was submitted come to its end; returns results by kind of event.
    fn run(&mut self) -> Vec<(Event, i32)> {
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

    fn phase(&self, tag: usize) -> Phase {
        self.kernel.borrow().tags[tag].phase
    }

    /// From now on this fault strikes at every occasion, on behalf of tag 0.
    fn always(&mut self, fault: Fault) {
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

const OP: Event = Event::Op(OpKey { place: 0, serial: 7 });

fn key(tag: u16) -> TagKey {
    TagKey { tag: Tag(tag), turn: 0 }
}

#[test]
fn what_is_right_is_let_through() {
    let mut hand = Hand::new(LendMode::Fused);
    hand.ask(0, WRITE);
    hand.push(&[hand.write(0, false)]);
    assert_eq!(hand.run(), [(OP, 1024)]);
    hand.commit(0, 1024);
    hand.ask(0, READ);
    hand.push(&[hand.read(0, 0, 0)]);
    assert_eq!(hand.run(), [(OP, 1024)]);
    hand.commit(0, 1024);
    let kernel = hand.kernel.borrow();
    assert_eq!((kernel.answered, kernel.succeeded), (2, 2));
    assert_eq!(kernel.tags[0].data[..1024], [0x11; 1024], "it was read back");
}

#[test]
fn a_request_ends_when_nothing_refers_to_its_buffer() {
    let mut hand = Hand::new(LendMode::Fused);
    hand.ask(0, WRITE);
    hand.push(&[hand.write(0, false)]);
    while hand.kernel.borrow().running.is_empty() {
        hand.kernel.borrow_mut().start_one();
    }
    hand.commit(0, 1024);
    assert_eq!(hand.phase(0), Phase::Committed, "an operation uses it");
    hand.run();
    assert_eq!(hand.phase(0), Phase::Waiting);
}

#[test]
#[should_panic(expected = "commit of tag 0, which is Waiting")]
fn a_second_commit_is_found_out() {
    let mut hand = Hand::new(LendMode::Fused);
    hand.ask(0, RequestKind::Flush);
    hand.commit(0, 0);
    hand.commit(0, 0);
}

#[test]
#[should_panic(expected = "left a hole")]
fn a_read_that_was_not_carried_out_is_found_out() {
    let mut hand = Hand::new(LendMode::Fused);
    hand.ask(0, READ);
    hand.commit(0, 1024);
}

#[test]
#[should_panic(expected = "left a hole")]
fn a_pool_buffer_that_was_not_filled_is_found_out() {
    let mut hand = Hand::new(LendMode::Copy);
    for _ in 0..2 {
        hand.ask(0, READ);
        let buffer = FixedBuffer::Pool { slot: 0, addr: hand.io.pool_addr(0, 0) };
        let read = Sqe::read_fixed(backing_file(0), buffer, 1024, 0);
        if hand.kernel.borrow().answered == 0 {
            hand.push(&[hand.named(read, OP)]);
            assert_eq!(hand.run(), [(OP, 1024)]);
        }
        // The second time the buffer has nothing in it that the first one has left.
        hand.commit(0, 1024);
    }
}

#[test]
#[should_panic(expected = "sector 0 was read wrongly")]
fn a_read_from_elsewhere_is_found_out() {
    let mut hand = Hand::new(LendMode::Fused);
    hand.ask(0, WRITE);
    hand.push(&[hand.write(0, false)]);
    hand.run();
    hand.commit(0, 1024);
    hand.ask(0, READ);
    hand.push(&[hand.read(0, 0, 4096)]);
    hand.run();
    hand.commit(0, 1024);
}

#[test]
#[should_panic(expected = "an operation on an empty slot")]
fn an_operation_on_an_empty_slot_is_found_out() {
    let mut hand = Hand::new(LendMode::Fused);
    hand.push(&[hand.read(0, 0, 0)]);
    hand.run();
}

#[test]
#[should_panic(expected = "bytes 512..1536 of 1024")]
fn an_operation_beyond_its_buffer_is_found_out() {
    let mut hand = Hand::new(LendMode::Fused);
    hand.ask(0, READ);
    hand.push(&[hand.read(0, 512, 0)]);
    hand.run();
}

#[test]
#[should_panic(expected = "registration in slot 1")]
fn a_registration_in_a_slot_that_is_taken_is_found_out() {
    let mut hand = Hand::new(LendMode::Slot);
    hand.ask(0, READ);
    hand.ask(1, READ);
    hand.push(&[hand.register(0, 1)]);
    hand.push(&[hand.register(1, 1)]);
}

#[test]
#[should_panic(expected = "registration without a request")]
fn a_registration_without_a_request_is_found_out() {
    let mut hand = Hand::new(LendMode::Slot);
    hand.push(&[hand.register(0, 1)]);
}

#[test]
#[should_panic(expected = "unregistration of slot 1")]
fn an_unregistration_of_an_empty_slot_is_found_out() {
    let mut hand = Hand::new(LendMode::Slot);
    hand.ask(0, READ);
    hand.push(&[hand.unregister(0, 1)]);
}

#[test]
#[should_panic(expected = "unregistration of slot 1")]
fn an_unregistration_of_a_foreign_buffer_is_found_out() {
    let mut hand = Hand::new(LendMode::Slot);
    hand.ask(0, READ);
    hand.ask(1, READ);
    hand.push(&[hand.register(0, 1)]);
    hand.push(&[hand.unregister(1, 1)]);
}

#[test]
fn a_request_whose_buffer_stays_registered_does_not_end() {
    let mut hand = Hand::new(LendMode::Slot);
    hand.ask(0, WRITE);
    hand.push(&[hand.register(0, 1)]);
    hand.push(&[hand.write(1, false)]);
    hand.run();
    hand.commit(0, 1024);
    assert_eq!(hand.phase(0), Phase::Committed);
    hand.push(&[hand.unregister(0, 1)]);
    assert_eq!(hand.phase(0), Phase::Waiting);
}

#[test]
#[should_panic(expected = "is not on stable storage")]
fn a_write_without_the_fua_that_was_asked_for_is_found_out() {
    let mut hand = Hand::new(LendMode::Fused);
    hand.ask(0, RequestKind::Write { fua: true });
    hand.push(&[hand.write(0, false)]);
    hand.run();
    hand.commit(0, 1024);
}

#[test]
#[should_panic(expected = "a flush has not reached all writes")]
fn a_flush_that_was_not_passed_on_is_found_out() {
    let mut hand = Hand::new(LendMode::Fused);
    hand.ask(0, WRITE);
    hand.push(&[hand.write(0, false)]);
    hand.run();
    hand.commit(0, 1024);
    hand.ask(0, RequestKind::Flush);
    hand.commit(0, 0);
}

#[test]
fn flushes_reach_what_was_written_before_them() {
    let mut hand = Hand::new(LendMode::Fused);
    hand.ask(0, WRITE);
    hand.push(&[hand.write(0, false)]);
    hand.run();
    hand.commit(0, 1024);
    hand.ask(0, RequestKind::Flush);
    hand.push(&[hand.named(Sqe::datasync(backing_file(0)), OP)]);
    assert_eq!(hand.run(), [(OP, 0)]);
    hand.commit(0, 0);
    assert_eq!(hand.kernel.borrow().succeeded, 2);
}

#[test]
#[should_panic(expected = "was not refused")]
fn success_of_a_request_that_is_malformed_is_found_out() {
    let mut hand = Hand::new(LendMode::Fused);
    let iod = IoDesc { op_flags: 3, nr_sectors: 0, start_sector: 0 };
    hand.deliver(0, Ask::refused(iod, Errno::EIO));
    hand.commit(0, 0);
}

#[test]
#[should_panic(expected = "though nothing went wrong")]
fn an_error_for_no_reason_is_found_out() {
    let mut hand = Hand::new(LendMode::Fused);
    hand.ask(0, RequestKind::Flush);
    hand.commit(0, Errno::EIO.negated());
}

#[test]
#[should_panic(expected = "succeeded in spite of an error")]
fn success_in_spite_of_an_error_is_found_out() {
    let mut hand = Hand::new(LendMode::Fused);
    hand.ask(0, WRITE);
    hand.push(&[hand.write(0, false)]);
    hand.always(Fault::OpZero);
    assert_eq!(hand.run(), [(OP, 0)]);
    hand.commit(0, 1024);
}

#[test]
#[should_panic(expected = "tag 0 is fetched twice")]
fn a_second_fetch_is_found_out() {
    let mut hand = Hand::new(LendMode::Fused);
    let fetch = Sqe::fetch(CDEV, QID, 0, hand.delivery(0));
    hand.push(&[hand.named(fetch, Event::Fetched(key(0)))]);
}

#[test]
#[should_panic(expected = "a chain is pushed whole")]
fn a_torn_chain_is_found_out() {
    let mut hand = Hand::new(LendMode::Slot);
    hand.ask(0, READ);
    hand.push(&[hand.register(0, 1).hard_link()]);
}

#[test]
fn chains_run_in_order_and_to_their_end() {
    let mut hand = Hand::new(LendMode::Slot);
    hand.ask(0, READ);
    let chain = |hand: &Hand| {
        let register = hand.register(0, 1).hard_link().skip_success();
        [register, hand.read(1, 0, 0).hard_link(), hand.unregister(0, 1)]
    };
    hand.push(&chain(&hand));
    let unregistered = Event::Unregistered(key(0));
    assert_eq!(hand.run(), [(OP, 1024), (unregistered, 0)], "a silent registration");
    hand.always(Fault::RegisterBusy);
    hand.push(&chain(&hand));
    let failed = [
        (Event::Registered(key(0)), Errno::EBUSY.negated()),
        (OP, Errno::EFAULT.negated()),
        (unregistered, Errno::EINVAL.negated()),
    ];
    assert_eq!(hand.run(), failed, "what follows a failed registration finds nothing");
}

#[test]
fn a_full_queue_takes_nothing() {
    let mut hand = Hand::new(LendMode::Slot);
    let nop = [Sqe::nop(), Sqe::nop(), Sqe::nop(), Sqe::nop(), Sqe::nop()];
    // Eight entries have room.
    for sqe in &nop {
        assert_eq!(hand.io.push(RingRole::Io, std::slice::from_ref(sqe)), Ok(()));
    }
    assert_eq!(hand.io.push(RingRole::Io, &nop), Err(Errno::EBUSY), "all or none");
    assert_eq!(hand.kernel.borrow().queues[0].len(), 5);
}

#[test]
fn what_waits_is_cancelled_and_what_is_unknown_is_not_found() {
    let mut hand = Hand::new(LendMode::Fused);
    hand.ask(0, READ);
    let cancel = |hand: &Hand| {
        let wanted = OP.encode(hand.kernel.borrow().incarnation);
        hand.named(Sqe::cancel(wanted), Event::Cancelled)
    };
    hand.push(&[cancel(&hand)]);
    assert_eq!(hand.run(), [(Event::Cancelled, Errno::ENOENT.negated())]);
    loop {
        hand.push(&[hand.read(0, 0, 0)]);
        if hand.kernel.borrow().queued.len() == 1 {
            break;
        }
        hand.run();
    }
    hand.push(&[cancel(&hand)]);
    let cancelled = [(OP, Errno::ECANCELED.negated()), (Event::Cancelled, 0)];
    assert_eq!(hand.run(), cancelled);
}

#[test]
fn user_copy_moves_bytes_between_request_and_pool() {
    let mut hand = Hand::new(LendMode::UserCopy);
    hand.ask(0, WRITE);
    assert_eq!(hand.io.copy(Tag(0), 1, Direction::FromRequest, 0, 1024), 1024);
    let buffer = FixedBuffer::Pool { slot: 1, addr: hand.io.pool_addr(1, 0) };
    let write = Sqe::write_fixed(backing_file(0), buffer, 1024, 0, false);
    hand.push(&[hand.named(write, OP)]);
    hand.run();
    hand.commit(0, 1024);
    hand.ask(0, READ);
    let read = Sqe::read_fixed(backing_file(0), buffer, 1024, 0);
    hand.push(&[hand.named(read, OP)]);
    hand.run();
    assert_eq!(hand.io.copy(Tag(0), 1, Direction::ToRequest, 0, 1024), 1024);
    hand.commit(0, 1024);
    assert_eq!(hand.kernel.borrow().succeeded, 2);
}

#[test]
#[should_panic(expected = "while an operation uses it")]
fn a_copy_of_a_buffer_in_use_is_found_out() {
    let mut hand = Hand::new(LendMode::UserCopy);
    hand.ask(0, READ);
    let buffer = FixedBuffer::Pool { slot: 1, addr: hand.io.pool_addr(1, 0) };
    let read = Sqe::read_fixed(backing_file(0), buffer, 1024, 0);
    hand.push(&[hand.named(read, OP)]);
    hand.io.copy(Tag(0), 1, Direction::ToRequest, 0, 1024);
}

#[test]
fn open_requests_survive_their_server() {
    let mut hand = Hand::new(LendMode::Fused);
    hand.ask(0, READ);
    hand.push(&[hand.read(0, 0, 0)]);
    let unreaped = hand.kernel.borrow_mut().bury().count();
    assert_eq!(unreaped, 0);
    let kernel = hand.kernel.borrow();
    assert_eq!((kernel.tags[0].phase, kernel.tags[0].refs), (Phase::NotFetched, 0));
    assert!(kernel.tags[0].ask.is_some(), "the next server is given the request");
    assert!(kernel.table[..3].iter().all(Option::is_none), "the table is gone");
    assert_eq!(kernel.incarnation, Incarnation(1));
}

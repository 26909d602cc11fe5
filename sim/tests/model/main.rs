//! The simulated kernel detects entries and answers of incorrect engines, and accepts correct ones.

mod hand;

use std::panic::{AssertUnwindSafe, catch_unwind};

use bufreg::Incarnation;
use ublk_engine::lane::event::Event;
use ublk_engine::lane::{LaneIo, RingRole, backing_file};
use ublk_engine::lend::LendMode;
use ublk_engine::request::{Request, RequestKind};
use ublk_engine::target::Decision;
use ublk_engine::units::Tag;
use ublk_sim::fault::Fault;
use ublk_sim::kernel::{Ask, Phase};
use ublk_sim::setup::ShortResults;
use uring_ext::Errno;
use uring_ext::iod::IoDesc;
use uring_ext::pool::Direction;
use uring_ext::sqe::{FixedBuffer, Sqe};

use hand::{ManualServer, OP, key, lent};

const READ: RequestKind = RequestKind::Read;
const WRITE: RequestKind = RequestKind::Write { fua: false };

#[test]
fn what_is_right_is_let_through() {
    let mut hand = ManualServer::new(LendMode::Fused);
    hand.serve(WRITE, hand.write(lent(0)));
    hand.serve(READ, hand.read(lent(0), 0));
    let kernel = hand.kernel.borrow();
    assert_eq!((kernel.answered, kernel.succeeded), (2, 2));
    assert_eq!(kernel.tags[0].data[..1024], [0x11; 1024], "it was read back");
}

#[test]
fn a_request_ends_when_nothing_refers_to_its_buffer() {
    let mut hand = ManualServer::new(LendMode::Fused);
    hand.ask(0, WRITE);
    hand.push(&[hand.write(lent(0))]);
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
    let mut hand = ManualServer::new(LendMode::Fused);
    hand.ask(0, RequestKind::Flush);
    hand.commit(0, 0);
    hand.commit(0, 0);
}

#[test]
#[should_panic(expected = "left a hole")]
fn a_read_that_was_not_carried_out_is_found_out() {
    let mut hand = ManualServer::new(LendMode::Fused);
    hand.ask(0, READ);
    hand.commit(0, 1024);
}

#[test]
#[should_panic(expected = "left a hole")]
fn a_pool_buffer_that_was_not_filled_is_found_out() {
    let mut hand = ManualServer::new(LendMode::Copy);
    hand.serve(READ, hand.read(hand.pooled(0), 0));
    hand.ask(0, READ);
    // The buffer no longer contains the data of the first request.
    hand.commit(0, 1024);
}

#[test]
#[should_panic(expected = "sector 0 was read wrongly")]
fn a_read_from_elsewhere_is_found_out() {
    let mut hand = ManualServer::new(LendMode::Fused);
    hand.serve(WRITE, hand.write(lent(0)));
    hand.serve(READ, hand.read(lent(0), 4096));
}

#[test]
#[should_panic(expected = "an operation on an empty slot")]
fn an_operation_on_an_empty_slot_is_found_out() {
    let mut hand = ManualServer::new(LendMode::Fused);
    hand.carry_out(hand.read(lent(0), 0));
}

#[test]
#[should_panic(expected = "bytes 512..1536 of 1024")]
fn an_operation_beyond_its_buffer_is_found_out() {
    let mut hand = ManualServer::new(LendMode::Fused);
    hand.ask(0, READ);
    hand.carry_out(hand.read(FixedBuffer::Lent { slot: 0, offset: 512 }, 0));
}

#[test]
#[should_panic(expected = "registration in slot 1")]
fn a_registration_in_a_slot_that_is_taken_is_found_out() {
    let mut hand = ManualServer::new(LendMode::Slot);
    hand.ask(0, READ);
    hand.ask(1, READ);
    hand.push(&[hand.register(0, 1)]);
    hand.push(&[hand.register(1, 1)]);
}

#[test]
#[should_panic(expected = "registration without a request")]
fn a_registration_without_a_request_is_found_out() {
    let mut hand = ManualServer::new(LendMode::Slot);
    hand.push(&[hand.register(0, 1)]);
}

#[test]
#[should_panic(expected = "unregistration of slot 1")]
fn an_unregistration_of_an_empty_slot_is_found_out() {
    let mut hand = ManualServer::new(LendMode::Slot);
    hand.ask(0, READ);
    hand.push(&[hand.unregister(0, 1)]);
}

#[test]
#[should_panic(expected = "unregistration of slot 1")]
fn an_unregistration_of_a_foreign_buffer_is_found_out() {
    let mut hand = ManualServer::new(LendMode::Slot);
    hand.ask(0, READ);
    hand.ask(1, READ);
    hand.push(&[hand.register(0, 1)]);
    hand.push(&[hand.unregister(1, 1)]);
}

#[test]
fn a_request_whose_buffer_stays_registered_does_not_end() {
    let mut hand = ManualServer::new(LendMode::Slot);
    hand.ask(0, WRITE);
    hand.push(&[hand.register(0, 1)]);
    hand.carry_out(hand.write(lent(1)));
    hand.commit(0, 1024);
    assert_eq!(hand.phase(0), Phase::Committed);
    hand.push(&[hand.unregister(0, 1)]);
    assert_eq!(hand.phase(0), Phase::Waiting);
}

#[test]
#[should_panic(expected = "is not on stable storage")]
fn a_write_without_the_fua_that_was_asked_for_is_found_out() {
    let mut hand = ManualServer::new(LendMode::Fused);
    hand.serve(RequestKind::Write { fua: true }, hand.write(lent(0)));
}

#[test]
#[should_panic(expected = "a flush has not reached all writes")]
fn a_flush_that_was_not_passed_on_is_found_out() {
    let mut hand = ManualServer::new(LendMode::Fused);
    hand.serve(WRITE, hand.write(lent(0)));
    hand.ask(0, RequestKind::Flush);
    hand.commit(0, 0);
}

#[test]
fn flushes_reach_what_was_written_before_them() {
    let mut hand = ManualServer::new(LendMode::Fused);
    hand.serve(WRITE, hand.write(lent(0)));
    hand.ask(0, RequestKind::Flush);
    let flush = hand.named(Sqe::datasync(backing_file(0)), OP);
    assert_eq!(hand.carry_out(flush), [(OP, 0)]);
    hand.commit(0, 0);
    assert_eq!(hand.kernel.borrow().succeeded, 2);
}

#[test]
#[should_panic(expected = "was not refused")]
fn success_of_a_request_that_is_malformed_is_found_out() {
    let mut hand = ManualServer::new(LendMode::Fused);
    let iod = IoDesc { op_flags: 3, nr_sectors: 0, start_sector: 0 };
    hand.deliver(0, Ask::refused(iod, Errno::EIO));
    hand.commit(0, 0);
}

#[test]
#[should_panic(expected = "though nothing went wrong")]
fn an_error_for_no_reason_is_found_out() {
    let mut hand = ManualServer::new(LendMode::Fused);
    hand.ask(0, RequestKind::Flush);
    hand.commit(0, Errno::EIO.negated());
}

#[test]
#[should_panic(expected = "succeeded in spite of an error")]
fn success_in_spite_of_an_error_is_found_out() {
    let mut hand = ManualServer::new(LendMode::Fused);
    hand.ask(0, WRITE);
    hand.always(Fault::OpZero);
    assert_eq!(hand.carry_out(hand.write(lent(0))), [(OP, 0)]);
    hand.commit(0, 1024);
}

/// With both kinds of driver.
#[test]
fn a_success_of_fewer_bytes_than_were_asked_for_is_found_out() {
    for short_results in ShortResults::ALL {
        for (kind, lend) in
            [(READ, LendMode::Copy), (READ, LendMode::Fused), (WRITE, LendMode::Copy)]
        {
            let mut hand = ManualServer::new(lend);
            hand.kernel.borrow_mut().setup.short_results = short_results;
            hand.ask(1, kind);
            let panic = catch_unwind(AssertUnwindSafe(|| hand.commit(1, 512))).unwrap_err();
            let said = panic.downcast::<String>().expect("it says what");
            assert!(said.contains("tag 1 committed short: 512 bytes of"), "{said}");
        }
    }
}

#[test]
#[should_panic(expected = "tag 0 committed 2048 bytes of")]
fn a_success_of_more_bytes_than_were_asked_for_is_found_out() {
    let mut hand = ManualServer::new(LendMode::Fused);
    hand.ask(0, WRITE);
    hand.commit(0, 2048);
}

#[test]
fn one_driver_delivers_the_rest_of_a_short_result_again() {
    for (kind, lend) in [(WRITE, LendMode::Fused), (READ, LendMode::Fused), (WRITE, LendMode::Copy)]
    {
        let mut hand = ManualServer::with_short_results(lend, ShortResults::Redelivered);
        let buffer = if lend == LendMode::Copy { hand.pooled(0) } else { lent(0) };
        hand.serve_half(kind, buffer);
        assert_eq!(hand.asked(0), Some(Request { kind, offset: 512, len: 512 }), "{lend}");
        let kernel = hand.kernel.borrow();
        assert_eq!((kernel.answered, kernel.asked), (1, 1), "the rest counts as another");
    }
    let mut hand = ManualServer::with_short_results(LendMode::Fused, ShortResults::Redelivered);
    hand.ask(0, WRITE);
    hand.commit(0, 0);
    assert_eq!(hand.asked(0), Some(Request { kind: WRITE, offset: 0, len: 1024 }), "for ever");
}

#[test]
fn the_other_driver_takes_a_short_result_for_the_whole() {
    for lend in [LendMode::Fused, LendMode::Copy] {
        let mut hand = ManualServer::with_short_results(lend, ShortResults::Believed);
        let buffer = if lend == LendMode::Copy { hand.pooled(0) } else { lent(0) };
        hand.serve_half(WRITE, buffer);
        assert_eq!((hand.asked(0), hand.phase(0)), (None, Phase::Waiting), "{lend}");
    }
    // A write of 0 bytes has succeeded, too.
    let mut hand = ManualServer::with_short_results(LendMode::Fused, ShortResults::Believed);
    hand.ask(0, WRITE);
    hand.commit(0, 0);
    assert_eq!(hand.kernel.borrow().succeeded, 1);
}

#[test]
#[should_panic(expected = "sector 1 was read wrongly")]
fn it_then_lacks_what_was_written() {
    let mut hand = ManualServer::with_short_results(LendMode::Fused, ShortResults::Believed);
    hand.serve_half(WRITE, lent(0));
    hand.serve(READ, hand.read(lent(0), 0));
}

#[test]
#[should_panic(expected = "left a hole in sector 1")]
fn its_reader_sees_what_was_in_the_buffer_before() {
    let mut hand = ManualServer::with_short_results(LendMode::Slot, ShortResults::Believed);
    hand.ask(0, READ);
    hand.push(&[hand.register(0, 1)]);
    let half = Sqe::read_fixed(backing_file(0), lent(1), 512, 0);
    hand.carry_out(hand.named(half, OP));
    hand.push(&[hand.unregister(0, 1)]);
    hand.commit(0, 512);
}

#[test]
fn reads_that_the_driver_copies_are_delivered_again_by_either() {
    for short_results in ShortResults::ALL {
        let mut hand = ManualServer::with_short_results(LendMode::Copy, short_results);
        hand.serve_half(READ, hand.pooled(0));
        assert_eq!(hand.asked(0), Some(Request { kind: READ, offset: 512, len: 512 }));
    }
    // Reads that the server copies are not.
    let mut hand = ManualServer::with_short_results(LendMode::UserCopy, ShortResults::Believed);
    hand.ask(0, READ);
    hand.carry_out(hand.read(hand.pooled(0), 0));
    assert_eq!(hand.io.copy(Tag(0), 0, Direction::ToRequest, 0, 1024), 1024);
    hand.commit(0, 512);
    assert_eq!((hand.asked(0), hand.kernel.borrow().succeeded), (None, 1));
}

#[test]
fn a_read_of_nothing_is_an_error_to_either() {
    for short_results in ShortResults::ALL {
        let mut hand = ManualServer::with_short_results(LendMode::Copy, short_results);
        hand.ask(0, READ);
        hand.commit(0, 0);
        let kernel = hand.kernel.borrow();
        assert_eq!((kernel.tags[0].result, kernel.asked), (Errno::EIO.negated(), 0));
    }
}

#[test]
#[should_panic(expected = "was to fail")]
fn success_instead_of_an_injected_error_is_found_out() {
    let mut hand = ManualServer::new(LendMode::Fused);
    hand.ask(0, RequestKind::Flush);
    hand.decide(0, Decision { error: Some(Errno::EIO), ..Decision::default() });
    hand.commit(0, 0);
}

#[test]
#[should_panic(expected = "was to be held back")]
fn an_answer_before_its_time_is_found_out() {
    let mut hand = ManualServer::new(LendMode::Fused);
    hand.ask(0, RequestKind::Flush);
    hand.decide(0, Decision { delay_ns: 1000, ..Decision::default() });
    hand.commit(0, 0);
}

#[test]
fn delays_take_their_time() {
    let mut hand = ManualServer::new(LendMode::Fused);
    assert_eq!(hand.carry_out(hand.named(Sqe::delay(5000), OP)), []);
    hand.kernel.borrow_mut().now += 5000;
    assert_eq!(hand.run(), [(OP, Errno::ETIME.negated())]);
}

#[test]
#[should_panic(expected = "tag 0 is fetched twice")]
fn a_second_fetch_is_found_out() {
    let mut hand = ManualServer::new(LendMode::Fused);
    hand.fetch(0);
}

#[test]
#[should_panic(expected = "a chain is pushed whole")]
fn a_torn_chain_is_found_out() {
    let mut hand = ManualServer::new(LendMode::Slot);
    hand.ask(0, READ);
    hand.push(&[hand.register(0, 1).hard_link()]);
}

#[test]
fn chains_run_in_order_and_to_their_end() {
    let mut hand = ManualServer::new(LendMode::Slot);
    hand.ask(0, READ);
    let chain = |hand: &ManualServer| {
        let register = hand.register(0, 1).hard_link().skip_success();
        [register, hand.read(lent(1), 0).hard_link(), hand.unregister(0, 1)]
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
    let mut hand = ManualServer::new(LendMode::Slot);
    let nop = [Sqe::nop(), Sqe::nop(), Sqe::nop(), Sqe::nop(), Sqe::nop()];
    // The queue holds eight entries.
    for sqe in &nop {
        assert_eq!(hand.io.push(RingRole::Io, std::slice::from_ref(sqe)), Ok(()));
    }
    assert_eq!(hand.io.push(RingRole::Io, &nop), Err(Errno::EBUSY), "all or none");
    assert_eq!(hand.kernel.borrow().queues[0].len(), 5);
}

#[test]
fn what_waits_is_cancelled_and_what_is_unknown_is_not_found() {
    let mut hand = ManualServer::new(LendMode::Fused);
    hand.ask(0, READ);
    let cancel = |hand: &ManualServer| {
        let wanted = OP.encode(hand.kernel.borrow().incarnation);
        hand.named(Sqe::cancel(wanted), Event::Cancelled)
    };
    let unknown = [(Event::Cancelled, Errno::ENOENT.negated())];
    assert_eq!(hand.carry_out(cancel(&hand)), unknown);
    loop {
        hand.push(&[hand.read(lent(0), 0)]);
        if hand.kernel.borrow().queued.len() == 1 {
            break;
        }
        hand.run();
    }
    let cancelled = [(OP, Errno::ECANCELED.negated()), (Event::Cancelled, 0)];
    assert_eq!(hand.carry_out(cancel(&hand)), cancelled);
}

#[test]
fn user_copy_moves_bytes_between_request_and_pool() {
    let mut hand = ManualServer::new(LendMode::UserCopy);
    hand.ask(0, WRITE);
    assert_eq!(hand.io.copy(Tag(0), 1, Direction::FromRequest, 0, 1024), 1024);
    hand.carry_out(hand.write(hand.pooled(1)));
    hand.commit(0, 1024);
    hand.ask(0, READ);
    hand.carry_out(hand.read(hand.pooled(1), 0));
    assert_eq!(hand.io.copy(Tag(0), 1, Direction::ToRequest, 0, 1024), 1024);
    hand.commit(0, 1024);
    assert_eq!(hand.kernel.borrow().succeeded, 2);
}

#[test]
#[should_panic(expected = "while an operation uses it")]
fn a_copy_of_a_buffer_in_use_is_found_out() {
    let mut hand = ManualServer::new(LendMode::UserCopy);
    hand.ask(0, READ);
    hand.push(&[hand.read(hand.pooled(1), 0)]);
    hand.io.copy(Tag(0), 1, Direction::ToRequest, 0, 1024);
}

#[test]
fn open_requests_survive_their_server() {
    let mut hand = ManualServer::new(LendMode::Fused);
    hand.ask(0, READ);
    hand.push(&[hand.read(lent(0), 0)]);
    let unreaped = hand.kernel.borrow_mut().end_server().count();
    assert_eq!(unreaped, 0);
    let kernel = hand.kernel.borrow();
    assert_eq!((kernel.tags[0].phase, kernel.tags[0].refs), (Phase::NotFetched, 0));
    assert!(kernel.tags[0].ask.is_some(), "the next server is given the request");
    assert!(kernel.table[..3].iter().all(Option::is_none), "the table is gone");
    assert_eq!(kernel.incarnation, Incarnation(1));
}

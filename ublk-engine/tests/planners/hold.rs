//! Requests are held back while the planner is changed.

use super::*;

/// Requests of each path through the engine have begun, others are held back meanwhile.
#[test]
fn held_requests_begin_in_order_after_the_others_have_ended() {
    let read = |request: &Request, _: u64, plan: &mut Plan| {
        push(plan, OpKind::Read, request.len);
        Ok(())
    };
    for is_single in [false, true] {
        let mut before = RecordingPlanner::new(read);
        before.is_single = is_single;
        let mut play = Play::new(before);
        play.engine.set_now(1_000);
        play.deliver(2, READ, 2);
        play.engine.set_now(4_000);
        play.deliver(0, READ, 0);
        assert!(!play.engine.is_quiet());
        play.engine.hold();
        play.deliver(3, READ, 3);
        play.deliver(1, READ, 1);
        assert_eq!((play.engine.held_back(), play.wanted.ops.len()), (2, 2));
        let oldest = play.engine.oldest_begun().unwrap();
        assert_eq!((oldest.tag, oldest.age_ns, oldest.request.offset), (Tag(2), 3_000, 2 << 14));
        assert!(oldest.op.is_some());
        play.complete(16384);
        // A tag is delivered again while it is held.
        play.deliver(2, READ, 5);
        assert!(!play.engine.is_quiet());
        assert_eq!(play.engine.oldest_begun().unwrap().tag, Tag(0));
        play.complete(16384);
        assert_eq!(play.answers(), [(2, 16384), (0, 16384)]);
        assert!(play.engine.is_quiet() && play.engine.oldest_begun().is_none());
        let mut after = RecordingPlanner::new(|request: &Request, _: u64, _: &mut Plan| {
            if request.offset == 1 << 14 { Err(Errno::EIO) } else { Err(Errno::ENOSPC) }
        });
        assert_eq!(play.engine.exchange_planner(&mut after), Ok(()));
        let asked: Vec<_> =
            after.asked.take().into_iter().map(|(offset, _)| offset >> 14).collect();
        assert_eq!(asked, if is_single { vec![] } else { vec![2, 0] }, "none that is held");
        play.engine.release(&mut play.wanted);
        let enospc = Errno::ENOSPC.negated();
        assert_eq!(play.answers(), [(3, enospc), (1, EIO), (2, enospc)]);
        assert_eq!(play.engine.stats().held_back, 3);
        // The fast path is open again: no planning.
        play.deliver(0, READ, 0);
        assert_eq!(play.answers(), [(0, enospc)]);
    }
}

/// A hold that ends without a change.
#[test]
fn a_hold_that_is_given_up_leaves_everything_as_it_was() {
    let mut planner = RecordingPlanner::new(|request: &Request, _: u64, plan: &mut Plan| {
        push(plan, OpKind::Read, request.len);
        Ok(())
    });
    planner.is_single = true;
    let mut play = Play::new(planner);
    play.deliver(0, READ, 0);
    play.engine.hold();
    play.deliver(1, READ, 1);
    play.engine.release(&mut play.wanted);
    assert!(!play.engine.is_holding());
    assert_eq!(play.wanted.ops.len(), 2, "the held one has begun");
    play.complete(16384);
    play.complete(16384);
    assert_eq!(play.answers(), [(0, 16384), (1, 16384)]);
    let asked = play.engine.planner().asked.take();
    assert_eq!(asked, [(1 << 14, 0)], "only what was held is planned");
    play.deliver(0, READ, 0);
    assert!(play.engine.planner().asked.take().is_empty(), "the fast path is open again");
}

/// A request that waits for another one has begun, so both end before the lane is quiet.
#[test]
fn a_request_that_waits_for_another_one_is_not_held() {
    let busy = Rc::new(Cell::new(false));
    let state = Rc::clone(&busy);
    let mut planner =
        RecordingPlanner::new(move |request: &Request, from: u64, plan: &mut Plan| {
            if state.replace(true) {
                plan.wait_at(from + 1);
                return Ok(());
            }
            push(plan, OpKind::Read, request.len);
            Ok(())
        });
    planner.busy = busy;
    let mut play = Play::new(planner);
    play.deliver(0, READ, 0);
    play.deliver(1, READ, 1);
    play.engine.hold();
    play.deliver(2, READ, 2);
    play.complete(16384);
    assert_eq!(play.answers(), [(0, 16384)]);
    assert!(!play.engine.is_quiet(), "the one that waited has begun now");
    play.complete(16384);
    assert!(play.engine.is_quiet());
    assert_eq!(play.wanted.ops.len(), 0);
    play.engine.release(&mut play.wanted);
    play.complete(16384);
    assert_eq!(play.answers(), [(1, 16384), (2, 16384)]);
}

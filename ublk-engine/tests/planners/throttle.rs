//! Requests wait for a time that the planner has chosen.

use super::*;

/// A planner whose requests begin at the time that their offset says, in microseconds per 16 KiB.
fn by_offset() -> RecordingPlanner {
    RecordingPlanner::new(|request: &Request, from: u64, plan: &mut Plan| {
        let time = (request.offset >> 14) * 1000;
        if from == 0 && time > plan.now_ns() {
            plan.wait_until(time, 1);
            return Ok(());
        }
        push(plan, OpKind::Read, request.len);
        Ok(())
    })
}

impl Play {
    fn tick(&mut self, now: u64) {
        self.engine.set_now(now);
        self.engine.begin_throttled(&mut self.wanted);
    }

    /// Completes all operations, and returns the tags that are answered.
    fn ended(&mut self) -> Vec<u16> {
        while !self.wanted.ops.is_empty() {
            self.complete(16384);
        }
        self.answers().into_iter().map(|(tag, _)| tag).collect()
    }
}

#[test]
fn requests_begin_at_their_time_in_order() {
    let mut play = Play::new(by_offset());
    for (tag, number) in [(0, 9), (1, 5), (2, 0), (3, 5)] {
        play.deliver(tag, READ, number);
    }
    assert_eq!(play.ended(), [2], "this one has no time");
    assert!(play.engine.has_throttled() && !play.engine.is_quiet());
    assert_eq!(play.engine.patience(), Some(std::time::Duration::from_nanos(5000)));
    play.tick(4999);
    assert!(play.ended().is_empty());
    play.tick(5000);
    assert_eq!(play.ended(), [1, 3], "in the order in which they came");
    assert_eq!(play.engine.patience(), Some(std::time::Duration::from_nanos(4000)));
    // A request that comes later does not begin before one whose time has come.
    play.engine.set_now(10_000);
    play.deliver(1, READ, 1);
    assert_eq!(play.ended(), [0, 1]);
    assert_eq!(play.engine.patience(), None);
    assert_eq!(play.engine.stats().throttled, 3);
    assert_eq!(play.engine.holdings().requests, 0);
}

#[test]
fn a_hold_takes_them_back() {
    let mut play = Play::new(by_offset());
    play.deliver(0, READ, 7);
    play.deliver(1, READ, 3);
    play.deliver(2, READ, 0);
    play.engine.hold();
    assert_eq!(play.engine.patience(), None, "none of them waits for its time");
    play.deliver(3, READ, 8);
    assert_eq!(*play.engine.planner().withdrawn.borrow(), [(7 << 14, 1), (3 << 14, 1)]);
    assert!(!play.engine.is_quiet());
    assert_eq!(play.ended(), [2]);
    assert!(play.engine.is_quiet());
    assert_eq!(play.engine.holdings().slots.free, u32::from(DEPTH) + 1, "they hold nothing");
    let mut other = RecordingPlanner::new(|request: &Request, from: u64, plan: &mut Plan| {
        assert_eq!(from, 0, "planned anew");
        push(plan, OpKind::Read, request.len);
        Ok(())
    });
    play.engine.exchange_planner(&mut other).unwrap();
    assert!(other.settled.borrow().iter().all(|(offset, _)| *offset == 0), "only what had begun");
    play.engine.release(&mut play.wanted);
    assert_eq!(play.ended(), [0, 1, 3], "in the order of their delivery");
    assert_eq!(play.settled().len(), 3);
}

#[test]
fn a_hold_without_a_change_lets_them_wait_again() {
    let mut play = Play::new(by_offset());
    play.deliver(0, READ, 7);
    play.engine.hold();
    play.tick(6000);
    play.engine.release(&mut play.wanted);
    assert!(play.ended().is_empty());
    play.tick(7000);
    assert_eq!(play.ended(), [0]);
    assert_eq!((play.engine.stats().throttled, play.engine.stats().held_back), (2, 1));
}

/// A request is in the delay before its wait when the hold begins.
#[test]
fn a_request_that_is_to_wait_while_the_engine_holds_is_taken_back() {
    let mut play = Play::new(RecordingPlanner::new(|request: &Request, from, plan: &mut Plan| {
        if from == 0 {
            plan.delay(10);
            plan.wait_until(500, 1);
            return Ok(());
        }
        push(plan, OpKind::Read, request.len);
        Ok(())
    }));
    play.deliver(0, READ, 0);
    play.engine.hold();
    assert!(!play.engine.is_quiet());
    assert_eq!(play.complete(Errno::ETIME.negated()).kind, OpKind::Delay);
    assert!(play.engine.is_quiet());
    assert_eq!(*play.engine.planner().withdrawn.borrow(), [(0, 1)]);
}

#[test]
fn at_the_end_nothing_waits() {
    let mut play = Play::new(by_offset());
    play.deliver(0, READ, 7);
    play.engine.set_throttling(false, &mut play.wanted);
    play.deliver(1, READ, 9);
    assert_eq!(play.ended(), [0, 1]);
    // The end is given up.
    play.engine.set_throttling(true, &mut play.wanted);
    play.deliver(1, READ, 9);
    assert!(play.ended().is_empty() && play.engine.has_throttled());
}

#[test]
fn waits_that_would_not_end_are_errors() {
    // Without progress, and in a later window.
    let idle = |_: &Request, from: u64, plan: &mut Plan| {
        plan.wait_until(100, from);
        Ok(())
    };
    let late = |request: &Request, from: u64, plan: &mut Plan| {
        if from > 0 {
            plan.wait_until(100, from + 1);
            return Ok(());
        }
        push(plan, OpKind::Read, request.len);
        plan.continue_at(1);
        Ok(())
    };
    let mut play = Play::new(RecordingPlanner::new(idle));
    play.deliver(0, READ, 0);
    assert_eq!(play.answers(), [(0, EIO)]);
    let mut play = Play::new(RecordingPlanner::new(late));
    play.deliver(0, READ, 0);
    play.complete(16384);
    assert_eq!(play.answers(), [(0, EIO)]);
}

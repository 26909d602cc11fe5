//! The answers to requests, whatever a drive does: the whole request, or an error. A driver may
//! treat fewer bytes as the whole.

#[path = "answers/drive.rs"]
mod drive;

use proptest::prelude::*;
use ublk_engine::lend::LendMode;
use uring_ext::sys;

use drive::{Fate, LEN, NO_DATA, Pieces, Play, modes};

const KINDS: [u32; 2] = [sys::UBLK_IO_OP_READ, sys::UBLK_IO_OP_WRITE];
const ALL: i32 = 16 << 10;

fn pieces(count: u64, at_first: Option<u64>) -> Pieces {
    Pieces { count, at_first, delay_ns: 0 }
}

fn fates() -> impl Strategy<Value = Vec<Fate>> {
    let fate = prop_oneof![
        6 => Just(Fate::Whole),
        6 => any::<u8>().prop_map(Fate::Part),
        1 => Just(Fate::Nothing),
        2 => Just(Fate::Again),
        1 => Just(Fate::Error),
        1 => (0..2_u64).prop_map(Fate::Retry),
    ];
    prop::collection::vec(fate, 0..40)
}

proptest! {
    #[test]
    fn a_success_is_the_whole_request(
        count in (0..6_u32).prop_map(|power| 1 << power),
        at_first in prop::option::of((1..40_u64).prop_map(|blocks| blocks * 512)),
        delay_ns in 0..2_u64,
        commands in any::<bool>(),
        requests in prop::collection::vec((0..2_usize, fates()), 1..4),
    ) {
        for mode in modes() {
            let mut play = Play::new(Pieces { count, at_first, delay_ns }, mode);
            play.commands = commands;
            for (kind, fates) in &requests {
                let answer = play.serve(KINDS[*kind], fates);
                let is_bad = |fate: &Fate| match fate {
                    Fate::Whole | Fate::Part(_) => false,
                    Fate::Nothing | Fate::Again | Fate::Error | Fate::Retry(_) => true,
                };
                let may_fail = fates.iter().any(is_bad);
                prop_assert!(answer == ALL || may_fail && answer < 0, "{:?}: {}", mode, answer);
            }
            let holdings = play.engine.holdings();
            prop_assert_eq!((holdings.requests, holdings.leaked), (0, 0));
            let stats = play.engine.stats();
            prop_assert_eq!((stats.commits, stats.unexpected), (requests.len() as u64, 0));
        }
    }
}

/// How many registrations and copies come before a request's first operation.
fn before_operations(lend: LendMode, op_flags: u32) -> usize {
    match lend {
        LendMode::Fused | LendMode::Copy => 0,
        LendMode::Slot => 1,
        LendMode::UserCopy => usize::from(op_flags == sys::UBLK_IO_OP_WRITE),
    }
}

#[test]
fn what_comes_short_is_completed() {
    const PART: &[Fate] = &[Fate::Part(128)];
    const AGAIN: &[Fate] = &[Fate::Again];
    let whole = u64::from(LEN);
    type Case<'a> = (&'a str, Pieces, &'a [Fate], &'a [u64], u64);
    // The planner, the fates of the first operations, the lengths of all operations, and how many
    // are first issued for a part.
    let table: [Case<'_>; 8] = [
        ("nothing is cut", pieces(1, None), &[], &[whole], 0),
        ("the rest follows", pieces(1, Some(512)), &[], &[512, whole - 512], 1),
        ("as long as the operation", pieces(1, Some(whole)), &[], &[whole], 0),
        ("a part of the first part", pieces(1, Some(512)), PART, &[512, whole - 256], 1),
        ("tried again", pieces(1, Some(512)), AGAIN, &[512, 512, whole - 512], 1),
        ("each of two", pieces(2, Some(4096)), &[], &[4096; 4], 2),
        ("longer ones only", pieces(4, Some(4096)), &[], &[4096; 4], 0),
        ("all windows", pieces(16, Some(512)), &[], &[512; 32], 16),
    ];
    for (what, planner, fates, asked, partial) in table {
        let kinds = modes().into_iter().flat_map(|mode| KINDS.map(|kind| (mode, kind)));
        for (mode, op_flags) in kinds {
            let before = vec![Fate::Whole; before_operations(mode.0, op_flags)];
            let mut play = Play::new(planner, mode);
            let answer = play.serve(op_flags, &[&before[..], fates].concat());
            assert_eq!((answer, &play.drive.asked[..]), (ALL, asked), "{what}: {mode:?}");
            let stats = play.engine.stats();
            let short = u64::from(partial > 0);
            let counted = (stats.planned_short, stats.partial, stats.failed);
            assert_eq!(counted, (short, partial, 0), "{what}: {mode:?}");
        }
    }
}

#[test]
fn commands_come_short_as_well() {
    for mode in modes() {
        let mut play = Play::new(pieces(2, Some(1024)), mode);
        play.commands = true;
        for op_flags in KINDS {
            assert_eq!(play.serve(op_flags, &[]), ALL, "{mode:?}");
            assert_eq!(play.drive.asked, [1024, 1024, 7168, 7168], "{mode:?}");
        }
        assert_eq!((play.engine.stats().planned_short, play.engine.stats().partial), (2, 4));
    }
}

/// A drive may demand that a command is retried after a delay.
#[test]
fn what_the_drive_asks_for_again_is_issued_again() {
    let cases = modes().into_iter().flat_map(|mode| KINDS.map(|kind| (mode, kind)));
    for (mode, op_flags) in cases {
        for pause_ns in [0, 200_000_000] {
            for asks in 0..8_usize {
                let mut play = Play::new(pieces(1, None), mode);
                play.commands = true;
                let mut fates = vec![Fate::Whole; before_operations(mode.0, op_flags)];
                for ask in 0..asks {
                    fates.push(Fate::Retry(pause_ns));
                    // Between two chains there are an unregistration and a registration. Only the
                    // first try of an operation that pauses is a chain.
                    if mode.0 == LendMode::Slot && (ask == 0 || pause_ns == 0) {
                        fates.extend([Fate::Whole; 2]);
                    }
                }
                let answer = play.serve(op_flags, &fates);
                let expected = if asks <= 5 { ALL } else { NO_DATA };
                let what = format!("{mode:?}, {op_flags}, {pause_ns}, {asks}");
                assert_eq!(answer, expected, "{what}");
                assert_eq!(play.drive.asked.len(), asks.min(5) + 1, "{what}");
                let pauses = if pause_ns > 0 { asks.min(5) } else { 0 };
                assert_eq!(play.drive.paused, vec![pause_ns; pauses], "{what}");
                assert_eq!(play.engine.stats().retries, asks.min(5) as u64, "{what}");
            }
        }
    }
}

#[test]
fn errors_after_a_part_are_errors() {
    for mode in modes() {
        let planner = Pieces { delay_ns: 5, ..pieces(1, Some(8192)) };
        for failure in [Fate::Error, Fate::Nothing] {
            let mut play = Play::new(planner, mode);
            let first = before_operations(mode.0, KINDS[1]) + 1;
            let fates = [&vec![Fate::Whole; first][..], &[failure]].concat();
            assert_eq!(play.serve(KINDS[1], &fates), -5, "{mode:?}: {failure:?}");
            assert_eq!(play.drive.asked, [8192, 8192], "{mode:?}");
            assert_eq!(play.serve(KINDS[1], &[]), ALL, "{mode:?}");
        }
    }
}

#[test]
fn what_cannot_come_short_fails() {
    // Nothing, and part of a block.
    for bytes in [0, 100, 513] {
        for mode in modes() {
            let mut play = Play::new(pieces(1, Some(bytes)), mode);
            assert_eq!(play.serve(KINDS[0], &[]), -5, "{bytes}: {mode:?}");
            assert!(play.drive.asked.is_empty());
            assert_eq!(play.engine.stats().planned_errors, 1);
        }
    }
}

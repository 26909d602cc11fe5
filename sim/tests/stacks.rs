//! Stacks of devices with lanes that share threads. A lower device must never wait for a resource
//! of a device above it.

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};

use ublk_sim::Options;
use ublk_sim::campaign::{Failure, play_stack};
use ublk_sim::setup::Hostility;
use ublk_sim::stack::{Outcome, Sharing, play};

/// Fewer steps with few seeds, since unoptimized builds use few.
fn options() -> Options {
    let steps = if seeds() >= USUAL_SEEDS { 3000 } else { 800 };
    Options { steps, hostility: Hostility::None, trace: false }
}

const USUAL_SEEDS: u64 = 80;

/// `UBLK_SIM_SEEDS`, or the number for a long run, or a number that takes seconds without
/// optimization.
fn seeds() -> u64 {
    let asked = std::env::var("UBLK_SIM_SEEDS").ok().and_then(|count| count.parse().ok());
    let usual = if std::env::var_os("UBLK_VM_LONG").is_some() { 5_000 } else { USUAL_SEEDS };
    asked.unwrap_or(usual)
}

#[test]
fn a_stack_of_processes_always_moves() {
    let mut total = Outcome::default();
    for seed in 0..seeds() {
        let played = play_stack(seed, &options()).unwrap_or_else(|Failure { seed, message }| {
            let replay = format!("cargo sim --stacks --seed {seed} --only --trace");
            panic!(
                "seed {seed} failed: {message}; replay with `{replay} --steps {}`",
                options().steps
            )
        });
        total.steps += played.steps;
        total.requests += played.requests;
        total.passed_down += played.passed_down;
        total.missed += played.missed;
        total.punted += played.punted;
        total.top = total.top.max(played.top);
        total.beside += played.beside;
    }
    println!("{total:?}");
    let each = |count: u64| count / seeds();
    assert!(each(total.passed_down) > 10, "{total:?}");
    if seeds() >= USUAL_SEEDS {
        // The dangerous situations have occurred often.
        assert!(each(total.missed) > 4 && each(total.punted) > 20, "{total:?}");
        assert!(total.top >= 3 && total.beside > 100, "{total:?}");
    }
}

/// How many of these seeds deadlock.
fn hangs(seeds: Range<u64>, sharing: Sharing) -> u64 {
    let (mut found, count) = (0, seeds.clone().count());
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    for seed in seeds {
        let played = catch_unwind(AssertUnwindSafe(|| play(seed, sharing, &options())));
        let Err(panic) = played else { continue };
        let said = panic.downcast_ref::<String>().cloned().unwrap_or_default();
        assert!(said.starts_with("deadlock after "), "seed {seed}: {said}");
        if found == 0 {
            println!("seed {seed}: {said}");
        }
        found += 1;
    }
    std::panic::set_hook(hook);
    println!("{sharing:?}: {found} of {count} seeds");
    found
}

/// The simulator detects the deadlocks that the server's rules prevent.
#[test]
fn a_stack_within_a_process_is_found_to_hang() {
    let all = seeds().min(40);
    assert!(hangs(0..all, Sharing::Any) > all / 2);
    if all == 40 {
        // Two processes, each with a device on a device of the other: 8 of 1,000 seeds.
        assert!(hangs(100..200, Sharing::NoneBelow) > 0);
    }
}

#[test]
fn a_seed_determines_everything() {
    for seed in 0..5 {
        let play = |seed| play(seed, Sharing::Apart, &options());
        assert_eq!(play(seed), play(seed), "seed {seed}");
    }
}

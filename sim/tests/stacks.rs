//! Stacks of devices whose lanes share threads: what a lower device does must never wait for what a
//! device above it holds.

use std::panic::{AssertUnwindSafe, catch_unwind};

use ublk_sim::Options;
use ublk_sim::campaign::{Failure, play_stack};
use ublk_sim::setup::Hostility;
use ublk_sim::stack::{Outcome, Sharing, play};

const OPTIONS: Options = Options { steps: 3000, hostility: Hostility::None, trace: false };

const USUAL_SEEDS: u64 = 80;

/// `UBLK_SIM_SEEDS`, or the budget of a long run, or what takes seconds without optimization.
fn seeds() -> u64 {
    let asked = std::env::var("UBLK_SIM_SEEDS").ok().and_then(|count| count.parse().ok());
    let usual = if std::env::var_os("UBLK_VM_LONG").is_some() { 5_000 } else { USUAL_SEEDS };
    asked.unwrap_or(usual)
}

#[test]
fn a_stack_whose_levels_have_lanes_of_their_own_always_moves() {
    let mut total = Outcome::default();
    for seed in 0..seeds() {
        let played = play_stack(seed, &OPTIONS).unwrap_or_else(|Failure { seed, message }| {
            let replay = format!("cargo sim --stacks --seed {seed} --only --trace");
            panic!(
                "seed {seed} failed: {message}; replay with `{replay} --steps {}`",
                OPTIONS.steps
            )
        });
        total.steps += played.steps;
        total.requests += played.requests;
        total.handed_down += played.handed_down;
        total.missed += played.missed;
        total.punted += played.punted;
        total.top = total.top.max(played.top);
    }
    println!("{total:?}");
    let each = |count: u64| count / seeds();
    assert!(each(total.handed_down) > 50, "{total:?}");
    // What could stop it has happened all the time.
    assert!(each(total.missed) > 4 && each(total.punted) > 20, "{total:?}");
    if seeds() >= USUAL_SEEDS {
        assert!(total.top >= 3, "{total:?}");
    }
}

#[test]
fn a_stack_on_one_lane_is_found_to_hang() {
    let mut found = 0;
    let all = seeds().min(40);
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    for seed in 0..all {
        let played = catch_unwind(AssertUnwindSafe(|| play(seed, Sharing::Any, &OPTIONS)));
        let Err(panic) = played else { continue };
        let said = panic.downcast_ref::<String>().cloned().unwrap_or_default();
        assert!(said.starts_with("deadlock after "), "seed {seed}: {said}");
        if found == 0 {
            println!("seed {seed}: {said}");
        }
        found += 1;
    }
    std::panic::set_hook(hook);
    println!("{found} of {all} seeds");
    assert!(found > all / 2, "{found} of {all} seeds");
}

#[test]
fn a_seed_determines_everything() {
    for seed in 0..5 {
        let play = |seed| play(seed, Sharing::ByLevel, &OPTIONS);
        assert_eq!(play(seed), play(seed), "seed {seed}");
    }
}

//! The planner of a device is changed in all its lanes at one instant.

use ublk_sim::Options;
use ublk_sim::campaign::{Failure, play_lanes};
use ublk_sim::lanes::{Outcome, play};
use ublk_sim::setup::Hostility;

const OPTIONS: Options = Options { steps: 6000, hostility: Hostility::Mixed, trace: false };

const USUAL_SEEDS: u64 = 60;

/// `UBLK_SIM_SEEDS`, or the number for a long run, or a number that takes seconds without
/// optimization.
fn seeds() -> u64 {
    let asked = std::env::var("UBLK_SIM_SEEDS").ok().and_then(|count| count.parse().ok());
    let usual = if std::env::var_os("UBLK_VM_LONG").is_some() { 10_000 } else { USUAL_SEEDS };
    asked.unwrap_or(usual)
}

#[test]
fn no_request_begins_under_two_planners() {
    let (mut total, mut lanes) = (Outcome::default(), [0_u64; 5]);
    for seed in 0..seeds() {
        let played = play_lanes(seed, &OPTIONS).unwrap_or_else(|Failure { seed, message }| {
            let replay = format!("cargo sim --lanes --seed {seed} --only --trace");
            panic!(
                "seed {seed} failed: {message}; replay with `{replay} --steps {}`",
                OPTIONS.steps
            )
        });
        lanes[played.lanes] += 1;
        total.requests += played.requests;
        total.changes += played.changes;
        total.held_back += played.held_back;
        total.given_up += played.given_up;
        total.deaths += played.deaths;
    }
    println!("{total:?}, devices by lanes: {lanes:?}");
    if seeds() >= USUAL_SEEDS {
        assert!(lanes[2..].iter().all(|count| *count > 0), "{lanes:?}");
        let each = [total.changes, total.given_up, total.held_back];
        assert!(total.deaths > 0, "{total:?}");
        assert!(each.iter().all(|count| *count > 2 * seeds()), "{total:?}");
    }
}

#[test]
fn a_seed_determines_everything() {
    for seed in 0..3 {
        assert_eq!(play(seed, &OPTIONS), play(seed, &OPTIONS), "seed {seed}");
    }
}

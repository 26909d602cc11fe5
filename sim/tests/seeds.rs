//! The engine under hostile kernels. `cargo sim --seeds 10000` plays the same seeds faster.

use ublk_sim::campaign::Campaign;
use ublk_sim::fault::Fault;
use ublk_sim::setup::Hostility;
use ublk_sim::{DEFAULT_STEPS, Options, play};

const OPTIONS: Options =
    Options { steps: DEFAULT_STEPS, hostility: Hostility::Mixed, trace: false };

const USUAL_SEEDS: u64 = 160;

/// `UBLK_SIM_SEEDS`, or the number for a long run, or a number that takes seconds without
/// optimization.
fn seeds() -> u64 {
    let asked = std::env::var("UBLK_SIM_SEEDS").ok().and_then(|count| count.parse().ok());
    let usual = if std::env::var_os("UBLK_VM_LONG").is_some() { 10_000 } else { USUAL_SEEDS };
    asked.unwrap_or(usual)
}

#[test]
fn every_request_is_answered_once_and_rightly_by_a_hostile_kernel() {
    let mut campaign = Campaign::default();
    for seed in 0..seeds() {
        if let Err(failure) = campaign.play(seed, &OPTIONS) {
            panic!(
                "seed {seed} failed: {}; replay with `cargo sim --seed {seed} --only --trace`",
                failure.message
            );
        }
    }
    println!("{} requests, {} with success", campaign.total.requests, campaign.total.succeeded);
    if campaign.seeds >= USUAL_SEEDS {
        let unseen: Vec<_> = campaign.total.tally.unseen().map(Fault::name).collect();
        assert!(unseen.is_empty(), "never seen: {unseen:?}");
        let drivers = campaign.total.drivers;
        assert!(drivers.iter().all(|seeds| *seeds > 40), "{drivers:?}");
    }
    assert!(
        campaign.total.requests > campaign.seeds * 100,
        "the kernel delivers enough to mean something"
    );
    assert!(campaign.total.succeeded > campaign.total.requests / 2, "and most requests survive");
}

#[test]
fn a_sound_kernel_sees_no_error() {
    let mut campaign = Campaign::default();
    let options = Options { steps: 2000, hostility: Hostility::None, trace: false };
    for seed in 0..seeds().min(40) {
        campaign.play(seed, &options).unwrap_or_else(|failure| panic!("{failure:?}"));
    }
    assert_eq!(campaign.total.succeeded, campaign.total.requests);
    let only = [
        Fault::Reordered,
        Fault::QueueFull,
        Fault::PlannedShort,
        Fault::Replaced,
        Fault::HeldBack,
        Fault::Throttled,
        Fault::ReplacedAmongHeld,
        Fault::HoldGivenUp,
        Fault::SpareTaken,
    ];
    for fault in Fault::ALL.iter().filter(|fault| !only.contains(fault)) {
        assert_eq!(campaign.total.tally.count(*fault), 0, "{}", fault.name());
    }
}

#[test]
fn a_seed_determines_everything() {
    for seed in 0..seeds().min(20) {
        let options = Options { steps: 1500, ..OPTIONS };
        let (one, other) = (play(seed, &options), play(seed, &options));
        assert_eq!(one, other, "seed {seed}");
        assert_ne!(one.hash, play(seed + 1000, &options).hash, "and seeds differ");
    }
}

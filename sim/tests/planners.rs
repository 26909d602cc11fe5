//! Planners that do more than map bytes: a mirror, copy on write, and faults.

use ublk_sim::campaign::Campaign;
use ublk_sim::setup::{Hostility, Setup};
use ublk_sim::{Options, play_setup};

/// Plays seeds after `change` has modified their configuration. Skips a seed if it returns false.
fn campaign(
    hostility: Hostility,
    seeds: std::ops::Range<u64>,
    mut change: impl FnMut(&mut Setup) -> bool,
) -> Campaign {
    let options = Options { steps: 1500, hostility, trace: false };
    let mut campaign = Campaign::default();
    for seed in seeds {
        let mut setup = Setup::of(seed, hostility);
        if change(&mut setup) {
            campaign.add(&play_setup(seed, setup, &options));
        }
    }
    campaign
}

fn counter(campaign: &Campaign, name: &str) -> u64 {
    let found = campaign.total.counters.iter().find(|(known, _)| *known == name);
    found.unwrap_or_else(|| panic!("no counter {name}")).1
}

#[test]
fn a_mirror_serves_without_the_leg_that_fails() {
    // There are no other faults, so every request succeeds.
    let campaign = campaign(Hostility::None, 0..240, |setup| {
        let legs = setup.mapping.mirror().map(|mirror| mirror.spread.backings);
        setup.dead_leg = legs.map(|legs| usize::from(legs) - 1);
        legs.is_some()
    });
    assert!(campaign.seeds > 15, "{} seeds", campaign.seeds);
    assert_eq!(campaign.total.succeeded, campaign.total.requests);
    let counted = |name| counter(&campaign, name);
    assert!(counted("substituted") > 0, "reads went to another leg");
    assert!(counted("ignored") > 0, "writes did without");
    assert_eq!((counted("failed"), counted("unexpected")), (0, 0));
}

#[test]
fn a_mirror_survives_a_hostile_kernel() {
    let campaign = campaign(Hostility::All, 0..200, |setup| setup.mapping.mirror().is_some());
    assert!(campaign.seeds > 15, "{} seeds", campaign.seeds);
    assert!(counter(&campaign, "substituted") > 0 && counter(&campaign, "ignored") > 0);
}

#[test]
fn a_snapshot_keeps_what_was_there_first() {
    for hostility in [Hostility::None, Hostility::All] {
        let campaign = campaign(hostility, 0..200, |setup| {
            setup.swaps = false;
            setup.mapping.snapshot().is_some()
        });
        assert!(campaign.seeds > 15, "{} seeds", campaign.seeds);
        assert!(counter(&campaign, "deferred") > 0, "requests to the same chunk have waited");
        let all = hostility == Hostility::None;
        assert!(!all || campaign.total.succeeded == campaign.total.requests);
    }
}

#[test]
fn faults_are_those_that_were_decided_on() {
    for (layers, seeds, least) in [(1..2, 0..100, 15), (2..4, 100..300, 10)] {
        let has_layers = |setup: &mut Setup| layers.contains(&setup.mapping.faults().len());
        let campaign = campaign(Hostility::All, seeds, has_layers);
        assert!(campaign.seeds > least, "{} seeds with {layers:?} layers", campaign.seeds);
        for name in ["planned_errors", "planned_short", "delays"] {
            assert!(counter(&campaign, name) > 20, "{name} with {layers:?} layers");
        }
    }
}

//! The simulator's drives have volatile caches, so that it detects a port that ignores flushes or
//! FUA.

use std::panic::{AssertUnwindSafe, catch_unwind};

use ublk_sim::setup::{Hostility, Setup};
use ublk_sim::{Options, play_setup};

/// Plays seeds of a sound kernel with a fault of the port. Returns the messages of the failures.
fn failures(port_faults: &'static str) -> Vec<String> {
    let options = Options { steps: 1500, hostility: Hostility::None, trace: false };
    let play = |seed| {
        let setup = Setup { port_faults: Some(port_faults), ..Setup::of(seed, Hostility::None) };
        catch_unwind(AssertUnwindSafe(|| play_setup(seed, setup, &options))).err()
    };
    let text = |panic: Box<dyn std::any::Any + Send>| {
        let text = panic.downcast_ref::<String>().cloned();
        text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()))
    };
    (0..20).filter_map(play).map(|panic| text(panic).unwrap_or_default()).collect()
}

#[test]
fn ignored_flushes_are_found_out() {
    let failures = failures("ignore-flush");
    assert!(failures.len() > 10, "{failures:?}");
    for failure in failures {
        // The latter if the planner implements FUA by flushes.
        let found = ["a flush has not reached all writes", "is not on stable storage"];
        assert!(found.iter().any(|found| failure.contains(found)), "{failure}");
    }
}

#[test]
fn ignored_fua_is_found_out() {
    let failures = failures("ignore-fua");
    assert!(failures.len() > 10, "{failures:?}");
    for failure in failures {
        assert!(failure.contains("fua: true") && failure.contains("dsync: false"), "{failure}");
    }
}

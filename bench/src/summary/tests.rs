use super::*;
use crate::sample;

fn index(results: &Results, name: &str) -> usize {
    results.subjects.iter().position(|subject| subject.name == name).unwrap()
}

/// A run with these requests a second for each subject and round, the same for all loads.
fn run(figures: &[(&str, &[f64])]) -> Results {
    let mut results = sample::results(7, 5);
    results.samples.retain_mut(|sample| {
        let of_subject = figures.iter().find(|(name, _)| *name == sample.subject);
        let iops =
            of_subject.and_then(|(_, iops)| iops.get(usize::try_from(sample.round).unwrap()));
        sample.iops = iops.copied().unwrap_or(0.0);
        iops.is_some()
    });
    results
}

#[test]
fn ratios_are_formed_within_rounds() {
    // Both get slower in the same way, so the ratio stays the same.
    let results = run(&[("raw", &[100.0, 50.0, 25.0]), ("fused", &[50.0, 25.0, 12.5])]);
    let summary = Summary::of(&results).unwrap();
    let fused = index(&results, "fused");
    let ratio = summary.of_raw(fused, 0).unwrap();
    assert_eq!((ratio.median, ratio.low, ratio.high, ratio.count), (0.5, 0.5, 0.5, 3));
    assert_eq!(summary.cell(fused, 0).unwrap().iops.median, 25.0);
    assert_eq!(summary.rounds(), 3);
}

#[test]
fn rounds_without_a_partner_are_left_out() {
    let results = run(&[("raw", &[100.0, 0.0]), ("fused", &[80.0, 80.0, 10.0])]);
    let summary = Summary::of(&results).unwrap();
    let ratio = summary.of_raw(index(&results, "fused"), 1).unwrap();
    assert_eq!((ratio.median, ratio.count), (0.8, 1), "nothing is divided by 0");
    assert_eq!(summary.of_raw(index(&results, "slot"), 1), None);
    assert!(summary.cell(index(&results, "slot"), 1).is_none());
    assert!(summary.cell(0, 99).is_none() && summary.cell(99, 0).is_none());
}

#[test]
fn rivals_are_loop_and_rublk_and_not_what_maps() {
    let results = run(&[
        ("raw", &[100.0]),
        ("dm-linear", &[99.0]),
        ("kernel-loop", &[50.0]),
        ("rublk", &[64.0]),
        ("fused", &[80.0]),
        ("copy", &[20.0]),
    ]);
    let summary = Summary::of(&results).unwrap();
    assert_eq!(summary.best_rival(0), Some(index(&results, "rublk")));
    assert_eq!(summary.ours(), Some(index(&results, "fused")));
    let against = summary.against_rivals().unwrap();
    assert!((against.mean.median - 1.25).abs() < 1e-12);
    assert_eq!(against.loads, results.loads.len());
    assert_eq!(summary.zero_copy_factor(4).unwrap().median, 4.0);
}

#[test]
fn without_one_side_there_is_no_comparison() {
    let results = run(&[("raw", &[100.0]), ("dm-linear", &[99.0]), ("slot", &[80.0])]);
    let summary = Summary::of(&results).unwrap();
    assert_eq!(summary.ours(), Some(index(&results, "slot")), "the first of ours that lends");
    assert_eq!(summary.best_rival(0), None);
    assert_eq!(summary.against_rivals(), None);
    assert_eq!(summary.zero_copy_factor(4), None);
    let nothing = run(&[]);
    let summary = Summary::of(&nothing).unwrap();
    assert_eq!((summary.raw(), summary.ours(), summary.rounds()), (None, None, 0));
}

#[test]
fn what_is_left_of_the_machine_is_the_rest() {
    let split = CpuSplit { machine_us: 10.0, client_us: 4.0, server_us: Some(3.0) };
    assert_eq!(split.rest_us(), 3.0);
    // They are measured in different ways, so the sum of the parts may exceed the whole.
    assert_eq!(CpuSplit { machine_us: 6.0, ..split }.rest_us(), 0.0);
}

#[test]
fn curves_are_medians_of_each_percentile() {
    let mut results = run(&[("raw", &[1.0, 1.0, 1.0])]);
    for (sample, ns) in results.samples.iter_mut().filter(|s| s.load == "read-128k").zip([7, 9, 80])
    {
        sample.latency.percentiles = vec![(50.0, ns), (99.99, ns * 10)];
    }
    let summary = Summary::of(&results).unwrap();
    let cell = summary.cell(0, 4).unwrap();
    assert_eq!(cell.curve(), [(50.0, 9.0), (99.99, 90.0)]);
    assert_eq!(cell.percentile_ns(99.0), None);
}

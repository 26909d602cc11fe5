use super::*;
use crate::sample::results;

const OPTIONS: Options = Options { absolute: false, threshold: 0.01 };

/// Another run, in which a subject has `factor` times the requests.
fn faster(seed: u64, rounds: u32, subject: &str, factor: f64) -> Results {
    let mut changed = results(seed, rounds);
    for sample in changed.samples.iter_mut().filter(|sample| sample.subject == subject) {
        sample.iops *= factor;
    }
    changed
}

fn verdicts(comparison: &Comparison, measure: Measure, subject: &str) -> Vec<Verdict> {
    let of = comparison.changes.iter();
    let of = of.filter(|change| change.measure == measure && change.subject == subject);
    of.map(|change| change.verdict).collect()
}

#[test]
fn noise_is_no_change() {
    let (mut clear, mut all) = (0, 0);
    for seed in 0..4 {
        let compared = compare(&results(seed, 9), &results(seed + 100, 9), OPTIONS).unwrap();
        all += compared.changes.len();
        clear += compared.changes.len() - compared.count(Verdict::Unclear);
    }
    // 10 subjects, 6 loads, 3 measures.
    assert_eq!(all, 4 * 180);
    assert!(clear * 100 < all, "{clear} of {all}");
}

#[test]
fn a_change_is_found_with_its_sign() {
    let before = results(1, 9);
    for (factor, expected) in [(1.2, Verdict::Better), (0.8, Verdict::Worse)] {
        let compared = compare(&before, &faster(2, 9, "fused", factor), OPTIONS).unwrap();
        let found = verdicts(&compared, Measure::Throughput, "fused");
        assert_eq!(found, [expected; 6], "{factor}");
        for other in ["raw", "slot", "rublk"] {
            let found = verdicts(&compared, Measure::Throughput, other);
            assert!(found.iter().filter(|verdict| **verdict != Verdict::Unclear).count() <= 1);
        }
        let change = compared.changes.iter().find(|change| change.subject == "fused").unwrap();
        assert!((change.ratio / factor - 1.0).abs() < 0.05, "{change:?}");
    }
    // More CPU time is worse.
    let mut after = results(2, 9);
    after.samples.iter_mut().for_each(|sample| {
        sample.cpu.machine_us *= if sample.subject == "slot" { 1.5 } else { 1.0 };
    });
    let compared = compare(&before, &after, OPTIONS).unwrap();
    assert_eq!(verdicts(&compared, Measure::Cpu, "slot"), [Verdict::Worse; 6]);
}

#[test]
fn a_slower_machine_is_no_change_of_a_device() {
    let before = results(1, 9);
    let mut after = results(2, 9);
    after.samples.iter_mut().for_each(|sample| sample.iops *= 0.5);
    let compared = compare(&before, &after, OPTIONS).unwrap();
    assert!(compared.count(Verdict::Worse) <= 8, "the raw backing's six");
    assert_eq!(verdicts(&compared, Measure::Throughput, "raw"), [Verdict::Worse; 6]);
    let warned = compared.warnings.join("\n");
    assert!(warned.contains("the raw backing's throughput itself"), "{warned}");
    let absolute = compare(&before, &after, Options { absolute: true, ..OPTIONS }).unwrap();
    assert_eq!(verdicts(&absolute, Measure::Throughput, "slot"), [Verdict::Worse; 6]);
    assert!(absolute.changes.iter().all(|change| !change.of_raw));
}

#[test]
fn small_changes_and_few_rounds_are_not_clear() {
    let (before, after) = (results(1, 9), faster(1, 9, "fused", 1.005));
    let compared = compare(&before, &after, OPTIONS).unwrap();
    assert_eq!(verdicts(&compared, Measure::Throughput, "fused"), [Verdict::Unclear; 6]);
    let compared = compare(&results(1, 3), &faster(2, 3, "fused", 3.0), OPTIONS).unwrap();
    assert_eq!(verdicts(&compared, Measure::Throughput, "fused"), [Verdict::Unclear; 6]);
    let warned = compared.warnings.join("\n");
    assert!(warned.contains("3 and 3 rounds are too few"), "{warned}");
}

#[test]
fn what_else_differs_is_told() {
    let before = results(1, 7);
    let mut after = results(2, 7);
    after.machine.kernel = "7.3".into();
    after.backing.scheduler = None;
    after.subjects[5].command.push_str(" -q 2");
    after.samples.retain(|sample| sample.subject != "rublk");
    after.incomplete = Some("a\nb".into());
    let warned = compare(&before, &after, OPTIONS).unwrap().warnings.join("\n");
    for expected in [
        "the second run is incomplete: a b",
        "the kernel differs: 7.2.12-cloud-amd64 and 7.3",
        "its scheduler differs: none and none",
        "only the first run has: rublk",
        "`fused` was made by another command",
    ] {
        // A scheduler named `none` equals no scheduler.
        let is_there = warned.contains(expected);
        assert_eq!(is_there, !expected.contains("scheduler"), "{expected}: {warned}");
    }
    let same = compare(&before, &before, OPTIONS).unwrap();
    assert!(same.warnings.is_empty(), "{:?}", same.warnings);
    assert_eq!(same.count(Verdict::Unclear), same.changes.len());
}

#[test]
fn nothing_in_common_is_no_panic() {
    let mut after = results(1, 2);
    after.subjects.iter_mut().for_each(|subject| subject.name.push('2'));
    after.samples.iter_mut().for_each(|sample| sample.subject.push('2'));
    let compared = compare(&results(1, 2), &after, OPTIONS).unwrap();
    assert!(compared.changes.is_empty());
    assert!(show::text(&compared, &results(1, 2), 80).contains("0 better, 0 worse, 0 without"));
    let mut zero = results(1, 2);
    zero.samples.iter_mut().for_each(|sample| {
        (sample.iops, sample.cpu.machine_us) = (0.0, 0.0);
    });
    assert!(compare(&zero, &zero, OPTIONS).unwrap().changes.iter().all(|c| c.ratio.is_finite()));
}

#[test]
fn the_text_has_a_table_for_each_measure() {
    let before = results(1, 9);
    let mut after = faster(2, 9, "fused", 1.3);
    after.backing.model = Some("<b>\u{1b}".into());
    let compared = compare(&before, &after, OPTIONS).unwrap();
    let text = show::text(&compared, &before, 90);
    assert!(text.starts_with("note: the drive differs: QEMU NVMe Ctrl and <b>\n"), "{text}");
    assert!(text.lines().all(|line| line.chars().count() <= 90), "{text}");
    let fused = text.lines().filter(|line| line.starts_with("ours: lend fused "));
    assert_eq!(fused.map(|line| line.matches("better").count()).sum::<usize>(), 6, "{text}");
    assert!(!text.contains('\u{1b}') && text.contains("raw") && text.contains("better, "));
}

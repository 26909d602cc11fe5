//! The limits of a run's conclusions.

use super::Summary;
use super::figure::bytes;
use crate::results::{Backing, Load, Machine, Method};

/// The limits of the conclusions, depending on the facts of the run; the most serious first.
#[must_use]
pub fn caveats(summary: &Summary) -> Vec<String> {
    let results = summary.results();
    let of_run = results
        .incomplete
        .iter()
        .map(|why| format!("The run is incomplete: {why}. Later rounds are missing."));
    let reads_only = !results.loads.iter().any(is_written);
    of_run
        .chain(unsteady(summary))
        .chain(virtual_machine(&results.machine))
        .chain(few_rounds(summary))
        .chain(short_samples(&results.method))
        .chain(of_backing(&results.backing))
        .chain(of_machine(&results.machine))
        .chain(reads_only.then(|| "Nothing was written: it says nothing about writes.".to_owned()))
        .chain(ALWAYS.map(str::to_owned))
        .collect()
}

/// Whether a load writes, according to its fio `rw`.
#[must_use]
pub fn is_written(load: &Load) -> bool {
    load.rw.contains("write") || load.rw.contains("rw")
}

/// A run is unsteady if the requests of two rounds differ by this factor.
const UNSTEADY: f64 = 1.5;

/// Limits of every run.
const ALWAYS: [&str; 2] = [
    "One job made all the load: several jobs, or several queues, were not measured.",
    "Neither flushes nor file systems were measured, and no mix of requests but those listed.",
];

/// The raw backing should have the same throughput in every round.
fn unsteady(summary: &Summary) -> Option<String> {
    let raw = summary.raw()?;
    let cells = summary.loads().filter_map(|(load, _)| summary.cell(raw, load));
    let factors = cells.filter_map(|cell| {
        let iops = || cell.samples.iter().map(|sample| sample.iops);
        let least = iops().reduce(f64::min).filter(|least| *least > 0.0)?;
        Some(iops().reduce(f64::max)? / least)
    });
    let greatest = factors.reduce(f64::max).filter(|factor| *factor >= UNSTEADY)?;
    Some(format!(
        "The machine was not quiet: from one round to another the raw backing itself did up to \
         {greatest:.1} times as many requests. Measure again while nothing else runs."
    ))
}

fn virtual_machine(machine: &Machine) -> Option<String> {
    let kind = machine.virtualization.as_ref()?;
    Some(format!(
        "It ran in a virtual machine ({kind}): only ratios mean something, and they too may differ \
         on real hardware, where drives, interrupts and processors cost other times."
    ))
}

fn few_rounds(summary: &Summary) -> Option<String> {
    let fewest = summary.fewest_samples();
    (1..6).contains(&fewest).then(|| {
        format!(
            "Some figures rest on few rounds (the fewest: {fewest}); less than six show no \
             difference with 95 % confidence."
        )
    })
}

fn short_samples(method: &Method) -> Option<String> {
    (method.sample_s < 10.0).then(|| {
        format!(
            "A sample lasts {} s: what a drive does after minutes of writing, when its caches are \
             full, does not show.",
            method.sample_s
        )
    })
}

fn of_backing(backing: &Backing) -> impl Iterator<Item = String> {
    let in_part = (backing.span_bytes < backing.size_bytes).then(|| {
        format!(
            "Only {} of {} were used: mapping tables and caches of a drive work better on a part \
             than on the whole.",
            bytes(backing.span_bytes),
            bytes(backing.size_bytes)
        )
    });
    let in_file = (backing.kind == "file").then(|| {
        "The backing is a file: every figure, also the raw one, includes its file system."
            .to_owned()
    });
    let scheduled = backing.scheduler.as_ref().filter(|name| *name != "none").map(|name| {
        format!("The backing had the scheduler `{name}`, which holds requests back and sorts them.")
    });
    in_part.into_iter().chain(in_file).chain(scheduled)
}

fn of_machine(machine: &Machine) -> impl Iterator<Item = String> {
    let crowded = (machine.cpus <= 4).then(|| {
        format!(
            "Load, server and kernel share {} processors, so a server's processor time costs \
             throughput that it might not cost elsewhere.",
            machine.cpus
        )
    });
    let governed = machine.governor.as_ref().filter(|name| *name != "performance").map(|name| {
        format!("The processors' frequency was governed by `{name}`, and may have changed.")
    });
    crowded.into_iter().chain(governed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample;

    #[test]
    fn a_busy_machine_is_noticed() {
        let mut results = sample::results(3, 9);
        let said = |results: &_| caveats(&Summary::of(results).unwrap()).swap_remove(0);
        assert!(said(&results).contains("virtual machine"), "{}", said(&results));
        let raw = results.samples.iter_mut().filter(|sample| sample.subject == "raw");
        raw.filter(|sample| sample.round == 4).for_each(|sample| sample.iops *= 0.5);
        let first = said(&results);
        assert!(
            first.starts_with("The machine was not quiet: ") && first.contains(" 2."),
            "{first}"
        );
        results.samples.iter_mut().for_each(|sample| sample.iops = 0.0);
        assert!(said(&results).contains("virtual machine"), "nothing is divided by 0");
    }

    #[test]
    fn caveats_follow_the_facts() {
        let mut results = sample::results(3, 9);
        let said = |results: &_| caveats(&Summary::of(results).unwrap()).join("\n");
        let text = said(&results);
        for expected in ["virtual machine (qemu)", "lasts 2 s", "1 GiB of 8 GiB", "share 2 proc"] {
            assert!(text.contains(expected), "{expected}: {text}");
        }
        assert!(!text.contains("incomplete") && !text.contains("few rounds"), "{text}");
        results.machine.virtualization = None;
        results.machine.cpus = 64;
        results.machine.governor = Some("powersave".into());
        results.method.sample_s = 60.0;
        results.backing.span_bytes = results.backing.size_bytes;
        results.backing.scheduler = Some("mq-deadline".into());
        results.incomplete = Some("interrupted".into());
        results.samples.retain(|sample| sample.round < 3);
        let text = said(&results);
        for expected in ["incomplete: interrupted", "the fewest: 3", "`powersave`", "`mq-deadline`"]
        {
            assert!(text.contains(expected), "{expected}: {text}");
        }
        for not in ["virtual", "lasts", "GiB of", "share"] {
            assert!(!text.contains(not), "{not}: {text}");
        }
    }
}

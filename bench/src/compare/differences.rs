//! Differences between two runs, apart from their results.

use super::{Change, Measure, Verdict};
use crate::results::{Family, Results};
use crate::summary::check::clean;
use crate::summary::figure::{bytes, ratio};

/// Facts that make a comparison doubtful, one sentence for each.
#[must_use]
pub fn warnings(before: &Results, after: &Results) -> Vec<String> {
    let mut said = Vec::new();
    for (name, results) in [("first", before), ("second", after)] {
        if let Some(why) = &results.incomplete {
            said.push(format!("the {name} run is incomplete: {}", clean(why)));
        }
    }
    let facts = facts(before).into_iter().zip(facts(after));
    said.extend(facts.filter(|((_, one), (_, other))| one != other).map(
        |((what, one), (_, other))| {
            format!("{what} differs: {} and {}", clean(&one), clean(&other))
        },
    ));
    said.extend(only(before, after, "first"));
    said.extend(only(after, before, "second"));
    said.extend(commands(before, after));
    said
}

/// Facts that should be the same, with their names.
fn facts(results: &Results) -> Vec<(&'static str, String)> {
    let (machine, backing, method) = (&results.machine, &results.backing, &results.method);
    let or_none = |text: &Option<String>| text.clone().unwrap_or_else(|| "none".to_owned());
    vec![
        ("the kernel", machine.kernel.clone()),
        ("the processor", machine.cpu.clone()),
        ("the number of processors", machine.cpus.to_string()),
        ("the memory", bytes(machine.memory_bytes)),
        ("the virtual machine", or_none(&machine.virtualization)),
        ("the frequency governor", or_none(&machine.governor)),
        ("the version of fio", machine.fio.clone()),
        ("the kind of the backing", backing.kind.clone()),
        ("the drive", or_none(&backing.model)),
        ("the size of the backing", bytes(backing.size_bytes)),
        ("its block size", bytes(backing.logical_block_bytes.into())),
        ("how much of it was used", bytes(backing.span_bytes)),
        ("its scheduler", or_none(&backing.scheduler)),
        ("its number of queues for polling", backing.poll_queues.to_string()),
        ("the profile", method.profile.clone()),
        ("the time of a sample", format!("{} s", method.sample_s)),
        ("the time of the warm-up", format!("{} s", method.warm_up_s)),
    ]
}

/// The names that only one of the runs has measured.
fn only(one: &Results, other: &Results, name: &str) -> Vec<String> {
    let measured = |results: &Results, subject: &str| {
        results.samples.iter().any(|sample| sample.subject == subject)
    };
    let subjects = one.subjects.iter().map(|subject| subject.name.as_str());
    let subjects = subjects.filter(|name| measured(one, name) && !measured(other, name));
    let loads = one.loads.iter().map(|load| load.name.as_str());
    let loads = loads.filter(|name| !other.loads.iter().any(|load| load.name == *name));
    let only: Vec<String> = subjects.chain(loads).map(clean).collect();
    if only.is_empty() {
        Vec::new()
    } else {
        vec![format!("only the {name} run has: {}", only.join(", "))]
    }
}

/// Subjects with the same name that were made by different commands.
fn commands(before: &Results, after: &Results) -> Vec<String> {
    let pairs = before.subjects.iter().filter_map(|one| {
        let other = after.subjects.iter().find(|other| other.name == one.name)?;
        (one.command != other.command).then_some((one, other))
    });
    let said = pairs.map(|(one, other)| {
        let [name, one, other] = [&one.name, &one.command, &other.command].map(|text| clean(text));
        format!("`{name}` was made by another command: `{one}` and `{other}`")
    });
    said.collect()
}

/// Whether the raw backing's figures have changed. Then figures that are compared absolutely may
/// have changed with them.
#[must_use]
pub fn moved_limit(before: &Results, changes: &[Change]) -> Option<String> {
    let raw = before.subjects.iter().find(|subject| subject.family == Family::Raw)?;
    let moved = |change: &&Change| {
        change.subject == raw.name
            && change.measure == Measure::Throughput
            && change.verdict != Verdict::Unclear
    };
    let moved: Vec<String> = changes
        .iter()
        .filter(moved)
        .map(|change| format!("{} times with {}", ratio(change.ratio), clean(&change.load)))
        .collect();
    if moved.is_empty() {
        return None;
    }
    Some(format!(
        "the raw backing's throughput itself has changed ({}): the machine or the drive is different",
        moved.join(", ")
    ))
}

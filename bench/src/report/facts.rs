//! Facts about the run: what was measured, on what, when and how.

use maud::{Markup, html};

use super::tables;
use crate::results::Results;
use crate::summary::Summary;
use crate::summary::caveats::is_written;
use crate::summary::figure::bytes;

const WORDS: [(&str, &str); 7] = [
    ("ours", "a device of ublk-target; behind the colon stands what it was added with"),
    ("fused", "zero copy: the driver lends each request's buffer when it delivers the request"),
    ("slot", "zero copy: the server has the buffer lent by a command of its own"),
    ("copy, user copy", "the driver, or the server, copies all data once"),
    ("QD", "queue depth: how many requests fio keeps in flight, QD32 is 32"),
    ("raw backing", "the drive or file that all devices stand on, without any of them"),
    ("rival", "what one would take otherwise: the kernel's loop driver, or rublk"),
];

/// The model of the drive, or the kind of the backing.
#[must_use]
pub fn drive(results: &Results) -> String {
    let backing = &results.backing;
    match &backing.model {
        Some(model) => model.clone(),
        None => format!("{} ({})", backing.path, backing.kind),
    }
}

/// When the run began, how long it took, and the program's version.
#[must_use]
pub fn when(results: &Results) -> String {
    let seconds = i64::try_from(results.began_s).ok();
    let began = seconds.and_then(|seconds| jiff::Timestamp::from_second(seconds).ok());
    let began = began.map_or_else(
        || "an unknown time".to_owned(),
        |began| began.strftime("%Y-%m-%d %H:%M UTC").to_string(),
    );
    format!("Measured by ublk-bench {} at {began}, in {}.", results.version, lasted(results.took_s))
}

/// `13 min`
fn lasted(seconds: f64) -> String {
    match seconds {
        seconds if seconds < 120.0 => format!("{seconds:.0} s"),
        seconds if seconds < 7200.0 => format!("{:.0} min", seconds / 60.0),
        seconds => format!("{:.1} h", seconds / 3600.0),
    }
}

/// The load generator and its version. Runs record the version with or without the name.
fn fio(results: &Results) -> String {
    let version = &results.machine.fio;
    format!("fio {}", version.strip_prefix("fio-").unwrap_or(version))
}

/// An explanation of the words in titles.
#[must_use]
pub fn words() -> Markup {
    html! {
        dl { @for (word, what) in WORDS { dt { (word) } dd { (what) } } }
    }
}

/// Machine, backing, method and devices.
#[must_use]
pub fn setting(summary: &Summary) -> Markup {
    let facts = facts(summary);
    html! {
        dl {
            @for (what, fact) in &facts { dt { (what) } dd { (fact) } }
        }
        (tables::subjects(summary))
    }
}

fn facts(summary: &Summary) -> Vec<(&'static str, String)> {
    let results = summary.results();
    let (machine, backing, method) = (&results.machine, &results.backing, &results.method);
    let mut facts = vec![
        ("Processor", format!("{} x {}", machine.cpus, machine.cpu)),
        ("Memory", bytes(machine.memory_bytes)),
        ("Kernel", format!("Linux {}", machine.kernel)),
    ];
    let mut optional = |what, text: &Option<String>| {
        facts.extend(text.iter().map(|text| (what, text.clone())));
    };
    optional("Virtual machine", &machine.virtualization);
    optional("Frequency governor", &machine.governor);
    optional("Drive", &backing.model);
    optional("Scheduler of the drive", &backing.scheduler);
    let used = [backing.size_bytes, backing.span_bytes].map(bytes);
    facts.extend([
        (
            "Backing",
            format!(
                "{} ({}), {}, of which {} were used",
                backing.path, backing.kind, used[0], used[1]
            ),
        ),
        ("Block size", bytes(backing.logical_block_bytes.into())),
        ("Queues for polling", backing.poll_queues.to_string()),
        ("Load generator", format!("{}: one job, io_uring, direct I/O", fio(results))),
        (
            "Method",
            format!(
                "profile {}: {} of {} rounds, in each of which every device is measured once with \
                 every load, for {} s after {} s of warm-up",
                method.profile,
                summary.rounds(),
                method.rounds,
                method.sample_s,
                method.warm_up_s
            ),
        ),
    ]);
    facts
}

/// The command, and its requirements.
#[must_use]
pub fn repeat(results: &Results) -> Markup {
    let words = std::iter::once("ublk-bench").chain(results.arguments.iter().map(String::as_str));
    let writes = results.loads.iter().any(is_written);
    let command = words.map(quoted).collect::<Vec<_>>().join(" ");
    html! {
        p { "As root, with this version of the program (" (results.version) ") and " (fio(results)) ":" }
        pre { code { (command) } }
        p {
            @if writes { "It overwrites the backing. " }
            code { "ublk-bench compare A.json B.json" }
            " shows what differs between two runs and whether it is more than noise; "
            code { "ublk-bench report RUN.json" } " makes this page of a run."
        }
    }
}

/// A word, quoted for a shell.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=,:+@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', "'\\''"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample;

    #[test]
    fn times_are_told() {
        let mut results = sample::results(1, 1);
        assert_eq!(
            when(&results),
            "Measured by ublk-bench 0.1.0 at 2026-11-21 18:00 UTC, in 14 min."
        );
        results.began_s = u64::MAX;
        assert!(when(&results).contains("an unknown time"));
        assert_eq!([5.0, 200.0, 9000.0].map(lasted), ["5 s", "3 min", "2.5 h"]);
    }

    #[test]
    fn words_are_quoted_for_a_shell() {
        let table =
            [("--backing", "--backing"), ("a b", "'a b'"), ("", "''"), ("it's", "'it'\\''s'")];
        for (word, expected) in table {
            assert_eq!(quoted(word), expected);
        }
    }
}

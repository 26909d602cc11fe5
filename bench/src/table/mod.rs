//! Results as text for a terminal.

pub mod cli;
pub mod columns;

use std::fmt::Write as _;

use crate::results::{Load, Results};
use crate::summary::caveats::caveats;
use crate::summary::check::{Invalid, clean};
use crate::summary::figure::{NONE, bandwidth, bytes, is_large, percent, rate, short, time};
use crate::summary::words::headline;
use crate::summary::{Cell, Summary};
use columns::{columns, wrapped};

/// The width if the output is no terminal.
pub const WIDTH: usize = 100;

/// The measure that a table shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Measure {
    Throughput,
    OfRaw,
    Tail,
    Cpu,
}

const MEASURES: [Measure; 4] = [Measure::Throughput, Measure::OfRaw, Measure::Tail, Measure::Cpu];

/// The results in tables of subjects by loads, no wider than `width`, and the main findings.
///
/// # Errors
/// The first invalid value in the results.
pub fn text(results: &Results, width: usize) -> Result<String, Invalid> {
    let summary = Summary::of(results)?;
    let mut text = String::new();
    if let Some(why) = &results.incomplete {
        text.push_str(&wrapped(&format!("INCOMPLETE: {}", clean(why)), width, ""));
    }
    text.push_str(&wrapped(&setting(&summary), width, ""));
    for measure in MEASURES {
        text.push('\n');
        text.push_str(&wrapped(title(measure), width, ""));
        text.push_str(&table(&summary, measure, width));
    }
    let skipped = skipped(results, width);
    if !skipped.is_empty() {
        text.push_str("\nnot measured:\n");
        text.push_str(&skipped);
    }
    text.push('\n');
    for said in headline(&summary) {
        text.push_str(&wrapped(&clean_long(&said), width, ""));
    }
    text.push_str("What limits this:\n");
    for caveat in caveats(&summary) {
        text.push_str(&wrapped(&format!("- {}", clean_long(&caveat)), width, "  "));
    }
    Ok(text)
}

/// A text without control characters, of any length.
fn clean_long(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// The machine, the backing and the method, in a line or two.
fn setting(summary: &Summary) -> String {
    let results = summary.results();
    let (backing, machine) = (&results.backing, &results.machine);
    let model = backing.model.as_deref().unwrap_or(&backing.kind);
    let virtualization = machine.virtualization.as_ref();
    let virtualization = virtualization.map(|kind| format!(", in a virtual machine ({kind})"));
    let line = format!(
        "{} ({model}, {} of {} used); {} x {}{}, Linux {}; profile {}, {} rounds of {} s a sample",
        backing.path,
        bytes(backing.span_bytes),
        bytes(backing.size_bytes),
        machine.cpus,
        machine.cpu,
        virtualization.unwrap_or_default(),
        machine.kernel,
        results.method.profile,
        summary.rounds(),
        results.method.sample_s,
    );
    clean_long(&line)
}

fn title(measure: Measure) -> &'static str {
    match measure {
        Measure::Throughput => "requests a second (bandwidth from 64 KiB on), median of the rounds",
        Measure::OfRaw => {
            "part of the raw backing's, median of ratios within rounds; ~: 95 % interval reaches 100 %"
        }
        Measure::Tail => "latency that 99.99 % of the requests do not exceed, median of the rounds",
        Measure::Cpu => {
            "processor time of the whole machine for each request, median of the rounds"
        }
    }
}

/// The tables of a measure, with as many loads side by side as fit.
fn table(summary: &Summary, measure: Measure, width: usize) -> String {
    let names: Vec<String> = summary.measured().map(|(_, subject)| clean(&subject.title)).collect();
    let heads: Vec<[String; 2]> =
        summary.loads().map(|(_, load)| short(load).map(|line| clean(&line))).collect();
    let rows: Vec<Vec<String>> = summary
        .measured()
        .map(|(subject, _)| {
            summary
                .loads()
                .map(move |(load, described)| cell(summary, measure, (subject, load), described))
        })
        .map(Iterator::collect)
        .collect();
    columns(&names, &heads, &rows, width)
}

fn cell(summary: &Summary, measure: Measure, at: (usize, usize), load: &Load) -> String {
    let found = summary.cell(at.0, at.1);
    let shown = match measure {
        Measure::Throughput => found.map(|cell| throughput(cell, load)),
        Measure::OfRaw => of_raw(summary, at),
        Measure::Tail => found.and_then(|cell| cell.percentile_ns(99.99)).map(time),
        Measure::Cpu => found.map(|cell| time(cell.cpu.machine_us * 1000.0)),
    };
    shown.unwrap_or_else(|| NONE.to_owned())
}

/// Requests or bytes a second, depending on the load.
#[must_use]
pub fn throughput(cell: &Cell, load: &Load) -> String {
    if is_large(load) { bandwidth(cell.bytes_per_s.median) } else { rate(cell.iops.median) }
}

fn of_raw(summary: &Summary, (subject, load): (usize, usize)) -> Option<String> {
    let ratio = summary.of_raw(subject, load)?;
    let unclear = summary.raw() != Some(subject) && !ratio.differs_from(1.0);
    Some(format!("{}{}", if unclear { "~" } else { "" }, percent(ratio.median)))
}

/// The subjects that were not measured, with the reasons.
fn skipped(results: &Results, width: usize) -> String {
    let mut lines = String::new();
    for subject in &results.subjects {
        if let Some(why) = &subject.skipped {
            let line = format!("- {}: {}", clean(&subject.title), clean(why));
            // Writing to a string cannot fail.
            let _ = write!(lines, "{}", wrapped(&line, width, "  "));
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample;

    fn no_wider(text: &str, width: usize) {
        for line in text.lines() {
            assert!(line.chars().count() <= width, "{line}\n{text}");
        }
    }

    #[test]
    fn all_measures_are_shown_within_the_width() {
        let results = sample::results(5, 7);
        for width in [60, 80, 100, 200] {
            let text = text(&results, width).unwrap();
            no_wider(&text, width);
            let rows = text.lines().filter(|line| line.starts_with("ours: lend fused ")).count();
            assert!(rows >= 2 * MEASURES.len() && rows % 2 == 0, "{width}: {text}");
        }
        let text = text(&results, 200).unwrap();
        assert!(text.starts_with("/dev/nvme1n1 (QEMU NVMe Ctrl, 1 GiB of 8 GiB used); 2 x QEMU"));
        let raw: Vec<&str> = text.lines().filter(|line| line.starts_with("raw ")).collect();
        assert!(raw[1].split_whitespace().skip(1).all(|word| word == "100.0" || word == "%"));
        assert!(text.contains("\nnot measured:\n- polled: the backing has no queues"), "{text}");
        assert!(text.contains("With zero copy ublk-target does so many"), "{text}");
        assert!(text.contains("GB/s") && text.contains(" ms") && text.contains("\nWhat limits"));
    }

    #[test]
    fn a_run_that_is_not_whole_says_so_first() {
        let mut results = sample::results(5, 2);
        results.incomplete = Some("interrupted\u{1b}[2J".into());
        results.samples.truncate(7);
        let text = text(&results, 80).unwrap();
        assert!(text.starts_with("INCOMPLETE: interrupted [2J\n"), "{text}");
        assert!(!text.contains('\u{1b}') && text.contains(" -"), "{text}");
    }

    #[test]
    fn nothing_and_nonsense_are_no_panic() {
        let mut results = sample::results(5, 0);
        assert!(text(&results, 80).unwrap().contains("Too little was measured"));
        results.subjects.clear();
        results.loads.clear();
        assert!(text(&results, 1).is_ok());
        results.took_s = -1.0;
        assert!(text(&results, 80).is_err());
        let mut results = sample::results(5, 2);
        results.subjects[1].title = "長".repeat(200);
        results.loads[0].rw = "w".repeat(5000);
        results.loads[1].block_bytes = u64::MAX;
        for sample in &mut results.samples {
            (sample.iops, sample.latency.percentiles) = (0.0, Vec::new());
        }
        assert!(text(&results, 80).is_ok());
    }
}

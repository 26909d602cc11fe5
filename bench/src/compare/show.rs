//! A comparison as text.

use super::{Change, Comparison, LEVEL, MEASURES, Measure, Verdict};
use crate::results::Results;
use crate::summary::check::clean;
use crate::summary::figure::{NONE, ratio, short};
use crate::table::columns::{columns, wrapped};

/// The changes, in tables no wider than `width`. Titles and order are those of the first run.
#[must_use]
pub fn text(comparison: &Comparison, before: &Results, width: usize) -> String {
    let mut text = String::new();
    for warning in &comparison.warnings {
        text.push_str(&wrapped(&format!("note: {warning}"), width, "  "));
    }
    for measure in MEASURES {
        text.push('\n');
        text.push_str(&wrapped(&format!("{}: second run / first run", measure.title()), width, ""));
        text.push_str(&table(comparison, measure, before, width));
    }
    text.push('\n');
    text.push_str(&wrapped(&verdict(comparison), width, ""));
    text
}

fn table(comparison: &Comparison, measure: Measure, before: &Results, width: usize) -> String {
    let of_measure: Vec<&Change> =
        comparison.changes.iter().filter(|change| change.measure == measure).collect();
    let find = |subject: &str, load: &str| {
        of_measure.iter().find(|change| change.subject == subject && change.load == load)
    };
    let subjects = before
        .subjects
        .iter()
        .filter(|subject| of_measure.iter().any(|change| change.subject == subject.name));
    let (names, rows): (Vec<String>, Vec<Vec<String>>) = subjects
        .map(|subject| {
            let cells = before.loads.iter().map(|load| find(&subject.name, &load.name));
            let cells = cells.map(|change| change.map_or_else(|| NONE.to_owned(), |c| cell(c)));
            (clean(&subject.title), cells.collect())
        })
        .unzip();
    let heads: Vec<[String; 2]> =
        before.loads.iter().map(|load| short(load).map(|line| clean(&line))).collect();
    columns(&names, &heads, &rows, width)
}

fn cell(change: &Change) -> String {
    let mark = match change.verdict {
        Verdict::Better => "better",
        Verdict::Worse => "WORSE",
        Verdict::Unclear => "~",
    };
    format!("{mark} {}", ratio(change.ratio))
}

fn verdict(comparison: &Comparison) -> String {
    let [better, worse, unclear] =
        [Verdict::Better, Verdict::Worse, Verdict::Unclear].map(|each| comparison.count(each));
    let all_of_raw = comparison.changes.iter().any(|change| change.of_raw);
    let basis = if all_of_raw {
        "Figures are compared as parts of the raw backing's in the same round, those of the raw \
         backing as they are."
    } else {
        "Figures are compared absolutely."
    };
    format!(
        "{better} better, {worse} worse, {unclear} without a clear change (~). {basis} A change is \
         clear where noise alone makes at least such a one with a probability of at most {LEVEL} \
         (Mann–Whitney's test over the rounds, corrected for the number of cells by Benjamini and \
         Hochberg)."
    )
}

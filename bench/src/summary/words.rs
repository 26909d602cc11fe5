//! The main findings as sentences.

use super::estimate::Estimate;
use super::figure::{is_large, percent, with_interval};
use super::{DEEP, LARGE, Summary};

/// The main findings, one sentence for each. Findings without figures are left out.
#[must_use]
pub fn headline(summary: &Summary) -> Vec<String> {
    let found = [against_raw(summary), against_rivals(summary), zero_copy(summary)];
    let mut said: Vec<String> = found.into_iter().flatten().collect();
    if said.is_empty() {
        said.push("Too little was measured to compare anything.".to_owned());
    }
    said
}

fn title(summary: &Summary, subject: usize) -> String {
    summary.results().subjects[subject].title.clone()
}

fn lead(summary: &Summary) -> Option<(usize, String)> {
    let ours = summary.ours()?;
    Some((ours, format!("ublk-target ({})", title(summary, ours))))
}

/// Ours as a ratio to the limit, at a large queue depth.
fn against_raw(summary: &Summary) -> Option<String> {
    let (ours, name) = lead(summary)?;
    let deep = summary.loads().filter(|(_, load)| load.depth == DEEP && !is_large(load));
    let parts: Vec<String> = deep
        .filter_map(|(load, described)| {
            let ratio = summary.of_raw(ours, load)?;
            let Estimate { median, low, high, .. } = ratio;
            let interval = format!("[{:.1}–{:.1}]", low * 100.0, high * 100.0);
            Some(format!("{} {interval} with {}", percent(median), described.title))
        })
        .collect();
    if parts.is_empty() {
        return None;
    }
    Some(format!(
        "Of the requests that the raw backing does in a second, {name} does {}.",
        parts.join("; ")
    ))
}

fn against_rivals(summary: &Summary) -> Option<String> {
    let (_, name) = lead(summary)?;
    let against = summary.against_rivals()?;
    let over = match against.loads {
        1 => "in one load".to_owned(),
        loads => format!("as the geometric mean over {loads} loads"),
    };
    Some(format!(
        "Against the best rival of each load (the kernel's loop driver or rublk), {name} does {} times \
         the requests {over}: {}.",
        with_interval(&against.mean),
        verdict(&against.mean, "it is faster", "it is slower")
    ))
}

/// The conclusion from the interval of a ratio.
fn verdict(estimate: &Estimate, more: &str, less: &str) -> String {
    if !estimate.differs_from(1.0) {
        return "no clear difference".to_owned();
    }
    if estimate.median > 1.0 { more.to_owned() } else { less.to_owned() }
}

fn zero_copy(summary: &Summary) -> Option<String> {
    let factors: Vec<String> = zero_copy_factors(summary)
        .into_iter()
        .map(|(load, factor)| {
            format!("{} with {}", with_interval(&factor), summary.results().loads[load].title)
        })
        .collect();
    if factors.is_empty() {
        return None;
    }
    Some(format!(
        "With zero copy ublk-target does so many times the requests that it does with a copy: {}.",
        factors.join(", ")
    ))
}

/// Zero copy divided by copying in the loads of large blocks.
#[must_use]
pub fn zero_copy_factors(summary: &Summary) -> Vec<(usize, Estimate)> {
    let large = summary.loads().filter(|(_, load)| LARGE.contains(&load.block_bytes));
    large.filter_map(|(load, _)| Some((load, summary.zero_copy_factor(load)?))).collect()
}

/// An explanation of the figures for readers.
pub const STATISTICS: &str = "Each figure is a median over the rounds. A ratio is formed within \
    each round, where both devices were measured one soon after the other, and the median is taken \
    of the ratios. In brackets stands an interval for the true median that needs no assumption \
    about the noise (order statistics, by the sign test): the narrowest with at least 95 % \
    confidence, or the whole range where fewer than six rounds allow none.";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample;

    #[test]
    fn the_main_findings_are_sentences() {
        let results = sample::results(3, 9);
        let said = headline(&Summary::of(&results).unwrap());
        assert_eq!(said.len(), 3, "{said:?}");
        assert!(said[0].contains("in a second, ublk-target (ours: lend fused) does 5"), "{said:?}");
        assert_eq!(said[0].matches("QD32").count(), 3);
        assert!(said[1].contains("geometric mean over 6 loads: it is faster."), "{said:?}");
        assert!(said[2].contains("] with 128 KiB read, QD8, 1."), "{said:?}");
    }

    #[test]
    fn nothing_is_said_about_what_was_not_measured() {
        let mut results = sample::results(3, 1);
        let said = headline(&Summary::of(&results).unwrap());
        assert!(said[1].ends_with("no clear difference."), "one round shows nothing: {said:?}");
        results.samples.retain(|sample| sample.subject == "raw");
        let said = headline(&Summary::of(&results).unwrap());
        assert_eq!(said, ["Too little was measured to compare anything."]);
    }
}

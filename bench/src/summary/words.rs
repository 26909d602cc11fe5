//! What results say, in sentences.

use super::estimate::Estimate;
use super::figure::{is_large, percent, with_interval};
use super::{DEEP, LARGE, Summary};

/// The main findings, a sentence each; those that the run has no figures for are left out.
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

/// Ours as a part of the limit where requests are deep in flight.
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

/// What an interval says about a ratio.
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

/// How the figures are formed, for whoever reads them.
pub const STATISTICS: &str = "Each figure is a median over the rounds. A ratio is formed within \
    each round, where both devices were measured one soon after the other, and the median is taken \
    of the ratios. In brackets stands an interval for the true median that needs no assumption \
    about the noise (order statistics, by the sign test): the narrowest with at least 95 % \
    confidence, or the whole range where fewer than six rounds allow none.";

/// What limits the conclusions, chosen by the facts of the run; the gravest first.
#[must_use]
pub fn caveats(summary: &Summary) -> Vec<String> {
    let results = summary.results();
    let (machine, backing, method) = (&results.machine, &results.backing, &results.method);
    let mut said = Vec::new();
    let mut say = |applies: bool, text: String| said.extend(applies.then_some(text));
    if let Some(why) = &results.incomplete {
        say(true, format!("The run is not whole: {why}. Later rounds are missing."));
    }
    if let Some(kind) = &machine.virtualization {
        say(
            true,
            format!(
                "It ran in a virtual machine ({kind}): only ratios mean something, and they too may \
                 differ on real hardware, where drives, interrupts and processors cost other times."
            ),
        );
    }
    let fewest = summary.fewest_samples();
    say(
        (1..6).contains(&fewest),
        format!(
            "Some figures rest on {fewest} rounds only: fewer than six show no difference with 95 % confidence."
        ),
    );
    say(
        method.sample_s < 10.0,
        format!(
            "A sample lasts {} s: what a drive does after minutes of writing, when its caches are \
             full, does not show.",
            method.sample_s
        ),
    );
    say(
        backing.span_bytes < backing.size_bytes,
        format!(
            "Only {} of {} were used: mapping tables and caches of a drive work better on a part \
             than on the whole.",
            super::figure::bytes(backing.span_bytes),
            super::figure::bytes(backing.size_bytes)
        ),
    );
    say(
        backing.kind == "file",
        "The backing is a file: its file system is part of every figure, the raw one's too.".into(),
    );
    say(
        machine.cpus <= 4,
        format!(
            "Load, server and kernel share {} processors, so a server's processor time costs \
             throughput that it might not cost elsewhere.",
            machine.cpus
        ),
    );
    if let Some(governor) = machine.governor.as_ref().filter(|name| *name != "performance") {
        say(
            true,
            format!(
                "The processors' frequency was governed by `{governor}`, and may have changed."
            ),
        );
    }
    if let Some(scheduler) = backing.scheduler.as_ref().filter(|name| *name != "none") {
        say(
            true,
            format!(
                "The backing had the scheduler `{scheduler}`, which holds requests back and sorts them."
            ),
        );
    }
    let writes = |rw: &str| rw.contains("write") || rw.contains("rw");
    say(
        !results.loads.iter().any(|load| writes(&load.rw)),
        "Nothing was written: it says nothing about writes.".into(),
    );
    say(
        true,
        "One job made all the load: several jobs, or several queues, were not measured.".into(),
    );
    say(
        true,
        "Neither flushes nor file systems were measured, and no mix of requests but those listed."
            .into(),
    );
    said
}

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

    #[test]
    fn caveats_follow_the_facts() {
        let mut results = sample::results(3, 9);
        let said = |results: &_| caveats(&Summary::of(results).unwrap()).join("\n");
        let text = said(&results);
        for expected in ["virtual machine (qemu)", "lasts 2 s", "1 GiB of 8 GiB", "share 2 proc"] {
            assert!(text.contains(expected), "{expected}: {text}");
        }
        assert!(!text.contains("not whole") && !text.contains("rest on"), "{text}");
        results.machine.virtualization = None;
        results.machine.cpus = 64;
        results.machine.governor = Some("powersave".into());
        results.method.sample_s = 60.0;
        results.backing.span_bytes = results.backing.size_bytes;
        results.backing.scheduler = Some("mq-deadline".into());
        results.incomplete = Some("interrupted".into());
        results.samples.retain(|sample| sample.round < 3);
        let text = said(&results);
        for expected in ["not whole: interrupted", "on 3 rounds", "`powersave`", "`mq-deadline`"] {
            assert!(text.contains(expected), "{expected}: {text}");
        }
        for not in ["virtual", "lasts", "GiB of", "share"] {
            assert!(!text.contains(not), "{not}: {text}");
        }
    }
}

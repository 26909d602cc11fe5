//! An explanation as text.

use std::fmt::Write as _;

use super::explanation::{Explanation, Times};
use super::stages::{Cause, WITH_DRIVE};
use crate::summary::figure::{bytes, percent, time};
use crate::table::WIDTH;
use crate::table::columns::wrapped;

/// The length of the longest bar, in characters.
const BAR: f64 = 24.0;

/// A table of the stages with a bar for each, and sentences about what dominates.
#[must_use]
pub fn text(explained: &Explanation) -> String {
    let mut text = format!(
        "{} ({}): {} reads of {}, one at a time\n\n",
        explained.device.display(),
        explained.lend,
        explained.reads,
        bytes(explained.block_bytes)
    );
    let greatest = explained.stages.iter().map(|stage| stage.share).fold(0.0, f64::max);
    line(&mut text, "STAGE", ["MEDIAN", "P99", "TYPICAL", "SHARE"].map(str::to_owned), "");
    for stage in &explained.stages {
        let bar = bar(stage.share, greatest);
        line(&mut text, stage.title, cells(&stage.times, stage.share), &bar);
    }
    line(&mut text, "the whole, as the client sees it", cells(&explained.whole, 1.0), "");
    text.push('\n');
    for sentence in words(explained).lines() {
        text.push_str(&wrapped(sentence, WIDTH, "  "));
    }
    text
}

fn line(text: &mut String, title: &str, cells: [String; 4], bar: &str) {
    let [median, p99, typical, share] = cells;
    let line = format!("{title:<40}{median:>9}{p99:>9}{typical:>9}{share:>8}  {bar}");
    text.push_str(line.trim_end());
    text.push('\n');
}

fn cells(times: &Times, share: f64) -> [String; 4] {
    let Times { median_ns, p99_ns, typical_ns } = *times;
    [time(median_ns as f64), time(p99_ns as f64), time(typical_ns), percent(share)]
}

fn bar(share: f64, greatest: f64) -> String {
    let steps = (1..=24_u32)
        .filter(|step| share > 0.0 && share * BAR >= greatest * (f64::from(*step) - 0.5));
    steps.map(|_| '█').collect()
}

/// What dominates, the server's measurement, and notes about the figures.
fn words(explained: &Explanation) -> String {
    let causes = explained.causes();
    let parts =
        causes.iter().map(|(cause, share)| format!("{} ({})", cause.words(), percent(*share)));
    let mut said =
        format!("Most of the time typically goes to {}.\n", list(&parts.collect::<Vec<_>>()));
    let slowest = &explained.slowest;
    // Writing to a string cannot fail.
    let _ = writeln!(
        said,
        "The slowest of each hundred take {}, {} of it in the stage \"{}\".",
        time(slowest.mean_ns),
        percent(slowest.share),
        slowest.title
    );
    if explained.stages.iter().any(|stage| is_wake(stage.stage) && stage.times.median_ns == 0) {
        said.push_str("If waking takes no time, the thread was not asleep.\n");
    }
    if !explained.server.is_empty() {
        let stages = explained.server.iter();
        let stages =
            stages.map(|stage| format!("{} {}", stage.stage, time(stage.median_ns as f64)));
        let stages: Vec<String> = stages.collect();
        let _ = writeln!(said, "Medians by the server's own clock: {}.", stages.join(", "));
    }
    if !explained.stages.iter().any(|stage| stage.stage == "drive") {
        said.push_str("No requests to drives are visible below this device.\n");
    }
    if explained.left_out > 0 {
        let all = explained.reads + explained.left_out;
        let left_out = explained.left_out;
        let _ = writeln!(
            said,
            "Left out because their events are inconsistent: {left_out} of {all} reads."
        );
    }
    said.push_str(
        "TYPICAL is the mean of the middle half of the reads, and adds up; SHARE is of it. Times \
         are exact to 1 µs, and tracing makes all of it somewhat slower.\n",
    );
    said
}

fn is_wake(stage: &str) -> bool {
    let waking = WITH_DRIVE.iter().filter(|stage| stage.cause() == Cause::Scheduler);
    waking.into_iter().any(|each| each.name() == stage)
}

/// `a, then to b, c and d`
fn list(parts: &[String]) -> String {
    match parts {
        [] => String::new(),
        [only] => only.clone(),
        [first, second] => format!("{first}, then to {second}"),
        [first, middle @ .., last] => format!("{first}, then to {} and {last}", middle.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::explain::explanation::tests::explained;

    #[test]
    fn stages_are_lines_with_bars_and_words() {
        let text = text(&explained());
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], "/dev/ublkb0 (fused): 4 reads of 4 KiB, one at a time");
        assert!(lines[2].starts_with("STAGE  ") && lines[2].ends_with("SHARE"), "{text}");
        let drive = lines.iter().find(|line| line.starts_with("drive")).unwrap();
        assert!(drive.contains("50.0 µs") && drive.ends_with(&"█".repeat(24)), "{text}");
        assert_eq!(drive.matches('█').count(), 24);
        assert!(
            text.contains(
                "\nMost of the time typically goes to waking threads (33.3 %), then to the"
            ),
            "{text}"
        );
        assert!(
            text.contains("hundred take 9.16 ms, 98.6 % of it in the stage \"client returns"),
            "{text}"
        );
        assert!(text.contains("own clock: plan 2.10 µs, total 99.0 µs.\n"), "{text}");
        assert!(!text.contains("was not asleep"), "{text}");
        assert!(
            text.contains("\nLeft out because their events are inconsistent: 1 of 5 reads."),
            "{text}"
        );
        let columns: Vec<_> =
            lines[2..12].iter().map(|line| line.chars().take(75).count()).collect();
        assert!(columns.iter().all(|width| *width == 75), "{columns:?} {text}");
    }

    #[test]
    fn bars_follow_shares() {
        assert_eq!(bar(0.5, 0.5).chars().count(), 24);
        assert_eq!(bar(0.25, 0.5).chars().count(), 12);
        assert_eq!(bar(0.0, 0.5), "");
        assert_eq!(bar(0.0, 0.0).chars().count(), 0, "of nothing");
    }
}

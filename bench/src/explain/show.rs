//! An explanation as text.

use std::fmt::Write as _;

use super::{Explanation, Times};
use crate::summary::figure::{bytes, percent, time};

/// Length of the longest bar.
const BAR: f64 = 24.0;

/// A table of the stages with a bar for each, and in words what dominates.
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
    line(&mut text, "STAGE", ["MEDIAN", "P99", "MEAN", "SHARE"].map(str::to_owned), "");
    for stage in &explained.stages {
        let bar = bar(stage.share, greatest);
        line(&mut text, stage.title, cells(&stage.times, stage.share), &bar);
    }
    line(&mut text, "the whole, as the client sees it", cells(&explained.whole, 1.0), "");
    text.push('\n');
    text.push_str(&words(explained));
    text
}

fn line(text: &mut String, title: &str, cells: [String; 4], bar: &str) {
    let [median, p99, mean, share] = cells;
    let line = format!("{title:<40}{median:>9}{p99:>9}{mean:>9}{share:>8}  {bar}");
    text.push_str(line.trim_end());
    text.push('\n');
}

fn cells(times: &Times, share: f64) -> [String; 4] {
    let Times { median_ns, p99_ns, mean_ns } = *times;
    [time(median_ns as f64), time(p99_ns as f64), time(mean_ns), percent(share)]
}

fn bar(share: f64, greatest: f64) -> String {
    let steps = (1..=24_u32)
        .filter(|step| share > 0.0 && share * BAR >= greatest * (f64::from(*step) - 0.5));
    steps.map(|_| '█').collect()
}

/// What dominates, what the server says, and what to know about the figures.
fn words(explained: &Explanation) -> String {
    let causes = explained.causes();
    let parts =
        causes.iter().map(|(cause, share)| format!("{} ({})", cause.words(), percent(*share)));
    let mut said = format!("Most of the time goes to {}.\n", list(&parts.collect::<Vec<_>>()));
    if !explained.server.is_empty() {
        let stages = explained.server.iter();
        let stages = stages.map(|stage| format!("{} {}", stage.stage, time(stage.mean_ns as f64)));
        let stages: Vec<String> = stages.collect();
        let _ =
            writeln!(said, "The server's own clock, means of all reads: {}.", stages.join(", "));
    }
    if !explained.stages.iter().any(|stage| stage.stage == "drive") {
        said.push_str("No drive's requests are to be seen below this device.\n");
    }
    if explained.left_out > 0 {
        let all = explained.reads + explained.left_out;
        let left_out = explained.left_out;
        let _ =
            writeln!(said, "Left out, since their events do not fit: {left_out} of {all} reads.");
    }
    said.push_str(
        "Times are exact to 1 µs, and tracing makes all of it somewhat slower. Medians and p99 do \
         not add up;\nmeans and shares do.\n",
    );
    said
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
    use crate::explain::tests::explained;

    #[test]
    fn stages_are_lines_with_bars_and_words() {
        let text = text(&explained());
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], "/dev/ublkb0 (fused): 3 reads of 4 KiB, one at a time");
        assert!(lines[2].starts_with("STAGE  ") && lines[2].ends_with("SHARE"), "{text}");
        let drive = lines.iter().find(|line| line.starts_with("drive")).unwrap();
        assert!(drive.contains("60.0 µs") && drive.ends_with(&"█".repeat(24)), "{text}");
        assert_eq!(drive.matches('█').count(), 24);
        assert!(
            text.contains(
                "\nMost of the time goes to the drive (69.8 %), then to waking threads (14.5 %), "
            ),
            "{text}"
        );
        assert!(text.contains("means of all reads: plan 2.30 µs, total 120 µs.\n"), "{text}");
        assert!(
            text.contains("\nLeft out, since their events do not fit: 1 of 4 reads."),
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

//! Figures as a reader wants them.

use crate::numbers::{decimal, group, percent};

/// IOPS of a drive in the rounds of one workload.
#[derive(Debug, Clone, PartialEq)]
pub struct Series {
    /// What was measured.
    pub name: String,
    /// Requests a second, of each round.
    pub iops: Vec<f64>,
}

/// A line of the table for each series, by its best round: what else the machine does only ever
/// slows a round down. The first series is what the others are compared with.
pub fn rows(workload: &str, block_bytes: f64, series: &[Series]) -> Vec<String> {
    let Some(raw) = series.first() else { return Vec::new() };
    let mut lines = Vec::new();
    for (n, one) in series.iter().enumerate() {
        let iops = best(&one.iops);
        let bandwidth = iops * block_bytes / f64::from(1 << 20);
        let label = if n == 0 { workload } else { "" };
        let ratio = ratio(&one.iops, &raw.iops).map_or_else(|| "-".to_owned(), percent);
        lines.push(row(label, &one.name, &group(iops), &decimal(bandwidth), &ratio));
    }
    lines
}

/// The table's heading.
pub fn heading() -> String {
    row("", "", "IOPS", "MiB/s", "of raw")
}

fn row(workload: &str, name: &str, iops: &str, bandwidth: &str, ratio: &str) -> String {
    format!("{workload:<30}{name:<12}{iops:>10}{bandwidth:>10}{ratio:>9}")
}

/// One drive's best round as a part of another's.
pub fn ratio(one: &[f64], raw: &[f64]) -> Option<f64> {
    let raw = best(raw);
    (raw > 0.0).then(|| best(one) / raw)
}

fn best(rounds: &[f64]) -> f64 {
    rounds.iter().copied().fold(0.0, f64::max)
}

/// The lowest and the highest, as `60-90%`.
pub fn range(parts: &[f64]) -> String {
    let low = parts.iter().copied().fold(f64::INFINITY, f64::min);
    let high = parts.iter().copied().fold(0.0, f64::max);
    let (low, high) = (format!("{:.0}", low * 100.0), format!("{:.0}", high * 100.0));
    if low == high { format!("{low}%") } else { format!("{low} to {high}%") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn series(name: &str, iops: &[f64]) -> Series {
        Series { name: name.into(), iops: iops.to_vec() }
    }

    #[test]
    fn columns_are_aligned_and_figures_the_best() {
        let all = [
            series("raw drive", &[20_000.0, 22_016.0, 21_000.0]),
            series("ublk fused", &[16_512.0, 15_000.0]),
        ];
        let lines = rows("4 KiB random read, QD32", 4096.0, &all);
        assert_eq!(
            [heading(), lines[0].clone(), lines[1].clone()],
            [
                "                                                IOPS     MiB/s   of raw",
                "4 KiB random read, QD32       raw drive       22,016      86.0     100%",
                "                              ublk fused      16,512      64.5      75%",
            ]
        );
        assert!(rows("x", 1.0, &[]).is_empty());
    }

    #[test]
    fn the_longest_names_fit() {
        let width = heading().len();
        let all = [series("ublk, fused", &[999_999.0])];
        assert_eq!(rows("128 KiB sequential read, QD8", 131_072.0, &all)[0].len(), width);
    }

    #[test]
    fn ratios_are_those_of_the_figures_shown() {
        assert_eq!(ratio(&[1.0, 9.0, 5.0], &[2.0, 10.0, 5.0]), Some(0.9));
        assert_eq!(ratio(&[1.0], &[0.0]), None);
        assert_eq!(ratio(&[], &[]), None);
        assert_eq!(range(&[0.604, 0.9]), "60 to 90%");
        assert_eq!(range(&[0.601, 0.602]), "60%");
    }
}

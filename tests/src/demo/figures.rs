//! What the rounds of a measurement say, and what they do not: medians, between what the rounds lie,
//! and what can be concluded.
//!
//! Rates are compared within a round only, where the drives were measured one soon after the other:
//! what else the machine does changes from round to round.

use crate::numbers::{decimal, group, percent};

/// Two rates are alike if no round has them further apart.
const ALIKE: f64 = 1.05;
/// A share is firm if no round has more than this times that of another.
const FIRM: f64 = 2.0;
/// The raw drive is steady if no round has more than this times the rate of another.
const STEADY: f64 = 1.5;

/// The median of some figures, the lowest and the highest.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Spread {
    /// The median.
    pub median: f64,
    /// The lowest.
    pub low: f64,
    /// The highest.
    pub high: f64,
}

impl Spread {
    /// Of figures in any order; `None` if there is none, or one is not a number.
    pub fn of(figures: &[f64]) -> Option<Self> {
        let mut sorted = figures.to_vec();
        sorted.sort_by(f64::total_cmp);
        let last = sorted.len().checked_sub(1)?;
        if sorted.iter().any(|figure| !figure.is_finite()) {
            return None;
        }
        let median = f64::midpoint(sorted[last / 2], sorted[last.div_ceil(2)]);
        Some(Self { median, low: sorted[0], high: sorted[last] })
    }

    /// Of one rate as a part of another, round by round.
    fn of_ratios(one: &[f64], other: &[f64]) -> Option<Self> {
        let ratios: Vec<f64> = one.iter().zip(other).map(|(one, other)| one / other).collect();
        Self::of(&ratios)
    }

    /// How far the figures are apart.
    fn width(self) -> f64 {
        self.high / self.low
    }

    /// As a share, the median says something.
    pub fn is_firm(self) -> bool {
        self.width() <= FIRM
    }
}

/// What is to be said of two rates.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The first is higher, in every round.
    Faster,
    /// The second is higher, in every round.
    Slower,
    /// They are about the same, in every round.
    Alike,
    /// Rounds contradict each other.
    Unclear,
}

impl Verdict {
    /// On one rate as a part of the other.
    fn of(ratios: Spread) -> Self {
        match ratios {
            Spread { low, high, .. } if low >= ALIKE.recip() && high <= ALIKE => Self::Alike,
            Spread { low, .. } if low > 1.0 => Self::Faster,
            Spread { high, .. } if high < 1.0 => Self::Slower,
            Spread { .. } => Self::Unclear,
        }
    }
}

/// Requests a second of the raw drive and of the device in both modes, of each round.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Rates {
    /// Without a device.
    pub raw: Vec<f64>,
    /// Without a copy.
    pub fused: Vec<f64>,
    /// With one.
    pub copy: Vec<f64>,
}

/// What was found with one workload.
#[derive(Debug, Clone, PartialEq)]
pub struct Finding {
    /// The workload.
    pub workload: &'static str,
    /// Requests a second: raw, fused, copy.
    rates: [Spread; 3],
    /// Bytes of a request.
    block_bytes: f64,
    /// Fused mode as a part of the raw drive's rate.
    pub fused: Spread,
    /// Copy mode as a part of it.
    pub copy: Spread,
    /// Fused mode as a multiple of copy mode.
    ratio: Spread,
    /// Of fused and copy mode.
    pub verdict: Verdict,
}

impl Finding {
    /// Looks at the rounds of a workload. `None` if there are none, or a rate is nothing.
    pub fn of(workload: &'static str, block_bytes: f64, rates: &Rates) -> Option<Self> {
        let Rates { raw, fused, copy } = rates;
        let ratio = Spread::of_ratios(fused, copy)?;
        Some(Self {
            workload,
            rates: [Spread::of(raw)?, Spread::of(fused)?, Spread::of(copy)?],
            block_bytes,
            fused: Spread::of_ratios(fused, raw)?,
            copy: Spread::of_ratios(copy, raw)?,
            ratio,
            verdict: Verdict::of(ratio),
        })
    }

    /// The raw drive's own rate changed so much that something else was at work.
    pub fn was_disturbed(&self) -> bool {
        self.rates[0].width() > STEADY
    }

    /// The workload's part of the table.
    pub fn rows(&self) -> Vec<String> {
        let shares = [None, Some(self.fused), Some(self.copy)];
        let mut lines = vec![self.workload.to_owned()];
        for ((name, rate), share) in RIVALS.iter().zip(self.rates).zip(shares) {
            let bandwidth = rate.median * self.block_bytes / f64::from(1 << 20);
            let (part, rounds) = share.map_or_else(Default::default, |share| {
                (percent(share.median), range(share.low, share.high))
            });
            lines.push(row(name, &group(rate.median), &decimal(bandwidth), &part, &rounds));
        }
        lines.extend(self.words().iter().map(|line| format!("  {line}")));
        lines
    }

    /// What is to be said of fused and copy mode.
    fn words(&self) -> Vec<String> {
        let Spread { median, low, high } = self.ratio;
        let spread = format!("{low:.2} to {high:.2}");
        match self.verdict {
            Verdict::Faster => {
                vec![format!("fused is faster than copy: {median:.2} times ({spread})")]
            }
            Verdict::Slower => {
                vec![format!("copy is faster than fused: {median:.2} times ({spread})")]
            }
            Verdict::Alike => {
                vec![format!("fused and copy are alike: {median:.2} times ({spread})")]
            }
            Verdict::Unclear => {
                let why = if self.was_disturbed() { DISTURBED } else { DIFFERENT };
                vec![
                    format!("fused is {spread} times as fast as copy:"),
                    format!("too wide to say which is faster: {why}"),
                ]
            }
        }
    }
}

/// Why rounds contradict each other where the raw drive was unsteady, too.
pub const DISTURBED: &str = "another load is on this machine";
/// Why they do where it was not.
pub const DIFFERENT: &str = "the rounds differ too much";

/// What is measured side by side.
pub const RIVALS: [&str; 3] = ["raw drive", "ublk, fused", "ublk, copy"];

/// The table's heading.
pub fn heading() -> String {
    row("", "IOPS", "MiB/s", "of raw", "in the rounds")
}

fn row(name: &str, iops: &str, bandwidth: &str, part: &str, rounds: &str) -> String {
    let line = format!("  {name:<14}{iops:>10}{bandwidth:>10}{part:>9}   {rounds}");
    line.trim_end().to_owned()
}

/// Two shares, as `60 to 90%`.
pub fn range(low: f64, high: f64) -> String {
    let (low, high) = (percent(low), percent(high));
    if low == high { low } else { format!("{} to {high}", low.trim_end_matches('%')) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spread(median: f64, low: f64, high: f64) -> Spread {
        Spread { median, low, high }
    }

    fn finding(raw: &[f64], fused: &[f64], copy: &[f64]) -> Finding {
        let rates = Rates { raw: raw.to_vec(), fused: fused.to_vec(), copy: copy.to_vec() };
        Finding::of("4 KiB random read, QD32", 4096.0, &rates).unwrap()
    }

    #[test]
    fn medians_are_those_of_known_figures() {
        for (figures, expected) in [
            (&[3.0][..], Some(spread(3.0, 3.0, 3.0))),
            (&[5.0, 1.0], Some(spread(3.0, 1.0, 5.0))),
            (&[9.0, 1.0, 2.0], Some(spread(2.0, 1.0, 9.0))),
            (&[10.0, 2.0, 4.0, 100.0], Some(spread(7.0, 2.0, 100.0))),
            (&[6.0, 5.0, 4.0, 3.0, 2.0, 1.0], Some(spread(3.5, 1.0, 6.0))),
            (&[], None),
            (&[1.0, f64::NAN], None),
            (&[f64::INFINITY, 1.0], None),
        ] {
            assert_eq!(Spread::of(figures), expected, "{figures:?}");
        }
    }

    #[test]
    fn ratios_are_formed_within_rounds() {
        // The machine is half as fast in the second round: the ratios do not change.
        let ratios = Spread::of_ratios(&[80.0, 40.0, 84.0], &[100.0, 50.0, 100.0]);
        assert_eq!(ratios, Some(spread(0.8, 0.8, 0.84)));
        assert_eq!(Spread::of_ratios(&[1.0], &[0.0]), None);
        assert_eq!(Spread::of_ratios(&[0.0], &[0.0]), None);
        assert_eq!(Spread::of_ratios(&[], &[]), None);
    }

    #[test]
    fn verdicts_need_all_rounds() {
        for (low, high, verdict) in [
            (1.06, 1.9, Verdict::Faster),
            (1.01, 1.2, Verdict::Faster),
            (0.5, 0.94, Verdict::Slower),
            (0.96, 1.04, Verdict::Alike),
            (1.01, 1.04, Verdict::Alike),
            (0.94, 1.2, Verdict::Unclear),
            (0.99, 2.0, Verdict::Unclear),
            (1.0, 2.0, Verdict::Unclear),
        ] {
            assert_eq!(Verdict::of(spread(1.0, low, high)), verdict, "{low} to {high}");
        }
        assert!(spread(1.0, 0.5, 1.0).is_firm() && !spread(1.0, 0.49, 1.0).is_firm());
    }

    #[test]
    fn the_table_shows_medians_and_what_follows() {
        let (raw, fused) = ([20_000.0, 22_016.0, 24_000.0], [16_000.0, 16_512.0, 15_200.0]);
        let found = finding(&raw, &fused, &[8192.0; 3]);
        assert_eq!((found.verdict, found.was_disturbed()), (Verdict::Faster, false));
        let mut lines = vec![heading()];
        lines.extend(found.rows());
        assert_eq!(
            lines,
            [
                "                      IOPS     MiB/s   of raw   in the rounds",
                "4 KiB random read, QD32",
                "  raw drive         22,016      86.0",
                "  ublk, fused       16,000      62.5      75%   63 to 80%",
                "  ublk, copy         8,192      32.0      37%   34 to 41%",
                "  fused is faster than copy: 1.95 times (1.86 to 2.02)",
            ]
        );
    }

    #[test]
    fn a_disturbed_measurement_says_so() {
        // Another load came in the second round while fused mode was measured.
        let found = finding(&[20_000.0, 9000.0], &[16_000.0, 4000.0], &[8000.0, 8000.0]);
        assert_eq!((found.verdict, found.was_disturbed()), (Verdict::Unclear, true));
        let rows = found.rows();
        let words = "  too wide to say which is faster: another load is on this machine";
        assert_eq!(rows[4..], ["  fused is 0.50 to 2.00 times as fast as copy:", words]);
        // The same, while the raw drive was steady.
        let found = finding(&[20_000.0, 19_000.0], &[16_000.0, 4000.0], &[8000.0, 8000.0]);
        assert_eq!((found.verdict, found.was_disturbed()), (Verdict::Unclear, false));
        assert!(found.rows()[5].ends_with("which is faster: the rounds differ too much"));
    }

    #[test]
    fn the_longest_lines_fit() {
        let found = finding(&[999_999.0; 2], &[999_999.0, 99_999.0], &[9999.0, 999_999.0]);
        assert!(found.rows().iter().all(|line| line.len() <= 77), "{:#?}", found.rows());
    }

    #[test]
    fn ranges_are_short() {
        assert_eq!(range(0.604, 0.9), "60 to 90%");
        assert_eq!(range(0.601, 0.602), "60%");
    }
}

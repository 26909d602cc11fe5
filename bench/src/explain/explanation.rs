//! Statistics of reads that were divided into stages.
//!
//! The mean of all reads says little: one read that was interrupted for milliseconds outweighs
//! hundreds of others. So shares are those of the typical reads, the middle half by duration, and
//! the slowest reads are reported separately. The means of the stages over the same reads add up to
//! the mean of the whole.

use std::path::PathBuf;

use anyhow::bail;
use serde::Serialize;

use super::Options;
use super::stages::{Cause, Division, Stage, WITH_DRIVE, WITHOUT_DRIVE};
use crate::summary::estimate::number;

/// How reads spent their time.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Explanation {
    /// The device.
    pub device: PathBuf,
    /// Its lend mode.
    pub lend: String,
    /// Bytes of a read.
    pub block_bytes: u64,
    /// The number of reads that were evaluated.
    pub reads: usize,
    /// The number of reads that were not evaluated, since their events were inconsistent.
    pub left_out: usize,
    /// The times of whole reads.
    pub whole: Times,
    /// The stages, in order. Their typical times add up to that of whole reads.
    pub stages: Vec<StageTimes>,
    /// The slowest reads.
    pub slowest: Slowest,
    /// The server's own measurement. Empty if it has none.
    pub server: Vec<ServerStage>,
}

/// Durations in nanoseconds. The resolution of the trace is 1000.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Times {
    /// The median.
    pub median_ns: u64,
    /// The 99th percentile.
    pub p99_ns: u64,
    /// The mean of the typical reads.
    pub typical_ns: f64,
}

/// A stage.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct StageTimes {
    /// [`Stage::name`].
    pub stage: &'static str,
    /// [`Stage::title`].
    pub title: &'static str,
    /// Its share of the typical reads' time, from 0 to 1.
    pub share: f64,
    /// Its times.
    #[serde(flatten)]
    pub times: Times,
}

/// The slowest reads: one in a hundred, and at least one.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Slowest {
    /// Their number.
    pub reads: usize,
    /// Their mean duration, in nanoseconds.
    pub mean_ns: f64,
    /// [`Stage::name`] of the stage with the largest share.
    pub stage: &'static str,
    /// [`Stage::title`] of that stage.
    pub title: &'static str,
    /// Its share of their time, from 0 to 1.
    pub share: f64,
}

/// A stage within the server, by its own clock.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ServerStage {
    /// Its name in `ublk-target stats`.
    pub stage: String,
    /// The median in nanoseconds.
    pub median_ns: u64,
    /// The mean in nanoseconds.
    pub mean_ns: u64,
}

impl Explanation {
    /// Computes the statistics.
    ///
    /// # Errors
    /// A one-line message if there are no reads.
    pub fn of(
        options: &Options,
        lend: String,
        division: &Division,
        server: Vec<ServerStage>,
    ) -> anyhow::Result<Self> {
        let left_out = division.left_out;
        let mut reads: Vec<&Vec<u64>> = division.reads.iter().collect();
        reads.sort_by_key(|stages| stages.iter().sum::<u64>());
        let Some(slowest) = Slowest::of(&reads, division.stages) else {
            bail!(
                "the trace does not show the requests of {left_out} reads; is {} a partition, or \
                 does its driver not tell of them?",
                options.device.display()
            );
        };
        let whole = Times::of(&reads, |stages| stages.iter().sum());
        let stage = |(index, stage): (usize, &Stage)| {
            let times = Times::of(&reads, |stages| stages[index]);
            let share = part(times.typical_ns, whole.typical_ns);
            StageTimes { stage: stage.name(), title: stage.title(), share, times }
        };
        Ok(Self {
            device: options.device.clone(),
            lend,
            block_bytes: options.block_bytes,
            reads: reads.len(),
            left_out,
            whole,
            stages: division.stages.iter().enumerate().map(stage).collect(),
            slowest,
            server,
        })
    }

    /// The causes of the typical reads' time, with their shares, the largest first.
    #[must_use]
    pub fn causes(&self) -> Vec<(Cause, f64)> {
        let mut causes: Vec<(Cause, f64)> = Vec::new();
        let all = WITH_DRIVE.iter().chain(&WITHOUT_DRIVE);
        for times in &self.stages {
            let Some(stage) = all.clone().find(|stage| stage.name() == times.stage) else {
                continue;
            };
            match causes.iter_mut().find(|(cause, _)| *cause == stage.cause()) {
                Some((_, share)) => *share += times.share,
                None => causes.push((stage.cause(), times.share)),
            }
        }
        causes.sort_by(|one, other| other.1.total_cmp(&one.1));
        causes
    }
}

impl Times {
    /// The times of reads that are ordered by duration. There must be at least one.
    fn of(reads: &[&Vec<u64>], figure: impl Fn(&Vec<u64>) -> u64) -> Self {
        let mut figures_us: Vec<u64> = reads.iter().map(|stages| figure(stages)).collect();
        let quarter = reads.len() / 4;
        let typical_ns = mean_ns(&figures_us[quarter..reads.len() - quarter]);
        figures_us.sort_unstable();
        Self {
            median_ns: figures_us[(figures_us.len() - 1) / 2] * 1000,
            p99_ns: figures_us[(figures_us.len() * 99).div_ceil(100) - 1] * 1000,
            typical_ns,
        }
    }
}

impl Slowest {
    /// The slowest of reads that are ordered by duration; `None` if there are none.
    fn of(reads: &[&Vec<u64>], stages: &[Stage]) -> Option<Self> {
        let count = (reads.len() / 100).max(1);
        let slowest = reads.get(reads.len().checked_sub(count)?..)?;
        let mean = |figure: &dyn Fn(&Vec<u64>) -> u64| {
            mean_ns(&slowest.iter().map(|stages| figure(stages)).collect::<Vec<_>>())
        };
        let means = stages.iter().enumerate().map(|(index, stage)| (stage, mean(&|s| s[index])));
        let (stage, most) = means.max_by(|one, other| one.1.total_cmp(&other.1))?;
        let whole = mean(&|stages| stages.iter().sum());
        let (name, title) = (stage.name(), stage.title());
        Some(Self { reads: count, mean_ns: whole, stage: name, title, share: part(most, whole) })
    }
}

fn mean_ns(figures_us: &[u64]) -> f64 {
    figures_us.iter().sum::<u64>() as f64 * 1000.0 / number(figures_us.len())
}

fn part(of: f64, whole: f64) -> f64 {
    if whole > 0.0 { of / whole } else { 0.0 }
}

#[cfg(test)]
pub(super) mod tests {
    use std::time::Duration;

    use super::*;

    fn options() -> Options {
        let limit = Duration::from_secs(1);
        Options { device: "/dev/ublkb0".into(), reads: 3, block_bytes: 4096, limit }
    }

    pub fn explained() -> Explanation {
        let reads = vec![
            vec![11, 16, 15, 50, 22, 8, 30, 40],
            vec![12, 15, 18, 10, 25, 9, 35, 9041],
            vec![10, 15, 15, 60, 22, 8, 30, 40],
            vec![10, 15, 15, 62, 22, 8, 30, 40],
        ];
        let division = Division { stages: &WITH_DRIVE, reads, left_out: 1 };
        let stage = |stage: &str, median_ns, mean_ns| ServerStage {
            stage: stage.into(),
            median_ns,
            mean_ns,
        };
        let server = vec![stage("plan", 2100, 2300), stage("total", 99_000, 120_000)];
        Explanation::of(&options(), "fused".into(), &division, server).unwrap()
    }

    #[test]
    fn typical_times_and_shares_add_up() {
        let explained = explained();
        let sum: f64 = explained.stages.iter().map(|stage| stage.times.typical_ns).sum();
        assert!((sum - explained.whole.typical_ns).abs() < 1e-6);
        assert!((sum - 201_000.0).abs() < 1e-6, "the middle two of four: {sum}");
        let shares: f64 = explained.stages.iter().map(|stage| stage.share).sum();
        assert!((shares - 1.0).abs() < 1e-9);
        assert_eq!((explained.reads, explained.left_out), (4, 1));
        assert_eq!((explained.whole.median_ns, explained.whole.p99_ns), (200_000, 9_165_000));
        let drive = &explained.stages[3];
        let Times { median_ns, p99_ns, .. } = drive.times;
        assert_eq!((drive.stage, median_ns, p99_ns), ("drive", 50_000, 62_000));
    }

    #[test]
    fn the_slowest_are_told_of_apart() {
        let slowest = explained().slowest;
        assert_eq!((slowest.reads, slowest.stage), (1, "return"));
        assert!((slowest.mean_ns - 9_165_000.0).abs() < 1e-6 && slowest.share > 0.98);
    }

    #[test]
    fn causes_are_ordered_by_their_shares() {
        let causes = explained().causes();
        let order: Vec<_> = causes.iter().map(|(cause, _)| *cause).collect();
        assert_eq!(order, [Cause::Scheduler, Cause::Drive, Cause::Client, Cause::Server]);
        assert!((causes.iter().map(|(_, share)| share).sum::<f64>() - 1.0).abs() < 1e-9);
    }

    #[test]
    fn a_trace_without_requests_is_told_of() {
        let nothing = Division { stages: &WITHOUT_DRIVE, reads: Vec::new(), left_out: 7 };
        let said = Explanation::of(&options(), String::new(), &nothing, Vec::new()).unwrap_err();
        assert!(said.to_string().contains("of 7 reads"), "{said}");
        // A clock that does not advance.
        let still = Division { stages: &WITHOUT_DRIVE, reads: vec![vec![0; 5]], left_out: 0 };
        let explained = Explanation::of(&options(), String::new(), &still, Vec::new()).unwrap();
        assert!(explained.stages.iter().all(|stage| stage.share == 0.0));
    }
}

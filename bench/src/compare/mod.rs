//! `compare`: what changed from one run to another, and whether it is more than noise.
//!
//! Each figure is compared as a ratio to the raw backing's in the same round, so that a slower
//! machine does not count as a change. The figures of the rounds are compared by a rank test, which
//! assumes nothing about their distribution. Its probabilities are corrected for the number of
//! cells.

pub mod cli;
pub mod differences;
pub mod show;
pub mod test;
#[cfg(test)]
mod tests;

use std::collections::HashMap;

use serde::Serialize;

use crate::results::{Results, Sample};
use crate::summary::Summary;
use crate::summary::check::Invalid;
use crate::summary::estimate::median_of;
use test::{corrected, least, mann_whitney};

/// The significance level: the maximum probability of noise for a change.
pub const LEVEL: f64 = 0.05;

/// How to compare.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Options {
    /// Compare the figures themselves, not their ratios to the raw backing's.
    pub absolute: bool,
    /// The minimum change, as a fraction, such as 0.01.
    pub threshold: f64,
}

/// A measure of a cell.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Measure {
    /// Requests a second.
    Throughput,
    /// The 99th percentile of the latency.
    Latency,
    /// CPU time of the machine for each request.
    Cpu,
}

/// All measures.
pub const MEASURES: [Measure; 3] = [Measure::Throughput, Measure::Latency, Measure::Cpu];

/// The verdict on a cell.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// Better, by more than noise.
    Better,
    /// Worse, by more than noise.
    Worse,
    /// Possibly noise, or too small to matter.
    Unclear,
}

/// One measure of one subject with one load in both runs.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Change {
    /// The subject's name.
    pub subject: String,
    /// The load's name.
    pub load: String,
    /// The measure.
    pub measure: Measure,
    /// Whether it is compared as a ratio to the raw backing's.
    pub of_raw: bool,
    /// Median in the first run: a ratio, requests a second, nanoseconds, or microseconds.
    pub before: f64,
    /// Median in the second.
    pub after: f64,
    /// The second divided by the first.
    pub ratio: f64,
    /// The probability that noise makes at least this difference, corrected for the number of
    /// cells.
    pub p: f64,
    /// The verdict.
    pub verdict: Verdict,
}

/// The comparison of two runs.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Comparison {
    /// Differences in machine, backing and method, and other warnings.
    pub warnings: Vec<String>,
    /// The cells that both have.
    pub changes: Vec<Change>,
}

impl Comparison {
    /// How many changes have a verdict.
    #[must_use]
    pub fn count(&self, verdict: Verdict) -> usize {
        self.changes.iter().filter(|change| change.verdict == verdict).count()
    }
}

impl Measure {
    /// Its title.
    #[must_use]
    pub fn title(self) -> &'static str {
        match self {
            Self::Throughput => "requests a second",
            Self::Latency => "99th percentile of the latency",
            Self::Cpu => "processor time for each request",
        }
    }

    fn of(self, sample: &Sample) -> Option<f64> {
        match self {
            Self::Throughput => Some(sample.iops),
            Self::Latency => {
                let mut percentiles = sample.latency.percentiles.iter();
                let found = percentiles.find(|(percentile, _)| (percentile - 99.0).abs() < 1e-6);
                found.map(|(_, ns)| *ns as f64)
            }
            Self::Cpu => Some(sample.cpu.machine_us),
        }
    }

    /// Whether more of it is better.
    fn more_is_better(self) -> bool {
        match self {
            Self::Throughput => true,
            Self::Latency | Self::Cpu => false,
        }
    }
}

/// Compares two runs.
///
/// # Errors
/// The first invalid value in the results.
pub fn compare(before: &Results, after: &Results, options: Options) -> Result<Comparison, Invalid> {
    let (one, other) = (Summary::of(before)?, Summary::of(after)?);
    let mut warnings = differences::warnings(before, after);
    let mut changes = Vec::new();
    for measure in MEASURES {
        let mut of_measure = tested(&one, &other, measure, options);
        if let Some(weak) = too_weak(&of_measure, measure) {
            warnings.push(weak);
        }
        judge(&mut of_measure, options.threshold);
        changes.extend(of_measure.into_iter().map(|(change, _)| change));
    }
    warnings.extend(differences::moved_limit(before, &changes));
    Ok(Comparison { warnings, changes })
}

/// A change, with the number of rounds of both runs. Its probability is not corrected yet.
type Tested = (Change, (usize, usize));

fn tested(one: &Summary, other: &Summary, measure: Measure, options: Options) -> Vec<Tested> {
    let tested = in_both(one, other).into_iter().filter_map(|(before, after)| {
        let relative = !options.absolute && one.raw() != Some(before.subject);
        let parts = || Some((before.of_raw(measure)?, after.of_raw(measure)?));
        let figures = || Some((before.figures(measure)?, after.figures(measure)?));
        let parts = if relative { parts() } else { None };
        let of_raw = parts.is_some();
        change(before.names(), measure, of_raw, parts.or_else(figures)?)
    });
    tested.collect()
}

/// A cell of a run.
struct RunCell<'a> {
    summary: &'a Summary<'a>,
    subject: usize,
    load: usize,
}

/// The cells with a subject and a load that both runs have.
fn in_both<'a>(one: &'a Summary, other: &'a Summary) -> Vec<(RunCell<'a>, RunCell<'a>)> {
    let mut places = Vec::new();
    for (subject, described) in one.measured() {
        let mut others = other.results().subjects.iter();
        let Some(its) = others.position(|each| each.name == described.name) else { continue };
        for (load, loaded) in one.loads() {
            let mut others = other.results().loads.iter();
            let Some(its_load) = others.position(|each| each.name == loaded.name) else { continue };
            let before = RunCell { summary: one, subject, load };
            places.push((before, RunCell { summary: other, subject: its, load: its_load }));
        }
    }
    places
}

impl RunCell<'_> {
    fn names(&self) -> (String, String) {
        let results = self.summary.results();
        (results.subjects[self.subject].name.clone(), results.loads[self.load].name.clone())
    }

    /// The figures of the rounds; `None` if there are none.
    fn figures(&self, measure: Measure) -> Option<Vec<f64>> {
        let samples = &self.summary.cell(self.subject, self.load)?.samples;
        let figures: Vec<f64> = samples.iter().filter_map(|sample| measure.of(sample)).collect();
        (!figures.is_empty()).then_some(figures)
    }

    /// The figures of the rounds as ratios to the raw backing's; `None` if there are none.
    fn of_raw(&self, measure: Measure) -> Option<Vec<f64>> {
        let raw = self.summary.cell(self.summary.raw()?, self.load)?.samples.iter();
        let of_round =
            |sample: &&Sample| Some((sample.round, measure.of(sample).filter(|base| *base > 0.0)?));
        let raw: HashMap<u32, f64> = raw.filter_map(of_round).collect();
        let samples = self.summary.cell(self.subject, self.load)?.samples.iter();
        let part = |sample: &&Sample| Some(measure.of(sample)? / raw.get(&sample.round)?);
        let parts: Vec<f64> = samples.filter_map(part).collect();
        (!parts.is_empty()).then_some(parts)
    }
}

fn change(
    (subject, load): (String, String),
    measure: Measure,
    of_raw: bool,
    (one, other): (Vec<f64>, Vec<f64>),
) -> Option<Tested> {
    let before = median_of(one.iter().copied())?;
    let after = median_of(other.iter().copied())?;
    let p = mann_whitney(&one, &other)?;
    let ratio = if before > 0.0 { after / before } else { return None };
    let verdict = Verdict::Unclear;
    let change = Change { subject, load, measure, of_raw, before, after, ratio, p, verdict };
    Some((change, (one.len(), other.len())))
}

/// A warning if there are too few rounds to distinguish any change of a measure from noise.
fn too_weak(tested: &[Tested], measure: Measure) -> Option<String> {
    let (_, (one, other)) = tested.iter().max_by_key(|(_, (one, other))| one.min(other))?;
    let alone = least(*one, *other) * crate::summary::estimate::number(tested.len());
    (alone > LEVEL).then(|| {
        format!(
            "{} and {} rounds are too few for a change of a single one of {} cells to stand out \
             from noise ({})",
            one,
            other,
            tested.len(),
            measure.title()
        )
    })
}

fn judge(tested: &mut [Tested], threshold: f64) {
    let probabilities: Vec<f64> = tested.iter().map(|(change, _)| change.p).collect();
    for ((change, _), p) in tested.iter_mut().zip(corrected(&probabilities)) {
        change.p = p;
        let matters = (change.ratio - 1.0).abs() >= threshold;
        let better = (change.ratio > 1.0) == change.measure.more_is_better();
        change.verdict = match (p <= LEVEL && matters, better) {
            (true, true) => Verdict::Better,
            (true, false) => Verdict::Worse,
            (false, _) => Verdict::Unclear,
        };
    }
}

//! The summary of a run's samples.
//!
//! Ratios are formed within a round, in which both devices were measured at about the same time. So
//! a slow drift of the machine cancels out. The result is the median over the rounds.

pub mod caveats;
pub mod check;
pub mod estimate;
pub mod figure;
pub mod roles;
pub mod words;

#[cfg(test)]
mod tests;

use std::collections::HashMap;

use crate::results::{Family, Load, Results, Sample, Subject};
use check::Invalid;
use estimate::{Estimate, geometric_mean, median_of};
use roles::Role;

/// The queue depth at which ours is compared with the limit.
pub const DEEP: u32 = 32;
/// Block sizes at which zero copy is compared with copying, in bytes.
pub const LARGE: [u64; 2] = [128 << 10, 1 << 20];

/// Results with their samples in order.
#[derive(Debug)]
pub struct Summary<'a> {
    results: &'a Results,
    /// By subject, then by load.
    cells: Vec<Option<Cell<'a>>>,
}

/// One subject with one load.
#[derive(Debug)]
pub struct Cell<'a> {
    /// Its samples, by round.
    pub samples: Vec<&'a Sample>,
    /// Requests completed in a second.
    pub iops: Estimate,
    /// Bytes moved in a second.
    pub bytes_per_s: Estimate,
    /// The mean latency, in nanoseconds.
    pub mean_ns: Estimate,
    /// Processor time.
    pub cpu: CpuSplit,
}

/// The CPU time of a request, in microseconds; medians over the rounds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CpuSplit {
    /// Of the whole machine.
    pub machine_us: f64,
    /// Of the load generator.
    pub client_us: f64,
    /// Of the server, if there is one.
    pub server_us: Option<f64>,
}

impl CpuSplit {
    /// The time of neither client nor server: interrupts, kernel threads, background work; at least
    /// 0.
    #[must_use]
    pub fn rest_us(&self) -> f64 {
        (self.machine_us - self.client_us - self.server_us.unwrap_or(0.0)).max(0.0)
    }
}

impl<'a> Summary<'a> {
    /// Sorts the samples of results.
    ///
    /// # Errors
    /// The first invalid value in the results.
    pub fn of(results: &'a Results) -> Result<Self, Invalid> {
        check::check(results)?;
        let mut samples: HashMap<(&str, &str), Vec<&Sample>> = HashMap::new();
        for sample in &results.samples {
            samples.entry((&sample.subject, &sample.load)).or_default().push(sample);
        }
        let mut cells = Vec::with_capacity(results.subjects.len() * results.loads.len());
        for subject in &results.subjects {
            for load in &results.loads {
                let samples = samples.remove(&(subject.name.as_str(), load.name.as_str()));
                cells.push(samples.and_then(Cell::of));
            }
        }
        Ok(Self { results, cells })
    }

    /// The results.
    #[must_use]
    pub fn results(&self) -> &'a Results {
        self.results
    }

    /// The cell of a subject and a load, both given by their index in the results.
    #[must_use]
    pub fn cell(&self, subject: usize, load: usize) -> Option<&Cell<'a>> {
        if load >= self.results.loads.len() {
            return None;
        }
        self.cells.get(subject * self.results.loads.len() + load)?.as_ref()
    }

    /// The subjects with samples, with their indices.
    pub fn measured(&self) -> impl Iterator<Item = (usize, &'a Subject)> {
        self.results.subjects.iter().enumerate().filter(|(index, _)| self.is_measured(*index))
    }

    fn is_measured(&self, subject: usize) -> bool {
        (0..self.results.loads.len()).any(|load| self.cell(subject, load).is_some())
    }

    /// The loads, with their indices.
    pub fn loads(&self) -> impl Iterator<Item = (usize, &'a Load)> {
        self.results.loads.iter().enumerate()
    }

    /// The raw backing.
    #[must_use]
    pub fn raw(&self) -> Option<usize> {
        self.measured().find(|(_, subject)| subject.family == Family::Raw).map(|(index, _)| index)
    }

    /// The device that represents ublk-target: the one in fused mode without other options, else
    /// the first of ours with zero copy.
    #[must_use]
    pub fn ours(&self) -> Option<usize> {
        let fused = roles::plain(&self.results.subjects, "fused");
        fused.filter(|index| self.is_measured(*index)).or_else(|| {
            self.measured().find(|(_, s)| Role::of(s) == Role::Ours).map(|(index, _)| index)
        })
    }

    /// The device of ublk-target in copy mode without other options.
    #[must_use]
    pub fn copying(&self) -> Option<usize> {
        roles::plain(&self.results.subjects, "copy").filter(|index| self.is_measured(*index))
    }

    /// The rival with the most requests a second in a load, by the medians.
    #[must_use]
    pub fn best_rival(&self, load: usize) -> Option<usize> {
        let rivals = self.measured().filter(|(_, subject)| Role::of(subject) == Role::Rival);
        let medians = rivals.filter_map(|(index, _)| Some((index, self.cell(index, load)?)));
        medians
            .max_by(|(_, one), (_, other)| one.iops.median.total_cmp(&other.iops.median))
            .map(|(index, _)| index)
    }

    /// Requests a second of one subject divided by those of another, formed in each round that has
    /// both.
    #[must_use]
    pub fn ratio(&self, subject: usize, to: usize, load: usize) -> Option<Estimate> {
        let ratios: Vec<f64> =
            self.ratios(subject, to, load)?.into_iter().map(|(_, r)| r).collect();
        Estimate::of(&ratios)
    }

    /// The same for each round.
    #[must_use]
    pub fn ratios(&self, subject: usize, to: usize, load: usize) -> Option<Vec<(u32, f64)>> {
        let (cell, other) = (self.cell(subject, load)?, self.cell(to, load)?);
        let of_other: HashMap<u32, f64> =
            other.samples.iter().map(|sample| (sample.round, sample.iops)).collect();
        let ratio = |sample: &&Sample| {
            let base = of_other.get(&sample.round).filter(|iops| **iops > 0.0)?;
            Some((sample.round, sample.iops / base))
        };
        Some(cell.samples.iter().filter_map(ratio).collect())
    }

    /// The ratio to the raw backing.
    #[must_use]
    pub fn of_raw(&self, subject: usize, load: usize) -> Option<Estimate> {
        self.ratio(subject, self.raw()?, load)
    }

    /// The geometric mean over the loads of ours divided by the best rival of each load. It is
    /// formed in each round that has all of the loads.
    #[must_use]
    pub fn against_rivals(&self) -> Option<AgainstRivals> {
        let ours = self.ours()?;
        let mut by_round: HashMap<u32, Vec<f64>> = HashMap::new();
        let mut loads = 0;
        for (load, _) in self.loads() {
            let Some(ratios) =
                self.best_rival(load).and_then(|rival| self.ratios(ours, rival, load))
            else {
                continue;
            };
            loads += 1;
            for (round, ratio) in ratios {
                by_round.entry(round).or_default().push(ratio);
            }
        }
        let whole = by_round.into_values().filter(|ratios| ratios.len() == loads);
        let means: Vec<f64> = whole.filter_map(|ratios| geometric_mean(&ratios)).collect();
        Some(AgainstRivals { mean: Estimate::of(&means)?, loads })
    }

    /// Zero copy divided by copying, both ours, in a load.
    #[must_use]
    pub fn zero_copy_factor(&self, load: usize) -> Option<Estimate> {
        let fused = roles::plain(&self.results.subjects, "fused")?;
        self.ratio(fused, self.copying()?, load)
    }

    /// The number of rounds with samples.
    #[must_use]
    pub fn rounds(&self) -> u32 {
        self.results.samples.iter().map(|sample| sample.round + 1).max().unwrap_or(0)
    }

    /// The fewest samples that a measured cell has.
    #[must_use]
    pub fn fewest_samples(&self) -> usize {
        self.cells.iter().flatten().map(|cell| cell.samples.len()).min().unwrap_or(0)
    }
}

/// Ours compared with the best rivals.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AgainstRivals {
    /// The geometric mean of the ratios.
    pub mean: Estimate,
    /// The number of loads.
    pub loads: usize,
}

impl<'a> Cell<'a> {
    fn of(mut samples: Vec<&'a Sample>) -> Option<Self> {
        samples.sort_by_key(|sample| sample.round);
        let estimate = |figure: fn(&Sample) -> f64| {
            Estimate::of(&samples.iter().map(|sample| figure(sample)).collect::<Vec<_>>())
        };
        let cpu = |figure: fn(&Sample) -> Option<f64>| {
            median_of(samples.iter().filter_map(|sample| figure(sample)))
        };
        Some(Self {
            iops: estimate(|sample| sample.iops)?,
            bytes_per_s: estimate(|sample| sample.bytes_per_s)?,
            mean_ns: estimate(|sample| sample.latency.mean_ns)?,
            cpu: CpuSplit {
                machine_us: cpu(|sample| Some(sample.cpu.machine_us))?,
                client_us: cpu(|sample| Some(sample.cpu.client_us))?,
                server_us: cpu(|sample| sample.cpu.server_us),
            },
            samples,
        })
    }

    /// The median over the rounds of a percentile of the latency, in nanoseconds.
    #[must_use]
    pub fn percentile_ns(&self, wanted: f64) -> Option<f64> {
        let of_sample = |sample: &&Sample| {
            let mut percentiles = sample.latency.percentiles.iter();
            percentiles.find(|(each, _)| same_percentile(*each, wanted)).map(|(_, ns)| *ns as f64)
        };
        median_of(self.samples.iter().filter_map(of_sample))
    }

    /// All percentiles, with their medians over the rounds in nanoseconds.
    #[must_use]
    pub fn curve(&self) -> Vec<(f64, f64)> {
        let percentiles = self.samples.first().map(|sample| &sample.latency.percentiles);
        let percentiles = percentiles.into_iter().flatten().map(|(percentile, _)| *percentile);
        percentiles.filter_map(|each| Some((each, self.percentile_ns(each)?))).collect()
    }
}

/// Whether two percentiles are equal, although some have no exact binary representation.
fn same_percentile(one: f64, other: f64) -> bool {
    (one - other).abs() < 1e-6
}

//! The measurement.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::cpu::{Meter, Rates};
use super::device_maker::{Device, DeviceMaker, ends_the_run};
use super::fio::{self, Job, Measured};
use super::output::Output;
use super::progress::Progress;
use super::subject::{Maker, SubjectKind};
use crate::results::{Cpu, Load, Results, Sample};

/// The mark of a file that was written during the run.
const UNDER_WAY: &str = "the run has not ended yet";

/// A run.
#[derive(Debug)]
pub struct Rounds<'a> {
    /// Makes the devices.
    pub device_maker: &'a DeviceMaker,
    /// Where to write the results.
    pub output: &'a Output,
    /// The kinds of the results' subjects, in the same order.
    pub kinds: Vec<SubjectKind>,
    /// The duration of a measurement.
    pub sample: Duration,
    /// The duration of the warm-up before each.
    pub warm_up: Duration,
    /// When it began.
    pub began: Instant,
    /// The results so far.
    pub results: Results,
}

impl Rounds<'_> {
    /// Makes and removes each device once, to find those that can be measured here. Records the
    /// reason for a subject that cannot.
    pub fn try_out(&mut self) -> Result<()> {
        let mut progress = Progress::new(u32::try_from(self.kinds.len())?);
        for (kind, subject) in self.kinds.iter().zip(&mut self.results.subjects) {
            progress.step("trying each device", kind.title);
            let tried = self.device_maker.make(kind.maker).and_then(Device::remove);
            match tried {
                Err(error) if ends_the_run(&error) => return Err(error),
                // Without the backing there is no basis for comparison.
                Err(error) if kind.maker == Maker::Raw => return Err(error),
                Err(error) => {
                    progress.note(&format!("not measured: {}: {error:#}", kind.title));
                    subject.skipped = Some(format!("{error:#}"));
                }
                Ok(()) => {}
            }
        }
        Ok(())
    }

    /// Writes the span that will be read.
    pub fn precondition(&self) -> Result<()> {
        let mut progress = Progress::new(1);
        progress.step("writing once what will be read", "on the backing itself");
        let device = self.device_maker.make(Maker::Raw)?;
        let argv = fio::precondition(&device.path, self.results.backing.span_bytes);
        let argv: Vec<&str> = argv.iter().map(String::as_str).collect();
        self.device_maker.commands.watch(&argv, Duration::from_millis(500), &mut || {})?;
        device.remove()
    }

    /// Measures all rounds. Returns whether every subject was measured to the end.
    pub fn measure(&mut self) -> Result<bool> {
        let (rounds, loads) = (self.results.method.rounds, self.results.loads.clone());
        let active =
            |results: &Results| results.subjects.iter().filter(|s| s.skipped.is_none()).count();
        let samples = u32::try_from(active(&self.results) * loads.len())? * rounds;
        let mut progress = Progress::new(samples);
        let mut is_whole = true;
        for round in 0..rounds {
            for (number, load) in loads.iter().enumerate() {
                let part = format!("round {} of {rounds}: {}", round + 1, load.title);
                for index in order(self.kinds.len(), round) {
                    if self.results.subjects[index].skipped.is_some() {
                        continue;
                    }
                    progress.step(&part, self.kinds[index].title);
                    if let Err(error) = self.measure_one(index, load, round) {
                        is_whole = false;
                        self.drop_subject(index, &part, error, &progress)?;
                        let loads_left = u32::try_from(loads.len() - number - 1)?;
                        let rounds_left = u32::try_from(loads.len())? * (rounds - round - 1);
                        progress.skip(loads_left + rounds_left);
                    }
                }
            }
            self.save(Some(UNDER_WAY.to_owned()))?;
        }
        Ok(is_whole)
    }

    /// Stops measuring a subject that has failed; the others continue.
    fn drop_subject(
        &mut self,
        index: usize,
        part: &str,
        error: anyhow::Error,
        progress: &Progress,
    ) -> Result<()> {
        let kind = self.kinds[index];
        if ends_the_run(&error) || kind.maker == Maker::Raw {
            return Err(error);
        }
        progress.note(&format!("failed: {}, {part}: {error:#}", kind.title));
        self.results.subjects[index].skipped = Some(format!("it failed, {part}: {error:#}"));
        Ok(())
    }

    fn measure_one(&mut self, index: usize, load: &Load, round: u32) -> Result<()> {
        let kind = self.kinds[index];
        let device = self.device_maker.make(kind.maker)?;
        let job = Job {
            device: &device.path,
            load,
            span_bytes: self.results.backing.span_bytes,
            sample: self.sample,
            warm_up: self.warm_up,
            seed: round,
            read_only: self.device_maker.read_only,
        };
        let argv = job.argv();
        let argv: Vec<&str> = argv.iter().map(String::as_str).collect();
        let mut meter = Meter::new(device.server);
        let interval = Meter::interval(self.sample);
        let said = self.device_maker.commands.watch(&argv, interval, &mut || meter.read())?;
        device.remove()?;
        let measured = fio::parse(&said)?;
        let cpu = cpu(&meter, &measured)?;
        let Measured { iops, bytes_per_s, latency, .. } = measured;
        let (subject, load) = (kind.name.to_owned(), load.name.to_owned());
        self.results.samples.push(Sample { subject, load, round, iops, bytes_per_s, latency, cpu });
        Ok(())
    }

    /// Writes the results so far.
    pub fn save(&mut self, incomplete: Option<String>) -> Result<()> {
        self.results.took_s = self.began.elapsed().as_secs_f64();
        self.results.incomplete = incomplete;
        self.output.write(&self.results)
    }
}

/// CPU time for each request.
fn cpu(meter: &Meter, measured: &Measured) -> Result<Cpu> {
    // Exact, since the milliseconds have less than 53 bits.
    #[allow(clippy::cast_precision_loss)]
    let [from, to] = [measured.within_ms.0, measured.within_ms.1].map(|ms| ms as f64);
    let rates =
        meter.rates(from, to).context("the processor time of this measurement is not known")?;
    Ok(cpu_of_each(rates, measured.cpu, measured.iops))
}

/// CPU time for each request in microseconds, from the time used per second.
fn cpu_of_each(rates: Rates, client: f64, iops: f64) -> Cpu {
    // Rounding may make 0 negative.
    let each = |rate: f64| rate.max(0.0) * 1e6 / iops;
    // Threads are measured individually. The kernel's idle time is not always right: in some
    // samples, machine time would be less than that of client and server.
    let machine = rates.machine.max(client + rates.server.unwrap_or(0.0));
    Cpu { machine_us: each(machine), client_us: each(client), server_us: rates.server.map(each) }
}

/// The order of subjects in a round. Each round begins with another subject, and every second round
/// is reversed, so that no subject always has the same neighbours.
fn order(subjects: usize, round: u32) -> Vec<usize> {
    let first = usize::try_from(round).unwrap_or(0) % subjects.max(1);
    let mut order: Vec<usize> = (first..subjects).chain(0..first).collect();
    if round % 2 == 1 {
        order.reverse();
    }
    order
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use crate::results::{Backing, FORMAT, Latency, Machine, Method};
    use crate::run::load::LOADS;
    use crate::run::subject::SUBJECTS;

    /// Results with one sample.
    pub fn some_results() -> Results {
        Results {
            format: FORMAT,
            version: "1".into(),
            arguments: vec!["run".into()],
            began_s: 1,
            took_s: 2.5,
            machine: Machine::default(),
            backing: Backing::default(),
            method: Method::default(),
            subjects: vec![super::super::described(&SUBJECTS[0], None)],
            loads: vec![LOADS[0].described()],
            samples: vec![Sample {
                subject: SUBJECTS[0].name.into(),
                load: LOADS[0].name.into(),
                round: 0,
                iops: 1000.5,
                bytes_per_s: 4_098_048.0,
                latency: Latency { mean_ns: 1.5, max_ns: 9, percentiles: vec![(99.99, 8)] },
                cpu: Cpu { machine_us: 2.0, client_us: 1.0, server_us: Some(0.5) },
            }],
            incomplete: Some("interrupted".into()),
        }
    }

    #[test]
    fn the_machine_uses_no_less_than_client_and_server() {
        for (machine, client, server, expected) in [
            (1.5, 0.5, Some(0.5), (1500.0, 500.0, Some(500.0))),
            (0.1, 0.5, Some(0.25), (750.0, 500.0, Some(250.0))),
            (0.1, 0.5, None, (500.0, 500.0, None)),
            (-0.1, 0.0, None, (0.0, 0.0, None)),
        ] {
            let cpu = cpu_of_each(Rates { machine, server }, client, 1000.0);
            assert_eq!((cpu.machine_us, cpu.client_us, cpu.server_us), expected);
        }
    }

    #[test]
    fn every_subject_comes_once_a_round_in_another_place() {
        assert_eq!(order(4, 0), [0, 1, 2, 3]);
        assert_eq!(order(4, 1), [0, 3, 2, 1]);
        assert_eq!(order(4, 2), [2, 3, 0, 1]);
        for round in 0..20 {
            let mut order = order(7, round);
            order.sort_unstable();
            assert_eq!(order, [0, 1, 2, 3, 4, 5, 6]);
        }
        assert!(order(0, 3).is_empty());
    }
}

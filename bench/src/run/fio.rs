//! The load generator fio: its command line and its report.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use crate::results::{Latency, Load};

/// The percentiles to report. fio takes at most 20.
const PERCENTILES: [f64; 13] =
    [1.0, 5.0, 10.0, 25.0, 50.0, 75.0, 90.0, 95.0, 99.0, 99.5, 99.9, 99.95, 99.99];

/// A measurement.
#[derive(Debug, Clone)]
pub struct Job<'a> {
    /// The device.
    pub device: &'a str,
    /// The load.
    pub load: &'a Load,
    /// How much of the device to use, in bytes.
    pub span_bytes: u64,
    /// The duration of the measurement.
    pub sample: Duration,
    /// The duration of the warm-up.
    pub warm_up: Duration,
    /// The seed of fio's requests: the same for all subjects of a round.
    pub seed: u32,
    /// Makes fio refuse to write.
    pub read_only: bool,
}

impl Job<'_> {
    /// fio's command line.
    pub fn argv(&self) -> Vec<String> {
        let percentiles: Vec<String> = PERCENTILES.iter().map(ToString::to_string).collect();
        let mut argv = common(self.device, self.span_bytes);
        argv.extend([
            format!("--rw={}", self.load.rw),
            format!("--bs={}", self.load.block_bytes),
            format!("--iodepth={}", self.load.depth),
            "--norandommap".to_owned(),
            format!("--randseed={}", u64::from(self.seed) + 1),
            "--time_based".to_owned(),
            format!("--runtime={}ms", self.sample.as_millis()),
            format!("--ramp_time={}ms", self.warm_up.as_millis()),
            // Reads and writes of a mixed load together.
            "--unified_rw_reporting=mixed".to_owned(),
            // Total latency, from submission to completion.
            "--lat_percentiles=1".to_owned(),
            "--clat_percentiles=0".to_owned(),
            format!("--percentile_list={}", percentiles.join(":")),
        ]);
        argv.extend(self.load.read_percent.map(|percent| format!("--rwmixread={percent}")));
        argv.extend(self.read_only.then(|| "--readonly".to_owned()));
        argv
    }
}

/// The command line that writes the whole span once: drives answer reads of blocks that were never
/// written without reading the medium.
pub fn precondition(device: &str, span_bytes: u64) -> Vec<String> {
    let mut argv = common(device, span_bytes);
    argv.extend(["--rw=write", "--bs=1M", "--iodepth=8"].map(String::from));
    argv
}

fn common(device: &str, span_bytes: u64) -> Vec<String> {
    // A colon separates names for fio.
    let device = device.replace(':', "\\:");
    let fixed = ["fio", "--name=ublk-bench", "--output-format=json", "--thread"].map(String::from);
    let how = ["--ioengine=io_uring", "--direct=1", "--registerfiles", "--fixedbufs"];
    let mut argv = fixed.to_vec();
    argv.extend(how.map(String::from));
    argv.extend([format!("--filename={device}"), format!("--size={span_bytes}")]);
    argv
}

/// The result of a measurement.
#[derive(Debug, Clone, PartialEq)]
pub struct Measured {
    /// Requests a second.
    pub iops: f64,
    /// Bytes a second.
    pub bytes_per_s: f64,
    /// The latencies.
    pub latency: Latency,
    /// CPU time of fio per second, in seconds.
    pub cpu: f64,
    /// An interval within the measurement, in milliseconds since 1970.
    pub within_ms: (u64, u64),
}

/// How long after the last request the report may be written, in milliseconds: fio checks for the
/// end four times a second.
const LATE_MS: u64 = 300;

#[derive(Deserialize)]
struct Report {
    /// The time of the report.
    timestamp_ms: u64,
    jobs: Vec<JobReport>,
}

#[derive(Deserialize)]
struct JobReport {
    error: i32,
    /// The end of the warm-up. Versions before 3.34 do not report it.
    job_start: Option<u64>,
    job_runtime: u64,
    usr_cpu: f64,
    sys_cpu: f64,
    mixed: Mixed,
}

#[derive(Deserialize)]
struct Mixed {
    total_ios: u64,
    iops: f64,
    bw_bytes: f64,
    lat_ns: LatencyReport,
}

#[derive(Deserialize)]
struct LatencyReport {
    mean: f64,
    max: u64,
    #[serde(default)]
    percentile: BTreeMap<String, u64>,
}

/// Reads fio's report.
pub fn parse(text: &str) -> Result<Measured> {
    // Notes may precede the report.
    let start = text.find('{').context("fio wrote no report")?;
    let report: Report = serde_json::from_str(&text[start..]).context("fio's report")?;
    let [job] = &report.jobs[..] else {
        anyhow::bail!("fio reported {} jobs", report.jobs.len());
    };
    ensure!(job.error == 0, "fio met error {}", job.error);
    ensure!(job.mixed.total_ios > 0 && job.mixed.iops > 0.0, "fio completed no request");
    Ok(Measured {
        iops: job.mixed.iops,
        bytes_per_s: job.mixed.bw_bytes,
        latency: Latency {
            mean_ns: job.mixed.lat_ns.mean,
            max_ns: job.mixed.lat_ns.max,
            percentiles: percentiles(&job.mixed.lat_ns.percentile)?,
        },
        cpu: (job.usr_cpu + job.sys_cpu) / 100.0,
        within_ms: within(&report, job),
    })
}

/// If the start is not reported, it is computed from the time of the report, minus the time by
/// which the report may be late.
fn within(report: &Report, job: &JobReport) -> (u64, u64) {
    let took = job.job_runtime;
    let began = job.job_start.unwrap_or(report.timestamp_ms.saturating_sub(took));
    let certain = if job.job_start.is_some() { took } else { took - LATE_MS.min(took / 2) };
    (began, began + certain)
}

/// Sorted as numbers, since the keys are texts.
fn percentiles(reported: &BTreeMap<String, u64>) -> Result<Vec<(f64, u64)>> {
    let read = |(percentile, value): (&String, &u64)| Ok((percentile.parse()?, *value));
    let mut percentiles = reported.iter().map(read).collect::<Result<Vec<(f64, u64)>>>()?;
    percentiles.sort_by(|one, other| one.0.total_cmp(&other.0));
    let wanted = PERCENTILES.len();
    ensure!(percentiles.len() == wanted, "fio reported {} percentiles", percentiles.len());
    Ok(percentiles)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run::load::LOADS;

    const REPORT: &str = r#"note: something
        {"fio version": "fio-3.39", "timestamp_ms": 1795286752416, "jobs": [{
        "jobname": "ublk-bench", "job_start": 1795286751661, "error": 0, "job_runtime": 500,
        "usr_cpu": 24.4, "sys_cpu": 63.6, "mixed": {"bw_bytes": 237886850, "iops": 58013.97,
        "runtime": 501, "total_ios": 29065, "lat_ns": {"min": 51490, "max": 6265358,
        "mean": 547434.98, "N": 29096, "percentile": {"1.000000": 1, "10.000000": 3,
        "25.000000": 4, "5.000000": 2, "50.000000": 5, "75.000000": 6, "90.000000": 7,
        "95.000000": 8, "99.000000": 9, "99.500000": 10, "99.900000": 11, "99.950000": 12,
        "99.990000": 13}}}}]}"#;

    #[test]
    fn reports_are_read() {
        let measured = parse(REPORT).unwrap();
        assert_eq!((measured.iops, measured.bytes_per_s), (58013.97, 237_886_850.0));
        assert!((measured.cpu - 0.88).abs() < 1e-9);
        assert_eq!(measured.within_ms, (1_795_286_751_661, 1_795_286_752_161));
        let latency = measured.latency;
        assert_eq!((latency.mean_ns, latency.max_ns), (547_434.98, 6_265_358));
        let expected: Vec<_> = PERCENTILES.into_iter().zip(1..).collect();
        assert_eq!(latency.percentiles, expected, "the least percentile first");
    }

    #[test]
    fn older_versions_do_not_tell_when_they_began() {
        let older = REPORT.replace("\"job_start\": 1795286751661, ", "");
        assert_eq!(parse(&older).unwrap().within_ms, (1_795_286_751_916, 1_795_286_752_166));
        let longer = older.replace("\"job_runtime\": 500", "\"job_runtime\": 2000");
        assert_eq!(parse(&longer).unwrap().within_ms, (1_795_286_750_416, 1_795_286_752_116));
    }

    #[test]
    fn reports_of_nothing_are_refused() {
        for (from, to, why) in [
            ("\"error\": 0", "\"error\": 5", "error 5"),
            ("\"total_ios\": 29065", "\"total_ios\": 0", "no request"),
            ("\"99.990000\": 13", "\"100\": 13, \"99.99\": 1", "14 percentiles"),
            ("{\"fio", "x", "fio's report"),
        ] {
            assert!(REPORT.contains(from), "{from}");
            let error = format!("{:#}", parse(&REPORT.replace(from, to)).unwrap_err());
            assert!(error.contains(why), "{error}");
        }
    }

    #[test]
    fn the_command_line_says_what_is_measured() {
        let mixed = LOADS.iter().find(|load| load.name == "randrw-4k-qd32").unwrap().described();
        let job = Job {
            device: "/dev/disk/by-path/pci-0000:00",
            load: &mixed,
            span_bytes: 1 << 30,
            sample: Duration::from_millis(500),
            warm_up: Duration::from_millis(200),
            seed: 6,
            read_only: false,
        };
        let argv = job.argv();
        for expected in [
            "--filename=/dev/disk/by-path/pci-0000\\:00",
            "--rw=randrw",
            "--rwmixread=70",
            "--bs=4096",
            "--iodepth=32",
            "--size=1073741824",
            "--runtime=500ms",
            "--ramp_time=200ms",
            "--randseed=7",
        ] {
            assert!(argv.iter().any(|word| word == expected), "{expected}: {argv:?}");
        }
        assert!(!argv.iter().any(|word| word == "--readonly"));
        let read_only = Job { read_only: true, ..job }.argv();
        assert!(read_only.iter().any(|word| word == "--readonly"));
    }
}

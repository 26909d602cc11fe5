//! Runs fio and reads its report.

use std::fs;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use super::{Ctx, process};

/// What fio reports of all its jobs together.
#[derive(Debug, Clone, PartialEq)]
pub struct Report {
    /// Reading.
    pub read: Direction,
    /// Writing.
    pub write: Direction,
    /// Discarding.
    pub trim: Direction,
    /// First error number, 0 if none.
    pub error: i32,
}

/// One direction of a [`Report`].
#[derive(Debug, Clone, Copy, PartialEq, Default, Deserialize)]
pub struct Direction {
    /// Bytes transferred.
    #[serde(rename = "io_bytes")]
    pub bytes: u64,
    /// Requests completed.
    #[serde(rename = "total_ios")]
    pub requests: u64,
    /// Requests a second.
    pub iops: f64,
    /// How long they took, from before their submission. The time from when that has returned
    /// (`clat`) may leave out some of what was done for them.
    #[serde(default)]
    pub lat_ns: Latency,
}

/// Latencies in nanoseconds; 0 where there are none.
#[derive(Debug, Clone, Copy, PartialEq, Default, Deserialize)]
pub struct Latency {
    /// The least.
    pub min: u64,
}

impl Latency {
    fn least(self, other: Self) -> Self {
        match (self.min, other.min) {
            (0, min) | (min, 0) => Self { min },
            (one, other) => Self { min: one.min(other) },
        }
    }
}

#[derive(Deserialize)]
struct Whole {
    jobs: Vec<JobReport>,
}

#[derive(Deserialize)]
struct JobReport {
    #[serde(default)]
    error: i32,
    read: Direction,
    write: Direction,
    trim: Direction,
}

/// Runs fio with `options` (without their dashes, `rw=randread`), in one job
/// named `test`. Fails if fio fails, which includes data that does not verify.
///
/// # Errors
/// When fio fails or its report cannot be read; the message holds its output.
pub fn run(ctx: &Ctx, options: &[&str]) -> Result<Report> {
    let path = ctx.directory().join("fio.json");
    let output = format!("--output={}", path.display());
    let options: Vec<String> = options.iter().map(|option| format!("--{option}")).collect();
    let mut argv = vec!["fio", "--name=test", "--output-format=json", &output];
    argv.extend(options.iter().map(String::as_str));
    let result = process::run(&argv);
    let text = fs::read_to_string(&path).unwrap_or_default();
    result.with_context(|| format!("fio reported:\n{}", text.trim()))?;
    let report = parse(&text)?;
    ensure!(report.error == 0, "fio reported error {}", report.error);
    Ok(report)
}

/// Runs fio like [`run`], on a device of which some requests fail. Returns how many did.
///
/// # Errors
/// When its report cannot be read.
pub fn run_for_errors(ctx: &Ctx, options: &[&str]) -> Result<u64> {
    let path = ctx.directory().join("fio.json");
    let output = format!("--output={}", path.display());
    let options: Vec<String> = options.iter().map(|option| format!("--{option}")).collect();
    let mut argv = vec!["fio", "--name=test", "--output-format=json", &output];
    argv.extend(options.iter().map(String::as_str));
    // Its exit code says that there were errors, which is what is wanted.
    let _ = process::run(&argv);
    let text = fs::read_to_string(&path).context("fio's report")?;
    let start = text.find('{').context("fio wrote no report")?;
    let whole: ErrorReport = serde_json::from_str(&text[start..]).context("fio's report")?;
    Ok(whole.jobs.iter().map(|job| job.total_err).sum())
}

#[derive(Deserialize)]
struct ErrorReport {
    jobs: Vec<JobErrors>,
}

#[derive(Deserialize)]
struct JobErrors {
    total_err: u64,
}

/// Reads a report; fio may print warnings before it.
///
/// # Errors
/// When it is not one.
pub fn parse(text: &str) -> Result<Report> {
    let start = text.find('{').context("fio wrote no report")?;
    let whole: Whole = serde_json::from_str(&text[start..]).context("fio's report")?;
    let sum = |direction: fn(&JobReport) -> Direction| {
        whole.jobs.iter().map(direction).fold(Direction::default(), |a, b| Direction {
            bytes: a.bytes + b.bytes,
            requests: a.requests + b.requests,
            iops: a.iops + b.iops,
            lat_ns: a.lat_ns.least(b.lat_ns),
        })
    };
    Ok(Report {
        read: sum(|job| job.read),
        write: sum(|job| job.write),
        trim: sum(|job| job.trim),
        error: whole.jobs.iter().map(|job| job.error).find(|error| *error != 0).unwrap_or(0),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_are_summed_over_jobs() {
        let direction = r#"{"io_bytes": 8192, "total_ios": 2, "iops": 10.5, "bw": 1}"#;
        let job = |error: i32| {
            let latency = format!(r#""iops": 10.5, "lat_ns": {{"min": {}, "max": 9}}"#, 7 - error);
            let read = direction.replace(r#""iops": 10.5"#, &latency);
            format!(r#"{{"error": {error}, "read": {read}, "write": {direction}, "trim": {read}}}"#)
        };
        let text = format!("fio: warning\n{{\"jobs\": [{}, {}]}}", job(0), job(5));
        let report = parse(&text).unwrap();
        assert_eq!((report.read.bytes, report.read.requests, report.error), (16384, 4, 5));
        assert!((report.write.iops - 21.0).abs() < 1e-9);
        assert_eq!((report.read.lat_ns.min, report.write.lat_ns.min), (2, 0));
        assert!(parse("no report").is_err());
        assert!(parse(r#"{"jobs": [{}]}"#).is_err());
    }
}

//! Runs fio and reads its report.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
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
    /// The longest that a request took, from its submission to its completion.
    pub longest_request: Duration,
    /// The longest that an fsync took.
    pub longest_sync: Duration,
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
    /// Milliseconds from the first request to the end of the last, of the job that took longest.
    #[serde(rename = "runtime", default)]
    pub runtime_ms: u64,
    /// How long they took, from before their submission. The time from when that has returned
    /// (`clat`) may leave out some of what was done for them.
    #[serde(default)]
    pub lat_ns: Latency,
}

/// Latencies in nanoseconds; 0 where there are none.
#[derive(Debug, Clone, Copy, PartialEq, Default, Deserialize)]
pub struct Latency {
    /// The least.
    #[serde(default)]
    pub min: u64,
    /// The greatest.
    #[serde(default)]
    pub max: u64,
}

impl Latency {
    fn of_both(self, other: Self) -> Self {
        let min = match (self.min, other.min) {
            (0, min) | (min, 0) => min,
            (one, other) => one.min(other),
        };
        Self { min, max: self.max.max(other.max) }
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
    #[serde(default)]
    sync: Syncs,
}

#[derive(Default, Deserialize)]
struct Syncs {
    #[serde(default)]
    lat_ns: Latency,
}

/// Runs fio with `options` (without their dashes, `rw=randread`), in one job
/// named `test`. Fails if fio fails, which includes data that does not verify.
///
/// # Errors
/// When fio fails or its report cannot be read; the message holds its output.
pub fn run(ctx: &Ctx, options: &[&str]) -> Result<Report> {
    run_in(ctx.directory(), options)
}

/// The same, with the report in a directory.
///
/// # Errors
/// As [`run()`].
pub fn run_in(directory: &Path, options: &[impl AsRef<str>]) -> Result<Report> {
    start_in(directory, "test", options)?.finish()
}

/// Runs jobs one after the other, each with `shared` options and its own: starting fio takes longer
/// than many of them. Fails if one of them does.
///
/// # Errors
/// As [`run()`].
pub fn run_each(ctx: &Ctx, shared: &[&str], jobs: &[Vec<String>]) -> Result<Vec<Report>> {
    let mut arguments = vec!["--name=global".to_owned()];
    arguments.extend(shared.iter().map(|option| format!("--{option}")));
    for (number, job) in jobs.iter().enumerate() {
        arguments.extend([format!("--name=test{number}"), "--stonewall".to_owned()]);
        arguments.extend(job.iter().map(|option| format!("--{option}")));
    }
    let reports = start_with(ctx.directory(), "test", &arguments)?.finish_each()?;
    ensure!(reports.len() == jobs.len(), "fio reported {} of {} jobs", reports.len(), jobs.len());
    Ok(reports)
}

/// A fio that runs beside the test; it is killed with its handle.
#[derive(Debug)]
pub struct Running {
    child: Child,
    report: PathBuf,
    said: PathBuf,
}

/// Starts fio with `options` as [`run`] does, in a job of this name, of which the test has one at a
/// time.
///
/// # Errors
/// When it cannot be started.
pub fn start(ctx: &Ctx, name: &str, options: &[&str]) -> Result<Running> {
    start_in(ctx.directory(), name, options)
}

fn start_in(directory: &Path, name: &str, options: &[impl AsRef<str>]) -> Result<Running> {
    let options = options.iter().map(|option| format!("--{}", option.as_ref()));
    let arguments: Vec<_> = std::iter::once(format!("--name={name}")).chain(options).collect();
    start_with(directory, name, &arguments)
}

fn start_with(directory: &Path, name: &str, arguments: &[String]) -> Result<Running> {
    let report = directory.join(format!("{name}.json"));
    let said = directory.join(format!("{name}.stderr"));
    let child = Command::new("fio")
        .args(["--output-format=json".to_owned(), format!("--output={}", report.display())])
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(File::create(&said)?)
        .spawn()
        .context("start fio")?;
    Ok(Running { child, report, said })
}

impl Running {
    /// Whether it has ended by itself.
    ///
    /// # Errors
    /// Those of `waitpid(2)`.
    pub fn has_ended(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_some())
    }

    /// Waits for its end, and reads its report.
    ///
    /// # Errors
    /// When fio fails or its report cannot be read; the message holds its output.
    pub fn finish(self) -> Result<Report> {
        let report = Report::of_all(&self.finish_each()?);
        ensure!(report.error == 0, "fio reported error {}", report.error);
        Ok(report)
    }

    /// Ends one that would go on, in order, and reads its report.
    ///
    /// # Errors
    /// As [`Running::finish`].
    pub fn end(mut self) -> Result<Report> {
        ensure!(!self.has_ended()?, "fio has ended before: {}", fs::read_to_string(&self.said)?);
        kill(Pid::from_raw(i32::try_from(self.child.id())?), Signal::SIGINT)?;
        self.finish()
    }

    /// As [`Running::finish`], with a report of each job.
    fn finish_each(mut self) -> Result<Vec<Report>> {
        let status = self.child.wait()?;
        let text = fs::read_to_string(&self.report).unwrap_or_default();
        let said = fs::read_to_string(&self.said).unwrap_or_default();
        // What it ends with after a signal; errors are in the report.
        let was_told = status.code() == Some(128);
        ensure!(
            status.success() || was_told,
            "fio: {status}\n{}\nit reported:\n{}",
            said.trim(),
            text.trim()
        );
        parse_each(&text)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Both fail when it has ended, which is the usual case.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
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

impl Report {
    fn of(job: &JobReport) -> Self {
        let [read, write, trim] = [job.read, job.write, job.trim];
        let longest = |each: &[u64]| Duration::from_nanos(each.iter().copied().max().unwrap_or(0));
        Self {
            read,
            write,
            trim,
            longest_request: longest(&[read.lat_ns.max, write.lat_ns.max, trim.lat_ns.max]),
            longest_sync: longest(&[job.sync.lat_ns.max]),
            error: job.error,
        }
    }

    /// Of jobs that ran at the same time.
    fn of_all(jobs: &[Self]) -> Self {
        let sum = |direction: fn(&Self) -> Direction| {
            jobs.iter().map(direction).fold(Direction::default(), |a, b| Direction {
                bytes: a.bytes + b.bytes,
                requests: a.requests + b.requests,
                iops: a.iops + b.iops,
                lat_ns: a.lat_ns.of_both(b.lat_ns),
                runtime_ms: a.runtime_ms.max(b.runtime_ms),
            })
        };
        Self {
            read: sum(|job| job.read),
            write: sum(|job| job.write),
            trim: sum(|job| job.trim),
            longest_request: jobs.iter().map(|job| job.longest_request).max().unwrap_or_default(),
            longest_sync: jobs.iter().map(|job| job.longest_sync).max().unwrap_or_default(),
            error: jobs.iter().map(|job| job.error).find(|error| *error != 0).unwrap_or(0),
        }
    }
}

/// Reads a report of jobs that ran at the same time.
///
/// # Errors
/// When it is not one.
pub fn parse(text: &str) -> Result<Report> {
    Ok(Report::of_all(&parse_each(text)?))
}

/// Reads the reports of all jobs; fio may print warnings before them.
///
/// # Errors
/// When there are none.
pub fn parse_each(text: &str) -> Result<Vec<Report>> {
    let start = text.find('{').context("fio wrote no report")?;
    let whole: Whole = serde_json::from_str(&text[start..]).context("fio's report")?;
    Ok(whole.jobs.iter().map(Report::of).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_are_summed_over_jobs() {
        let direction = |max: u64| {
            format!(
                r#"{{"io_bytes": 8192, "total_ios": 2, "iops": 10.5, "runtime": 190, "lat_ns": {{"min": 1, "max": {max}}}}}"#
            )
        };
        let job = |error: i32| {
            format!(
                r#"{{"error": {error}, "read": {}, "write": {}, "trim": {}, "sync": {{"lat_ns": {{"max": {}}}}}}}"#,
                direction(7),
                direction(3000 + u64::from(error.unsigned_abs())),
                direction(0),
                if error == 0 { 40 } else { 8 },
            )
        };
        let text = format!("fio: warning\n{{\"jobs\": [{}, {}]}}", job(0), job(5));
        let report = parse(&text).unwrap();
        assert_eq!((report.read.bytes, report.read.requests, report.error), (16384, 4, 5));
        assert!((report.write.iops - 21.0).abs() < 1e-9);
        assert_eq!((report.read.lat_ns.min, report.read.lat_ns.max), (1, 7));
        assert_eq!(report.longest_request, Duration::from_nanos(3005));
        assert_eq!(report.longest_sync, Duration::from_nanos(40));
        assert_eq!(report.trim.runtime_ms, 190);
        assert!(parse("no report").is_err());
        assert!(parse(r#"{"jobs": [{}]}"#).is_err());
    }
}

//! Loads by fio: with checksums, of a fixed number, and for speed.

use anyhow::{Context, Result, ensure};

use super::commands::Commands;
use super::device::{Device, claim, settle, text};
use super::environment::DemoTarget;
use super::figures::{Finding, RIVALS, Rates};
use crate::guest::fio::{self, Report};
use crate::ui;

/// How much of the backing the loads cover.
const COVERED: &str = "size=256m";

/// In which order the rivals are measured in each round: all orders there are, so that none is
/// favoured by its place. That six rounds agree by chance is rare, too: once in 32 times.
const ORDERS: [[usize; 3]; 6] = [[0, 1, 2], [2, 1, 0], [1, 2, 0], [0, 2, 1], [2, 0, 1], [1, 0, 2]];
/// Rounds of the measurement.
pub const ROUNDS: usize = ORDERS.len();
/// How the rivals lend; the raw drive needs no device.
const LEND_MODES: [Option<&str>; 3] = [None, Some("fused"), Some("copy")];

struct Workload {
    name: &'static str,
    options: [&'static str; 3],
    block_bytes: f64,
}

const WORKLOADS: [Workload; 3] = [
    Workload {
        name: "4 KiB random read, QD32",
        options: ["rw=randread", "bs=4k", "iodepth=32"],
        block_bytes: 4096.0,
    },
    Workload {
        name: "4 KiB random write, QD32",
        options: ["rw=randwrite", "bs=4k", "iodepth=32"],
        block_bytes: 4096.0,
    },
    Workload {
        name: "128 KiB sequential read, QD8",
        options: ["rw=read", "bs=128k", "iodepth=8"],
        block_bytes: 131_072.0,
    },
];

/// Runs fio on a device with `options`, without their dashes.
fn fio(commands: &Commands, doing: &str, device: &str, options: &[&str]) -> Result<Report> {
    fio_jobs(commands, doing, device, &[options])?.pop().context("fio reported no job")
}

/// Runs jobs of fio one after the other on a device, each with its options.
fn fio_jobs(
    commands: &Commands,
    doing: &str,
    device: &str,
    jobs: &[&[&str]],
) -> Result<Vec<Report>> {
    let path = commands.path("fio.json");
    let mut argv = ["fio", "--output-format=json"].map(String::from).to_vec();
    argv.push(format!("--output={}", text(&path)?));
    argv.push("--name=global".into());
    // A colon separates names for fio.
    argv.push(format!("--filename={}", device.replace(':', "\\:")));
    argv.extend(["--thread", "--ioengine=io_uring", "--direct=1"].map(String::from));
    argv.push("--registerfiles".into());
    for job in jobs {
        argv.extend(["--name=demo", "--stonewall"].map(String::from));
        argv.extend(job.iter().map(|option| format!("--{option}")));
    }
    commands.run(doing, &argv.iter().map(String::as_str).collect::<Vec<_>>())?;
    let reports = fio::parse_each(&std::fs::read_to_string(&path)?)?;
    ensure!(reports.len() == jobs.len(), "fio reported {} of {} jobs", reports.len(), jobs.len());
    Ok(reports)
}

/// Writes and reads in random order with a checksum in every block; returns how many blocks were
/// written, and how many were read back and found right.
pub fn verify(commands: &Commands, device: &str) -> Result<(u64, u64)> {
    let options = ["rw=randrw", "bs=4k", "iodepth=32", "size=64m", "verify=crc32c"];
    let more = ["verify_fatal=1", "do_verify=1", "randrepeat=0"];
    let doing = "writing, reading and checking";
    let report = fio(commands, doing, device, &[&options[..], &more].concat())?;
    Ok((report.write.requests, report.read.requests))
}

/// A fixed number of random reads and writes.
pub fn requests(commands: &Commands, device: &str, number: u64) -> Result<()> {
    let number = format!("number_ios={number}");
    let options = ["rw=randrw", "bs=4k", "iodepth=16", COVERED, "norandommap", &number];
    fio(commands, "reading and writing", device, &options).map(drop)
}

/// Measures everything in turns.
pub fn measure(commands: &Commands, target: &DemoTarget) -> Result<Vec<Finding>> {
    {
        let _claim = claim(&target.backing)?;
        let doing = "writing once what will be read";
        fio(commands, doing, text(&target.backing)?, &["rw=write", "bs=1m", COVERED])?;
    }
    let mut all: [Rates; WORKLOADS.len()] = Default::default();
    for (round, order) in ORDERS.iter().enumerate() {
        for rival in order {
            let doing = format!("round {} of {ROUNDS}: {}", round + 1, RIVALS[*rival]);
            ui::progress(&format!("   {doing} …"));
            let rates = round_of(commands, target, LEND_MODES[*rival], &doing)?;
            for (all, rate) in all.iter_mut().zip(rates) {
                [&mut all.raw, &mut all.fused, &mut all.copy][*rival].push(rate);
            }
        }
    }
    let findings = WORKLOADS.iter().zip(&all).map(|(workload, rates)| {
        Finding::of(workload.name, workload.block_bytes, rates)
            .with_context(|| format!("{}: no request was completed", workload.name))
    });
    findings.collect()
}

/// One rival's round: requests a second with each workload.
fn round_of(
    commands: &Commands,
    target: &DemoTarget,
    lend: Option<&str>,
    doing: &str,
) -> Result<Vec<f64>> {
    let runtime = format!("runtime={}ms", target.environment.runtime().as_millis());
    let more = ["fixedbufs", COVERED, "time_based", &runtime, "norandommap", "randrepeat=0"];
    let jobs = WORKLOADS.map(|workload| [workload.options.as_slice(), &more].concat());
    let jobs: Vec<&[&str]> = jobs.iter().map(Vec::as_slice).collect();
    let reports = if let Some(lend) = lend {
        let device = Device::add(commands, target, lend)?;
        settle(commands);
        let reports = fio_jobs(commands, doing, &device.path, &jobs)?;
        device.delete(commands, target)?;
        reports
    } else {
        let _claim = claim(&target.backing)?;
        fio_jobs(commands, doing, text(&target.backing)?, &jobs)?
    };
    Ok(reports.iter().map(|report| report.read.iops + report.write.iops).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_rival_is_favoured_by_its_place() {
        for (n, order) in ORDERS.iter().enumerate() {
            assert!(ORDERS[n + 1..].iter().all(|other| other != order), "{order:?}");
            let mut sorted = *order;
            sorted.sort_unstable();
            assert_eq!(sorted, [0, 1, 2]);
        }
    }
}

//! Loads by fio: with checksums, of a fixed number, and for speed.

use anyhow::Result;

use super::commands::Commands;
use super::device::{Device, claim, settle, text};
use super::figures::{self, Series};
use super::place::DemoTarget;
use crate::guest::fio::{self, Report};

/// How much of the backing the loads cover.
const COVERED: &str = "size=256m";
/// Rounds of each measurement.
pub const ROUNDS: u32 = 3;
/// What is measured side by side.
const RIVALS: [(&str, Option<&str>); 3] =
    [("raw drive", None), ("ublk, fused", Some("fused")), ("ublk, copy", Some("copy"))];

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

/// What share of the raw drive's rate each mode reached, a value for each workload.
#[derive(Debug, Clone, Default)]
pub struct Shares {
    /// Without a copy.
    pub fused: Vec<f64>,
    /// With one.
    pub copy: Vec<f64>,
}

/// Runs fio on a device with `options`, without their dashes.
fn fio(commands: &Commands, doing: &str, device: &str, options: &[&str]) -> Result<Report> {
    let path = commands.path("fio.json");
    // A colon separates names for fio.
    let filename = format!("--filename={}", device.replace(':', "\\:"));
    let output = format!("--output={}", text(&path)?);
    let mut argv = vec!["fio", "--name=demo", "--output-format=json", &filename, &output];
    argv.extend(["--thread", "--ioengine=io_uring", "--direct=1", "--registerfiles"]);
    let options: Vec<String> = options.iter().map(|option| format!("--{option}")).collect();
    argv.extend(options.iter().map(String::as_str));
    commands.run(doing, &argv)?;
    fio::parse(&std::fs::read_to_string(&path)?)
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

/// Measures everything in turn, and gives `show` the table line by line.
pub fn table(
    commands: &Commands,
    target: &DemoTarget,
    mut show: impl FnMut(&str),
) -> Result<Shares> {
    {
        let _claim = claim(&target.backing)?;
        let doing = "writing once what will be read";
        fio(commands, doing, text(&target.backing)?, &["rw=write", "bs=1m", COVERED])?;
    }
    let mut shares = Shares::default();
    show(&figures::heading());
    for workload in &WORKLOADS {
        let mut all = RIVALS.map(|(name, _)| Series { name: name.into(), iops: Vec::new() });
        for round in 1..=ROUNDS {
            for (series, (name, lend)) in all.iter_mut().zip(RIVALS) {
                let doing = format!("{}: {name}, round {round} of {ROUNDS}", workload.name);
                series.iops.push(measure(commands, target, workload, lend, &doing)?);
            }
        }
        figures::rows(workload.name, workload.block_bytes, &all).iter().for_each(|row| show(row));
        let [raw, fused, copy] = &all;
        shares.fused.extend(figures::ratio(&fused.iops, &raw.iops));
        shares.copy.extend(figures::ratio(&copy.iops, &raw.iops));
    }
    Ok(shares)
}

/// One measurement, in requests a second.
fn measure(
    commands: &Commands,
    target: &DemoTarget,
    workload: &Workload,
    lend: Option<&str>,
    doing: &str,
) -> Result<f64> {
    let runtime = format!("runtime={}ms", target.place.runtime().as_millis());
    let more = ["fixedbufs", COVERED, "time_based", &runtime, "norandommap", "randrepeat=0"];
    let options = [workload.options.as_slice(), &more].concat();
    let report = if let Some(lend) = lend {
        let device = Device::add(commands, target, lend)?;
        settle(commands);
        let report = fio(commands, doing, &device.path, &options)?;
        device.delete(commands, target)?;
        report
    } else {
        let _claim = claim(&target.backing)?;
        fio(commands, doing, text(&target.backing)?, &options)?
    };
    Ok(report.read.iops + report.write.iops)
}

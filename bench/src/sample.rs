//! Invented results with seeded noise, similar to those of a run in a virtual machine.

use rand::{RngExt as _, SeedableRng as _};
use rand_xoshiro::SplitMix64;

use crate::results::{
    Backing, Cpu, FORMAT, Family, Latency, Load, Machine, Method, Results, Sample, Subject,
};

/// The percentiles of a run.
const PERCENTILES: [f64; 12] =
    [1.0, 5.0, 10.0, 25.0, 50.0, 75.0, 90.0, 95.0, 99.0, 99.9, 99.95, 99.99];

/// A subject.
pub fn subject(name: &str, family: Family, command: &str) -> Subject {
    Subject {
        name: name.into(),
        title: name.replace('-', " "),
        family,
        version: (family == Family::Rublk).then(|| "0.2.13".into()),
        command: command.into(),
        skipped: None,
    }
}

/// A load.
pub fn load(name: &str, rw: &str, block_bytes: u64, depth: u32) -> Load {
    let title = format!("{} KiB {rw}, QD{depth}", block_bytes >> 10);
    Load { name: name.into(), title, rw: rw.into(), block_bytes, depth, read_percent: None }
}

/// Subjects with their overhead over the raw backing: a fixed time in microseconds, and nanoseconds
/// for each KiB.
fn subjects() -> Vec<(Subject, f64, f64)> {
    let ours = |name: &str, options: &str| {
        let mut made =
            subject(name, Family::Ours, format!("ublk-target add loop {options}").trim_end());
        made.title = format!("ours: {}", options.replace("--", ""));
        made
    };
    vec![
        (subject("raw", Family::Raw, ""), 0.0, 0.0),
        (subject("dm-linear", Family::Kernel, "dmsetup create …"), 1.5, 2.0),
        (subject("kernel-loop", Family::Kernel, "losetup --direct-io=on"), 14.0, 3.0),
        (subject("rublk", Family::Rublk, "rublk add loop --zero-copy"), 12.0, 14.0),
        (subject("rublk-copy", Family::Rublk, "rublk add loop"), 14.0, 120.0),
        (ours("fused", "--lend fused"), 10.0, 11.0),
        (ours("slot", "--lend slot"), 12.0, 12.0),
        (ours("user-copy", "--lend user-copy"), 15.0, 110.0),
        (ours("copy", "--lend copy"), 13.0, 100.0),
        (ours("passthru", "--lend fused --passthru"), 9.0, 11.0),
    ]
}

/// Loads of a run.
pub fn loads() -> Vec<Load> {
    let mut loads = vec![
        load("randread-qd1", "randread", 4096, 1),
        load("randread-qd32", "randread", 4096, 32),
        load("randwrite-qd32", "randwrite", 4096, 32),
        load("mixed-qd32", "randrw", 4096, 32),
        load("read-128k", "read", 128 << 10, 8),
        load("write-1m", "write", 1 << 20, 8),
    ];
    loads[3].read_percent = Some(70);
    loads
}

/// A factor with a median of 1: log-normal, with the standard deviation `spread` of its logarithm.
fn about_one(rng: &mut SplitMix64, spread: f64) -> f64 {
    // The sum of 12 uniform numbers is close to a normal distribution.
    let sum: f64 = rng.random_iter::<f64>().take(12).sum();
    ((sum - 6.0) * spread).exp()
}

/// Results of a run of this many rounds.
pub fn results(seed: u64, rounds: u32) -> Results {
    let (subjects, loads) = (subjects(), loads());
    let mut rng = SplitMix64::seed_from_u64(seed);
    let mut samples = Vec::new();
    for round in 0..rounds {
        // A slow drift of the machine.
        let drift = 1.0 + f64::from(round) * 0.01;
        for load in &loads {
            for (subject, fixed_us, per_kib_ns) in &subjects {
                let kib = (load.block_bytes >> 10) as f64;
                let more_us = fixed_us + per_kib_ns * kib / 1000.0;
                samples.push(sample(&mut rng, subject, load, round, more_us * drift));
            }
        }
    }
    let mut subjects: Vec<_> = subjects.into_iter().map(|(subject, ..)| subject).collect();
    let mut polled = subject("polled", Family::Ours, "ublk-target add loop --lend fused --poll");
    polled.skipped = Some("the backing has no queues for polled I/O".into());
    subjects.push(polled);
    Results { subjects, loads, samples, ..header(rounds) }
}

fn sample(
    rng: &mut SplitMix64,
    subject: &Subject,
    load: &Load,
    round: u32,
    more_us: f64,
) -> Sample {
    let kib = (load.block_bytes >> 10) as f64;
    // Requests in flight overlap, except for their CPU time.
    let alone_us = 45.0 + kib * 0.29;
    let depth = f64::from(load.depth);
    let busy_us = 9.0 + kib * 0.2 + more_us * 0.8;
    let each_us = ((alone_us + more_us) / depth).max(busy_us) * about_one(rng, 0.02);
    let iops = 1e6 / each_us;
    let mean_ns = each_us * depth * 1000.0;
    let tail = about_one(rng, 0.2);
    let mut at = 0.0_f64;
    let percentiles = PERCENTILES.map(|percentile| {
        // Logarithmic in the fraction above the percentile.
        let spread = 0.75 + 0.35 * tail * (100.0 / (100.0 - percentile)).ln();
        at = at.max(mean_ns * spread);
        (percentile, format!("{at:.0}").parse().unwrap())
    });
    let has_server = matches!(subject.family, Family::Rublk | Family::Ours);
    Sample {
        subject: subject.name.clone(),
        load: load.name.clone(),
        round,
        iops,
        bytes_per_s: iops * load.block_bytes as f64,
        latency: Latency {
            mean_ns,
            max_ns: percentiles[11].1 * 2,
            percentiles: percentiles.to_vec(),
        },
        cpu: Cpu {
            machine_us: busy_us * about_one(rng, 0.02),
            client_us: 5.0,
            server_us: has_server.then_some(more_us * 0.5),
        },
    }
}

fn header(rounds: u32) -> Results {
    Results {
        format: FORMAT,
        version: "0.1.0".into(),
        arguments: ["run", "--backing", "/dev/nvme1n1", "--profile", "quick"]
            .map(String::from)
            .to_vec(),
        began_s: 1_795_284_000,
        took_s: 812.0,
        machine: Machine {
            kernel: "7.2.12-cloud-amd64".into(),
            cpu: "QEMU TCG CPU version 2.5+".into(),
            cpus: 2,
            memory_bytes: 4 << 30,
            virtualization: Some("qemu".into()),
            governor: None,
            fio: "3.39".into(),
        },
        backing: Backing {
            path: "/dev/nvme1n1".into(),
            kind: "nvme".into(),
            model: Some("QEMU NVMe Ctrl".into()),
            size_bytes: 8 << 30,
            logical_block_bytes: 512,
            span_bytes: 1 << 30,
            scheduler: Some("none".into()),
            poll_queues: 0,
        },
        method: Method { profile: "quick".into(), rounds, sample_s: 2.0, warm_up_s: 0.5 },
        subjects: Vec::new(),
        loads: Vec::new(),
        samples: Vec::new(),
        incomplete: None,
    }
}

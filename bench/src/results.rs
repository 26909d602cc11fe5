//! The results of a run: the file that `run` writes, and that the other commands read. Plain data,
//! *untrusted* when it is read back.

use serde::{Deserialize, Serialize};

/// Version of the file's format.
pub const FORMAT: u32 = 1;

/// A run: what was measured, on what, how, and the results.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Results {
    /// The [`FORMAT`] of the program that wrote it.
    pub format: u32,
    /// Version of ublk-bench.
    pub version: String,
    /// The command line, without the program.
    pub arguments: Vec<String>,
    /// When it began, in seconds since 1970 (UTC).
    pub began_s: u64,
    /// How long it took, in seconds.
    pub took_s: f64,
    /// The machine.
    pub machine: Machine,
    /// The backing.
    pub backing: Backing,
    /// How it was measured.
    pub method: Method,
    /// What was measured, in the order of the tables.
    pub subjects: Vec<Subject>,
    /// The loads, in the order of the tables.
    pub loads: Vec<Load>,
    /// All measurements, in the order in which they were made.
    pub samples: Vec<Sample>,
    /// Why the run is incomplete, if it is.
    pub incomplete: Option<String>,
}

/// The machine that was measured on.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    /// Release of the kernel.
    pub kernel: String,
    /// The model name of the processor.
    pub cpu: String,
    /// Processors that are online.
    pub cpus: u32,
    /// Memory, in bytes.
    pub memory_bytes: u64,
    /// The kind of virtual machine, if it is one.
    pub virtualization: Option<String>,
    /// The CPU frequency governor, if there is one.
    pub governor: Option<String>,
    /// Version of fio.
    pub fio: String,
}

/// The backing below all devices.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Backing {
    /// Its path, as given by the user.
    pub path: String,
    /// Its kind: `nvme`, `block` or `file`.
    pub kind: String,
    /// The model name of the drive, if known.
    pub model: Option<String>,
    /// Its size, in bytes.
    pub size_bytes: u64,
    /// Its logical block size, in bytes.
    pub logical_block_bytes: u32,
    /// How much of it was used, in bytes.
    pub span_bytes: u64,
    /// Its I/O scheduler, if it has one.
    pub scheduler: Option<String>,
    /// The number of its queues for polled I/O.
    pub poll_queues: u32,
}

/// How it was measured.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Method {
    /// Name of the profile.
    pub profile: String,
    /// The planned number of rounds. In each round, each subject is measured once with each load.
    pub rounds: u32,
    /// The duration of a sample, in seconds, without its warm-up.
    pub sample_s: f64,
    /// The duration of the warm-up before each sample, in seconds.
    pub warm_up_s: f64,
}

/// The maker of a subject.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Family {
    /// The backing itself: the limit.
    Raw,
    /// A driver of the kernel.
    Kernel,
    /// rublk.
    Rublk,
    /// ublk-target.
    Ours,
}

/// A device that was measured.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Subject {
    /// Its name in samples and options.
    pub name: String,
    /// Its title in tables.
    pub title: String,
    /// Its maker.
    pub family: Family,
    /// The version, if it is no part of the kernel.
    pub version: Option<String>,
    /// The command that made the device, without the backing's path.
    pub command: String,
    /// Why it was not measured, if so.
    pub skipped: Option<String>,
}

/// A load.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Load {
    /// Its name in samples.
    pub name: String,
    /// Its title in tables.
    pub title: String,
    /// fio's `rw`.
    pub rw: String,
    /// Bytes of a request.
    pub block_bytes: u64,
    /// Requests in flight.
    pub depth: u32,
    /// The percentage of reads, if the load is mixed.
    pub read_percent: Option<u32>,
}

/// One measurement of one subject with one load.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// The subject's name.
    pub subject: String,
    /// The load's name.
    pub load: String,
    /// The round, from 0.
    pub round: u32,
    /// Requests completed in a second.
    pub iops: f64,
    /// Bytes moved in a second.
    pub bytes_per_s: f64,
    /// The latencies.
    pub latency: Latency,
    /// CPU time for each request.
    pub cpu: Cpu,
}

/// Latencies of reads and writes together, in nanoseconds.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Latency {
    /// The mean.
    pub mean_ns: f64,
    /// The maximum.
    pub max_ns: u64,
    /// Percentiles, 1 to 99.99, with their values, in ascending order.
    pub percentiles: Vec<(f64, u64)>,
}

/// CPU time for each request, in microseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Cpu {
    /// Of the whole machine while the sample ran, interrupts included.
    pub machine_us: f64,
    /// Of the load generator.
    pub client_us: f64,
    /// Of the server, if there is one.
    pub server_us: Option<f64>,
}

impl Results {
    /// The samples of a subject with a load, in their order.
    pub fn samples_of<'a>(
        &'a self,
        subject: &'a str,
        load: &'a str,
    ) -> impl Iterator<Item = &'a Sample> {
        self.samples.iter().filter(move |sample| sample.subject == subject && sample.load == load)
    }
}

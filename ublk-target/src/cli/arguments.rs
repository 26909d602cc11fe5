//! The command line.

use std::num::NonZeroU64;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use ublk_engine::target::{Rate, Rates, Rule};
use ublk_engine::units::{Bytes, Nanos, NotASize};
use ublk_target::config::{ExtentConfig, LayerKind, LayerName};
use ublk_target::control::deletion;

use super::device::{Device, Life, seconds};
use super::which::{One, OnlyOption, Perhaps, Which};

/// Serves Linux block devices (/dev/ublkbN) from user space, without copying their data.
#[derive(Debug, Parser)]
#[command(name = "ublk-target", version, max_term_width = 100)]
pub struct Cli {
    /// Log more (-v: choices and their reasons, -vv: details)
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Add a device and serve it
    #[command(subcommand)]
    Add(Target),
    /// Serve all devices of a file in one process, with few threads
    #[command(after_help = SERVE_HELP)]
    Serve(Serve),
    /// Delete devices in any state; a device that is open or mounted is refused
    #[command(after_help = DEL_HELP)]
    Del(Del),
    /// Start a new server for a device whose server is dead
    Recover(Recover),
    /// Replace the running server of a device with this version of the program
    Upgrade(Upgrade),
    /// Change the size of a device while it is used
    Resize(Resize),
    /// Change the layers of a device while it is used
    #[command(subcommand)]
    Interpose(Interpose),
    /// Show devices
    List(List),
    /// Show rates, lent slots and latencies of a device
    Stats(Stats),
    /// Show the features of this kernel's ublk driver
    Features(Features),
    /// Stop or remove a device for a process that must not do it itself
    #[command(hide = true)]
    StopDevice {
        /// The device /dev/ublkbID
        #[arg(short = 'n', long, value_name = "ID")]
        id: u32,
        /// The command for the driver
        #[arg(long, value_name = "WHAT", default_value = "stop")]
        command: deletion::Command,
    },
    /// Suspend the I/O of a device until its next server
    #[command(hide = true)]
    QuiesceDevice {
        /// The device /dev/ublkbID
        #[arg(short = 'n', long, value_name = "ID")]
        id: u32,
        /// Process id of its server, which has started this process
        #[arg(long, value_name = "PID")]
        server: u32,
    },
    /// Check whether this program could replace the server of a device
    #[command(hide = true)]
    CheckState {
        /// The device /dev/ublkbID
        #[arg(short = 'n', long, value_name = "ID")]
        id: u32,
    },
    /// Wait for the end of a device's partition scan; its server must not wait itself
    #[command(hide = true)]
    AwaitPartitions {
        /// The device /dev/ublkbID
        #[arg(short = 'n', long, value_name = "ID")]
        id: u32,
    },
    /// Supervise the server of a device
    #[command(hide = true)]
    Supervise {
        /// The device /dev/ublkbID
        #[arg(short = 'n', long, value_name = "ID")]
        id: u32,
        /// Process id of its server
        #[arg(long, value_name = "PID")]
        server: u32,
    },
}

// Targets can be nested, so clap builds only the requested ones.
#[derive(Debug, Subcommand)]
#[command(defer = true)]
pub enum Target {
    /// Discard writes and read as zeros
    Null {
        /// Size of the device: bytes, or a number with K, M, G, T or P
        #[arg(long, default_value = "250G")]
        size: Bytes,
        #[command(flatten)]
        device: Device,
    },
    /// Map one file or block device, block for block
    Loop {
        /// The backing: a block device (opened exclusively) or a regular file (locked)
        #[arg(short, long, value_name = "PATH")]
        file: PathBuf,
        #[command(flatten)]
        device: Device,
    },
    /// Concatenate extents of files or block devices
    Linear {
        /// An extent, in the order of the device: a backing, the offset of the extent on it (default
        /// 0) and its length (default: to the end); can be repeated
        #[arg(short, long = "file", value_name = "PATH[,OFFSET[,LENGTH]]", required = true)]
        file: Vec<Extent>,
        #[command(flatten)]
        device: Device,
    },
    /// Stripe over files or block devices (RAID 0)
    Stripe {
        /// A backing; repeat the option for 2 to 64 backings
        #[arg(short, long = "file", value_name = "PATH", required = true)]
        file: Vec<PathBuf>,
        /// Chunk size: a power of two, at least 4K
        #[arg(short, long, value_name = "SIZE", default_value = "64K")]
        chunk: Bytes,
        #[command(flatten)]
        device: Device,
    },
    /// Put a layer before another target that injects faults: errors, short transfers, delays
    #[command(after_help = format!("{RULES_HELP}\n\n{FAULT_HELP}"), subcommand_value_name = "TARGET", subcommand_help_heading = "Targets")]
    Fault {
        #[command(flatten)]
        faults: Faults,
        #[command(subcommand)]
        target: Box<Target>,
    },
}

// The options of the layer `fault`.
#[derive(Clone, Debug, Args)]
pub struct Faults {
    /// Which requests get which fault, see below; can be repeated, the first matching rule applies
    #[arg(long, value_name = "RULE", required = true)]
    pub rule: Vec<Rule>,
    /// Random seed: the same seed and requests give the same faults
    #[arg(long, value_name = "N", default_value = "0")]
    pub seed: u64,
}

// The options of the layer `throttle`.
#[derive(Clone, Copy, Debug, Args)]
#[group(id = "rates", required = true, multiple = true)]
pub struct Throttle {
    /// Reads a second
    #[arg(long, value_name = "N", value_parser = some_requests)]
    pub read_iops: Option<NonZeroU64>,
    /// Bytes a second that are read
    #[arg(long, value_name = "SIZE", value_parser = some_bytes)]
    pub read_bps: Option<NonZeroU64>,
    /// Writes, discards and write-zeroes a second
    #[arg(long, value_name = "N", value_parser = some_requests)]
    pub write_iops: Option<NonZeroU64>,
    /// Bytes a second that are written or zeroed; a discard has none
    #[arg(long, value_name = "SIZE", value_parser = some_bytes)]
    pub write_bps: Option<NonZeroU64>,
}

/// A layer with its options.
#[derive(Clone, Debug, Subcommand)]
#[command(subcommand_value_name = "LAYER", subcommand_help_heading = "Layers")]
pub enum Layer {
    /// Inject faults: errors, short transfers, delays
    #[command(after_help = RULES_HELP)]
    Fault(Faults),
    /// Let only so many requests and bytes a second pass, over all queues; others wait for their turn
    Throttle {
        #[command(flatten)]
        rates: Throttle,
        /// After a rest, as much may pass at once as in this time: a number with ns, us, ms or s
        #[arg(long, value_name = "TIME", default_value = "100ms")]
        burst: Nanos,
    },
}

/// A number that is not 0.
fn some_requests(text: &str) -> Result<NonZeroU64, String> {
    text.parse().map_err(|_| "not a number of requests, at least 1".to_owned())
}

/// A size that is not 0.
fn some_bytes(text: &str) -> Result<NonZeroU64, String> {
    let Bytes(bytes) = text.parse().map_err(|error: NotASize| error.to_string())?;
    NonZeroU64::new(bytes).ok_or_else(|| "at least one byte has to pass".to_owned())
}

impl Layer {
    pub fn kind(&self) -> LayerKind {
        match self {
            Self::Fault(Faults { rule, seed }) => {
                LayerKind::Fault { rules: rule.clone(), seed: *seed }
            }
            Self::Throttle { rates: it, burst } => {
                let read = Rate { iops: it.read_iops, bps: it.read_bps };
                let write = Rate { iops: it.write_iops, bps: it.write_bps };
                LayerKind::Throttle(Rates { read, write, burst: *burst })
            }
        }
    }
}

/// A layer as one argument: its kind and options, with spaces in between.
#[derive(Clone, Debug)]
pub struct LayerArgument {
    pub name: Option<LayerName>,
    pub kind: LayerKind,
}

/// The words of a [`LayerArgument`].
#[derive(Debug, Parser)]
#[command(name = "--layer", disable_help_subcommand = true)]
struct LayerWords {
    #[arg(long)]
    name: Option<LayerName>,
    #[command(subcommand)]
    layer: Layer,
}

impl std::str::FromStr for LayerArgument {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let words = std::iter::once("--layer").chain(text.split_whitespace());
        let parsed = LayerWords::try_parse_from(words);
        let LayerWords { name, layer } =
            parsed.map_err(|error| super::one_line(&error.render().to_string()))?;
        Ok(Self { name, kind: layer.kind() })
    }
}

/// Attaches layers to a device that is used, and detaches them.
#[derive(Debug, Subcommand)]
pub enum Interpose {
    /// Put a layer between the users of a device and its target
    #[command(after_help = ATTACH_HELP)]
    Attach {
        #[command(flatten)]
        which: OnlyOption,
        /// Name of the layer [default: its kind, with a number if that is taken]
        #[arg(long)]
        name: Option<LayerName>,
        /// Put it directly inside of the layer NAME, away from the client [default: outside of all]
        #[arg(long, value_name = "NAME")]
        inside: Option<LayerName>,
        #[command(flatten)]
        wait: ToEnd,
        #[command(subcommand)]
        layer: Layer,
    },
    /// Remove a layer
    Detach {
        #[command(flatten)]
        which: OnlyOption,
        /// The layer
        #[arg(value_name = "NAME")]
        name: LayerName,
        #[command(flatten)]
        wait: ToEnd,
    },
    /// Show the layers of a device, the outermost first
    List {
        #[command(flatten)]
        which: One,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
}

// How long to wait for the requests that have begun.
#[derive(Clone, Copy, Debug, Args)]
pub struct ToEnd {
    /// How long to wait until the requests that have begun have ended; if they have not, nothing changes
    #[arg(long, value_name = "SECONDS", default_value = "5", value_parser = seconds)]
    pub timeout: Duration,
    /// Print the layer and how long requests waited as JSON
    #[arg(long)]
    pub json: bool,
}

pub const ATTACH_HELP: &str = "\
The device stays in use, and none of its requests fails. New requests wait until those that have begun
have ended; then the layer is put in, and the new ones begin. `attach` prints how long they waited. The
layer stays until `detach`, also through `upgrade` and `recover`. `ublk-target interpose attach LAYER
--help` shows the options of a layer:
  ublk-target interpose attach -n 3 --name bad-writes fault --rule op=write,p=0.01,error=EIO
  ublk-target interpose attach -n 3 throttle --read-iops 2000 --write-bps 50M
  ublk-target interpose detach -n 3 bad-writes";

/// The names of the targets.
pub const TARGETS: [&str; 5] = ["null", "loop", "linear", "stripe", "fault"];

pub const RULES_HELP: &str = "\
A rule matches requests by:
  op=KIND+KIND…     read, write, flush, discard, write-zeroes [default: all that allow the effect]
  range=START-END   requests that touch these bytes; also START+LENGTH, with K, M, G, T
  p=P               probability [default: 1]
  count=N           at most N requests per queue
Effects, one or more:
  error=NAME        fails with this error: EIO, ENOSPC, ETIMEDOUT, ENOLINK, EREMOTEIO, EBADE,
                    ENODATA, EILSEQ, ENODEV or ETIME; no data is read or written
  short             transfers only a part at first, as a drive may; the server continues with the rest
  delay=TIME        delays the request first: a number with ns, us, ms or s";

pub const FAULT_HELP: &str = "\
The options of the device (-n, -q, -d, --lend, …) follow the target:
  ublk-target add fault --rule p=0.01,error=EIO loop -f /dev/nvme1n1 -n 3
  ublk-target add fault --rule op=write,range=1G+4K,count=1,error=ENOSPC --rule op=read,delay=10ms \\
      stripe -f /dev/nvme1n1 -f /dev/nvme2n1 --lend slot";

/// A part of a backing: `PATH[,OFFSET[,LENGTH]]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Extent(pub ExtentConfig);

impl std::str::FromStr for Extent {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut fields = text.split(',');
        let file = PathBuf::from(fields.next().filter(|path| !path.is_empty()).ok_or("no path")?);
        let mut size = || fields.next().map(str::parse::<Bytes>).transpose();
        let offset = size().map_err(|error| error.to_string())?.unwrap_or_default();
        let len = size().map_err(|error| error.to_string())?;
        match fields.next() {
            None => Ok(Self(ExtentConfig { file, offset, len })),
            Some(_) => Err("more than a path, an offset and a length".to_owned()),
        }
    }
}

#[derive(Debug, Args)]
pub struct Serve {
    /// The file of the devices
    #[arg(short, long, value_name = "PATH", default_value = "/etc/ublk-target/serve.toml")]
    pub config: PathBuf,
    /// Only check the file, its devices and their backings, and print the errors
    #[arg(long)]
    pub check: bool,
}

pub const SERVE_HELP: &str = "\
The file is TOML. A device is a table with its target and the long options of `add TARGET`:
  lanes = 2                  # threads that serve I/O [default: one per CPU]
  [[device]]
  id = 0
  target = \"loop\"
  file = \"/dev/nvme1n1\"
  queues = 2
  on-death = \"reissue\"
  [[device]]
  id = 1
  target = \"linear\"
  file = [\"/dev/nvme2n1,0,10G\", \"/srv/disk.img\"]
  rule = [\"p=0.01,error=EIO\"] # short for a single layer `fault`
A device with layers has a table for each, the outermost first. The outermost layer sees a request
before the others. A `name` is unique in the device; by default it is the kind:
  [[device.layer]]
  kind = \"fault\"             # with the options of `interpose attach`
  name = \"bad-writes\"
  rule = [\"op=write,p=0.01,error=EIO\"]
  seed = 4
The process stays in the foreground, prints the devices when they are live, and notifies systemd.
SIGHUP rereads the file: new devices are added, removed ones are deleted, changed ones are deleted and
added again. A device in use stays as it was. If only the layers of a device have changed, they are
changed while it is used. If the file has an error, nothing changes. SIGTERM stops
all devices. After SIGKILL, the next `serve` takes over devices with `on-death` wait, reissue or error,
and adds the others again. Devices that poll, send NVMe commands, have an I/O lane or a `busy-wait` in
microseconds get lanes of their own. A device stacked on another one of the process, directly or not,
is refused.";

#[derive(Debug, Args)]
pub struct Del {
    #[command(flatten)]
    pub which: Which,
    /// Delete a device even if it is open or mounted: the I/O of its users fails. Kill its server
    /// if it does not end within 5 seconds
    #[arg(long)]
    pub force: bool,
}

pub const DEL_HELP: &str = "\
It works on devices in any state: live, waiting for recovery, in recovery, never started, with a dead
server. It returns when the device, its server and its supervisor are gone. Every wait is bounded. A
server of several devices (`serve`) keeps running without this one. --all also ends servers and
supervisors of this program without a device, and removes files in /run/ublk-target without a device.";

#[derive(Debug, Args)]
pub struct Recover {
    #[command(flatten)]
    pub which: Which,
    #[command(flatten)]
    pub life: Life,
}

#[derive(Debug, Args)]
pub struct Upgrade {
    #[command(flatten)]
    pub which: Which,
    /// The new program [default: this one]
    #[arg(long, value_name = "PATH")]
    pub program: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub struct Resize {
    #[command(flatten)]
    pub which: One,
    /// Size of the device: bytes, or a number with K, M, G, T or P [default: the present size of
    /// the backings]
    #[arg(long)]
    pub size: Option<Bytes>,
    /// Allow a smaller size; refused while the device is open or mounted
    #[arg(long)]
    pub shrink: bool,
}

#[derive(Debug, Args)]
pub struct List {
    #[command(flatten)]
    pub which: Perhaps,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct Stats {
    #[command(flatten)]
    pub which: One,
    /// Print JSON: one object; with --watch, one object per line
    #[arg(long)]
    pub json: bool,
    /// Repeat until interrupted, or until the device is gone
    #[arg(long)]
    pub watch: bool,
    /// Length of a sample in seconds, from 0.1
    #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = interval)]
    pub interval: Duration,
    /// List each lent slot and the operations that borrow it
    #[arg(long)]
    pub slots: bool,
}

/// A sample length: seconds from 0.1 to a day.
fn interval(text: &str) -> Result<Duration, String> {
    let interval = seconds(text).ok().filter(|interval| *interval >= Duration::from_millis(100));
    interval.ok_or_else(|| "not a number of seconds from 0.1 to 86400".to_owned())
}

#[derive(Debug, Args)]
pub struct Features {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

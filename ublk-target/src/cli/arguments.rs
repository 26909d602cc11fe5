//! The command line.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use ublk_engine::target::Rule;
use ublk_engine::units::Bytes;
use ublk_target::config::ExtentConfig;
use ublk_target::control::deletion;

use super::device::{Device, Life, seconds};
use super::which::{One, Perhaps, Which};

/// Serves Linux block devices (/dev/ublkbN) from user space, without copying their data.
#[derive(Debug, Parser)]
#[command(name = "ublk-target", version, max_term_width = 100)]
pub struct Cli {
    /// Say more (-v: choices and their reasons, -vv: details)
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
    /// Serve many devices with few threads, as a file says
    #[command(after_help = SERVE_HELP)]
    Serve(Serve),
    /// Delete devices, in whatever state they are; one that is open or mounted is refused
    #[command(after_help = DEL_HELP)]
    Del(Del),
    /// Give a device whose server is dead a new one
    Recover(Recover),
    /// Have devices served by another version of this program, while they are used
    Upgrade(Upgrade),
    /// Change the size of a device, while it is used
    Resize(Resize),
    /// Show devices
    List(List),
    /// Show what a device does: rates, lent slots, latencies
    Stats(Stats),
    /// Show what the ublk driver of this kernel can do
    Features(Features),
    /// Stop or remove a device for a process that must not do it itself
    #[command(hide = true)]
    StopDevice {
        /// The device /dev/ublkbID
        #[arg(short = 'n', long, value_name = "ID")]
        id: u32,
        /// What to have the driver do
        #[arg(long, value_name = "WHAT", default_value = "stop")]
        command: deletion::Command,
    },
    /// Make the I/O of a device wait for its next server
    #[command(hide = true)]
    QuiesceDevice {
        /// The device /dev/ublkbID
        #[arg(short = 'n', long, value_name = "ID")]
        id: u32,
        /// Process id of its server, which has started this process
        #[arg(long, value_name = "PID")]
        server: u32,
    },
    /// Say whether this program could serve a device in the place of its present server
    #[command(hide = true)]
    CheckState {
        /// The device /dev/ublkbID
        #[arg(short = 'n', long, value_name = "ID")]
        id: u32,
    },
    /// Wait until the kernel has looked for partitions on a device, for its server, which must not
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

// One may be within another, so they are made only as far as they are asked for.
#[derive(Debug, Subcommand)]
#[command(defer = true)]
pub enum Target {
    /// A device that forgets what is written to it and reads as zeros
    Null {
        /// Size of the device: bytes, or a number with K, M, G, T or P
        #[arg(long, default_value = "250G")]
        size: Bytes,
        #[command(flatten)]
        device: Device,
    },
    /// A file or block device, block for block
    Loop {
        /// The backing: a block device (opened exclusively) or a regular file (locked)
        #[arg(short, long, value_name = "PATH")]
        file: PathBuf,
        #[command(flatten)]
        device: Device,
    },
    /// Extents of files or block devices, one after the other
    Linear {
        /// An extent, in the order of the device: a backing, and where on it the extent begins
        /// (default 0) and how long it is (default: to the end)
        #[arg(short, long = "file", value_name = "PATH[,OFFSET[,LENGTH]]", required = true)]
        file: Vec<Extent>,
        #[command(flatten)]
        device: Device,
    },
    /// Chunks that go to files or block devices in turn (RAID 0)
    Stripe {
        /// A backing; 2 to 64 of them
        #[arg(short, long = "file", value_name = "PATH", required = true)]
        file: Vec<PathBuf>,
        /// Bytes of a chunk: a power of two of at least 4K
        #[arg(short, long, value_name = "SIZE", default_value = "64K")]
        chunk: Bytes,
        #[command(flatten)]
        device: Device,
    },
    /// Another target, some of whose requests fail, come short at first, or are held back
    #[command(after_help = FAULT_HELP, subcommand_value_name = "TARGET", subcommand_help_heading = "Targets")]
    Fault {
        /// Which requests meet what, see below; the first rule that applies decides
        #[arg(long, value_name = "RULE", required = true)]
        rule: Vec<Rule>,
        /// The same seed and requests meet the same faults
        #[arg(long, value_name = "N", default_value = "0")]
        seed: u64,
        #[command(subcommand)]
        target: Box<Target>,
    },
}

/// Their names.
pub const TARGETS: [&str; 5] = ["null", "loop", "linear", "stripe", "fault"];

pub const FAULT_HELP: &str = "\
Which requests a rule concerns:
  op=KIND+KIND…     read, write, flush, discard, write-zeroes [default: all that the effect fits]
  range=START-END   those that touch these bytes of the device; also START+LENGTH, with K, M, G, T
  p=P               with this probability [default: 1]
  count=N           at most N of each queue
What it does to them, one or more:
  error=NAME        answers with this error: EIO, ENOSPC, ETIMEDOUT, ENOLINK, EREMOTEIO, EBADE,
                    ENODATA, EILSEQ, ENODEV or ETIME; nothing is read or written
  short             reads or writes only a part at first, as a drive may; the server goes on with the rest
  delay=TIME        holds them for so long first: a number with ns, us, ms or s

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
    /// Say what is wrong with the file, its devices and their backings, and do no more
    #[arg(long)]
    pub check: bool,
}

pub const SERVE_HELP: &str = "\
The file is TOML. A device is a table with its target and the long options of `add TARGET`:
  lanes = 2                  # threads that serve I/O [default: one for each CPU]
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
A device with layers has a table for each, the outermost first, which sees a request before the others;
a `name` tells it from the others, and is the kind if it is left out:
  [[device.layer]]
  kind = \"fault\"             # with the options of `add fault`
  name = \"bad-writes\"
  rule = [\"op=write,p=0.01,error=EIO\"]
  seed = 4
The process stays in the foreground, prints the devices when they are live, and tells systemd. SIGHUP has
it read the file again: devices that are new are added, those that are gone or have changed are deleted
if nobody uses them; with a fault in the file all stays as it was. SIGTERM takes all devices down. After
SIGKILL the next `serve` takes over those of `on-death` wait, reissue and error, and adds the others
again. Devices that poll, give NVMe commands, have an I/O lane or a `busy-wait` in microseconds get lanes
of their own. A device that stands on another one of the process, in whatever way, is refused.";

#[derive(Debug, Args)]
pub struct Del {
    #[command(flatten)]
    pub which: Which,
    /// Delete a device that is open or mounted all the same: I/O of its users fails. Kill its server
    /// if that does not end within 5 seconds
    #[arg(long)]
    pub force: bool,
}

pub const DEL_HELP: &str = "\
Works on devices that are live, wait for recovery or are just recovered, that were never started, or
whose server is dead. It returns when the device, its server and its supervisor are gone, and bounds
every wait. A server of several devices (`serve`) goes on without this one. --all also ends other servers
and supervisors of this program that have no device, and removes files in /run/ublk-target that belong to
none.";

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
    /// The program that is to serve from now on [default: this one]
    #[arg(long, value_name = "PATH")]
    pub program: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub struct Resize {
    #[command(flatten)]
    pub which: One,
    /// Size of the device: bytes, or a number with K, M, G, T or P [default: all of the backings, which
    /// may have grown]
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
    /// Print JSON: one object, with --watch one a line
    #[arg(long)]
    pub json: bool,
    /// Go on until interrupted, or until the device is gone
    #[arg(long)]
    pub watch: bool,
    /// Look at so many seconds, whole or not
    #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = interval)]
    pub interval: Duration,
    /// Name each lent slot and what borrows it
    #[arg(long)]
    pub slots: bool,
}

/// A number of seconds that lanes can be asked after again and again.
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

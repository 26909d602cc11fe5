//! Options that all targets share.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};
use ublk_target::config::busy_wait::BusyWait;
use ublk_target::config::lend::LendRequest;
use ublk_target::config::on_death::OnDeath;
use ublk_target::config::polling;
use ublk_target::device::mark::Nonce;
use uring_ext::ring::Polling;

use super::arguments::LayerArgument;
use super::which;

// A doc comment here would replace the target's own help.
#[derive(Debug, Args)]
pub struct Device {
    /// Device id: the device is /dev/ublkbID [default: the first free id]
    #[arg(short = 'n', long, value_name = "ID", value_parser = which::id)]
    pub id: Option<u32>,
    /// Number of queues; the driver takes no more than there are CPUs
    #[arg(short, long, default_value = "1", value_parser = clap::value_parser!(u16).range(1..=4096))]
    pub queues: u16,
    /// Queue depth: requests in flight per queue
    #[arg(short, long, default_value = "128", value_parser = clap::value_parser!(u16).range(1..=4096))]
    pub depth: u16,
    /// How the data of a request gets to the backing
    #[arg(long, value_name = "MODE", default_value = "auto")]
    pub lend: LendRequest,
    /// Slot of tag 0 in the lane's buffer table; the other tags use the following slots [default: 0
    /// with `fused`, any free slot with `slot`]
    #[arg(long, value_name = "N")]
    pub first_slot: Option<u16>,
    /// Issue the operations of each queue from a second thread and ring (with `--lend slot`)
    #[arg(long)]
    pub io_lane: bool,
    /// Cancel an operation on the backing after this time, and fail its request with ETIMEDOUT
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    pub io_timeout: Option<Duration>,
    /// Send NVMe commands to the backings, bypassing the block layer (Linux 6.19). The backings must
    /// be whole namespaces. /dev/ngXnY always uses NVMe commands
    #[arg(long)]
    pub passthru: bool,
    /// Poll drives for completions instead of waiting for interrupts; `hybrid` first sleeps for half
    /// of the time that operations take (Linux 7.1, and drives with poll queues)
    #[arg(long, value_name = "HOW", num_args = 0..=1, default_missing_value = "busy")]
    pub poll: Option<Poll>,
    /// With --poll: what to do if a backing has no poll queues
    #[arg(long, value_name = "WHAT", default_value = "refuse", requires = "poll")]
    pub unpolled: Unpolled,
    /// Spin for completions before sleeping, while requests come one by one: `auto` (at most 200 us,
    /// and only if that is usually enough), `off`, or a limit in microseconds. A thread that has
    /// one CPU only takes real-time priority instead. Not with --poll
    #[arg(long, value_name = "HOW", default_value = "auto", value_parser = busy_wait)]
    #[arg(conflicts_with = "poll")]
    pub busy_wait: BusyWait,
    /// Block size: 512, 1024, 2048 or 4096 [default: that of the backing]. If the file system of a
    /// file needs larger blocks for direct I/O, the file goes through the page cache
    #[arg(long, value_name = "BYTES", value_parser = block_size)]
    pub block_size: Option<u32>,
    /// What happens to the device when its server dies. All but `fail` allow `recover`, and automatic
    /// recovery with --supervise [default: fail; with --supervise: reissue]
    #[arg(long, value_name = "WHAT")]
    pub on_death: Option<OnDeath>,
    /// Do not scan for partitions; others can, with `partprobe` (Linux 7.0). Without this option, the
    /// kernel scans, and `add` returns when the partitions exist
    #[arg(long)]
    pub no_part_scan: bool,
    /// Put a layer before the target: its kind and options, as in `interpose attach`, in one argument;
    /// can be repeated, the outermost first. For instance --layer 'fault --rule p=0.01,error=EIO'
    #[arg(long, value_name = "LAYER", allow_hyphen_values = true)]
    pub layer: Vec<LayerArgument>,
    /// With -n: if the device exists and its server is dead, recover it instead of adding it; it keeps
    /// its options. For services that restart
    #[arg(long, requires = "id")]
    pub or_recover: bool,
    #[command(flatten)]
    pub life: Life,
}

// Where the server runs, and for how long.
#[derive(Clone, Debug, Args)]
pub struct Life {
    /// Replace a dead server at once
    #[arg(long)]
    pub supervise: bool,
    /// Stay in the foreground and log to the terminal
    #[arg(long)]
    pub foreground: bool,
    /// Print the device as JSON
    #[arg(long)]
    pub json: bool,
    /// The role of this process among those of a command
    #[arg(long, hide = true)]
    pub role: Option<Role>,
    /// Process id of the supervisor
    #[arg(long, hide = true, value_name = "PID")]
    pub supervisor: Option<u32>,
    /// The mark of devices that this process adds
    #[arg(long, hide = true)]
    pub nonce: Option<Nonce>,
    /// The path of this process's program
    #[arg(long, hide = true, value_name = "PATH")]
    pub program: Option<PathBuf>,
    /// This process was the device's server before `execve`
    #[arg(long, hide = true)]
    pub next: bool,
}

/// The role of a process that this program has started.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Role {
    /// Serves in the background; the process at the other end of standard output waits for it
    Server,
    /// Starts servers
    Supervisor,
}

/// How to poll drives for completions.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Poll {
    /// Poll without a pause
    Busy,
    /// Sleep first, then poll
    Hybrid,
}

/// What to do if a backing cannot be polled.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Unpolled {
    /// Refuse to serve the device
    Refuse,
    /// Use interrupts for the whole device
    Interrupt,
}

impl Device {
    pub fn polling(&self) -> Polling {
        match self.poll {
            None => Polling::Off,
            Some(Poll::Busy) => Polling::Busy,
            Some(Poll::Hybrid) => Polling::Hybrid,
        }
    }

    pub fn on_death(&self) -> OnDeath {
        let default = if self.life.supervise { OnDeath::Reissue } else { OnDeath::Fail };
        self.on_death.unwrap_or(default)
    }

    pub fn unpolled(&self) -> polling::Unpolled {
        match self.unpolled {
            Unpolled::Refuse => polling::Unpolled::Refuse,
            Unpolled::Interrupt => polling::Unpolled::Interrupt,
        }
    }
}

/// `auto`, `off`, or a number of microseconds up to a second.
fn busy_wait(text: &str) -> Result<BusyWait, String> {
    match text {
        "auto" => Ok(BusyWait::Auto),
        "off" => Ok(BusyWait::Off),
        _ => {
            let limit = text.parse().ok().filter(|us| (1..=1_000_000).contains(us));
            let limit =
                limit.ok_or("neither `auto` nor `off` nor microseconds from 1 to 1000000")?;
            Ok(BusyWait::Limit(Duration::from_micros(limit)))
        }
    }
}

/// A power of two from 512 to 4,096.
fn block_size(text: &str) -> Result<u32, String> {
    let bytes = text.parse().ok();
    let bytes = bytes.filter(|bytes: &u32| (512..=4096).contains(bytes) && bytes.is_power_of_two());
    bytes.ok_or_else(|| "neither 512, 1024, 2048 nor 4096".to_owned())
}

/// Seconds, from 0.001 to a day.
pub fn seconds(text: &str) -> Result<Duration, String> {
    let seconds = text.parse().ok().filter(|seconds| (0.001..=86_400.0).contains(seconds));
    let seconds = seconds.ok_or("not a number of seconds from 0.001 to 86400")?;
    Ok(Duration::from_secs_f64(seconds))
}

//! Arguments that all targets have in common.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};
use ublk_target::config::busy_wait::BusyWait;
use ublk_target::config::lend::LendRequest;
use ublk_target::config::on_death::OnDeath;
use ublk_target::config::polling;
use ublk_target::device::mark::Nonce;
use uring_ext::ring::Polling;

use super::which;

// A doc comment here would take the place of the target's own help.
#[derive(Debug, Args)]
pub struct Device {
    /// Device id: the device is /dev/ublkbID [default: the first free one]
    #[arg(short = 'n', long, value_name = "ID", value_parser = which::id)]
    pub id: Option<u32>,
    /// Number of queues; the driver takes no more than there are CPUs
    #[arg(short, long, default_value = "1", value_parser = clap::value_parser!(u16).range(1..=4096))]
    pub queues: u16,
    /// Requests in flight for each queue
    #[arg(short, long, default_value = "128", value_parser = clap::value_parser!(u16).range(1..=4096))]
    pub depth: u16,
    /// How request buffers get to the backing
    #[arg(long, value_name = "MODE", default_value = "auto")]
    pub lend: LendRequest,
    /// Lend in slot N of the lane's buffer table for tag 0, and the following slots for the other
    /// tags [default: 0 with `fused`, whichever is free with `slot`]
    #[arg(long, value_name = "N")]
    pub first_slot: Option<u16>,
    /// Issue the operations of each queue from a second thread and ring (with `--lend slot`)
    #[arg(long)]
    pub io_lane: bool,
    /// Cancel an operation on the backing after so many seconds, and fail its request
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    pub io_timeout: Option<Duration>,
    /// Give NVMe commands to the backings, which are whole namespaces, past the block layer
    /// (Linux 6.19). /dev/ngXnY always works so
    #[arg(long)]
    pub passthru: bool,
    /// Ask drives for completions in place of waiting for interrupts; `hybrid` sleeps for half of
    /// the time that operations take (Linux 7.1, and drives with queues for it)
    #[arg(long, value_name = "HOW", num_args = 0..=1, default_missing_value = "busy")]
    pub poll: Option<Poll>,
    /// With --poll: what to do where a backing has no queues for it
    #[arg(long, value_name = "WHAT", default_value = "refuse", requires = "poll")]
    pub unpolled: Unpolled,
    /// Look for completions for a while before sleeping, while requests come one by one: `auto`
    /// (200 us at most, and only where that is usually enough), `off`, or at most so many
    /// microseconds. A thread with one CPU takes real-time priority instead. Not with --poll,
    /// which has its own way to wait
    #[arg(long, value_name = "HOW", default_value = "auto", value_parser = busy_wait)]
    #[arg(conflicts_with = "poll")]
    pub busy_wait: BusyWait,
    /// Blocks of so many bytes: 512, 1024, 2048 or 4096 [default: those of the backing]. A file whose
    /// file system wants larger ones goes through the page cache then
    #[arg(long, value_name = "BYTES", value_parser = block_size)]
    pub block_size: Option<u32>,
    /// What becomes of the device when its server dies; all but `fail` let it be recovered, or
    /// recover by itself with --supervise [default: fail; with --supervise: reissue]
    #[arg(long, value_name = "WHAT")]
    pub on_death: Option<OnDeath>,
    /// Leave it to others to look for partitions, as with `partprobe` (Linux 7.0). The kernel does so
    /// otherwise, and `add` returns when they are there
    #[arg(long)]
    pub no_part_scan: bool,
    /// With -n: recover the device where it is there and its server is dead, in place of adding it;
    /// it stays as it was added. For services that are started again
    #[arg(long, requires = "id")]
    pub or_recover: bool,
    #[command(flatten)]
    pub life: Life,
}

// Where and how long the server lives.
#[derive(Clone, Debug, Args)]
pub struct Life {
    /// Put a new server in the place of a dead one at once
    #[arg(long)]
    pub supervise: bool,
    /// Stay in the foreground and log to the terminal
    #[arg(long)]
    pub foreground: bool,
    /// Print the device as JSON
    #[arg(long)]
    pub json: bool,
    /// What this process is, of those that one command needs
    #[arg(long, hide = true)]
    pub role: Option<Role>,
    /// Process id of the supervisor
    #[arg(long, hide = true, value_name = "PID")]
    pub supervisor: Option<u32>,
    /// What devices are marked with that this process adds
    #[arg(long, hide = true)]
    pub nonce: Option<Nonce>,
    /// Where the program was found that this process is of
    #[arg(long, hide = true, value_name = "PATH")]
    pub program: Option<PathBuf>,
    /// This process was the device's server before it became one of this program
    #[arg(long, hide = true)]
    pub next: bool,
}

/// A process that another one of this program has started.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Role {
    /// Serves, in the background of the process at the other end of standard output
    Server,
    /// Starts servers
    Supervisor,
}

/// How to ask drives for completions.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Poll {
    /// Again and again
    Busy,
    /// After a sleep
    Hybrid,
}

/// What to do where a backing cannot be polled.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Unpolled {
    /// Refuse to serve the device
    Refuse,
    /// Serve all of it by interrupt
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

/// A number of seconds, whole or not, from 1 ms to a day.
pub fn seconds(text: &str) -> Result<Duration, String> {
    let seconds = text.parse().ok().filter(|seconds| (0.001..=86_400.0).contains(seconds));
    let seconds = seconds.ok_or("not a number of seconds from 0.001 to 86400")?;
    Ok(Duration::from_secs_f64(seconds))
}

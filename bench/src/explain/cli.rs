//! The subcommand `explain`.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use ublk_engine::units::Bytes;

use super::{Options, Outcome, explain, show};
use crate::output::print;

/// Arguments of `explain`.
#[derive(Debug, Args)]
#[command(after_help = HELP)]
pub struct Arguments {
    /// The ublk device; it is only read
    #[arg(long, value_name = "/dev/ublkbN")]
    device: PathBuf,
    /// Number of reads, at most 20000
    #[arg(long, value_name = "N", default_value = "2000", value_parser = clap::value_parser!(u32).range(1..=20_000))]
    reads: u32,
    /// Size of a read, at most 1M: bytes, or a number with K or M
    #[arg(long, value_name = "SIZE", default_value = "4K", value_parser = block)]
    block: Bytes,
    /// Read for at most this time
    #[arg(long, value_name = "SECONDS", default_value = "10", value_parser = clap::value_parser!(u32).range(1..=3600))]
    seconds: u32,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

const HELP: &str = "\
It reads one block at a time. Meanwhile, kernel trace points record when the ublk driver and the drive
got the request, when they completed it, and when the threads of server and client ran. It needs root
and tracefs, uses its own trace instance, and leaves nothing behind. Other users of the device and its
drives disturb the figures.";

fn block(text: &str) -> Result<Bytes, String> {
    let block: Bytes = text.parse().map_err(|error| format!("{error}"))?;
    let fits = (512..=1 << 20).contains(&block.0);
    if fits { Ok(block) } else { Err("not a size from 512 to 1M".to_owned()) }
}

/// Explains and prints.
///
/// # Errors
/// One line: what is missing, or what failed.
pub fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let options = Options {
        device: arguments.device.clone(),
        reads: usize::try_from(arguments.reads)?,
        block_bytes: arguments.block.0,
        limit: Duration::from_secs(arguments.seconds.into()),
    };
    let explained = match explain(&options)? {
        Outcome::Explained(explained) => explained,
        Outcome::Interrupted(signal) => {
            eprintln!("ublk-bench: interrupted");
            return Ok(ExitCode::from(128 + u8::try_from(signal).unwrap_or(0)));
        }
    };
    let text = if arguments.json {
        serde_json::to_string_pretty(&explained)? + "\n"
    } else {
        show::text(&explained)
    };
    print(&text)?;
    Ok(ExitCode::SUCCESS)
}

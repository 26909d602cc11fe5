//! `vm demo`: demonstrates ublk-target on a drive of a guest or, on request, on a backing of this
//! machine. Both run the same steps.

mod closing;
mod commands;
mod device;
mod environment;
mod figures;
mod files;
mod guest;
mod measure;
mod native;
mod show;
mod undo;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::Args;

pub use guest::in_guest;

/// Options of the demonstration.
#[derive(Debug, Clone, Default, Args)]
pub struct DemoArgs {
    /// Use this machine's own ublk driver instead of a guest's (Linux 6.16 or newer, as root)
    #[arg(long)]
    pub native: bool,
    /// With --native: the block device or regular file to serve; ALL ITS DATA WILL BE OVERWRITTEN
    #[arg(short, long, value_name = "PATH", requires = "native")]
    pub file: Option<PathBuf>,
    /// With --native: overwrite PATH without asking
    #[arg(long, requires = "native")]
    pub yes: bool,
    /// With --native: overwrite PATH without asking, even if it holds a file system or partitions
    #[arg(long, requires = "native")]
    pub yes_overwrite: bool,
    /// With --native: use this ublk-target instead of building one
    #[arg(long, value_name = "PATH", requires = "native")]
    pub program: Option<PathBuf>,
}

/// Runs the demonstration.
///
/// # Errors
/// If it cannot start, or a step of it fails.
pub fn run(args: &DemoArgs) -> Result<ExitCode> {
    if args.native { native::run(args) } else { guest::run() }
}

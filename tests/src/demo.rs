//! `vm demo`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::Args;

/// Options of the demonstration.
#[derive(Debug, Args)]
pub struct DemoArgs {
    /// Use this machine's own ublk driver instead of a guest
    #[arg(long)]
    pub native: bool,
    /// File or block device to serve
    #[arg(short, long, value_name = "PATH")]
    pub file: Option<PathBuf>,
}

/// Runs the demonstration.
///
/// # Errors
/// When it cannot be shown.
pub fn run(_args: &DemoArgs) -> Result<ExitCode> {
    bail!("the demonstration needs ublk-target, which is not built yet")
}

//! Builds rublk, a rival, from the registry. It is run as a program, and nothing of it is used.

use std::path::PathBuf;
use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;

use super::stack::RUBLK;
use crate::cleanup::{self, Group, RunDir};
use crate::{paths, payload, ui};

/// The release that is measured.
pub const VERSION: &str = "0.2.15";

/// The program for the guest, built if it is not in the cache yet.
///
/// # Errors
/// When it cannot be built.
pub fn ensure_built() -> Result<PathBuf> {
    let cache = paths::cache()?;
    let directory = cache.join(format!("{RUBLK}-{VERSION}"));
    let program = directory.join(RUBLK);
    if program.is_file() {
        return Ok(program);
    }
    // Whatever ends this, the directory goes.
    let building = RunDir::create(&cache.join("run"))?;
    let root = building.path().join("root");
    ui::step(&format!("building {RUBLK} {VERSION} (some minutes, once)"));
    let mut command = cleanup::command(paths::cargo(), Signal::SIGTERM);
    command.args(["install", "--locked", "--quiet", RUBLK, "--version", VERSION]);
    // By default it wants OpenCL.
    command.args(["--no-default-features", "--no-track", "--root"]).arg(&root);
    command.arg("--target-dir").arg(building.path().join("target"));
    payload::link_statically(&mut command);
    command.current_dir(paths::workspace()).stdin(Stdio::null());
    let status = Group::spawn(&mut command, Signal::SIGTERM)?.wait()?;
    ui::clear();
    ensure!(status.success(), "`cargo install {RUBLK} --version {VERSION}` ended with {status}");
    std::fs::create_dir_all(&directory)?;
    // In one step, for another run may be looking.
    std::fs::rename(root.join("bin").join(RUBLK), &program)
        .with_context(|| format!("put {RUBLK} into {}", directory.display()))?;
    Ok(program)
}

//! `vm bench --profile`: what each function costs a request, in instructions.
//!
//! A plugin counts the instructions that the guest executes at each address. One guest makes the
//! load's requests, another one twice as many, so that the difference is what the requests cost,
//! without booting, making devices and all else.

mod functions;
pub mod guest;

use std::path::{Path, PathBuf};
use std::process::{ExitCode, Stdio};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;

use self::functions::{Functions, Table};
use self::guest::PROFILE;
use super::column::COLUMNS;
use super::guest::PREPARE;
use super::host::{PREPARE_TIMEOUT, PROGRAM, ROW_TIMEOUT, run as run_in};
use super::row::{Subject, row_named};
use super::{qemu_version, rublk};
use crate::artifact;
use crate::cleanup::{self, Group};
use crate::config::VmConfig;
use crate::image::Image;
use crate::vm::Vm;
use crate::{paths, payload, shell, ui};

/// The plugin's package, and the name of its library.
const PLUGIN: (&str, &str) = ("insn-counts", "insn_counts");
/// Functions that cost less than this are summed up.
const LEAST: f64 = 4.0;

/// Prints what each function costs a request of a row with a load.
///
/// # Errors
/// When the guest cannot be made, the emulator takes no plugins, or the load fails.
pub fn run(row: &str, load: &str) -> Result<ExitCode> {
    let row = row_named(row).with_context(|| format!("there is no row {row}"))?;
    let column = COLUMNS.iter().find(|it| it.name == load).context("there is no such load")?;
    let mut programs = payload::build(&payload::BENCH)?;
    let rival = (row.subject == Subject::RublkLoop).then(rublk::ensure_built).transpose()?;
    let plugin = build()?;
    let rival: Vec<PathBuf> = rival.into_iter().collect();
    let (image, directory, disk) = shell::prepare(&payload::BENCH, &rival)?;
    programs.extend(rival);
    let measure = |times: &str| {
        ui::step(&format!("counting the instructions of {times} x {} requests", column.requests));
        let counts = directory.path().join(format!("counts-{times}"));
        let words = [row.name, column.name, times];
        let table = count(&image, &disk, &plugin, &counts, &words, &programs);
        ui::clear();
        table
    };
    let (once, twice) = (measure("1")?, measure("2")?);
    ui::out(&format!("{}, {}: instructions for each request", row.title, column.title.join(" ")));
    let cost = twice.less(&once).of_each(column.requests);
    cost.lines(LEAST).iter().for_each(|line| ui::out(line));
    Ok(ExitCode::SUCCESS)
}

/// Runs the load in a guest of its own, and counts.
fn count(
    image: &Image,
    disk: &Path,
    plugin: &Path,
    counts: &Path,
    words: &[&str; 3],
    programs: &[PathBuf],
) -> Result<Table> {
    let plugin = format!("file={},out={}", plugin.display(), counts.display());
    let config = VmConfig { icount: true, cpus: 1, plugin: Some(plugin), ..VmConfig::default() };
    let mut vm =
        Vm::boot(&config, image, disk).context("a guest whose instructions are counted")?;
    run_in(&mut vm, &[PROGRAM, PREPARE], PREPARE_TIMEOUT, |_| Ok(()))
        .context("prepare the guest")?;
    let mut functions = Functions::default();
    let argv = [&[PROGRAM, PROFILE], &words[..]].concat();
    run_in(&mut vm, &argv, ROW_TIMEOUT, |line| functions.learn(line, programs))?;
    vm.power_off()?;
    let counts = std::fs::read_to_string(counts).context("the plugin has written nothing")?;
    functions.finish().table(&counts)
}

/// Builds the plugin for the emulator that there is.
fn build() -> Result<PathBuf> {
    ui::step("building the plugin that counts");
    let (package, library) = PLUGIN;
    let mut command = cleanup::command(paths::cargo(), Signal::SIGTERM);
    command.current_dir(paths::workspace()).args(["build", "--release", "--quiet", "-p", package]);
    command.args(["--message-format", "json-render-diagnostics"]);
    command.env("QEMU_PLUGIN_VERSION", interface(&qemu_version()?).to_string());
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    let mut group = Group::spawn(&mut command, Signal::SIGTERM)?;
    let stdout = group.child().stdout.take().context("cargo's standard output")?;
    let files = artifact::libraries(std::io::BufReader::new(stdout))?;
    ensure!(group.wait()?.success(), "the build failed");
    ui::clear();
    let name = format!("lib{library}.so");
    let found = files.into_iter().find(|file| file.file_name().is_some_and(|it| *it == *name));
    found.with_context(|| format!("cargo did not say where {name} is"))
}

/// The version of the plugin interface that an emulator speaks: 1 before 8.2, and 2 is taken by
/// all that have come since.
fn interface(emulator: &str) -> u32 {
    let words = emulator.split([' ', '.']).filter_map(|word| word.parse::<u32>().ok());
    let release: Vec<_> = words.take(2).collect();
    if release.as_slice() < [8, 2].as_slice() { 1 } else { 2 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interfaces_go_by_releases() {
        for (emulator, expected) in [
            ("QEMU 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)", 1),
            ("QEMU 8.1.5", 1),
            ("QEMU 8.2.2 (Debian 1:8.2.2+ds-0ubuntu1)", 2),
            ("QEMU 10.0.2", 2),
        ] {
            assert_eq!(interface(emulator), expected, "{emulator}");
        }
    }
}

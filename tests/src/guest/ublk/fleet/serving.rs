//! `ublk-target serve` in the foreground.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::super::device::{Description, PROGRAM, load_driver, text};
use super::PATIENCE;
use crate::guest::{process, wait_for};

/// A `serve` in the foreground.
#[derive(Debug)]
pub struct Fleet {
    child: Child,
    /// The block devices that it has printed.
    pub devices: Vec<PathBuf>,
    log: PathBuf,
}

impl Fleet {
    /// Starts it, and waits until its devices are live.
    pub fn start(directory: &Path, config: &Path) -> Result<Self> {
        let wanted = fs::read_to_string(config)?.matches("[[device]]").count();
        Self::start_with(directory, config, wanted)
    }

    /// Starts it, and waits until so many devices are live.
    pub fn start_with(directory: &Path, config: &Path, wanted: usize) -> Result<Self> {
        load_driver()?;
        let log = directory.join("fleet.log");
        let error = File::options().create(true).append(true).open(&log)?;
        // In a session of its own, as a service manager would start it and as `add` runs: the
        // scheduler has groups of sessions, and switching between groups costs more.
        let mut child = Command::new("setsid")
            .arg(PROGRAM)
            .args(["serve", "--config", text(config)?])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(error)
            .spawn()?;
        let out = child.stdout.take().context("its output")?;
        let mut fleet = Self { child, devices: Vec::new(), log };
        // It prints all at once when it is ready.
        for line in BufReader::new(out).lines().take(wanted) {
            fleet.devices.push(line?.into());
        }
        ensure!(fleet.devices.len() == wanted, "not ready:\n{}", fleet.said()?);
        Ok(fleet)
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn said(&self) -> Result<String> {
        Ok(fs::read_to_string(&self.log)?)
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        Ok(kill(Pid::from_raw(i32::try_from(self.pid())?), signal)?)
    }

    /// Has it read its file again, and waits until it has done so.
    pub fn reload(&self, done: &str) -> Result<()> {
        let before = self.said()?.matches(done).count();
        self.signal(Signal::SIGHUP)?;
        wait_for(done, PATIENCE, || Ok((self.said()?.matches(done).count() > before).then_some(())))
    }

    /// Ends it in order.
    pub fn stop(mut self) -> Result<()> {
        self.signal(Signal::SIGTERM)?;
        let status = self.child.wait()?;
        ensure!(status.success(), "{status}\n{}", self.said()?);
        Ok(())
    }

    /// Ends it in order; nothing is left.
    pub fn end(self) -> Result<()> {
        self.stop()?;
        let left = listed()?;
        ensure!(left.is_empty(), "left: {left:?}");
        Ok(())
    }

    pub fn kill(mut self) -> Result<()> {
        self.signal(Signal::SIGKILL)?;
        self.child.wait()?;
        Ok(())
    }

    /// A field of its `smaps_rollup`, in KiB.
    pub fn memory_kib(&self, field: &str) -> Result<u64> {
        let rollup = fs::read_to_string(format!("/proc/{}/smaps_rollup", self.pid()))?;
        let line = rollup.lines().find_map(|line| line.strip_prefix(field));
        let number = line.and_then(|line| line.trim_start_matches(':').split_whitespace().next());
        Ok(number.context("no such field")?.parse()?)
    }

    /// Its threads, without workers that the kernel has made for it.
    pub fn threads(&self) -> Result<usize> {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.pid()))?.flatten();
        let names = tasks.filter_map(|task| fs::read_to_string(task.path().join("comm")).ok());
        Ok(names.filter(|name| !name.starts_with("iou-")).count())
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        // Both fail when it has ended, which is the usual case.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub fn listed() -> Result<Vec<Description>> {
    let printed = process::run(&[PROGRAM, "list", "--json"])?.stdout;
    Ok(serde_json::from_str(&printed)?)
}

pub fn ids() -> Result<Vec<u32>> {
    Ok(listed()?.iter().map(|device| device.id).collect())
}

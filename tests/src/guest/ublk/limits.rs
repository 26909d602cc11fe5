//! Limits of memory: what is needed and what there is are told.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use anyhow::{Context, Result, ensure};

use super::device::{PROGRAM, load_driver, text};
use crate::config::DEFAULT;
use crate::guest::{Ctx, FIGURE, Outcome, TestCase, process};

pub const TESTS: &[TestCase] = &[
    TestCase::guest("a_small_memory_cgroup_is_named", DEFAULT, small_group).seconds(300),
    TestCase::guest("a_small_limit_of_locked_memory_is_named", DEFAULT, locked).seconds(300),
];

/// A control group with a limit.
pub(super) struct Group(PathBuf);

impl Group {
    /// One with a controller, such as `memory`.
    pub fn new(name: &str, controller: &str) -> Result<Self> {
        let root = Path::new("/sys/fs/cgroup");
        if !root.join("cgroup.controllers").exists() {
            process::run(&["mount", "-t", "cgroup2", "none", text(root)?])?;
        }
        let controller = format!("+{controller}");
        fs::write(root.join("cgroup.subtree_control"), controller).context("the controller")?;
        let group = Self(root.join(name));
        fs::create_dir(&group.0)?;
        Ok(group)
    }

    fn limit(&self, bytes: u64) -> Result<()> {
        self.set("memory.max", &bytes.to_string())
    }

    pub fn set(&self, file: &str, value: &str) -> Result<()> {
        fs::write(self.0.join(file), value).with_context(|| format!("{value} to {file}"))
    }

    /// Takes a process in.
    pub fn take(&self, pid: u32) -> Result<()> {
        self.set("cgroup.procs", &pid.to_string())
    }

    /// Lets a process go.
    pub fn release(&self, pid: u32) -> Result<()> {
        fs::write("/sys/fs/cgroup/cgroup.procs", pid.to_string()).context("to the root group")
    }

    /// Runs the program in it.
    fn run(&self, arguments: &str) -> Result<Output> {
        let script =
            format!("echo $$ > {}/cgroup.procs; exec {PROGRAM} {arguments}", text(&self.0)?);
        Ok(Command::new("sh").args(["-c", &script]).stdin(Stdio::null()).output()?)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}

/// The device is served, or a line names the limit.
fn small_group(_ctx: &Ctx) -> Result<Outcome> {
    load_driver()?;
    let group = Group::new("small", "memory")?;
    // What pages of the program are charged to is whoever reads them first.
    fs::write("/proc/sys/vm/drop_caches", "1")?;
    let (mut smallest, mut faults) = (None, Vec::new());
    for mib in (2..=12_u64).chain([16, 24]) {
        group.limit(mib << 20)?;
        let output = group.run("add null -n 3")?;
        let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        println!("{mib} MiB: {} {said}", output.status);
        if output.status.success() {
            smallest = smallest.or(Some(mib));
            process::run(&[PROGRAM, "del", "-n", "3"])?;
            continue;
        }
        let is_told = said.contains("/sys/fs/cgroup/small/memory.max") && said.contains("need");
        if !is_told || said.lines().count() > 1 || smallest.is_some() {
            faults.push(format!("{mib} MiB: {}: {said}", output.status));
        }
    }
    ensure!(faults.is_empty(), "{faults:#?}");
    let smallest = smallest.context("24 MiB do not suffice")?;
    println!("{FIGURE}a null device can be added with memory.max of {smallest} MiB");
    Ok(Outcome::Pass)
}

/// Without `CAP_IPC_LOCK`.
fn locked(_ctx: &Ctx) -> Result<Outcome> {
    load_driver()?;
    let mut served = 0;
    for kib in [0_u64, 64, 1024, 2048, 4096, 8192, 16384, 65536] {
        let script = format!(
            "ulimit -l {kib}; exec setpriv --bounding-set -ipc_lock --inh-caps -ipc_lock {PROGRAM} \
             add null -n 3"
        );
        let output = Command::new("bash").args(["-c", &script]).stdin(Stdio::null()).output()?;
        let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        println!("{kib} KiB: {} {said}", output.status);
        if output.status.success() {
            served += 1;
            process::run(&[PROGRAM, "del", "-n", "3"])?;
            continue;
        }
        let names = ["RLIMIT_MEMLOCK", "ulimit -l", "CAP_IPC_LOCK"];
        ensure!(names.iter().all(|name| said.contains(name)), "{kib} KiB: {said}");
    }
    ensure!(served > 0, "64 MiB do not suffice");
    Ok(Outcome::Pass)
}

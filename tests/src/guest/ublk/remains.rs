//! What processes and devices of ublk-target there are: none, after `del`.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use super::device::{Description, PROGRAM};
use crate::guest::{process, wait_for};

/// The directory of state files and sockets.
pub const RUN_DIRECTORY: &str = "/run/ublk-target";

/// A process of the program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    pub pid: u32,
    pub state: char,
    pub arguments: String,
}

impl Process {
    fn read(pid: u32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let (_, rest) = stat.rsplit_once(')')?;
        let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        let arguments = String::from_utf8_lossy(&line).replace('\0', " ").trim_end().to_owned();
        let state = rest.trim_start().chars().next()?;
        (state != 'Z' && state != 'X').then_some(Self { pid, state, arguments })
    }

    /// A server or a supervisor, whose end `del` waits for.
    fn sees_to_a_device(&self) -> bool {
        ["--role", "supervise ", "--foreground"].iter().any(|word| self.arguments.contains(word))
    }
}

/// All processes of the program.
pub fn processes() -> Vec<Process> {
    pids_of(PROGRAM).into_iter().filter_map(Process::read).collect()
}

/// All processes of a name.
pub fn pids_of(name: &str) -> Vec<u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let is_it = |pid: &u32| {
        let comm = fs::read_to_string(format!("/proc/{pid}/comm"));
        let state = fs::read_to_string(format!("/proc/{pid}/stat"));
        let is_zombie = state.is_ok_and(|stat| stat.contains(") Z"));
        comm.is_ok_and(|comm| comm.trim_end() == name) && !is_zombie
    };
    pids.filter(is_it).collect()
}

/// The process whose arguments have this in them.
pub fn find(what: &str) -> Result<Process> {
    wait_for(&format!("a process `{what}`"), Duration::from_secs(10), || {
        Ok(processes().into_iter().find(|process| process.arguments.contains(what)))
    })
}

/// Waits until a process is suspended.
pub fn wait_suspended(what: &str) -> Result<Process> {
    wait_for(&format!("`{what}` to be suspended"), Duration::from_secs(20), || {
        let mut found = processes().into_iter();
        Ok(found.find(|process| process.arguments.contains(what) && process.state == 'T'))
    })
}

/// Waits for a device in a state, as the driver names it.
pub fn wait_for_state(state: &str) -> Result<()> {
    wait_for(&format!("a device in state {state}"), Duration::from_secs(20), || {
        Ok(devices()?.iter().any(|device| device.state == state).then_some(()))
    })
}

/// Files of the server's state.
pub fn files() -> Vec<PathBuf> {
    let entries = fs::read_dir(RUN_DIRECTORY).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).filter(|path| *path != role_directory()).collect()
}

/// Where the processes say what they are. It is there while there are any.
fn role_directory() -> PathBuf {
    [RUN_DIRECTORY, "process"].iter().collect()
}

/// The files of the processes, dead ones among them that nobody has come by since.
pub fn role_files() -> Vec<PathBuf> {
    let entries = fs::read_dir(role_directory()).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).collect()
}

/// All devices.
pub fn devices() -> Result<Vec<Description>> {
    Ok(serde_json::from_str(&process::run(&[PROGRAM, "list", "--json"])?.stdout)?)
}

/// Recovers the only device, unless it is served: nobody else does it for a server that dies right
/// after an upgrade which the command has seen to succeed.
pub fn recover_if_dead() -> Result<()> {
    let look = || {
        let devices = devices()?;
        let device = devices.first().context("a device")?;
        let is_dead = device.pid.is_none() && device.state == "QUIESCED";
        let is_served = device.pid.is_some() && device.state == "LIVE";
        Ok((is_dead || is_served).then(|| is_dead.then(|| device.id.to_string())))
    };
    if let Some(id) = wait_for("a server or none", Duration::from_secs(30), look)? {
        process::run(&[PROGRAM, "recover", "-n", &id])?;
    }
    Ok(())
}

/// Fails if there is a server, a supervisor, a device or a file; commands have a moment to end.
pub fn ensure_none() -> Result<()> {
    let seeing_to: Vec<_> = processes().into_iter().filter(Process::sees_to_a_device).collect();
    ensure!(seeing_to.is_empty(), "left: {seeing_to:?}");
    ensure_no_device()?;
    wait_for("commands to end", Duration::from_secs(10), || {
        Ok(processes().is_empty().then_some(()))
    })?;
    ensure!(!role_directory().exists(), "left: {:?}", role_files());
    Ok(())
}

fn ensure_no_device() -> Result<()> {
    let classes = fs::read_dir("/sys/class/ublk-char")?.flatten().map(|entry| entry.path());
    let left: Vec<_> = classes.chain(files()).collect();
    ensure!(left.is_empty(), "left: {left:?}");
    Ok(())
}

/// Waits until there is nothing.
pub fn wait_for_none() -> Result<()> {
    let gone =
        || processes().is_empty() && ensure_no_device().is_ok() && !role_directory().exists();
    let waited = wait_for("nothing", Duration::from_secs(20), || Ok(gone().then_some(())));
    if waited.is_err() {
        bail!("left: {:?} {:?} {:?}", processes(), ensure_no_device(), role_files());
    }
    Ok(())
}

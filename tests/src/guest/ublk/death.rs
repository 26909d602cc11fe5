//! Servers die, and their devices do not: what becomes of I/O, of whoever waits for it, and of what
//! the dead have left.

pub mod modes;
pub mod mounted;
pub mod refusals;
pub mod storm;
pub mod supervision;

use std::fs::{self, File};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::fcntl::OFlag;
use nix::sys::signal::Signal;

use super::device::{Description, Device, PROGRAM};
use crate::guest::{process, wait_for};

/// The longest wait for anything that is to come by itself.
const PATIENCE: Duration = Duration::from_secs(30);
/// A server that is killed later than this was sound; the supervisor's limit is 1 s.
const SOUND: Duration = Duration::from_millis(1300);
const RUN_DIR: &str = "/run/ublk-target";

/// The device as `list` shows it now.
fn look(device: &Device) -> Result<Description> {
    let printed = process::run(&[PROGRAM, "list", "-n", &device.id(), "--json"])?;
    serde_json::from_str(&printed.stdout).context(printed.stdout)
}

/// Waits until the device is as it should be.
fn await_device(
    device: &Device,
    what: &str,
    is_so: impl Fn(&Description) -> bool,
) -> Result<Description> {
    let mut last = None;
    let limit = PATIENCE;
    let seen = wait_for(what, limit, || {
        let now = look(device)?;
        let seen = is_so(&now).then(|| now.clone());
        last = Some(now);
        Ok(seen)
    });
    seen.with_context(|| format!("at last it was {last:?}"))
}

/// Kills the server and waits until the driver has noticed.
pub(super) fn kill_server(device: &Device) -> Result<()> {
    let pid = device.pid()?;
    process::signal(pid, Signal::SIGKILL)?;
    await_device(device, "the server's death to be noticed", |now| now.state != "LIVE").map(drop)
}

/// Waits until the device has another server than `old`; its handle knows that one from then on.
fn await_new_server(device: &mut Device, old: u32) -> Result<()> {
    let is_new = |now: &Description| now.state == "LIVE" && now.pid.is_some_and(|pid| pid != old);
    device.described = await_device(device, "a new server", is_new)?;
    Ok(())
}

/// `recover -n`; the handle knows the new server from then on.
pub(super) fn recover(device: &mut Device, more: &[&str]) -> Result<()> {
    let id = device.id();
    let printed = process::run(&[&[PROGRAM, "recover", "-n", &id, "--json"], more].concat())?;
    let described: Description = serde_json::from_str(&printed.stdout).context(printed.stdout)?;
    ensure!(described.state == "LIVE" && described.pid.is_some(), "{described:?}");
    let same = |of: &Description| {
        (of.id, of.size_bytes, of.queues, of.depth, of.lend.clone(), of.backings.clone())
    };
    ensure!(same(&described) == same(&device.described), "{described:?} {device:?}");
    device.described = described;
    Ok(())
}

/// A refusal of `recover`: one line on standard error.
fn refused(device: &Device) -> Result<String> {
    let refused = process::run_for_code(&[PROGRAM, "recover", "-n", &device.id()], 1)?;
    ensure!(refused.stdout.is_empty(), "{refused:?}");
    let said = refused.stderr.trim_end();
    ensure!(said.lines().count() == 1 && said.starts_with("ublk-target: "), "{said}");
    Ok(said.to_owned())
}

/// The processes of the program, with their arguments.
fn processes() -> Result<Vec<(u32, String)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        // One that is gone by now, or a zombie, has none.
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        let program = line.split(' ').next().unwrap_or_default();
        if Path::new(program).file_name().is_some_and(|name| name == PROGRAM) {
            found.push((pid, line));
        }
    }
    Ok(found)
}

/// Opens a device as those do who want it for themselves: nobody else has it so, nor a mount.
fn exclusively(device: impl AsRef<Path>) -> Result<File> {
    let device = device.as_ref();
    let options = OFlag::O_EXCL.bits();
    let file = File::options().read(true).write(true).custom_flags(options).open(device);
    file.with_context(|| format!("{} is still in use", device.display()))
}

/// Waits until there is nothing of the program: no process, file or device.
fn await_nothing() -> Result<()> {
    let mut last = Vec::new();
    let gone = wait_for("all of the program to be gone", PATIENCE, || {
        last = processes()?.into_iter().map(|(pid, line)| format!("{pid} {line}")).collect();
        for directory in [RUN_DIR, "/sys/class/ublk-char"] {
            let entries = fs::read_dir(directory)?.flatten();
            last.extend(entries.map(|entry| entry.path().display().to_string()));
        }
        let nodes = fs::read_dir("/dev")?.flatten().map(|entry| entry.path());
        let is_ublk =
            |path: &String| path.starts_with("/dev/ublkb") || path.starts_with("/dev/ublkc");
        last.extend(nodes.map(|path| path.display().to_string()).filter(is_ublk));
        Ok(last.is_empty().then_some(()))
    });
    gone.with_context(|| format!("left: {last:?}"))
}

/// Ends the server by SIGTERM, and waits until nothing is left of it and its supervisor. Its log
/// must not tell of leaks.
fn end(device: Device) -> Result<()> {
    device.stop_and_count()?.ensure_none(&["stale", "unexpected", "leaks"])?;
    await_nothing()
}

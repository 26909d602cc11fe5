//! File systems on a device whose server dies.

use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use nix::sys::signal::Signal;

use super::{SOUND, await_new_server, await_nothing, end, exclusively, kill_server, recover};
use crate::config::DEFAULT;
use crate::guest::ublk::device::{Device, Mount, fresh_drive, text, wait_for_requests};
use crate::guest::ublk::filesystem::EXT4;
use crate::guest::{Ctx, FIGURE, Outcome, TestCase, process};

pub const TESTS: &[TestCase] = &[
    TestCase::guest("death_file_system_outlives_servers", DEFAULT, outlives).seconds(300),
    TestCase::guest("death_recovered_server_holds_no_file_system", DEFAULT, holds_none)
        .seconds(180),
];

fn digest(root: &str) -> Result<String> {
    let script = "cd \"$1\" && find . -type f -print0 | sort -z | xargs -0 sha256sum | sha256sum";
    process::run(&["sh", "-c", script, "digest", root]).map(|printed| printed.stdout)
}

fn outlives(ctx: &Ctx) -> Result<Outcome> {
    const TREE: &str = "/usr/share/zoneinfo";
    let kills = if ctx.long { 12 } else { 3 };
    let drive = fresh_drive("drive0")?;
    let path = drive.path();
    let mut device = Device::add_loop(&path, &["--supervise"])?;
    process::run(&[EXT4.make, &[device.path()?]].concat())?;
    let mount = Mount::new(ctx, device.path()?, "fs")?;
    let mut live_since = Instant::now();
    for kill in 0..kills {
        let tree = mount.point().join(format!("tree{kill}"));
        let script = "cp -a \"$1\" \"$2\" && sync -f \"$2\"";
        let mut copy =
            Command::new("sh").args(["-c", script, "copy", TREE, text(&tree)?]).spawn()?;
        wait_for_requests(&device, 20)?;
        // The supervisor gives up when too many in a row have not lived so long.
        thread::sleep(SOUND.saturating_sub(live_since.elapsed()));
        let old = device.pid()?;
        process::signal(old, Signal::SIGKILL)?;
        await_new_server(&mut device, old)?;
        live_since = Instant::now();
        let status = copy.wait()?;
        ensure!(status.success(), "copying: {status}");
    }
    let original = digest(TREE)?;
    std::fs::write("/proc/sys/vm/drop_caches", "3")?;
    for kill in 0..kills {
        let copy = digest(text(&mount.point().join(format!("tree{kill}")))?)?;
        ensure!(copy == original, "tree {kill} differs: {copy} {original}");
    }
    // Right after a recovery.
    thread::sleep(SOUND.saturating_sub(live_since.elapsed()));
    let old = device.pid()?;
    process::signal(old, Signal::SIGKILL)?;
    await_new_server(&mut device, old)?;
    let began = Instant::now();
    mount.unmount()?;
    drop(exclusively(device.path()?)?);
    println!("{FIGURE}unmounted and free within {} ms", began.elapsed().as_millis());
    process::run(&[EXT4.check, &[device.path()?]].concat())?;
    device.delete()?;
    await_nothing()?;
    Ok(Outcome::Pass)
}

/// By hand, so that the server is one that was started when the file system was there already.
fn holds_none(ctx: &Ctx) -> Result<Outcome> {
    let drive = fresh_drive("drive0")?;
    let path = drive.path();
    let mut device = Device::add_loop(&path, &["--on-death", "reissue"])?;
    process::run(&[EXT4.make, &[device.path()?]].concat())?;
    let mount = Mount::new(ctx, device.path()?, "fs")?;
    std::fs::write(mount.point().join("file"), "before")?;
    process::run(&["sync", "-f", text(mount.point())?])?;
    kill_server(&device)?;
    recover(&mut device, &[])?;
    let table = std::fs::read_to_string(format!("/proc/{}/mountinfo", device.pid()?))?;
    ensure!(!table.contains(text(mount.point())?), "the server has it mounted: {table}");
    // Nor does one that is unmounted while there is no server come in the way.
    ensure!(std::fs::read_to_string(mount.point().join("file"))? == "before");
    std::fs::write(mount.point().join("file"), "after")?;
    mount.unmount()?;
    drop(exclusively(device.path()?)?);
    process::run(&[EXT4.check, &[device.path()?]].concat())?;

    // One that is mounted while the server dies is unmounted only by the next one's work.
    let mount = Mount::new(ctx, device.path()?, "fs")?;
    std::fs::write(mount.point().join("file"), "unwritten")?;
    let point = mount.point().to_owned();
    kill_server(&device)?;
    let unmount = std::thread::spawn(move || mount.unmount());
    std::thread::sleep(Duration::from_millis(200));
    recover(&mut device, &["--supervise"])?;
    unmount.join().map_err(|_| anyhow::anyhow!("umount has panicked"))??;
    drop(exclusively(device.path()?)?);
    let mount = Mount::new(ctx, device.path()?, "fs")?;
    ensure!(std::fs::read_to_string(point.join("file"))? == "unwritten");
    mount.unmount()?;
    process::run(&[EXT4.make, &[device.path()?]].concat())?;
    end(device)?;
    Ok(Outcome::Pass)
}

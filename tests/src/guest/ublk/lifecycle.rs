//! Devices come and go: in the foreground and background, by signals, with their server dead, in
//! use, under load.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;

use super::device::{
    Description, Device, Mount, PROGRAM, fresh_drive, load_driver, start_load, text,
    wait_for_requests,
};
use crate::config::DEFAULT;
use crate::guest::{Ctx, Outcome, TestCase, fio, process, wait_for};

pub const TESTS: &[TestCase] = &[
    TestCase::guest("sigterm_and_sigint_end_the_server", DEFAULT, signals),
    TestCase::guest("foreground_serves_until_a_signal", DEFAULT, foreground),
    TestCase::guest("del_cleans_up_after_a_killed_server", DEFAULT, killed),
    TestCase::guest("del_refuses_a_device_in_use_and_names_the_user", DEFAULT, in_use),
    TestCase::guest("del_of_a_stopped_server_is_bounded", DEFAULT, stopped).seconds(180),
    TestCase::guest("del_all_deletes_every_device", DEFAULT, all),
    TestCase::guest("sigterm_under_load_answers_every_request", DEFAULT, under_load).seconds(180),
    TestCase::guest("a_kill_under_load_leaves_nothing_stuck", DEFAULT, kill_under_load)
        .seconds(180),
    TestCase::guest("an_abandoned_add_takes_its_device_back", DEFAULT, abandoned),
    TestCase::guest("devices_are_added_and_deleted_again_and_again", DEFAULT, churn).seconds(600),
];

fn signals(_ctx: &Ctx) -> Result<Outcome> {
    for sent in [Signal::SIGTERM, Signal::SIGINT] {
        let device = Device::add(&["null", "-n", "2"])?;
        process::signal(device.pid()?, sent)?;
        device.wait_until_gone()?;
        let log = std::fs::read_to_string("/var/log/ublk-target/2.log")?;
        ensure!(log.contains(&format!("{sent}: stopping")), "{log}");
        ensure!(!log.contains("ERROR"), "{log}");
    }
    Ok(Outcome::Pass)
}

/// Starts a server in the foreground and waits for its device.
fn start_in_foreground(arguments: &[&str]) -> Result<(Child, String)> {
    load_driver()?;
    let mut child = Command::new(PROGRAM)
        .args(["add", "null", "--foreground"])
        .args(arguments)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let mut line = String::new();
    BufReader::new(child.stdout.as_mut().context("piped")?).read_line(&mut line)?;
    Ok((child, line.trim_end().to_owned()))
}

fn foreground(_ctx: &Ctx) -> Result<Outcome> {
    for sent in [Signal::SIGTERM, Signal::SIGINT] {
        let (mut child, device) = start_in_foreground(&[])?;
        ensure!(device.starts_with("/dev/ublkb"), "{device}");
        process::run(&[
            "dd",
            &format!("if={device}"),
            "of=/dev/null",
            "bs=4k",
            "count=1",
            "status=none",
        ])?;
        process::signal(child.id(), sent)?;
        let status = child.wait()?;
        let mut said = String::new();
        child.stderr.take().context("piped")?.read_to_string(&mut said)?;
        ensure!(status.success(), "{status}: {said}");
        ensure!(said.contains("is live") && said.contains("stopping"), "logged: {said}");
        ensure!(!std::path::Path::new(&device).exists(), "{device} is left");
    }
    Ok(Outcome::Pass)
}

fn killed(_ctx: &Ctx) -> Result<Outcome> {
    let drive = fresh_drive("drive0")?;
    for lend in ["fused", "copy"] {
        let device = Device::add_loop(&drive.path(), &["--lend", lend])?;
        process::signal(device.pid()?, Signal::SIGKILL)?;
        let listed = wait_for("the device to be dead", Duration::from_secs(30), || {
            let printed = process::run(&[PROGRAM, "list", "-n", &device.id(), "--json"])?;
            let listed: Description = serde_json::from_str(&printed.stdout)?;
            Ok((listed.state == "DEAD").then_some(listed))
        })?;
        ensure!(listed.pid.is_none(), "a dead server has no pid: {listed:?}");
        ensure!(listed.target == "loop" && listed.backings == [drive.path()], "{listed:?}");
        device.delete()?;
        // The backing is free again.
        Device::add_loop(&drive.path(), &["--lend", lend])?.delete()?;
    }
    Ok(Outcome::Pass)
}

fn in_use(ctx: &Ctx) -> Result<Outcome> {
    let drive = fresh_drive("drive0")?;
    let device = Device::add_loop(&drive.path(), &[])?;
    let refused = |expected: &str| -> Result<()> {
        let said = process::run_for_code(&[PROGRAM, "del", "-n", &device.id()], 1)?.stderr;
        ensure!(said.contains("is in use") && said.contains(expected), "{said}");
        ensure!(said.trim_end().lines().count() == 1, "{said}");
        Ok(())
    };
    process::run(&["mkfs.ext4", "-q", "-F", device.path()?])?;
    let mount = Mount::new(ctx, device.path()?, "mnt")?;
    refused(&format!("mounted on {}", text(mount.point())?))?;
    // Still alive and well.
    std::fs::write(mount.point().join("file"), "data")?;
    process::run(&["sync", "-f", text(mount.point())?])?;
    mount.unmount()?;

    let held = std::fs::File::open(device.path()?)?;
    refused(&format!("({})", std::process::id()))?;
    drop(held);
    process::run(&[
        "dd",
        &format!("if={}", device.path()?),
        "of=/dev/null",
        "count=1",
        "status=none",
    ])?;
    device.delete()?;
    Ok(Outcome::Pass)
}

/// A server that does not run cannot end: `del` says so in bounded time, and completes once it
/// runs again.
fn stopped(_ctx: &Ctx) -> Result<Outcome> {
    let device = Device::add(&["null"])?;
    // Or udev would have it open for as long as its server does not run.
    crate::guest::udev::settle()?;
    let pid = device.pid()?;
    process::signal(pid, Signal::SIGSTOP)?;
    let refused = process::run_for_code(&[PROGRAM, "del", "-n", &device.id()], 1);
    process::signal(pid, Signal::SIGCONT)?;
    let said = refused?.stderr;
    ensure!(said.contains("waiting for") && said.contains("gave up waiting"), "{said}");
    device.wait_until_gone()?;
    Ok(Outcome::Pass)
}

fn all(_ctx: &Ctx) -> Result<Outcome> {
    let devices = [
        Device::add(&["null", "--lend", "copy"])?,
        Device::add(&["null"])?,
        Device::add(&["null", "-n", "40"])?,
    ];
    process::signal(devices[1].pid()?, Signal::SIGKILL)?;
    process::run(&[PROGRAM, "del", "--all"])?;
    let left = process::run(&[PROGRAM, "list", "--json"])?.stdout;
    ensure!(left.trim() == "[]", "{left}");
    for device in devices {
        device.wait_until_gone()?;
    }
    Ok(Outcome::Pass)
}

fn under_load(_ctx: &Ctx) -> Result<Outcome> {
    let drive = fresh_drive("drive0")?;
    for lend in ["fused", "slot", "user-copy", "copy"] {
        let device = Device::add_loop(&drive.path(), &["--lend", lend, "-q", "2"])?;
        let mut load = start_load(device.path()?)?;
        wait_for_requests(&device, 2000)?;
        let counters = device.stop_and_count()?;
        ensure!(!load.wait()?.success(), "fio must see its device go");
        ensure!(counters.get("commits") == counters.get("requests"), "{counters:?}");
        counters.ensure_none(&["failed", "stale", "unexpected"])?;
    }
    Ok(Outcome::Pass)
}

fn kill_under_load(ctx: &Ctx) -> Result<Outcome> {
    let drive = fresh_drive("drive0")?;
    for lend in ["fused", "slot", "user-copy", "copy", "fused"] {
        let device = Device::add_loop(&drive.path(), &["--lend", lend, "-q", "2"])?;
        let mut load = start_load(device.path()?)?;
        wait_for_requests(&device, 2000)?;
        process::signal(device.pid()?, Signal::SIGKILL)?;
        ensure!(!load.wait()?.success(), "fio must see its device go");
        device.delete()?;
    }
    // The drive is as good as before.
    let device = Device::add_loop(&drive.path(), &[])?;
    let filename = format!("filename={}", device.path()?);
    let options = [
        &filename,
        "rw=randwrite",
        "bs=4k",
        "size=8m",
        "iodepth=32",
        "direct=1",
        "ioengine=io_uring",
        "verify=crc32c",
    ];
    fio::run(ctx, &options)?;
    device.delete()?;
    Ok(Outcome::Pass)
}

/// `add` is killed while its server works: the server notices that nobody waits, and leaves
/// nothing. Where the device was live before, it stays.
fn abandoned(_ctx: &Ctx) -> Result<Outcome> {
    load_driver()?;
    let mut reader = Command::new(PROGRAM)
        .args(["add", "null", "--role", "server"])
        .stdout(Stdio::piped())
        .spawn()?;
    // Nobody reads what the server prints when it is live.
    drop(reader.stdout.take());
    let status = reader.wait()?;
    ensure!(!status.success(), "the server went on for nobody");
    ensure!(std::fs::read_dir("/sys/class/ublk-char")?.next().is_none(), "the device is left");
    Ok(Outcome::Pass)
}

fn churn(ctx: &Ctx) -> Result<Outcome> {
    let rounds = if ctx.long { 300 } else { 30 };
    let drive = fresh_drive("drive0")?;
    for round in 0..rounds {
        let lend = if round % 2 == 0 { "fused" } else { "copy" };
        let device = Device::add_loop(&drive.path(), &["--lend", lend, "-q", "2"])?;
        if round % 3 == 0 {
            process::signal(device.pid()?, Signal::SIGTERM)?;
            device.wait_until_gone()?;
        } else {
            device.delete()?;
        }
    }
    Ok(Outcome::Pass)
}

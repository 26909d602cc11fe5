//! Bad input: one clear line, a non-zero exit code, nothing left behind.

use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::death::kill_server;
use super::device::{Device, Mount, PROGRAM, fresh_drive, load_driver, text};
use crate::config::DEFAULT;
use crate::guest::{Ctx, Outcome, TestCase, process};

pub const TESTS: &[TestCase] = &[
    TestCase::guest("bad_backings_are_refused", DEFAULT, backings),
    TestCase::guest("backings_in_use_are_refused", DEFAULT, in_use),
    TestCase::guest("bad_numbers_are_refused", DEFAULT, numbers),
    TestCase::guest("devices_are_named_by_id_name_or_path", DEFAULT, named),
    TestCase::guest("no_arguments_print_the_help", DEFAULT, help),
    TestCase::guest("taken_ids_are_refused", DEFAULT, taken_id),
    TestCase::guest("a_missing_driver_is_named", DEFAULT, no_driver),
    TestCase::guest("a_forbidden_io_uring_is_named", DEFAULT, no_io_uring),
    TestCase::guest("ordinary_users_are_told_to_be_root", DEFAULT, not_root),
    TestCase::guest("devices_beyond_the_drivers_limit_are_refused", DEFAULT, no_room),
    TestCase::guest("buffers_beyond_memory_are_refused", DEFAULT, no_memory),
    TestCase::guest("a_state_directory_that_cannot_be_written_is_named", DEFAULT, no_state),
];

/// Runs the program, which must fail with one line that has all of `expected`, and leave nothing
/// that was not there before.
fn refused(arguments: &[&str], expected: &[&str]) -> Result<()> {
    let before = traces_of_devices()?;
    let output = Command::new(PROGRAM).args(arguments).stdin(Stdio::null()).output()?;
    judge(arguments, &output, expected)?;
    let after = traces_of_devices()?;
    ensure!(before == after, "{arguments:?} left something: {before:?} became {after:?}");
    Ok(())
}

fn judge(arguments: &[&str], output: &Output, expected: &[&str]) -> Result<()> {
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(!output.status.success(), "{arguments:?} succeeded");
    ensure!(output.status.code().is_some(), "{arguments:?} ended by a signal: {}", output.status);
    ensure!(output.stdout.is_empty(), "{arguments:?} printed to standard output");
    ensure!(said.trim_end().lines().count() == 1, "{arguments:?}: not one line:\n{said}");
    for text in expected {
        ensure!(said.contains(text), "{arguments:?}: `{text}` is not in: {said}");
    }
    println!("{}", said.trim_end());
    Ok(())
}

/// Nodes, state files and processes of devices.
fn traces_of_devices() -> Result<Vec<String>> {
    let mut traces = Vec::new();
    for (directory, prefix) in
        [("/dev", "ublk"), ("/run/ublk-target", ""), ("/sys/class/ublk-char", "")]
    {
        let Ok(entries) = fs::read_dir(directory) else { continue };
        let names = entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
        traces.extend(names.filter(|name| name.starts_with(prefix)));
    }
    let servers = Command::new("pidof").arg(PROGRAM).output()?;
    traces.push(String::from_utf8_lossy(&servers.stdout).trim().to_owned());
    traces.sort();
    Ok(traces)
}

fn backings(ctx: &Ctx) -> Result<Outcome> {
    load_driver()?;
    let at = |name: &str| ctx.directory().join(name);
    fs::write(at("empty"), "")?;
    fs::write(at("tiny"), "x")?;
    std::os::unix::fs::symlink("nowhere", at("dangling"))?;
    for (path, expected) in [
        (at("missing"), "does not exist"),
        (at("dangling"), "does not exist"),
        (at("empty/below"), "cannot be looked up: ENOTDIR"),
        (ctx.directory().to_owned(), "is a directory"),
        (at("empty"), "is empty"),
        (at("tiny"), "less than one block"),
        (Path::new("/dev/null").to_owned(), "is a character device"),
        (Path::new("/proc/version").to_owned(), "/proc/version: "),
    ] {
        let path = text(&path)?;
        refused(&["add", "loop", "-f", path], &[path, expected])?;
    }
    refused(&["add", "loop"], &["--file"])?;
    Ok(Outcome::Pass)
}

fn in_use(ctx: &Ctx) -> Result<Outcome> {
    load_driver()?;
    let drive = fresh_drive("drive1")?;
    let path = drive.path();
    let path = text(&path)?;
    let add = ["add", "loop", "-f", path];

    process::run(&["mkfs.ext4", "-q", "-F", path])?;
    let mount = Mount::new(ctx, path, "mnt")?;
    refused(&add, &[path, "in use", "mounted on", text(mount.point())?])?;
    mount.unmount()?;

    process::run(&["sh", "-c", &format!("echo '2048,' | sfdisk -q {path}")])?;
    crate::guest::udev::settle()?;
    let part = format!("{path}p1");
    process::run(&["mkfs.ext4", "-q", "-F", &part])?;
    let mount = Mount::new(ctx, &part, "part")?;
    // The whole disk, one of whose partitions is mounted.
    refused(&add, &["in use", "mounted on"])?;
    mount.unmount()?;
    drive.wipe()?;
    process::run(&["blockdev", "--rereadpt", path])?;
    crate::guest::udev::settle()?;

    process::run(&[
        "dmsetup",
        "create",
        "ublk-test",
        "--table",
        &format!("0 2048 linear {path} 0"),
    ])?;
    let held = refused(&add, &["in use", "held by dm-"]);
    process::run(&["dmsetup", "remove", "ublk-test"])?;
    held?;

    process::run(&["mkswap", "-q", path])?;
    process::run(&["swapon", path])?;
    let swap = refused(&add, &["in use", "used as swap"]);
    process::run(&["swapoff", path])?;
    swap?;

    let device = Device::add(&["loop", "-f", path])?;
    let pid = format!("({})", device.pid()?);
    refused(&add, &["in use", "open by ublk-target", &pid])?;
    device.delete()?;

    process::run(&["modprobe", "loop"])?;
    let file = ctx.directory().join("image");
    fs::File::create(&file)?.set_len(1 << 20)?;
    let file_add = ["add", "loop", "-f", text(&file)?];
    let printed = process::run(&["losetup", "--find", "--show", text(&file)?])?;
    let attached = printed.stdout.trim();
    let loops = refused(&file_add, &["in use", "attached to /dev/loop"]);
    process::run(&["losetup", "-d", attached])?;
    loops?;
    Ok(Outcome::Pass)
}

fn numbers(_ctx: &Ctx) -> Result<Outcome> {
    load_driver()?;
    for (arguments, expected) in [
        (["add", "null", "-q", "0"].as_slice(), "1..=4096"),
        (&["add", "null", "-q", "4097"], "1..=4096"),
        (&["add", "null", "-q", "99999999999999999999"], "--queues"),
        (&["add", "null", "-d", "0"], "1..=4096"),
        (&["add", "null", "-d", "4097"], "1..=4096"),
        (&["add", "null", "-d", "-1"], "-1"),
        (&["add", "null", "-n", "1048576"], "beyond the driver's limit of 1048575"),
        (&["add", "null", "-n", "4294967296"], "--id"),
        (&["add", "null", "-n", "x"], "an id is the number N of a device /dev/ublkbN"),
        (&["add", "null", "-n", "/dev/ublkb7"], "an id is the number alone: 7"),
        (&["stats", "/dev/ublkb7p1"], "this is a partition"),
        (&["del", "77"], "no ublk device 77"),
        (&["list", "/dev/ublkb77"], "no ublk device 77"),
        (&["add", "loop", "-q", "0"], "see `ublk-target add loop --help`"),
        (&["del", "1", "2"], "see `ublk-target del --help`"),
        (&["add", "null", "--size", "0"], "0 bytes"),
        (&["add", "null", "--size", "lots"], "is not a size"),
        (&["add", "null", "--lend", "magic"], "auto, fused, slot, user-copy, copy"),
        (&["add", "teapot"], "teapot"),
        (&["del", "-n", "77"], "no ublk device 77"),
        (&["del"], "--all"),
        (&["list", "-n", "77"], "no ublk device 77"),
        (&["frobnicate"], "frobnicate"),
    ] {
        refused(arguments, &[expected])?;
    }
    Ok(Outcome::Pass)
}

fn taken_id(_ctx: &Ctx) -> Result<Outcome> {
    let device = Device::add(&["null", "-n", "17"])?;
    ensure!(device.described.id == 17);
    refused(&["add", "null", "-n", "17"], &["id 17 is taken"])?;
    device.delete()?;
    Ok(Outcome::Pass)
}

fn no_driver(_ctx: &Ctx) -> Result<Outcome> {
    load_driver()?;
    process::run(&["modprobe", "-r", "ublk_drv"])?;
    ensure!(!Path::new("/dev/ublk-control").exists(), "the driver is still there");
    let expected = ["/dev/ublk-control is missing", "modprobe ublk_drv"];
    for arguments in [
        ["add", "null"].as_slice(),
        &["del", "--all"],
        &["del", "-n", "0"],
        &["list"],
        &["features"],
    ] {
        refused(arguments, &expected)?;
    }
    // What is wrong besides is not hidden by it.
    refused(&["add", "loop", "-f", "/nowhere/disk"], &["/nowhere/disk: does not exist"])?;
    let said = as_nobody(&["list"])?;
    judge(&["list"], &said, &["run as root", "modprobe ublk_drv"])?;
    load_driver()?;
    let (node, aside) = ("/dev/ublk-control", "/dev/ublk-control.aside");
    fs::rename(node, aside)?;
    let numbers = fs::read_to_string("/sys/class/misc/ublk-control/dev")?;
    let needs = format!("needs the character device {}", numbers.trim());
    let without_node = refused(&["list"], &["though the ublk driver is loaded", &needs]);
    fs::rename(aside, node)?;
    without_node?;
    Ok(Outcome::Pass)
}

fn no_io_uring(_ctx: &Ctx) -> Result<Outcome> {
    load_driver()?;
    let switch = "/proc/sys/kernel/io_uring_disabled";
    fs::write(switch, "2")?;
    let added = refused(&["add", "null"], &["io_uring is not allowed", "kernel.io_uring_disabled"]);
    fs::write(switch, "0")?;
    added?;
    Ok(Outcome::Pass)
}

fn not_root(_ctx: &Ctx) -> Result<Outcome> {
    load_driver()?;
    for arguments in [["add", "null"].as_slice(), &["del", "--all"], &["list"], &["features"]] {
        judge(arguments, &as_nobody(arguments)?, &["run as root"])?;
    }
    Ok(Outcome::Pass)
}

/// Runs the program as another user.
fn as_nobody(arguments: &[&str]) -> Result<Output> {
    // `setpriv` changes the user without a session, a shell or an entry in passwd.
    let mut command = Command::new("setpriv");
    command.args(["--reuid", "65534", "--clear-groups", PROGRAM]).args(arguments);
    command.output().context("setpriv")
}

/// The device itself does as well as `-n ID`.
fn named(_ctx: &Ctx) -> Result<Outcome> {
    let device = Device::add(&["null", "--size", "1.5G", "--on-death", "wait", "-n", "5"])?;
    ensure!(device.described.size_bytes == 3 << 29, "{:?}", device.described);
    for name in ["5", "ublkb5", "/dev/ublkb5"] {
        let listed: Value = printed(&["list", name, "--json"])?;
        ensure!(listed["id"] == 5, "{listed}");
        let report: Value = printed(&["stats", name, "--json", "--interval", "0.1"])?;
        ensure!(report["device"] == 5, "{report}");
    }
    process::run(&[PROGRAM, "resize", "ublkb5", "--size", "2G"])?;
    process::run(&[PROGRAM, "upgrade", "/dev/ublkb5"])?;
    kill_server(&device)?;
    let recovered: Value = printed(&["recover", "/dev/ublkb5", "--json"])?;
    ensure!(recovered["size_bytes"] == 2_u64 << 30, "{recovered}");
    // The server is known by its arguments from the first on, not only when it has the device.
    let line = fs::read_to_string(format!("/proc/{}/cmdline", recovered["pid"]))?;
    ensure!(line.contains("recover\0-n\x005\0"), "{line:?}");
    process::run(&[PROGRAM, "del", "ublkb5"])?;
    ensure!(!Path::new("/dev/ublkb5").exists(), "the device is left");
    device.was_deleted();
    Ok(Outcome::Pass)
}

fn printed(arguments: &[&str]) -> Result<Value> {
    let printed = process::run(&[&[PROGRAM], arguments].concat())?.stdout;
    serde_json::from_str(&printed).with_context(|| format!("not JSON: {printed}"))
}

fn help(_ctx: &Ctx) -> Result<Outcome> {
    for (arguments, expected) in [([].as_slice(), "Usage: ublk-target"), (&["add"], "stripe")] {
        let output = Command::new(PROGRAM).args(arguments).output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.code() == Some(2), "{arguments:?}: {}", output.status);
        ensure!(said.contains(expected) && said.lines().count() > 5, "{arguments:?}: {said}");
    }
    Ok(Outcome::Pass)
}

fn no_room(_ctx: &Ctx) -> Result<Outcome> {
    // The limit of older kernels counts all devices, that of newer ones only the unprivileged:
    // what is asked for here is that either is handled.
    load_driver()?;
    let limit = "/sys/module/ublk_drv/parameters/ublks_max";
    let before = fs::read_to_string(limit)?;
    fs::write(limit, "1")?;
    let first = Device::add(&["null"]);
    let second = Device::add(&["null"]);
    fs::write(limit, before.trim())?;
    first?.delete()?;
    match second {
        Ok(device) => device.delete()?,
        Err(error) => {
            let said = format!("{error:#}");
            ensure!(said.contains("ublks_max"), "{said}");
        }
    }
    Ok(Outcome::Pass)
}

fn no_memory(_ctx: &Ctx) -> Result<Outcome> {
    load_driver()?;
    let add = ["add", "null", "--lend", "copy", "-q", "4096", "-d", "4096"];
    refused(&add, &["for buffers", "lower -q or -d"])?;
    Ok(Outcome::Pass)
}

fn no_state(_ctx: &Ctx) -> Result<Outcome> {
    load_driver()?;
    // A file where the directory should be.
    if Path::new("/run/ublk-target").exists() {
        fs::remove_dir("/run/ublk-target")?;
    }
    fs::write("/run/ublk-target", "")?;
    let result = Command::new(PROGRAM).args(["add", "null"]).output();
    fs::remove_file("/run/ublk-target")?;
    judge(&["add", "null"], &result?, &["cannot write to /run/ublk-target"])?;
    ensure!(fs::read_dir("/sys/class/ublk-char")?.next().is_none(), "the device is left");
    Ok(Outcome::Pass)
}

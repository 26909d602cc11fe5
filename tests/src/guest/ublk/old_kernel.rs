//! The release's own kernel, whose driver has no zero copy.

use anyhow::{Context, Result, ensure};

use super::device::{Description, Device, PROGRAM, fresh_drive, load_driver, text};
use crate::config::STABLE;
use crate::guest::{Ctx, Outcome, TestCase, fio, process};
use crate::witness::{COPY, LEND};

pub const TESTS: &[TestCase] = &[
    TestCase::guest("old_kernel_auto_serves_by_copy_and_says_why", STABLE, auto),
    TestCase::guest("old_kernel_zero_copy_is_refused", STABLE, zero_copy),
    TestCase::guest("old_kernel_verify_copy", STABLE, |ctx| verify(ctx, "copy")).seconds(300),
    TestCase::guest("old_kernel_verify_user_copy", STABLE, |ctx| verify(ctx, "user-copy"))
        .seconds(300),
    TestCase::guest("old_kernel_killed_server_is_cleaned_up", STABLE, killed),
    TestCase::guest("old_kernel_witness_says_what_it_looked_for", STABLE, witness),
];

const WHY: &str = "fused needs the ublk feature SUPPORT_ZERO_COPY (Linux 6.15)";

fn auto(_ctx: &Ctx) -> Result<Outcome> {
    load_driver()?;
    let drive = fresh_drive("drive0")?;
    let backing = drive.path();
    let argv = [PROGRAM, "add", "loop", "-f", text(&backing)?, "--lend", "auto", "--json"];
    let printed = process::run(&argv)?;
    let described: Description = serde_json::from_str(&printed.stdout)?;
    process::run(&[PROGRAM, "del", "-n", &described.id.to_string()])?;
    ensure!(described.lend == "copy", "{described:?}");
    ensure!(printed.stderr.contains(WHY) && printed.stderr.contains("6.1"), "{}", printed.stderr);
    ensure!(printed.stderr.trim_end().lines().count() == 1, "{}", printed.stderr);
    Ok(Outcome::Pass)
}

fn zero_copy(_ctx: &Ctx) -> Result<Outcome> {
    load_driver()?;
    for (options, expected) in [
        (["--lend", "fused"].as_slice(), "lend mode fused needs"),
        (&["--lend", "slot"], "lend mode slot needs"),
        (&["--lend", "copy", "--io-lane"], "`--io-lane` needs"),
        (&["--no-part-scan"], "--no-part-scan needs the ublk feature NO_AUTO_PART_SCAN"),
    ] {
        let argv = [&[PROGRAM, "add", "null"], options].concat();
        let said = process::run_for_code(&argv, 1)?.stderr;
        ensure!(said.contains(expected), "{said}");
        ensure!(said.trim_end().lines().count() == 1, "{said}");
    }
    ensure!(std::fs::read_dir("/sys/class/ublk-char")?.next().is_none(), "a device is left");
    Ok(Outcome::Pass)
}

fn verify(ctx: &Ctx, lend: &str) -> Result<Outcome> {
    let drive = fresh_drive("drive0")?;
    let device = Device::add_loop(&drive.path(), &["-q", "2", "--lend", lend])?;
    let filename = format!("filename={}", device.path()?);
    for (block, depth) in
        [("bs=4k", "iodepth=32"), ("bsrange=512-64k", "iodepth=128"), ("bs=1m", "iodepth=4")]
    {
        let options = [
            &filename,
            "rw=randrw",
            block,
            depth,
            "size=32m",
            "ioengine=io_uring",
            "direct=1",
            "verify=crc32c",
        ];
        fio::run(ctx, &options)?;
    }
    process::run(&["blkdiscard", device.path()?])?;
    process::run(&["mkfs.ext4", "-q", "-F", device.path()?])?;
    process::run(&["e2fsck", "-f", "-n", device.path()?])?;
    device.delete()?;
    Ok(Outcome::Pass)
}

fn killed(_ctx: &Ctx) -> Result<Outcome> {
    let device = Device::add(&["null"])?;
    let pid = i32::try_from(device.pid()?)?;
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL)?;
    device.delete()?;
    Ok(Outcome::Pass)
}

/// The driver copies by a function that is known, and lends by none: a witness that knows none says
/// so, as on a kernel that is newer than what it knows.
fn witness(_ctx: &Ctx) -> Result<Outcome> {
    load_driver()?;
    let copies = COPY.find()?;
    ensure!(!copies.is_empty());
    let said = LEND.find().err().context("a driver without zero copy lends")?.to_string();
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let names = LEND.functions.iter().map(|function| function.name);
    for part in names.chain([release.trim(), "tests/src/witness"]) {
        ensure!(said.contains(part), "no {part} in {said}");
    }
    ensure!(said.lines().count() == 1, "{said}");
    Ok(Outcome::Pass)
}

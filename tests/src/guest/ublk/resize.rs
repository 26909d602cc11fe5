//! Devices get another size while they are used.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::device::{Device, Mount, PROGRAM, file_on_drive, fresh_drive, text};
use super::remains;
use crate::config::DEFAULT;
use crate::guest::direct::{self, Aligned};
use crate::guest::{Ctx, Outcome, TestCase, fio, process, wait_for};

pub const TESTS: &[TestCase] = &[
    TestCase::guest("a_device_grows_with_its_file_under_load", DEFAULT, grows).seconds(180),
    TestCase::guest("a_grown_device_is_recovered_with_its_size", DEFAULT, recovered).seconds(180),
    TestCase::guest("linear_and_stripe_grow_where_data_stays", DEFAULT, several).seconds(180),
    TestCase::guest("a_device_shrinks_only_if_told_and_unused", DEFAULT, shrinks).seconds(180),
    TestCase::guest("sizes_that_cannot_be_are_refused", DEFAULT, refused),
    TestCase::guest("two_resizes_come_one_after_the_other", DEFAULT, at_once),
];

const MIB: u64 = 1 << 20;

fn lengthen(file: &Path, mib: u64) -> Result<()> {
    Ok(OpenOptions::new().write(true).open(file)?.set_len(mib * MIB)?)
}

fn resize(device: &Device, more: &[&str]) -> Result<u64> {
    process::run(&[&[PROGRAM, "resize", "-n", &device.id()], more].concat())?;
    size(device)
}

fn size(device: &Device) -> Result<u64> {
    Ok(device.attribute("size")?.parse::<u64>()? * 512)
}

/// Writes a block, and reads it back from the device.
fn write_at(device: &Device, offset: u64, fill: u8) -> Result<()> {
    let file = direct::open(device.path()?)?;
    let mut block = Aligned::new(4096, fill);
    file.write_all_at(block.bytes(), offset)?;
    block.bytes().fill(0);
    file.read_exact_at(block.bytes(), offset)?;
    ensure!(block.bytes().iter().all(|byte| *byte == fill), "another byte at {offset}");
    Ok(())
}

/// One that has looked at the device waits while another one comes, which makes it longer: it must not
/// make it shorter again.
fn at_once(ctx: &Ctx) -> Result<Outcome> {
    let (mount, file) = file_on_drive(ctx, "drive0", 64)?;
    let device = Device::add_loop(&file, &[])?;
    lengthen(&file, 128)?;
    let mark = Path::new("/dev/step-of-a-test");
    std::fs::write(mark, "")?;
    let said = ctx.directory().join("said");
    let start = |more: &[&str], step: &str| -> Result<std::process::Child> {
        Ok(Command::new(PROGRAM)
            .args(["resize", "-n", &device.id()])
            .args(more)
            .env("UBLK_TARGET_STEP", step)
            .stderr(File::options().create(true).append(true).open(&said)?)
            .spawn()?)
    };
    let mut first = start(&["--size", "96M"], "resize-checked self SIGSTOP /dev/step-of-a-test")?;
    remains::wait_suspended("--size 96M")?;
    let mut second = start(&[], "")?;
    wait_for("the second to end or to wait", Duration::from_secs(20), || {
        let waits = std::fs::read_to_string(&said)?.contains("waiting for another");
        Ok((waits || second.try_wait()?.is_some()).then_some(()))
    })?;
    kill(Pid::from_raw(i32::try_from(first.id())?), Signal::SIGCONT)?;
    ensure!(first.wait()?.success() && second.wait()?.success(), "a resize has failed");
    ensure!(size(&device)? == 128 * MIB, "{} MiB", size(&device)? / MIB);
    device.delete()?;
    mount.unmount()?;
    Ok(Outcome::Pass)
}

fn grows(ctx: &Ctx) -> Result<Outcome> {
    let (mount, file) = file_on_drive(ctx, "drive0", 64)?;
    for lend in ["fused", "slot", "copy"] {
        lengthen(&file, 64)?;
        let device = Device::add_loop(&file, &["--lend", lend, "-q", "2"])?;
        let name = format!("filename={}", device.path()?);
        let options = [
            &name,
            "rw=randwrite",
            "bs=4k",
            "iodepth=32",
            "ioengine=io_uring",
            "direct=1",
            "size=48m",
            "rate_iops=3000",
            "verify=crc32c",
            "verify_fatal=1",
        ];
        let running = fio::start(ctx, "load", &options)?;
        for mib in [80, 96, 112, 128] {
            lengthen(&file, mib)?;
            ensure!(resize(&device, &[])? == mib * MIB, "{mib} MiB");
            write_at(&device, mib * MIB - 4096, u8::try_from(mib)?)?;
        }
        // As much of it as one likes.
        lengthen(&file, 256)?;
        ensure!(resize(&device, &["--size", "200M"])? == 200 * MIB, "200 MiB");
        ensure!(resize(&device, &["--size", "256M"])? == 256 * MIB, "256 MiB");
        running.finish()?;
        device.delete()?;
    }
    mount.unmount()?;
    Ok(Outcome::Pass)
}

fn recovered(ctx: &Ctx) -> Result<Outcome> {
    let (mount, file) = file_on_drive(ctx, "drive0", 64)?;
    let device = Device::add_loop(&file, &["--on-death", "reissue"])?;
    lengthen(&file, 128)?;
    ensure!(resize(&device, &[])? == 128 * MIB, "grown");
    write_at(&device, 127 * MIB, 7)?;
    // What comes after the last resize is not the device's.
    lengthen(&file, 192)?;
    kill(Pid::from_raw(i32::try_from(device.pid()?)?), Signal::SIGKILL)?;
    process::run(&[PROGRAM, "recover", "-n", &device.id()])?;
    ensure!(size(&device)? == 128 * MIB, "recovered");
    write_at(&device, 127 * MIB + 4096, 8)?;
    ensure!(resize(&device, &[])? == 192 * MIB, "grown again");
    write_at(&device, 191 * MIB, 9)?;
    device.delete()?;
    mount.unmount()?;
    Ok(Outcome::Pass)
}

fn several(ctx: &Ctx) -> Result<Outcome> {
    let (mount, one) = file_on_drive(ctx, "drive0", 64)?;
    let two = mount.point().join("second.img");
    std::fs::File::create(&two)?.set_len(64 * MIB)?;
    let (first, second) = (text(&one)?, text(&two)?);
    let device = Device::add(&["linear", "-f", first, "-f", second])?;
    write_at(&device, 64 * MIB, 1)?;
    lengthen(&two, 96)?;
    ensure!(resize(&device, &[])? == 160 * MIB, "the last extent");
    write_at(&device, 159 * MIB, 2)?;
    lengthen(&one, 96)?;
    let refused = process::run_for_code(&[PROGRAM, "resize", "-n", &device.id()], 1)?;
    ensure!(
        refused.stderr.contains("the place of existing data would change"),
        "{}",
        refused.stderr
    );
    ensure!(size(&device)? == 160 * MIB, "after a refusal");
    device.delete()?;

    let device = Device::add(&["stripe", "-f", first, "-f", second])?;
    write_at(&device, 192 * MIB - 4096, 3)?;
    lengthen(&one, 128)?;
    // Both had 96 MiB: what one has more is behind all that was there.
    ensure!(resize(&device, &[])? == 224 * MIB, "one of two");
    write_at(&device, 224 * MIB - 4096, 4)?;
    lengthen(&two, 128)?;
    let refused = process::run_for_code(&[PROGRAM, "resize", "-n", &device.id()], 1)?;
    ensure!(
        refused.stderr.contains("the place of existing data would change"),
        "{}",
        refused.stderr
    );
    device.delete()?;
    mount.unmount()?;
    Ok(Outcome::Pass)
}

fn shrinks(ctx: &Ctx) -> Result<Outcome> {
    let (mount, file) = file_on_drive(ctx, "drive0", 64)?;
    let device = Device::add_loop(&file, &["--on-death", "reissue"])?;
    write_at(&device, 0, 5)?;
    crate::guest::udev::settle()?;
    let shrink = [PROGRAM, "resize", "-n", &device.id(), "--size", "32M", "--shrink"];
    let refused = process::run_for_code(&shrink[..6], 1)?;
    ensure!(refused.stderr.contains("use --shrink"), "{}", refused.stderr);
    let open = direct::open(device.path()?)?;
    let refused = process::run_for_code(&shrink, 1)?;
    ensure!(refused.stderr.contains("is in use: open by"), "{}", refused.stderr);
    drop(open);
    crate::guest::udev::settle()?;
    ensure!(resize(&device, &shrink[4..])? == 32 * MIB, "shrunk");
    // Its next server leaves it so.
    kill(Pid::from_raw(i32::try_from(device.pid()?)?), Signal::SIGKILL)?;
    process::run(&[PROGRAM, "recover", "-n", &device.id()])?;
    ensure!(size(&device)? == 32 * MIB, "recovered");
    write_at(&device, 32 * MIB - 4096, 6)?;
    process::run(&["mkfs.ext4", "-q", "-F", device.path()?])?;
    let mounted = Mount::new(ctx, device.path()?, "on-it")?;
    let refused = process::run_for_code(
        &[PROGRAM, "resize", "-n", &device.id(), "--size", "16M", "--shrink"],
        1,
    )?;
    ensure!(refused.stderr.contains("mounted on"), "{}", refused.stderr);
    // And grows below a mounted file system.
    ensure!(resize(&device, &[])? == 64 * MIB, "grown");
    process::run(&["resize2fs", device.path()?])?;
    mounted.unmount()?;
    process::run(&["e2fsck", "-fn", device.path()?])?;
    device.delete()?;
    mount.unmount()?;
    Ok(Outcome::Pass)
}

fn refused(_ctx: &Ctx) -> Result<Outcome> {
    let drive = fresh_drive("drive0")?;
    let device = Device::add_loop(&drive.path(), &[])?;
    let id = device.id();
    for (arguments, expected) in [
        (&["-n", "77"][..], "there is no ublk device 77"),
        (&["-n", &id, "--size", "1000"], "a multiple of 512"),
        (&["-n", &id, "--size", "0"], "and not 0"),
        (&["-n", &id, "--size", "2G"], "less than 2 GiB; enlarge them first"),
    ] {
        let refused = process::run_for_code(&[&[PROGRAM, "resize"], arguments].concat(), 1)?;
        ensure!(refused.stderr.contains(expected), "{arguments:?}: {}", refused.stderr);
        ensure!(refused.stderr.lines().count() == 1, "{}", refused.stderr);
    }
    ensure!(size(&device)? == device.described.size_bytes, "it has not changed");
    device.delete()?;
    let null = Device::add(&["null", "--size", "1G"])?;
    ensure!(resize(&null, &["--size", "3G"])? == 3 << 30, "null");
    null.delete()?;
    Ok(Outcome::Pass)
}

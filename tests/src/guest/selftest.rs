//! The harness's own tests: if one of these fails, what the others say is of
//! no worth.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};

use super::drives::Drive;
use super::{Ctx, Outcome, TestCase, fio, process, wait_for};
use crate::config::{DEFAULT, ICOUNT, STABLE};

/// The tests of this module.
pub const TESTS: &[TestCase] = &[
    TestCase::guest("harness_boots_the_newest_kernel", DEFAULT, newest_kernel),
    TestCase::guest("harness_boots_the_stable_kernel", STABLE, stable_kernel),
    TestCase::guest("harness_counts_instructions", ICOUNT, deterministic_time),
    TestCase::guest("harness_makes_the_drives_asked_for", DEFAULT, drives),
    TestCase::guest("harness_drives_keep_what_is_written", DEFAULT, verified_write).seconds(300),
    TestCase::guest("harness_finds_kernel_warnings", DEFAULT, warn)
        .expect_in_log(&["WARNING: CPU: 0 PID: 1 at test"]),
    TestCase::guest("harness_finds_leaked_devices", DEFAULT, leak_devices).expect_leaks(&[
        "dm device: vm-leak",
        "loop device: loop",
        "mount: ",
        "sleep 98765",
    ]),
    TestCase::guest("harness_removes_what_was_leaked", DEFAULT, nothing_is_left),
];

fn kernel_version() -> Result<(u32, u32)> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let mut numbers = release.split('.').map(str::parse::<u32>);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) => Ok((major, minor)),
        _ => bail!("odd kernel release {release}"),
    }
}

fn load_ublk() -> Result<()> {
    process::run(&["modprobe", "ublk_drv"])?;
    let node = Path::new("/dev/ublk-control");
    ensure!(node.exists(), "no {} after loading ublk_drv", node.display());
    Ok(())
}

fn newest_kernel(_: &Ctx) -> Result<Outcome> {
    let version = kernel_version()?;
    ensure!(version >= (7, 2), "kernel {version:?} is too old for all ublk features");
    load_ublk()?;
    Ok(Outcome::Pass)
}

fn stable_kernel(_: &Ctx) -> Result<Outcome> {
    let version = kernel_version()?;
    ensure!(version == (6, 12), "kernel {version:?} is not the release's");
    load_ublk()?;
    Ok(Outcome::Pass)
}

/// With one nanosecond an instruction and time that jumps while idle, a long
/// sleep is over at once and still is as long as asked for.
fn deterministic_time(_: &Ctx) -> Result<Outcome> {
    let clock = std::time::Instant::now();
    process::run(&["sleep", "600"])?;
    ensure!(clock.elapsed().as_secs() >= 600, "the guest's clock does not follow its sleep");
    ensure!(fs::read_to_string("/proc/cpuinfo")?.matches("processor\t").count() == 1, "CPUs");
    Ok(Outcome::Pass)
}

fn drives(_: &Ctx) -> Result<Outcome> {
    let config = (crate::config::group(DEFAULT).context("group")?.config)();
    for wanted in &config.nvme {
        let drive = Drive::by_serial(&wanted.serial)?;
        let namespace = wanted.namespaces.first().context("namespace")?;
        ensure!(drive.size_bytes()? == namespace.size_bytes, "size of {}", wanted.serial);
        let block_bytes = drive.number("queue/logical_block_size")?;
        ensure!(
            block_bytes == u64::from(namespace.block_bytes),
            "{} has blocks of {block_bytes} bytes",
            wanted.serial
        );
        ensure!(drive.attribute("queue/write_cache")? == "write back", "volatile write cache");
        ensure!(drive.char_path().exists(), "no {}", drive.char_path().display());
        let log = process::run(&["dmesg"])?.stdout;
        let queues = format!("nvme {}: ", drive.controller);
        let line = log
            .lines()
            .find(|line| line.contains(&queues) && line.contains("default/read/poll queues"))
            .with_context(|| format!("no queue counts of {}", drive.controller))?;
        ensure!(
            line.contains(&format!("/{} default/read/poll", config.poll_queues)),
            "poll queues: {line}"
        );
    }
    Ok(Outcome::Pass)
}

fn verified_write(ctx: &Ctx) -> Result<Outcome> {
    let drive = Drive::by_serial("drive0")?;
    let filename = format!("filename={}", drive.path().display());
    let report = fio::run(
        ctx,
        &[
            &filename,
            "rw=randwrite",
            "bs=4k",
            "size=8m",
            "direct=1",
            "ioengine=io_uring",
            "iodepth=16",
            "verify=crc32c",
            "verify_fatal=1",
        ],
    )?;
    ensure!(report.write.bytes == 8 << 20, "wrote {} bytes", report.write.bytes);
    ensure!(report.read.bytes == 8 << 20, "verified {} bytes", report.read.bytes);
    drive.wipe()?;
    let mut block = [1; 4096];
    std::os::unix::fs::FileExt::read_exact_at(&fs::File::open(drive.path())?, &mut block, 0)?;
    ensure!(block.iter().all(|byte| *byte == 0), "a wiped drive is not zero");
    Ok(Outcome::Pass)
}

fn warn(_: &Ctx) -> Result<Outcome> {
    fs::write("/dev/kmsg", "<4>WARNING: CPU: 0 PID: 1 at test\n")?;
    Ok(Outcome::Pass)
}

/// Leaves behind one of each: a dm device, a loop device with a file system
/// mounted from it, and a daemon.
fn leak_devices(_: &Ctx) -> Result<Outcome> {
    process::run(&["modprobe", "dm_mod"])?;
    let drive = Drive::by_serial("drive1")?;
    let table = format!("0 2048 linear {} 0", drive.path().display());
    process::run(&["dmsetup", "create", "vm-leak", "--table", &table])?;
    process::run(&["modprobe", "loop"])?;
    process::run(&["truncate", "-s", "16M", "/root/leak.img"])?;
    process::run(&["mkfs.ext4", "-q", "/root/leak.img"])?;
    process::run(&["mkdir", "-p", "/mnt/leak"])?;
    process::run(&["mount", "-o", "loop", "/root/leak.img", "/mnt/leak"])?;
    let daemon = "setsid sleep 98765 < /dev/null > /dev/null 2>&1 &";
    process::run(&["sh", "-c", daemon])?;
    Ok(Outcome::Pass)
}

/// Runs after the test that leaks.
fn nothing_is_left(_: &Ctx) -> Result<Outcome> {
    let limit = std::time::Duration::from_secs(10);
    wait_for("the leaked device to go", limit, || {
        Ok((!Path::new("/dev/mapper/vm-leak").exists()).then_some(()))
    })?;
    let mounts = fs::read_to_string("/proc/mounts")?;
    ensure!(!mounts.contains("/mnt/leak"), "still mounted:\n{mounts}");
    process::run_for_code(&["pgrep", "-f", "sleep 98765"], 1)?;
    Ok(Outcome::Pass)
}

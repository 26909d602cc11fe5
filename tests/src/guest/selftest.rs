//! The harness's own tests: if one of these fails, what the others say is of
//! no worth.

use std::fs;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};

use super::direct::{self, Aligned};
use super::dm::Mapper;
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
    TestCase::guest("harness_makes_drives_with_bad_sectors", DEFAULT, bad_sectors),
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
    ensure!(version >= (7, 2), "kernel {version:?} is older than 7.2, which the tests need");
    load_ublk()?;
    Ok(Outcome::Pass)
}

fn stable_kernel(_: &Ctx) -> Result<Outcome> {
    let version = kernel_version()?;
    ensure!(version == (6, 12), "kernel {version:?} is not the release's, 6.12");
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
        // As `nvme_setup_io_queues` of `drivers/nvme/host/pci.c` words it.
        let (queues, counts) = (format!("nvme {}: ", drive.controller), "default/read/poll queues");
        let line =
            log.lines().find(|line| line.contains(&queues) && line.contains(counts)).with_context(
                || format!("looked for `{queues}… {counts}` in the kernel log:\n{log}"),
            )?;
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
    fs::File::open(drive.path())?.read_exact_at(&mut block, 0)?;
    ensure!(block.iter().all(|byte| *byte == 0), "a wiped drive is not zero");
    Ok(Outcome::Pass)
}

/// Each bad sector fails and no other; the others are those of the drive.
fn bad_sectors(_: &Ctx) -> Result<Outcome> {
    const SECTOR: usize = 512;
    const SECTORS: usize = 4096;
    const BAD: Range<u64> = 2051..2053;
    const EIO: i32 = 5;
    let drive = Drive::by_serial("drive2")?;
    let mut pattern = Aligned::new(SECTORS * SECTOR, 0);
    for (number, sector) in (0u64..).zip(pattern.bytes().chunks_exact_mut(SECTOR)) {
        sector.chunks_exact_mut(8).for_each(|word| word.copy_from_slice(&number.to_le_bytes()));
    }
    let direct = direct::open(drive.path())?;
    direct.write_all_at(pattern.bytes(), 0)?;

    let mapper = Mapper::with_bad_sectors("vm-bad", &drive, &[(BAD.start, BAD.end - BAD.start)])?;
    let path = mapper.path();
    let bytes = process::run(&["blockdev", "--getsize64", &path.to_string_lossy()])?.stdout;
    ensure!(bytes.trim().parse() == Ok(drive.size_bytes()?), "{bytes} bytes");
    let mapped = direct::open(&path)?;
    for sector in 2040..2064 {
        for count in [1, 2, 8] {
            let range = sector..sector + count;
            let is_bad = range.start < BAD.end && BAD.start < range.end;
            let mut buffer = Aligned::new(SECTOR * usize::try_from(count)?, 0xff);
            let read = mapped.read_exact_at(buffer.bytes(), sector * 512);
            match read {
                Ok(()) => {
                    ensure!(!is_bad, "sectors {range:?} were read");
                    let start = usize::try_from(sector)? * SECTOR;
                    let wanted = &pattern.bytes()[start..][..buffer.bytes().len()];
                    ensure!(buffer.bytes() == wanted, "sectors {range:?} have other contents");
                }
                Err(error) => {
                    ensure!(is_bad && error.raw_os_error() == Some(EIO), "{range:?}: {error}");
                }
            }
        }
    }

    let mut ones = Aligned::new(SECTOR, 1);
    let error = mapped.write_all_at(ones.bytes(), BAD.start * 512).err();
    ensure!(error.and_then(|error| error.raw_os_error()) == Some(EIO), "a bad sector was written");
    mapped.write_all_at(ones.bytes(), BAD.end * 512)?;
    drop(mapped);
    mapper.remove()?;
    let start = usize::try_from(BAD.end)? * SECTOR;
    pattern.bytes()[start..start + SECTOR].fill(1);
    let mut now = Aligned::new(SECTORS * SECTOR, 0);
    direct.read_exact_at(now.bytes(), 0)?;
    ensure!(now.bytes() == pattern.bytes(), "more or less than one sector was written");
    drop(direct);

    drop(Mapper::create("vm-bad", &["0 8 error"])?);
    ensure!(!path.exists(), "the dropped device is still there");
    drive.wipe()?;
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

//! NVMe passthrough: what is written is read back, by commands that the drive gets as they are and
//! with the client's own pages, and what cannot be served so is refused.

use std::path::Path;

use anyhow::{Result, ensure};

use super::device::{Device, Mount, PROGRAM, fresh_drive, load_driver, text};
use super::verify::{BLOCKS, SHORTER, verify};
use super::zero_copy::{REQUESTS, fua_writes, shared_pages};
use crate::config::{DEFAULT, STABLE, TRACING};
use crate::guest::drives::Drive;
use crate::guest::{Ctx, Outcome, TestCase, process};
use crate::witness::NvmeCommands;

pub const TESTS: &[TestCase] = &[
    verified("passthrough_verifies_in_each_lend_mode", modes),
    verified("passthrough_verifies_with_blocks_of_4k", big_blocks),
    verified("passthrough_verifies_linear_and_stripe", split),
    verified("passthrough_survives_deadlines_and_eagain", faults),
    TestCase::guest("passthrough_inherits_what_one_command_takes", DEFAULT, limits),
    TestCase::guest("passthrough_keeps_out_of_the_page_cache", DEFAULT, cache),
    TestCase::guest("passthrough_refuses_what_it_cannot_serve", DEFAULT, refused),
    TestCase::guest("passthrough_gives_the_drive_the_clients_pages", TRACING, pages).seconds(300),
    TestCase::guest("passthrough_commands_reach_the_drive", TRACING, commands).seconds(300),
    TestCase::guest("passthrough_is_refused_by_old_kernels", STABLE, old_kernel),
];

const fn verified(name: &'static str, run: fn(&Ctx) -> Result<Outcome>) -> TestCase {
    TestCase::guest(name, DEFAULT, run).seconds(900)
}

const QUIET: [&str; 7] =
    ["failed", "partial", "retries", "copied", "stale", "unexpected", "failed registrations"];

fn modes(ctx: &Ctx) -> Result<Outcome> {
    let drive = fresh_drive("drive0")?;
    for lend in ["fused", "slot", "user-copy", "copy"] {
        let device = Device::add_loop(&drive.char_path(), &["--lend", lend, "-q", "2"])?;
        let blocks = if lend == "fused" { &BLOCKS[..] } else { &SHORTER };
        let requests = verify(ctx, device.path()?, blocks)?;
        tree(ctx, &device, "mkfs.ext4", &["e2fsck", "-f", "-n"])?;
        let counters = device.stop_and_count()?;
        counters.ensure_none(&QUIET)?;
        ensure!(counters.get("requests") >= requests, "{counters:?}");
    }
    // The I/O lane issues the commands and registers for them.
    let device = Device::add_loop(&drive.char_path(), &["--lend", "slot", "--io-lane"])?;
    verify(ctx, device.path()?, &[("bsrange=512-64k", 8)])?;
    device.stop_and_count()?.ensure_none(&QUIET)?;
    Ok(Outcome::Pass)
}

/// A file system with files, which discards and flushes, checked.
fn tree(ctx: &Ctx, device: &Device, mkfs: &str, fsck: &[&str]) -> Result<()> {
    process::run(&["blkdiscard", device.path()?])?;
    process::run(&[mkfs, "-q", device.path()?])?;
    let mount = Mount::new(ctx, device.path()?, "tree")?;
    process::run(&["cp", "-r", "/etc", text(mount.point())?])?;
    process::run(&["sync", "-f", text(mount.point())?])?;
    process::run(&["fstrim", text(mount.point())?])?;
    process::run(&["diff", "-r", "--no-dereference", "/etc", text(&mount.point().join("etc"))?])?;
    mount.unmount()?;
    process::run(&[fsck, &[device.path()?]].concat()).map(drop)
}

fn big_blocks(ctx: &Ctx) -> Result<Outcome> {
    let drive = fresh_drive("big-blocks")?;
    let device = Device::add_loop(&drive.char_path(), &[])?;
    ensure!(device.attribute("queue/logical_block_size")? == "4096");
    verify(ctx, device.path()?, &[("bs=4k", 8), ("bs=1m", 32)])?;
    tree(ctx, &device, "mkfs.xfs", &["xfs_repair", "-n"])?;
    device.stop_and_count()?.ensure_none(&QUIET)?;
    Ok(Outcome::Pass)
}

fn split(ctx: &Ctx) -> Result<Outcome> {
    let drives = [fresh_drive("drive0")?, fresh_drive("drive1")?];
    let [one, two] = [drives[0].path(), drives[1].path()];
    for lend in ["fused", "slot", "copy"] {
        // One is given by its generic device, the other is a block device beside it.
        let generic = drives[0].char_path();
        let extents = [format!("{},512,1049088", text(&generic)?), text(&two)?.to_owned()];
        let linear = ["linear", "-f", &extents[0], "-f", &extents[1], "--lend", lend];
        let stripe = ["stripe", "-c", "4K", "-f", text(&one)?, "-f", text(&two)?];
        let stripe = [&stripe[..], &["--passthru", "--lend", lend]].concat();
        for arguments in [&linear[..], &stripe] {
            let device = Device::add(arguments)?;
            verify(ctx, device.path()?, &SHORTER)?;
            tree(ctx, &device, "mkfs.ext4", &["e2fsck", "-f", "-n"])?;
            device.stop_and_count()?.ensure_none(&QUIET)?;
        }
    }
    Ok(Outcome::Pass)
}

fn faults(ctx: &Ctx) -> Result<Outcome> {
    let drive = fresh_drive("drive0")?;
    let generic = drive.char_path();
    let arguments = ["loop", "-f", text(&generic)?, "--io-timeout", "20"];
    let device = Device::add_with_faults("short=3,again=4,auto-register", &arguments)?;
    verify(ctx, device.path()?, &[("bs=4k", 4), ("bs=64k", 8)])?;
    let counters = device.stop_and_count()?;
    // Commands are never short.
    counters.ensure_none(&["failed", "partial", "short", "stale", "unexpected"])?;
    ensure!(counters.get("again") > 100, "{counters:?}");
    ensure!(counters.get("retries") == counters.get("again"), "{counters:?}");
    Ok(Outcome::Pass)
}

fn limits(_ctx: &Ctx) -> Result<Outcome> {
    let drive = fresh_drive("drive0")?;
    let device = Device::add_loop(&drive.char_path(), &[])?;
    for (ours, drives) in [
        ("queue/max_hw_sectors_kb", "queue/max_hw_sectors_kb"),
        ("queue/max_segments", "queue/max_segments"),
        ("queue/max_segment_size", "queue/max_segment_size"),
        ("queue/virt_boundary_mask", "queue/virt_boundary_mask"),
        ("queue/dma_alignment", "queue/dma_alignment"),
        ("queue/logical_block_size", "queue/logical_block_size"),
    ] {
        let (ours_is, drives_is) = (device.attribute(ours)?, drive.attribute(drives)?);
        ensure!(ours_is == drives_is, "{ours}: {ours_is}, the drive's {drives_is}");
    }
    let size = drive.size_bytes()?;
    ensure!(device.described.size_bytes == size, "{:?}", device.described);
    device.delete()?;
    Ok(Outcome::Pass)
}

/// What the block device's cache held is written before, and not read after.
fn cache(_ctx: &Ctx) -> Result<Outcome> {
    let drive = fresh_drive("drive0")?;
    let block = drive.path();
    let read = |path: &Path| -> Result<Vec<u8>> {
        use std::os::unix::fs::FileExt;
        let mut bytes = vec![0; 4096];
        std::fs::File::open(path)?.read_exact_at(&mut bytes, 1 << 20)?;
        Ok(bytes)
    };
    let write = |path: &Path, fill: u8| -> Result<()> {
        use std::os::unix::fs::FileExt;
        let file = std::fs::File::options().write(true).open(path)?;
        file.write_all_at(&[fill; 4096], 1 << 20)?;
        Ok(())
    };
    // Open all the time, so that nobody else drops the cache.
    let keep = std::fs::File::open(&block)?;
    write(&block, 0x11)?;
    let device = Device::add_loop(&drive.char_path(), &[])?;
    ensure!(read(Path::new(device.path()?))? == [0x11; 4096], "it was in the cache only");
    process::run(&[
        "dd",
        "if=/dev/zero",
        &format!("of={}", device.path()?),
        "bs=4k",
        "count=1",
        "seek=256",
        "oflag=direct",
        "status=none",
    ])?;
    device.delete()?;
    ensure!(read(&block)? == [0; 4096], "the cache was stale");
    drop(keep);
    Ok(Outcome::Pass)
}

fn refused(ctx: &Ctx) -> Result<Outcome> {
    load_driver()?;
    let drive = fresh_drive("drive0")?;
    let metadata = Drive::by_serial_and_nsid("big-blocks", 2)?;
    let file = ctx.directory().join("file");
    std::fs::File::create(&file)?.set_len(1 << 20)?;
    let (generic, metadata, file) = (drive.char_path(), metadata.char_path(), text(&file)?);
    let metadata = text(&metadata)?;
    let refuse = |options: &[&str], expected: &str| -> Result<()> {
        let argv = [&[PROGRAM, "add"], options].concat();
        let said = process::run_for_code(&argv, 1)?.stderr;
        ensure!(said.contains(expected), "{options:?}: {said}");
        ensure!(said.trim_end().lines().count() == 1, "{said}");
        Ok(())
    };
    refuse(&["loop", "-f", metadata], "has 8 bytes of metadata per block")?;
    refuse(&["loop", "-f", file, "--passthru"], "is not a whole NVMe namespace")?;
    refuse(&["loop", "-f", "/dev/ng77n1"], "does not exist")?;
    refuse(&["loop", "-f", "/dev/null"], "a character device")?;
    refuse(&["null", "--passthru"], "the null target has no drive")?;

    process::run(&["mkfs.ext4", "-q", text(&drive.path())?])?;
    let mount = Mount::new(ctx, text(&drive.path())?, "busy")?;
    refuse(&["loop", "-f", text(&generic)?], "is in use: mounted on")?;
    mount.unmount()?;

    let device = Device::add_loop(&generic, &[])?;
    refuse(&["loop", "-f", text(&generic)?], "is in use")?;
    refuse(&["loop", "-f", text(&drive.path())?], "is in use")?;
    let mounted = process::run(&["mount", text(&drive.path())?, text(ctx.directory())?]);
    ensure!(mounted.is_err(), "the namespace can be mounted while it is served");
    device.delete()?;
    ensure!(std::fs::read_dir("/sys/class/ublk-char")?.next().is_none(), "a device is left");
    Ok(Outcome::Pass)
}

/// The kernel would copy a command that does not fit the queue's limits, silently: then its pages
/// are not the client's.
fn pages(ctx: &Ctx) -> Result<Outcome> {
    let drive = fresh_drive("drive0")?;
    for (lend, rw, blocks) in [
        ("fused", "randread", &["512", "4k", "36k", "512k"][..]),
        ("fused", "randwrite", &["512", "36k", "512k"]),
        ("slot", "randwrite", &["4k"]),
    ] {
        let device = Device::add_loop(&drive.char_path(), &["--lend", lend])?;
        crate::guest::udev::settle()?;
        for block in blocks {
            let (same, other) = shared_pages(ctx, &device, &drive.name, rw, block)?;
            println!("{lend} {rw} {block}: {same} with the client's page, {other} with another");
            // Neighbours in a batch may be merged into one request.
            ensure!(same >= REQUESTS / 2 && other == 0, "{same} and {other}");
        }
        device.delete()?;
    }
    Ok(Outcome::Pass)
}

fn commands(_ctx: &Ctx) -> Result<Outcome> {
    let drive = fresh_drive("drive0")?;
    let device = Device::add_loop(&drive.char_path(), &[])?;
    crate::guest::udev::settle()?;
    let output = format!("of={}", device.path()?);
    let argv = ["dd", "if=/dev/zero", output.as_str(), "bs=4k", "count=10", "status=none"];
    let recorded = |argv: &[&str]| -> Result<NvmeCommands> {
        let commands = NvmeCommands::record(&[&drive.name])?;
        process::run(argv)?;
        Ok(commands)
    };

    let seen = recorded(&[&argv[..], &["oflag=direct"]].concat())?;
    ensure!(seen.count(&["nvme_cmd_write "])? == 10, "{:#?}", seen.lines()?);
    ensure!(seen.count(&["nvme_cmd_flush"])? == 0 && fua_writes(&seen)? == 0);
    drop(seen);
    let seen = recorded(&[&argv[..], &["oflag=direct,dsync"]].concat())?;
    ensure!(fua_writes(&seen)? == 10, "{:#?}", seen.lines()?);
    drop(seen);
    let seen = recorded(&["sync", device.path()?])?;
    ensure!(seen.count(&["nvme_cmd_flush"])? >= 1, "{:#?}", seen.lines()?);
    drop(seen);
    let seen = recorded(&["blkdiscard", "-l", "1M", device.path()?])?;
    ensure!(seen.count(&["nvme_cmd_dsm"])? >= 1, "{:#?}", seen.lines()?);
    drop(seen);
    let seen = recorded(&["blkdiscard", "-z", "-l", "256k", device.path()?])?;
    ensure!(seen.count(&["nvme_cmd_write_zeroes"])? >= 1, "{:#?}", seen.lines()?);
    ensure!(seen.count(&["nvme_cmd_write "])? == 0, "zeroes were written as data");
    drop(seen);
    device.delete()?;
    Ok(Outcome::Pass)
}

fn old_kernel(_ctx: &Ctx) -> Result<Outcome> {
    load_driver()?;
    let drive = fresh_drive("drive0")?;
    let (block, generic) = (drive.path(), drive.char_path());
    for (options, expected) in [
        (vec!["-f", text(&generic)?], "passthrough needs Linux 6.19"),
        (vec!["-f", text(&block)?, "--passthru"], "passthrough needs Linux 6.19"),
        (vec!["-f", text(&block)?, "--poll"], "--poll needs Linux 7.1"),
    ] {
        let argv = [vec![PROGRAM, "add", "loop"], options].concat();
        let said = process::run_for_code(&argv, 1)?.stderr;
        ensure!(said.contains(expected) && said.trim_end().lines().count() == 1, "{said}");
    }
    ensure!(std::fs::read_dir("/sys/class/ublk-char")?.next().is_none(), "a device is left");
    Ok(Outcome::Pass)
}

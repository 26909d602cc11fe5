//! What is written is read back: fio with checksums over block sizes, queue depths, queues, lend
//! modes and kinds of backing.

use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Result, ensure};

use super::device::{Device, file_on_drive, fresh_drive, text};
use super::verify::{BLOCKS, verify, verify_at_length};
use crate::config::DEFAULT;
use crate::guest::direct::{self, Aligned};
use crate::guest::{Ctx, Outcome, TestCase, fio, process};

pub const TESTS: &[TestCase] = &[
    TestCase::guest("verify_file_fused_1_queue", DEFAULT, |ctx| file(ctx, "fused", "1"))
        .seconds(900),
    TestCase::guest("verify_file_fused_2_queues", DEFAULT, |ctx| file(ctx, "fused", "2"))
        .seconds(900),
    TestCase::guest("verify_file_copy_1_queue", DEFAULT, |ctx| file(ctx, "copy", "1")).seconds(900),
    TestCase::guest("verify_file_copy_2_queues", DEFAULT, |ctx| file(ctx, "copy", "2"))
        .seconds(900),
    TestCase::guest("verify_nvme_of_4096_byte_blocks", DEFAULT, big_blocks).seconds(600),
    TestCase::guest("verify_a_partition", DEFAULT, partition).seconds(300),
    TestCase::guest("null_reads_as_zeros", DEFAULT, null).seconds(300),
    TestCase::guest("limits_are_inherited_from_nvme", DEFAULT, limits),
    TestCase::guest("read_only_backings_are_served_read_only", DEFAULT, read_only),
];

const MODES: [&str; 4] = ["fused", "slot", "user-copy", "copy"];

fn file(ctx: &Ctx, lend: &str, queues: &str) -> Result<Outcome> {
    // The size bounds what the largest run covers.
    let mib = if ctx.long { 192 } else { 96 };
    let (mount, file) = file_on_drive(ctx, "drive1", mib)?;
    let device = Device::add_loop(&file, &["--lend", lend, "-q", queues])?;
    verify_at_length(ctx, device.path()?, &BLOCKS)?;
    device.delete()?;
    mount.unmount()?;
    Ok(Outcome::Pass)
}

fn big_blocks(ctx: &Ctx) -> Result<Outcome> {
    let drive = fresh_drive("big-blocks")?;
    for lend in MODES {
        let device = Device::add_loop(&drive.path(), &["--lend", lend])?;
        let block = device.attribute("queue/logical_block_size")?;
        ensure!(block == "4096", "the block size is inherited, not {block}");
        verify(ctx, device.path()?, &[("bsrange=4k-64k", 8), ("bs=1m", 48)])?;
        device.delete()?;
    }
    Ok(Outcome::Pass)
}

/// A partition whose start is not aligned to anything but the sector.
fn partition(ctx: &Ctx) -> Result<Outcome> {
    let drive = fresh_drive("drive2")?;
    let disk = drive.path();
    let disk = text(&disk)?;
    process::run(&["sh", "-c", &format!("echo '4097,262143' | sfdisk -q --no-reread {disk}")])?;
    crate::guest::udev::settle()?;
    let device = Device::add_loop(Path::new(&format!("{disk}p1")), &[])?;
    ensure!(device.described.size_bytes == 262_143 * 512);
    verify(ctx, device.path()?, &[("bsrange=512-64k", 8)])?;
    device.delete()?;
    drive.wipe()?;
    Ok(Outcome::Pass)
}

fn null(ctx: &Ctx) -> Result<Outcome> {
    for lend in MODES {
        let device = Device::add(&["null", "--size", "1G", "--lend", lend])?;
        ensure!(device.described.size_bytes == 1 << 30);
        let block = direct::open(device.path()?)?;
        let mut buffer = Aligned::new(1 << 20, 0xaa);
        block.write_all_at(buffer.bytes(), 4096)?;
        buffer.bytes().fill(0xbb);
        block.read_exact_at(buffer.bytes(), 4096)?;
        ensure!(buffer.bytes().iter().all(|byte| *byte == 0), "a read did not fill its buffer");
        let filename = format!("filename={}", device.path()?);
        let report = fio::run(
            ctx,
            &[
                &filename,
                "rw=randrw",
                "bs=4k",
                "iodepth=32",
                "size=16m",
                "ioengine=io_uring",
                "direct=1",
            ],
        )?;
        ensure!(report.read.bytes + report.write.bytes == 16 << 20);
        drop(block);
        device.delete()?;
    }
    Ok(Outcome::Pass)
}

/// Each limit of the device is the drive's, but for the length of requests, which are cut, and their
/// segments.
fn limits(_ctx: &Ctx) -> Result<Outcome> {
    for serial in ["drive0", "big-blocks"] {
        let drive = fresh_drive(serial)?;
        let device = Device::add_loop(&drive.path(), &["--lend", "fused"])?;
        for attribute in [
            "queue/logical_block_size",
            "queue/physical_block_size",
            "queue/minimum_io_size",
            "queue/max_segment_size",
            "queue/virt_boundary_mask",
            "queue/dma_alignment",
            "queue/chunk_sectors",
            "queue/discard_granularity",
            "queue/write_zeroes_max_bytes",
            "queue/write_cache",
            "queue/fua",
            "queue/rotational",
            "size",
            "ro",
        ] {
            let (ours, theirs) = (device.attribute(attribute)?, drive.attribute(attribute)?);
            ensure!(ours == theirs, "{serial}: {attribute} is {ours}, the drive's is {theirs}");
        }
        let longest = device.attribute("queue/max_hw_sectors_kb")?;
        ensure!(longest == "1024", "requests may have {longest} KiB");
        let (segments, drives) =
            (device.attribute("queue/max_segments")?, drive.number("queue/max_segments")?);
        ensure!(drives == 129, "{serial} was to have a segment for each page, and has {drives}");
        ensure!(segments == "257", "requests may have {segments} segments");
        device.delete()?;
    }
    Ok(Outcome::Pass)
}

fn read_only(ctx: &Ctx) -> Result<Outcome> {
    let drive = fresh_drive("drive0")?;
    let path = drive.path();
    let path = text(&path)?;
    process::run(&["blockdev", "--setro", path])?;
    let device = Device::add_loop(&drive.path(), &[]);
    process::run(&["blockdev", "--setrw", path])?;
    assert_read_only(device?)?;

    let (mount, file) = file_on_drive(ctx, "drive1", 16)?;
    process::run(&["mount", "-o", "remount,ro", text(mount.point())?])?;
    assert_read_only(Device::add_loop(&file, &[])?)?;
    mount.unmount()?;
    Ok(Outcome::Pass)
}

fn assert_read_only(device: Device) -> Result<()> {
    ensure!(device.attribute("ro")? == "1", "the device takes writes");
    let output = format!("of={}", device.path()?);
    let input = format!("if={}", device.path()?);
    process::run(&["dd", &input, "of=/dev/null", "bs=1M", "count=1", "status=none"])?;
    let refused = process::run_for_code(&["dd", "if=/dev/zero", &output, "count=1"], 1)?;
    ensure!(refused.stderr.contains("not permitted"), "{}", refused.stderr);
    device.delete()
}

//! What is written is read back: fio with checksums over block sizes, queue depths, queues, lend
//! modes and kinds of backing; discard and write zeroes.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Result, bail, ensure};

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
    TestCase::guest("discard_and_write_zeroes_on_nvme", DEFAULT, zeroing_nvme).seconds(300),
    TestCase::guest("discard_and_write_zeroes_on_a_file", DEFAULT, zeroing_file).seconds(300),
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
    process::run(&["udevadm", "settle"])?;
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

fn zeroing_nvme(_ctx: &Ctx) -> Result<Outcome> {
    for lend in MODES {
        let drive = fresh_drive("drive0")?;
        zeroing(&drive.path(), lend)?;
    }
    Ok(Outcome::Pass)
}

fn zeroing_file(ctx: &Ctx) -> Result<Outcome> {
    for lend in MODES {
        let (mount, file) = file_on_drive(ctx, "drive1", 64)?;
        let allocated = |file: &Path| -> Result<u64> {
            use std::os::unix::fs::MetadataExt;
            File::open(file)?.sync_all()?;
            Ok(std::fs::metadata(file)?.blocks() * 512)
        };
        zeroing(&file, lend)?;
        let before = allocated(&file)?;
        let device = Device::add_loop(&file, &["--lend", lend])?;
        process::run(&["blkdiscard", device.path()?])?;
        device.delete()?;
        let after = allocated(&file)?;
        ensure!(before > 0 && after == 0, "a discard gives space back: {before} to {after} bytes");
        mount.unmount()?;
    }
    Ok(Outcome::Pass)
}

/// Writes, then zeroes a part in each way, and compares every byte around it.
fn zeroing(backing: &Path, lend: &str) -> Result<()> {
    const SIZE: usize = 4 << 20;
    let device = Device::add_loop(backing, &["--lend", lend])?;
    let path = device.path()?;
    for (how, must_be_zero) in [
        // Of what a discard leaves nothing is promised, but that its neighbours stay.
        (["blkdiscard", "-o", "1052672", "-l", "1048576"].as_slice(), false),
        (&["blkdiscard", "-z", "-o", "1049088", "-l", "1050624"], true),
        (&["fallocate", "--zero-range", "-n", "-o", "1049088", "-l", "1050624"], true),
        (&["fallocate", "--punch-hole", "-o", "1052672", "-l", "1048576"], true),
    ] {
        let block = direct::open(path)?;
        let mut buffer = Aligned::new(SIZE, 0x5a);
        block.write_all_at(buffer.bytes(), 0)?;
        process::run(&[how, &[path]].concat())?;
        block.read_exact_at(buffer.bytes(), 0)?;
        let number = |flag: &str| -> usize {
            let at = how.iter().position(|word| *word == flag);
            at.and_then(|at| how[at + 1].parse().ok()).unwrap_or(0)
        };
        let range = number("-o")..number("-o") + number("-l");
        for (at, byte) in buffer.bytes().iter().enumerate() {
            match (range.contains(&at), *byte) {
                (true, 0) | (false, 0x5a) => {}
                (true, _) if !must_be_zero => {}
                (inside, byte) => bail!("{how:?}: byte {at} is {byte:#x}, inside: {inside}"),
            }
        }
    }
    device.delete()
}

/// Each limit of the device is the drive's.
fn limits(_ctx: &Ctx) -> Result<Outcome> {
    for serial in ["drive0", "big-blocks"] {
        let drive = fresh_drive(serial)?;
        let device = Device::add_loop(&drive.path(), &["--lend", "fused"])?;
        for attribute in [
            "queue/logical_block_size",
            "queue/physical_block_size",
            "queue/minimum_io_size",
            "queue/max_hw_sectors_kb",
            "queue/max_segments",
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

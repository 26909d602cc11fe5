//! Discard and write-zeroes, byte by byte: what they hit, and that what is around it stays.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};

use super::device::{Device, file_on_drive, fresh_drive, fresh_drives, text};
use crate::config::{DEFAULT, STACKS};
use crate::guest::direct::{self, Aligned};
use crate::guest::drives::Drive;
use crate::guest::{Ctx, Outcome, TestCase, process};

pub const TESTS: &[TestCase] = &[
    TestCase::guest("discard_and_write_zeroes_on_nvme", DEFAULT, on_nvme).seconds(300),
    TestCase::guest("discard_and_write_zeroes_on_a_file", DEFAULT, on_file).seconds(300),
    TestCase::guest("discard_and_write_zeroes_on_a_stripe", STACKS, on_stripe).seconds(300),
    TestCase::guest("discard_and_write_zeroes_on_linear", STACKS, on_linear).seconds(300),
];

const MODES: [&str; 4] = ["fused", "slot", "user-copy", "copy"];
/// Bytes that are written and compared.
const SIZE: usize = 4 << 20;

fn on_nvme(_ctx: &Ctx) -> Result<Outcome> {
    for lend in MODES {
        let drive = fresh_drive("drive0")?;
        let device = Device::add_loop(&drive.path(), &["--lend", lend])?;
        zero_in_each_way(&device, |_| Ok(()))?;
        device.delete()?;
    }
    Ok(Outcome::Pass)
}

fn on_file(ctx: &Ctx) -> Result<Outcome> {
    for lend in MODES {
        let (mount, file) = file_on_drive(ctx, "drive1", 64)?;
        let allocated = |file: &Path| -> Result<u64> {
            File::open(file)?.sync_all()?;
            Ok(std::fs::metadata(file)?.blocks() * 512)
        };
        let device = Device::add_loop(&file, &["--lend", lend])?;
        zero_in_each_way(&device, |_| Ok(()))?;
        device.delete()?;
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

fn on_stripe(_ctx: &Ctx) -> Result<Outcome> {
    const CHUNK: usize = 4096;
    let drives = fresh_drives(4)?;
    let arguments = ["stripe".to_owned(), "--chunk".to_owned(), "4K".to_owned()];
    let files = drives.iter().map(|drive| Ok(text(&drive.path())?.to_owned()));
    let files = files.collect::<Result<Vec<_>>>()?;
    on_all_of(&drives, &arguments, &files, |at| {
        let (chunk, into) = (at / CHUNK, at % CHUNK);
        (chunk % 4, chunk / 4 * CHUNK + into)
    })
}

/// Extents that begin and end at odd sectors, within what is zeroed.
const EXTENTS: [(usize, usize, usize); 4] =
    [(0, 512, 1_049_088 + 5120), (1, 7168, 513_536), (0, 4_194_304, 19_968), (2, 1536, SIZE)];

fn on_linear(_ctx: &Ctx) -> Result<Outcome> {
    let drives = fresh_drives(3)?;
    let files = EXTENTS
        .iter()
        .map(|(drive, start, len)| Ok(format!("{},{start},{len}", text(&drives[*drive].path())?)));
    let files = files.collect::<Result<Vec<_>>>()?;
    on_all_of(&drives, &["linear".to_owned()], &files, |at| {
        let mut left = at;
        for (drive, start, len) in EXTENTS {
            if left < len {
                return (drive, start + left);
            }
            left -= len;
        }
        unreachable!("the extents are longer than what is written")
    })
}

/// Zeroes a device in each way, and compares with what its drives hold at the places that `place`
/// gives: of the first byte of a sector of the device, its drive, and where on it.
fn on_all_of(
    drives: &[Drive],
    arguments: &[String],
    files: &[String],
    place: impl Fn(usize) -> (usize, usize),
) -> Result<Outcome> {
    for lend in MODES {
        let mut arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
        arguments.extend(["--lend", lend]);
        files.iter().for_each(|file| arguments.extend(["-f", file]));
        let device = Device::add(&arguments)?;
        zero_in_each_way(&device, |seen| {
            let sectors = (0..seen.len()).step_by(512);
            let placed: Vec<_> = sectors.map(|at| (at, place(at))).collect();
            for (number, drive) in drives.iter().enumerate() {
                let mine = placed.iter().filter(|(_, (drive, _))| *drive == number);
                compare(drive, seen, mine.map(|(at, (_, on_drive))| (*at, *on_drive)).collect())?;
            }
            Ok(())
        })?;
        device.stop_and_count()?.ensure_none(&["failed", "stale", "unexpected", "copied"])?;
    }
    Ok(Outcome::Pass)
}

/// Sectors are pairs of their places on the device and on the drive.
fn compare(drive: &Drive, seen: &[u8], sectors: Vec<(usize, usize)>) -> Result<()> {
    let end = sectors.iter().map(|(_, on_drive)| on_drive + 512).max();
    let mut held = Aligned::new(end.context("a drive without a part")?, 0);
    direct::open(drive.path())?.read_exact_at(held.bytes(), 0)?;
    for (at, on_drive) in sectors {
        let same = held.bytes()[on_drive..][..512] == seen[at..][..512];
        ensure!(same, "what is at {at} is not at {on_drive} of {}", drive.name);
    }
    Ok(())
}

/// A byte that is not 0, nor the same in neighbouring sectors, pages or chunks.
fn pattern(at: usize) -> u8 {
    let mixed = (at / 512).wrapping_mul(0x9e37) >> 3;
    u8::try_from(mixed % 255 + 1).unwrap_or(1)
}

/// Writes, then zeroes a part in each way, and compares every byte around it. `check` gets what the
/// device holds.
fn zero_in_each_way(device: &Device, mut check: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
    let path = device.path()?;
    for (how, must_be_zero) in [
        // Of what a discard leaves nothing is promised, but that its neighbours stay.
        (["blkdiscard", "-o", "1052672", "-l", "1048576"].as_slice(), false),
        (&["blkdiscard", "-z", "-o", "1049088", "-l", "1050624"], true),
        (&["fallocate", "--zero-range", "-n", "-o", "1049088", "-l", "1050624"], true),
        (&["fallocate", "--punch-hole", "-o", "1052672", "-l", "1048576"], true),
    ] {
        let block = direct::open(path)?;
        let mut buffer = Aligned::new(SIZE, 0);
        buffer.bytes().iter_mut().enumerate().for_each(|(at, byte)| *byte = pattern(at));
        block.write_all_at(buffer.bytes(), 0)?;
        check(buffer.bytes()).context("as written")?;
        process::run(&[how, &[path]].concat())?;
        block.read_exact_at(buffer.bytes(), 0)?;
        let number = |flag: &str| -> usize {
            let at = how.iter().position(|word| *word == flag);
            at.and_then(|at| how[at + 1].parse().ok()).unwrap_or(0)
        };
        let range = number("-o")..number("-o") + number("-l");
        for (at, byte) in buffer.bytes().iter().enumerate() {
            match (range.contains(&at), *byte) {
                (true, 0) => {}
                (false, byte) if byte == pattern(at) => {}
                (true, _) if !must_be_zero => {}
                (inside, byte) => bail!("{how:?}: byte {at} is {byte:#x}, inside: {inside}"),
            }
        }
        check(buffer.bytes()).with_context(|| format!("{how:?}"))?;
    }
    Ok(())
}

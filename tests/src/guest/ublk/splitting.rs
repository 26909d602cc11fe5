//! Targets that split requests over several drives: every part borrows the same buffer at its own
//! offset.

use anyhow::{Context, Result, ensure};

use super::death::{kill_server, recover};
use super::device::{Device, fresh_drive, fresh_drives, text};
use super::stats::reports::{number, report};
use super::verify::verify;
use crate::config::{DEFAULT, TRACING};
use crate::guest::direct::{self, Aligned};
use crate::guest::dm::Mapper;
use crate::guest::drives::Drive;
use crate::guest::udev::QuietUdev;
use crate::guest::{Ctx, Outcome, TestCase, process};
use crate::witness::NvmeCommands;

use std::collections::BTreeSet;
use std::os::unix::fs::FileExt;

pub const TESTS: &[TestCase] = &[
    splitting("verify_linear_over_3_drives", linear),
    splitting("verify_stripe_of_4k_over_2_drives", |ctx| stripe(ctx, "4K", 2)),
    splitting("verify_stripe_of_64k_over_3_drives", |ctx| stripe(ctx, "64K", 3)),
    splitting("errors_of_a_leg_hit_the_requests_that_touch_it_stripe", stripe_leg),
    splitting("errors_of_a_leg_hit_the_requests_that_touch_it_linear", linear_leg),
    splitting("linear_and_stripe_refuse_what_makes_no_device", refused),
    TestCase::guest("requests_are_cut_to_what_the_drive_takes", TRACING, cut).seconds(300),
];

const fn splitting(name: &'static str, run: fn(&Ctx) -> Result<Outcome>) -> TestCase {
    TestCase::guest(name, DEFAULT, run).seconds(900)
}

const MODES: [&str; 4] = ["fused", "slot", "user-copy", "copy"];
const BLOCKS: [(&str, u32); 3] = [("bsrange=512-64k", 8), ("bs=64k", 8), ("bs=1m", 32)];

/// Extents that begin and end at odd sectors, two of them on one drive, all small, so that
/// requests cross them.
fn linear(ctx: &Ctx) -> Result<Outcome> {
    let drives = fresh_drives(3)?;
    let [one, two, three] = [0, 1, 2].map(|number: usize| drives[number].path());
    let (one, two, three) = (text(&one)?, text(&two)?, text(&three)?);
    let extents = [
        format!("{one},512,1049088"),
        format!("{two},7168,513536"),
        format!("{one},33554432,4194816"),
        format!("{three},1536"),
    ];
    for lend in MODES {
        let mut arguments = vec!["linear", "--lend", lend];
        extents.iter().for_each(|extent| arguments.extend(["-f", extent]));
        let device = Device::add(&arguments)?;
        let size = 1_049_088 + 513_536 + 4_194_816 + (1 << 30) - 1536;
        ensure!(device.described.size_bytes == size, "{:?}", device.described);
        verify(ctx, device.path()?, &BLOCKS)?;
        fsck(&device)?;
        device.stop_and_count()?.ensure_none(&["failed", "stale", "unexpected", "copied"])?;
    }
    Ok(Outcome::Pass)
}

fn stripe(ctx: &Ctx, chunk: &str, width: u32) -> Result<Outcome> {
    let drives = fresh_drives(width)?;
    for lend in MODES {
        let paths: Vec<_> = drives.iter().map(Drive::path).collect();
        let mut arguments = vec!["stripe", "--chunk", chunk, "--lend", lend];
        for path in &paths {
            arguments.extend(["-f", text(path)?]);
        }
        let device = Device::add(&arguments)?;
        ensure!(device.described.size_bytes == u64::from(width) << 30, "{:?}", device.described);
        verify(ctx, device.path()?, &BLOCKS)?;
        fsck(&device)?;
        // Every drive has its share.
        for drive in &drives {
            let file = direct::open(drive.path())?;
            let mut start = Aligned::new(1 << 20, 0);
            file.read_exact_at(start.bytes(), 0)?;
            ensure!(start.bytes().iter().any(|byte| *byte != 0), "{} is empty", drive.name);
        }
        device.stop_and_count()?.ensure_none(&["failed", "stale", "unexpected", "copied"])?;
    }
    Ok(Outcome::Pass)
}

/// Discards everything, which goes to every drive, and makes a file system.
fn fsck(device: &Device) -> Result<()> {
    process::run(&["blkdiscard", device.path()?])?;
    process::run(&["mkfs.ext4", "-q", "-F", device.path()?])?;
    process::run(&["e2fsck", "-f", "-n", device.path()?]).map(drop)
}

/// Where on the device requests are sent to a leg with a bad sector: behind where anybody looks for
/// signatures.
const BASE: u64 = 8 << 20;
/// The bad sector's first byte on the device.
const BAD: u64 = BASE + 5 * 4096 + 3 * 512;

/// In the third chunk of 4 KiB behind 4 MiB of its drive, which is the sixth behind 8 MiB of the
/// device.
fn stripe_leg(_ctx: &Ctx) -> Result<Outcome> {
    leg(BASE / 2 / 512 + 19, |first, second| {
        let arguments = ["stripe", "-c", "4K", "-f", first, "-f", second];
        arguments.map(str::to_owned).to_vec()
    })
}

/// The second extent begins 3 sectors before the bad one, amid what is read and written.
fn linear_leg(_ctx: &Ctx) -> Result<Outcome> {
    const START: u64 = BASE + 512;
    leg(START / 512 + 3, |first, second| {
        let first = format!("{first},1M,{}", BAD - 3 * 512);
        ["linear", "-f", &first, "-f", &format!("{second},{START}")].map(str::to_owned).to_vec()
    })
}

/// The second of two drives has a bad sector, which is byte [`BAD`] of the device that `arguments`
/// make of both: of all requests, those that touch it fail.
fn leg(sector: u64, arguments: fn(&str, &str) -> Vec<String>) -> Result<Outcome> {
    let drives = fresh_drives(2)?;
    let mapper = Mapper::with_bad_sectors("ublk-leg", &drives[1], &[(sector, 1)])?;
    let arguments = arguments(text(&drives[0].path())?, text(&mapper.path())?);
    let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
    for lend in MODES {
        let device = Device::add(&[&arguments[..], &["--lend", lend]].concat())?;
        let udev = QuietUdev::new()?;
        let failed = touch(&device, lend)?;
        let counters = device.stop_and_count();
        drop(udev);
        let counters = counters?;
        ensure!(counters.get("failed") == failed && failed > 0, "{failed}: {counters:?}");
    }
    mapper.remove()?;
    Ok(Outcome::Pass)
}

/// Writes and reads around the bad sector, in requests of several sizes. Returns how many failed.
fn touch(device: &Device, lend: &str) -> Result<u64> {
    let file = direct::open(device.path()?)?;
    let mut failed = 0;
    for (len, step) in [(512, 512), (4096, 4096), (6144, 2048), (32 << 10, 4096_u64)] {
        let mut buffer = Aligned::new(len, 0x3c);
        let first = BAD - BAD % step - 9 * step;
        for offset in (0..12).map(|number| first + number * step) {
            let end = offset + u64::try_from(len)?;
            let touches = offset <= BAD && BAD < end;
            let written = file.write_all_at(buffer.bytes(), offset);
            let read = file.read_exact_at(buffer.bytes(), offset);
            for result in [written, read] {
                let errno = result.err().and_then(|error| error.raw_os_error());
                let expected = touches.then_some(5);
                ensure!(errno == expected, "{lend}: {len} bytes at {offset}: {errno:?}");
                failed += u64::from(touches);
            }
        }
    }
    Ok(failed)
}

/// A device that lends takes longer requests than its drive, and the drive is given what it takes:
/// nothing is split below, for which the ring's worker threads would be needed.
fn cut(_ctx: &Ctx) -> Result<Outcome> {
    let drive = fresh_drive("drive0")?;
    let attribute = |name: &str| format!("/sys/block/{}/queue/{name}", drive.name);
    let set = |name: &str, value: &str| {
        std::fs::write(attribute(name), value).with_context(|| format!("{value} to {name}"))
    };
    let longest = drive.attribute("queue/max_sectors_kb")?;
    set("max_sectors_kb", "64")?;
    // Neighbours would become one command.
    set("nomerges", "2")?;
    let outcome = [("fused", "512"), ("slot", "512"), ("user-copy", "64"), ("copy", "64")]
        .into_iter()
        .try_for_each(|(lend, kib)| cut_for(&drive, lend, kib).context(lend))
        .and_then(|()| {
            // A drive that takes less than it did is no reason not to serve a device again.
            set("max_sectors_kb", &longest)?;
            let mut device = Device::add_loop(&drive.path(), &["--on-death", "wait"])?;
            kill_server(&device)?;
            set("max_sectors_kb", "64")?;
            recover(&mut device, &[])?;
            ensure_cut(&drive, &device, "1024").context("recovered")?;
            device.delete()
        });
    set("nomerges", "0")?;
    set("max_sectors_kb", &longest)?;
    outcome.map(|()| Outcome::Pass)
}

fn cut_for(drive: &Drive, lend: &str, kib: &str) -> Result<()> {
    let device = Device::add_loop(&drive.path(), &["--lend", lend])?;
    ensure_cut(drive, &device, kib)?;
    device.stop_and_count()?.ensure_none(&["failed", "retries", "stale", "unexpected", "copied"])
}

/// Requests may have so many KiB, and what becomes of those of 256 KiB has 64 KiB at most.
fn ensure_cut(drive: &Drive, device: &Device, kib: &str) -> Result<()> {
    const LEN: usize = 256 << 10;
    const REQUESTS: u64 = 24;
    let longest = device.attribute("queue/max_hw_sectors_kb")?;
    ensure!(longest == kib, "requests may have {longest} KiB");
    let _udev = QuietUdev::new()?;
    // udev may have read the drive, and its pages stay while a server has the drive open. A write that
    // meets one needs a worker to take it out of the cache.
    process::run(&["blockdev", "--flushbufs", text(&drive.path())?])?;
    let done = || -> Result<(u64, u64)> {
        let report = report(device)?;
        let requests = |kind| number(&report, &format!("/total/requests/{kind}/requests"));
        let ops = number(&report, "/total/counters/ops")?;
        Ok((requests("read")? + requests("write")?, ops))
    };
    // A worker is named after its ring's thread. The main thread's ring has some, for the commands to
    // the driver; they come and go.
    let of_commands = format!("iou-wrk-{}", device.pid()?);
    let workers = || -> Result<BTreeSet<String>> {
        let mut workers = BTreeSet::new();
        for task in std::fs::read_dir(format!("/proc/{}/task", device.pid()?))? {
            let task = task?;
            // It may have ended since.
            let comm = std::fs::read_to_string(task.path().join("comm")).unwrap_or_default();
            let (comm, thread) = (comm.trim(), task.file_name());
            if comm.starts_with("iou-wrk") && comm != of_commands {
                workers.insert(format!("{comm} ({})", thread.to_string_lossy()));
            }
        }
        Ok(workers)
    };
    let (before, idle) = (done()?, workers()?);
    let commands = NvmeCommands::record(&[&drive.name])?;
    let file = direct::open(device.path()?)?;
    // Most begin at no multiple of a page.
    for (number, fill) in (0..REQUESTS).zip(1_u8..) {
        let (offset, mut buffer) = (number * (300 << 10) + number * 512, Aligned::new(LEN, fill));
        file.write_all_at(buffer.bytes(), offset)?;
        buffer.bytes().fill(0);
        file.read_exact_at(buffer.bytes(), offset)?;
        ensure!(buffer.bytes().iter().all(|byte| *byte == fill), "at {offset}");
    }
    let after = done()?;
    let blocks = |line: &String| -> Result<u64> {
        let text = line.split("len=").nth(1).and_then(|rest| rest.split(',').next());
        Ok(text.with_context(|| line.clone())?.parse::<u64>()? + 1)
    };
    let blocks = commands.lines()?.iter().map(blocks).collect::<Result<Vec<_>>>()?;
    drop(commands);
    let (requests, ops) = (after.0 - before.0, after.1 - before.1);
    println!("up to {kib} KiB: {requests} requests, {ops} operations, {} commands", blocks.len());
    ensure!(blocks.len() as u64 == ops, "an operation was split");
    ensure!(blocks.iter().all(|blocks| *blocks <= 128), "a command is too long: {blocks:?}");
    ensure!(blocks.iter().sum::<u64>() == 2 * REQUESTS * LEN as u64 / 512, "{blocks:?}");
    let lends = kib != "64";
    ensure!(requests == if lends { 2 * REQUESTS } else { ops }, "{requests} requests");
    ensure!(ops >= 2 * REQUESTS * 4, "{ops} operations");
    let new: Vec<_> = workers()?.difference(&idle).cloned().collect();
    ensure!(new.is_empty(), "the ring has needed worker threads: {new:?} beside {idle:?}");
    Ok(())
}

fn refused(_ctx: &Ctx) -> Result<Outcome> {
    super::device::load_driver()?;
    let drives = fresh_drives(2)?;
    let (one, two) = (drives[0].path(), drives[1].path());
    let (one, two) = (text(&one)?, text(&two)?);
    let table: [(&[&str], String, &str); 8] = [
        (&["linear"], format!("{one},2G"), "reaches beyond the backing"),
        (&["linear"], format!("{one},1M,2G"), "reaches beyond the backing"),
        (&["linear"], format!("{one},100"), "must be multiples of the block of 512"),
        (&["linear", "-f", one], format!("{one},1M,1M"), "overlaps another extent"),
        (&["stripe"], one.to_owned(), "1 backings; a stripe has 2 to 64"),
        (&["stripe", "-f", one], one.to_owned(), "is given twice"),
        (&["stripe", "-f", one, "-c", "5K"], two.to_owned(), "power of two of at least 4096"),
        (&["stripe", "-f", one, "-c", "2G"], two.to_owned(), "less than a chunk"),
    ];
    for (arguments, last, expected) in table {
        let argv = [&["ublk-target", "add"], arguments, &["-f", &last]].concat();
        let said = process::run_for_code(&argv, 1)?.stderr;
        ensure!(
            said.contains(expected) && said.trim_end().lines().count() == 1,
            "{argv:?}: {said}"
        );
    }
    ensure!(std::fs::read_dir("/sys/class/ublk-char")?.next().is_none(), "a device is left");
    Ok(Outcome::Pass)
}

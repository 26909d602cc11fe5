//! Polled I/O: what is written is read back without interrupts, what a polling ring refuses goes
//! another way, and who has nothing to do sleeps.

use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::device::wait_for_requests;
use super::device::{Device, PROGRAM, fresh_drive, load_driver, start_load, text};
use super::verify::{BLOCKS, SHORTER, verify};
use crate::config::DEFAULT;
use crate::guest::drives::Drive;
use crate::guest::losetup::{Caching, KernelLoop};
use crate::guest::{Ctx, Outcome, TestCase, fio, process};

pub const TESTS: &[TestCase] = &[
    verified("polled_verifies_in_each_lend_mode", modes),
    verified("polled_verifies_linear_and_stripe", split),
    verified("polled_passthrough_verifies", passthrough),
    verified("polled_flushes_beside_reads", flushes),
    verified("polled_survives_faults", faults),
    verified("polled_reads_do_not_interrupt", interrupts),
    TestCase::guest("polled_and_idle_uses_no_cpu", DEFAULT, idle).seconds(300),
    verified("polled_beside_a_drive_that_interrupts", mixed),
    TestCase::guest("polling_is_refused_with_the_reason", DEFAULT, refused),
];

const fn verified(name: &'static str, run: fn(&Ctx) -> Result<Outcome>) -> TestCase {
    TestCase::guest(name, DEFAULT, run).seconds(900)
}

pub const QUIET: [&str; 6] = ["failed", "retries", "copied", "stale", "unexpected", "timed out"];

fn modes(ctx: &Ctx) -> Result<Outcome> {
    let drive = fresh_drive("drive0")?;
    for (lend, poll) in [
        ("fused", "busy"),
        ("fused", "hybrid"),
        ("slot", "busy"),
        ("user-copy", "busy"),
        ("copy", "hybrid"),
    ] {
        let options = ["--lend", lend, "--poll", poll, "-q", "2"];
        let device = Device::add_loop(&drive.path(), &options)?;
        let blocks = if options[..4] == ["--lend", "fused", "--poll", "busy"] {
            &BLOCKS[..]
        } else {
            &SHORTER
        };
        let requests = verify(ctx, device.path()?, blocks)?;
        fsck(&device)?;
        let counters = device.stop_and_count()?;
        counters.ensure_none(&QUIET)?;
        ensure!(counters.get("requests") >= requests, "{counters:?}");
    }
    Ok(Outcome::Pass)
}

/// Discards, flushes and writes zeroes.
fn fsck(device: &Device) -> Result<()> {
    process::run(&["blkdiscard", device.path()?])?;
    process::run(&["blkdiscard", "-z", "-l", "4M", device.path()?])?;
    process::run(&["mkfs.ext4", "-q", "-F", device.path()?])?;
    process::run(&["e2fsck", "-f", "-n", device.path()?]).map(drop)
}

/// Linear over three drives and stripe over four, one of which has greater blocks.
fn split(ctx: &Ctx) -> Result<Outcome> {
    let drives = ["drive0", "drive1", "drive2", "big-blocks"];
    let drives = drives.into_iter().map(fresh_drive).collect::<Result<Vec<_>>>()?;
    let paths: Vec<_> = drives.iter().map(Drive::path).collect();
    let paths = paths.iter().map(|path| text(path)).collect::<Result<Vec<_>>>()?;
    let extents = [format!("{},512,1049088", paths[0]), format!("{},7168,4194816", paths[1])];
    let linear = ["linear", "-f", &extents[0], "-f", &extents[1], "-f", paths[2]];
    let stripe = |chunk| {
        let files = paths.iter().flat_map(|path| ["-f", *path]);
        ["stripe", "-c", chunk].into_iter().chain(files).collect::<Vec<_>>()
    };
    for (target, how) in [
        (linear.to_vec(), &["--poll"][..]),
        (linear.to_vec(), &["--poll", "hybrid", "--lend", "slot"]),
        (linear.to_vec(), &["--poll", "--passthru", "--lend", "copy"]),
        (stripe("4K"), &["--poll"]),
        (stripe("64K"), &["--poll", "hybrid", "--passthru"]),
        (stripe("4K"), &["--poll", "--passthru", "--lend", "slot"]),
        (stripe("64K"), &["--poll", "--lend", "copy"]),
    ] {
        let device = Device::add(&[&target, how].concat())?;
        let block = if target[0] == "stripe" { "bs=4k" } else { "bsrange=512-64k" };
        verify(ctx, device.path()?, &[(block, 4), ("bs=1m", 8)])?;
        fsck(&device)?;
        device.stop_and_count()?.ensure_none(&QUIET)?;
    }
    Ok(Outcome::Pass)
}

fn passthrough(ctx: &Ctx) -> Result<Outcome> {
    let drive = fresh_drive("drive0")?;
    for (lend, poll) in [("fused", "busy"), ("slot", "hybrid"), ("copy", "busy")] {
        let options = ["--lend", lend, "--poll", poll];
        let device = Device::add_loop(&drive.char_path(), &options)?;
        verify(ctx, device.path()?, &SHORTER)?;
        fsck(&device)?;
        device.stop_and_count()?.ensure_none(&QUIET)?;
    }
    Ok(Outcome::Pass)
}

/// A storm of flushes, which go by the side ring, while others read and write.
fn flushes(ctx: &Ctx) -> Result<Outcome> {
    let drive = fresh_drive("drive0")?;
    for more in [&[][..], &["--passthru"]] {
        let device = Device::add_loop(&drive.path(), &[&["--poll"], more].concat())?;
        let mut load = start_load(device.path()?)?;
        let filename = format!("filename={}", device.path()?);
        let options = [
            filename.as_str(),
            "rw=randwrite",
            "bs=4k",
            "offset=512m",
            "size=16m",
            "number_ios=2000",
            "fsync=4",
            "ioengine=io_uring",
            "direct=1",
            "iodepth=8",
        ];
        let report = fio::run(ctx, &options)?;
        ensure!(report.write.requests == 2000, "{report:?}");
        wait_for_requests(&device, 1000)?;
        load.kill()?;
        load.wait()?;
        let counters = device.stop_and_count()?;
        counters.ensure_none(&QUIET)?;
    }
    Ok(Outcome::Pass)
}

fn faults(ctx: &Ctx) -> Result<Outcome> {
    let drive = fresh_drive("drive0")?;
    let backing = drive.path();
    for lend in ["fused", "slot"] {
        let arguments =
            ["loop", "-f", text(&backing)?, "--lend", lend, "--poll", "--io-timeout", "20"];
        let device = Device::add_with_faults("short=3,again=4,auto-register", &arguments)?;
        verify(ctx, device.path()?, &[("bs=4k", 4), ("bs=64k", 8)])?;
        let counters = device.stop_and_count()?;
        counters.ensure_none(&["failed", "stale", "unexpected", "lost ops"])?;
        ensure!(counters.get("short") > 100 && counters.get("again") > 100, "{counters:?}");
        ensure!(counters.get("partial") == counters.get("short"), "{counters:?}");
        ensure!(counters.get("retries") == counters.get("again"), "{counters:?}");
    }
    Ok(Outcome::Pass)
}

/// Interrupts of a drive's I/O queues so far.
fn interrupts_of(drive: &Drive) -> Result<u64> {
    let table = std::fs::read_to_string("/proc/interrupts")?;
    let prefix = format!("{}q", drive.controller);
    ensure!(
        table.lines().any(|line| line.contains(&prefix)),
        "looked for {prefix}0, {prefix}1, … in /proc/interrupts, which has none:\n{table}"
    );
    let mut sum = 0;
    for line in table.lines() {
        let Some(name) = line.split_whitespace().last() else { continue };
        let Some(queue) = name.strip_prefix(&prefix) else { continue };
        // Queue 0 is the administrator's.
        if queue != "0" {
            sum +=
                line.split_whitespace().skip(1).map_while(|n| n.parse::<u64>().ok()).sum::<u64>();
        }
    }
    Ok(sum)
}

fn interrupts(ctx: &Ctx) -> Result<Outcome> {
    let drive = fresh_drive("drive0")?;
    let backing = drive.path();
    let mut counted = Vec::new();
    for (options, is_polled) in [
        (&[][..], false),
        (&["--passthru"], false),
        (&["--poll"], true),
        (&["--poll", "hybrid"], true),
        (&["--poll", "--passthru"], true),
    ] {
        let device = Device::add_loop(&backing, options)?;
        crate::guest::udev::settle()?;
        let before = interrupts_of(&drive)?;
        let filename = format!("filename={}", device.path()?);
        let load = ["rw=randread", "bs=4k", "iodepth=4", "size=64m", "number_ios=4000"];
        let more = ["ioengine=io_uring", "direct=1"];
        fio::run(ctx, &[&[filename.as_str()], &load[..], &more].concat())?;
        let interrupts = interrupts_of(&drive)? - before;
        println!("{options:?}: {interrupts} interrupts for 4000 reads");
        counted.push((interrupts, is_polled));
        device.delete()?;
    }
    for (interrupts, is_polled) in counted {
        // An interrupt may bring more than one completion, and somebody else may read.
        ensure!(
            if is_polled { interrupts < 40 } else { interrupts > 400 },
            "{interrupts} interrupts for 4000 reads, polled: {is_polled}"
        );
    }
    Ok(Outcome::Pass)
}

/// CPU time that a server has used, in ticks of 10 ms.
pub fn ticks(pid: u32) -> Result<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let fields: Vec<_> = stat.rsplit(')').next().context("stat")?.split_whitespace().collect();
    Ok(fields[11].parse::<u64>()? + fields[12].parse::<u64>()?)
}

fn idle(ctx: &Ctx) -> Result<Outcome> {
    const SPAN: Duration = Duration::from_secs(4);
    let drive = fresh_drive("drive0")?;
    for options in [&["--poll"][..], &["--poll", "hybrid"], &["--poll", "--passthru", "-q", "2"]] {
        let device = Device::add_loop(&drive.path(), options)?;
        crate::guest::udev::settle()?;
        let pid = device.pid()?;
        let mut used = Vec::new();
        for burst in [false, true] {
            if burst {
                let filename = format!("filename={}", device.path()?);
                let load = ["rw=randrw", "bs=4k", "iodepth=64", "size=64m", "number_ios=4000"];
                let more = ["ioengine=io_uring", "direct=1", "fsync=100"];
                fio::run(ctx, &[&[filename.as_str()], &load[..], &more].concat())?;
                // Who wrote has closed, and udev looks.
                crate::guest::udev::settle()?;
            }
            let before = ticks(pid)?;
            // There is no event to wait for: this is the span that is measured.
            std::thread::sleep(SPAN);
            used.push(ticks(pid)? - before);
        }
        println!("{options:?}: {used:?} ticks of 10 ms in {SPAN:?}, idle and after a burst");
        ensure!(used.iter().all(|ticks| *ticks < 4), "more than 1 % of a CPU");
        device.delete()?;
    }
    Ok(Outcome::Pass)
}

/// A loop device of the kernel has no queues to be polled.
fn mixed(ctx: &Ctx) -> Result<Outcome> {
    load_driver()?;
    let drive = fresh_drive("drive0")?;
    let file = ctx.directory().join("file");
    std::fs::File::create(&file)?.set_len(256 << 20)?;
    let attached = KernelLoop::attach(&file, Caching::Direct)?;
    let other = text(attached.path())?;
    let path = drive.path();
    let arguments = ["stripe", "-f", text(&path)?, "-f", other, "--poll"];
    let said = process::run_for_code(&[&[PROGRAM, "add"], &arguments[..]].concat(), 1)?.stderr;
    ensure!(said.contains("has no poll queues") && said.contains(other), "{said}");
    let device = Device::add(&[&arguments[..], &["--unpolled", "interrupt"]].concat())?;
    let before = interrupts_of(&drive)?;
    verify(ctx, device.path()?, &SHORTER)?;
    ensure!(interrupts_of(&drive)? > before + 400, "nobody interrupts");
    fsck(&device)?;
    device.stop_and_count()?.ensure_none(&QUIET)?;
    attached.detach()?;
    Ok(Outcome::Pass)
}

fn refused(_ctx: &Ctx) -> Result<Outcome> {
    load_driver()?;
    let drive = fresh_drive("drive0")?;
    let path = drive.path();
    let path = text(&path)?;
    let table: [(&[&str], i32, &str); 4] = [
        (&["null", "--poll"], 1, "the null target has no drive to poll"),
        (&["loop", "-f", path, "--poll", "--lend", "slot", "--io-lane"], 1, "exclude each other"),
        (&["loop", "-f", path, "--poll", "often"], 2, "often"),
        (&["loop", "-f", path, "--unpolled", "interrupt"], 2, "--poll"),
    ];
    for (options, code, expected) in table {
        let argv = [&[PROGRAM, "add"], options].concat();
        let said = process::run_for_code(&argv, code)?.stderr;
        ensure!(said.contains(expected) && said.trim_end().lines().count() == 1, "{said}");
    }
    ensure!(std::fs::read_dir("/sys/class/ublk-char")?.next().is_none(), "a device is left");
    Ok(Outcome::Pass)
}

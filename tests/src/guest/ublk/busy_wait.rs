//! Lanes that look for completions before they sleep: data are right, they do look, and who has
//! nothing to do sleeps.

use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::device::{Device, PROGRAM, fresh_drive, load_driver, text};
use super::polled::{QUIET, ticks};
use super::verify::verify;
use crate::config::DEFAULT;
use crate::guest::{Ctx, Outcome, TestCase, fio, process};

pub const TESTS: &[TestCase] = &[
    TestCase::guest("busy_wait_verifies", DEFAULT, verified).seconds(600),
    TestCase::guest("busy_wait_sleeps_less_and_idles_asleep", DEFAULT, sleeps).seconds(300),
    TestCase::guest("busy_wait_refuses_nonsense", DEFAULT, refused),
];

/// Longer than anything takes here, so that lanes look as often as they ever may.
const LONG: &str = "1000000";

fn verified(ctx: &Ctx) -> Result<Outcome> {
    let drive = fresh_drive("drive0")?;
    for options in [
        &["--lend", "fused"][..],
        &["--lend", "slot"],
        &["--lend", "slot", "--io-lane"],
        &["--lend", "copy"],
        &["--passthru"],
        &["--io-timeout", "60"],
    ] {
        let options = [options, &["--busy-wait", LONG, "-q", "2"]].concat();
        let device = Device::add_loop(&drive.path(), &options)?;
        let requests = verify(ctx, device.path()?, &[("bs=4k", 1), ("bsrange=512-64k", 16)])?;
        process::run(&["blkdiscard", device.path()?])?;
        let counters = device.stop_and_count()?;
        counters.ensure_none(&QUIET)?;
        ensure!(counters.get("requests") >= requests, "{counters:?}");
    }
    Ok(Outcome::Pass)
}

/// How often the first lane has gone to sleep.
fn sleeps_of(device: &Device) -> Result<u64> {
    let (pid, name) = (device.pid()?, format!("ublkb{}-q0", device.described.id));
    for task in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        let status = std::fs::read_to_string(task?.path().join("status"))?;
        let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name));
        if field("Name:\t") == Some(&name) {
            let count = field("voluntary_ctxt_switches:\t").context("switches")?;
            return Ok(count.trim().parse()?);
        }
    }
    anyhow::bail!("there is no thread {name}")
}

fn sleeps(ctx: &Ctx) -> Result<Outcome> {
    const SPAN: Duration = Duration::from_secs(2);
    /// Ticks of 10 ms: 1 %.
    const ALLOWED: u64 = 2;
    const READS: u64 = 4000;
    let drive = fresh_drive("drive0")?;
    let mut slept = Vec::new();
    for busy_wait in ["off", LONG, "auto"] {
        let device = Device::add_loop(&drive.path(), &["--busy-wait", busy_wait])?;
        crate::guest::udev::settle()?;
        let before = sleeps_of(&device)?;
        let filename = format!("filename={}", device.path()?);
        let number = format!("number_ios={READS}");
        let load =
            [&filename, "rw=randread", "bs=4k", "iodepth=1", "size=64m", "io_size=1g", &number];
        fio::run(ctx, &[&load[..], &["ioengine=io_uring", "direct=1"]].concat())?;
        slept.push(sleeps_of(&device)? - before);
        crate::guest::udev::settle()?;
        let mut used = u64::MAX;
        // A host that has other things to do makes the guest's ticks longer than they are.
        for _ in 0..4 {
            let before = ticks(device.pid()?)?;
            // There is no event to wait for: this is the span that is measured.
            std::thread::sleep(SPAN);
            used = used.min(ticks(device.pid()?)? - before);
            if used <= ALLOWED {
                break;
            }
        }
        println!(
            "{busy_wait}: {} sleeps for {READS} reads, idle: {used} ticks in {SPAN:?}",
            slept[slept.len() - 1]
        );
        ensure!(used <= ALLOWED, "{busy_wait}: {used} ticks of 10 ms while idle");
        device.delete()?;
    }
    // Without looking it sleeps before each delivery and during each read; other threads that need
    // the processor may make it sleep now and then even if it looks.
    ensure!(slept[0] >= READS, "{slept:?}");
    ensure!(slept[1] * 2 < slept[0], "it hardly looks: {slept:?}");
    Ok(Outcome::Pass)
}

fn refused(_ctx: &Ctx) -> Result<Outcome> {
    load_driver()?;
    let drive = fresh_drive("drive0")?;
    let path = drive.path();
    for nonsense in ["0", "1000001", "-1", "often", ""] {
        let argv = [PROGRAM, "add", "loop", "-f", text(&path)?, "--busy-wait", nonsense];
        let said = process::run_for_code(&argv, 2)?.stderr;
        ensure!(said.trim_end().lines().count() == 1, "{nonsense}: {said}");
    }
    let argv = [PROGRAM, "add", "loop", "-f", text(&path)?, "--busy-wait", "off", "--poll"];
    let said = process::run_for_code(&argv, 2)?.stderr;
    ensure!(said.contains("--poll") && said.trim_end().lines().count() == 1, "{said}");
    Ok(Outcome::Pass)
}

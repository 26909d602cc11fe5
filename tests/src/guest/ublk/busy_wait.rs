//! Lanes that look for completions before they sleep, or go before their clients where there is one
//! processor: data are right, they do so, and who has nothing to do sleeps.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::device::{Device, PROGRAM, fresh_drive, load_driver, text};
use super::polled::{QUIET, ticks};
use super::verify::verify;
use crate::config::DEFAULT;
use crate::guest::{Ctx, Outcome, TestCase, fio, process, wait_for};

pub const TESTS: &[TestCase] = &[
    TestCase::guest("busy_wait_verifies", DEFAULT, verified).seconds(600),
    TestCase::guest("busy_wait_sleeps_less_and_idles_asleep", DEFAULT, sleeps).seconds(300),
    TestCase::guest("a_lane_with_one_processor_goes_first", DEFAULT, goes_first).seconds(300),
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
        // The lanes of two queues have a processor each, and go first.
        &["--lend", "fused", "-q", "2"],
        &["--lend", "slot", "--io-lane", "-q", "2"],
    ] {
        let options = [options, &["--busy-wait", LONG]].concat();
        let device = Device::add_loop(&drive.path(), &options)?;
        let requests = verify(ctx, device.path()?, &[("bs=4k", 1), ("bsrange=512-64k", 16)])?;
        process::run(&["blkdiscard", device.path()?])?;
        let counters = device.stop_and_count()?;
        counters.ensure_none(&QUIET)?;
        ensure!(counters.get("requests") >= requests, "{options:?}: {counters:?}");
    }
    Ok(Outcome::Pass)
}

/// Directories of the lanes' threads, in the order of their queues.
fn lanes(device: &Device) -> Result<Vec<PathBuf>> {
    let (pid, name) = (device.pid()?, format!("ublkb{}-q", device.described.id));
    let mut lanes = Vec::new();
    for task in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        let task = task?.path();
        let own = std::fs::read_to_string(task.join("comm"))?;
        lanes.extend(own.trim().strip_prefix(&name).map(|qid| (qid.to_owned(), task)));
    }
    ensure!(!lanes.is_empty(), "there is no thread {name}");
    lanes.sort_unstable();
    Ok(lanes.into_iter().map(|(_, task)| task).collect())
}

/// How often the first lane has gone to sleep.
fn sleeps_of(device: &Device) -> Result<u64> {
    let status = std::fs::read_to_string(lanes(device)?[0].join("status"))?;
    let mut lines = status.lines();
    let count = lines.find_map(|line| line.strip_prefix("voluntary_ctxt_switches:\t"));
    Ok(count.context("switches")?.trim().parse()?)
}

/// Whether some lane has real-time priority.
fn any_first(device: &Device) -> Result<bool> {
    /// Of `/proc/PID/task/TID/stat`, counted from what follows the name.
    const POLICY: usize = 38;
    const SCHED_FIFO: &str = "1";
    for lane in lanes(device)? {
        let stat = std::fs::read_to_string(lane.join("stat"))?;
        let fields = stat.rsplit(')').next().context("stat")?;
        if fields.split_whitespace().nth(POLICY).context("policy")? == SCHED_FIFO {
            return Ok(true);
        }
    }
    Ok(false)
}

fn goes_first(ctx: &Ctx) -> Result<Outcome> {
    const PATIENCE: Duration = Duration::from_secs(60);
    let drive = fresh_drive("drive0")?;
    for (busy_wait, queues, expected) in
        [("auto", "2", true), (LONG, "2", true), ("off", "2", false), ("auto", "1", false)]
    {
        let device = Device::add_loop(&drive.path(), &["--busy-wait", busy_wait, "-q", queues])?;
        let filename = format!("filename={}", device.path()?);
        let load = [&filename, "rw=randread", "bs=4k", "iodepth=1", "size=64m", "direct=1"];
        if expected {
            // As a process of its own, the job would outlive the fio that is killed.
            let endless = ["ioengine=io_uring", "time_based", "runtime=600", "thread"];
            let _load = fio::start(ctx, "load", &[&load[..], &endless].concat())?;
            let first = || Ok(any_first(&device)?.then_some(()));
            wait_for("a lane that goes first", PATIENCE, first)?;
        } else {
            // As many requests as make another lane go first several times.
            let few = ["ioengine=io_uring", "io_size=1g", "number_ios=4000"];
            let mut load = fio::start(ctx, "load", &[&load[..], &few].concat())?;
            wait_for("the end of the load", PATIENCE, || {
                ensure!(!any_first(&device)?, "{busy_wait}, {queues}: a lane goes first");
                Ok(load.has_ended()?.then_some(()))
            })?;
            load.finish()?;
        }
        device.delete()?;
    }
    Ok(Outcome::Pass)
}

fn sleeps(ctx: &Ctx) -> Result<Outcome> {
    const SPAN: Duration = Duration::from_secs(2);
    /// Ticks of 10 ms: 1 %.
    const ALLOWED: u64 = 2;
    const READS: u64 = 4000;
    /// A lane that was kept from running leaves the processor to others for about a whole load.
    const LOADS: u32 = 8;
    let drive = fresh_drive("drive0")?;
    let mut slept = Vec::new();
    for busy_wait in ["off", LONG, "auto"] {
        let device = Device::add_loop(&drive.path(), &["--busy-wait", busy_wait])?;
        crate::guest::udev::settle()?;
        let filename = format!("filename={}", device.path()?);
        let number = format!("number_ios={READS}");
        let load =
            [&filename, "rw=randread", "bs=4k", "iodepth=1", "size=64m", "io_size=1g", &number];
        let load = [&load[..], &["ioengine=io_uring", "direct=1"]].concat();
        let mut least = u64::MAX;
        for _ in 0..if busy_wait == LONG { LOADS } else { 1 } {
            let before = sleeps_of(&device)?;
            fio::run(ctx, &load)?;
            least = least.min(sleeps_of(&device)? - before);
            if least * 2 < READS {
                break;
            }
        }
        slept.push(least);
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
    // Without looking it sleeps before each delivery and during each read, but where the host is so
    // busy that what it waits for has happened before it comes to that.
    ensure!(slept[0] * 2 > READS, "{slept:?}");
    ensure!(slept[1] * 2 < READS, "it hardly looks: {slept:?}");
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

//! The layer `throttle`: no more passes than its rates allow, and what waits holds nobody up.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::thread::{JoinHandle, spawn};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;

use super::device::{Device, PROGRAM, fresh_drive, text};
use super::steps::verify;
use crate::config::DEFAULT;
use crate::guest::direct::{self, Aligned};
use crate::guest::{Ctx, FIGURE, Outcome, TestCase, fio, process, wait_for};

pub const TESTS: &[TestCase] = &[
    TestCase::guest("a_throttle_lets_no_more_pass", DEFAULT, rates_hold).seconds(300),
    TestCase::guest("what_a_throttle_holds_holds_nobody_up", DEFAULT, held_up).seconds(400),
];

/// Rates that any machine keeps up with.
const RATES: &str = "throttle --read-iops 200 --write-bps 512K --burst 100ms";
/// Reads of a run, and the least time in milliseconds: the first 20 are the burst.
const READS: (u64, u64) = (256, 1170);
/// The same for writes: 1 MiB, of which the first 50 KiB are the burst.
const WRITES: (u64, u64) = (64, 1850);

fn rates_hold(ctx: &Ctx) -> Result<Outcome> {
    let drive = fresh_drive("drive0")?;
    let path = drive.path();
    let add = ["loop", "-f", text(&path)?, "--layer", RATES];
    let kinds: [&[&str]; 8] = [
        &[],
        &["-q", "2"],
        &["--lend", "slot"],
        &["--lend", "copy"],
        &["--lend", "user-copy"],
        &["--poll"],
        &["--passthru"],
        &["--lend", "slot", "--io-lane"],
    ];
    let mut rates = [Vec::new(), Vec::new()];
    for kind in kinds {
        let device = Device::add(&[&add, kind].concat())?;
        // Writes first, so that what is verified is what came through the throttle.
        let runs = [("write", "16k", WRITES), ("randread", "4k", READS)];
        for (rates, (rw, bs, (count, least))) in rates.iter_mut().zip(runs) {
            let options = [
                format!("filename={}", device.path()?),
                format!("rw={rw}"),
                format!("bs={bs}"),
                format!("number_ios={count}"),
                "size=1m ioengine=io_uring iodepth=16 direct=1 norandommap".to_owned(),
            ];
            let options: Vec<_> = options.iter().flat_map(|it| it.split(' ')).collect();
            let report = fio::run(ctx, &options)?;
            let part = if rw == "write" { report.write } else { report.read };
            ensure!(part.requests == count && report.error == 0, "{kind:?} {rw}: {report:?}");
            ensure!(part.runtime_ms >= least, "{kind:?} {rw}: {count} in {} ms", part.runtime_ms);
            rates.push(part.requests * 1000 / part.runtime_ms);
        }
        let counters = device.stop_and_count()?;
        counters.ensure_none(&["failed", "unexpected", "stale"])?;
        // The 16 of fio wait all the time.
        ensure!(counters.get("throttled") >= 200, "{kind:?}: {counters:?}");
        ensure!(counters.get("requests") == counters.get("commits"), "{kind:?}: {counters:?}");
    }
    println!("{FIGURE}requests a second with `{RATES}`: writes of 16 KiB {:?}", rates[0]);
    println!("{FIGURE}reads of 4 KiB {:?}", rates[1]);
    Ok(Outcome::Pass)
}

/// Reads of 4 KiB at several offsets, each by a thread of its own. All have one open file: while udev
/// looks at a device that was closed, nobody can open it.
fn reads(device: &Arc<File>, count: u64) -> Vec<JoinHandle<Result<()>>> {
    let read = |number: u64| {
        let device = Arc::clone(device);
        spawn(move || {
            let mut block = Aligned::new(4096, 0);
            device.read_exact_at(block.bytes(), number << 12)?;
            Ok(())
        })
    };
    (0..count).map(read).collect()
}

fn join(reads: Vec<JoinHandle<Result<()>>>) -> Result<()> {
    reads.into_iter().try_for_each(|it| it.join().map_err(|_| anyhow!("a reader has panicked"))?)
}

/// Waits until so many requests of a device are in flight.
fn wait_for_held(id: &str, count: u64) -> Result<()> {
    wait_for("reads that wait for their time", Duration::from_secs(20), || {
        let stats = [PROGRAM, "stats", "-n", id, "--json", "--interval", "0.1"];
        let stats: Value = serde_json::from_str(&process::run(&stats)?.stdout)?;
        let in_flight = stats["total"]["in_flight"].as_u64().context("requests in flight")?;
        Ok((in_flight >= count).then_some(()))
    })
}

/// Less than the reads would take: nine times 64 seconds.
const QUICK: Duration = Duration::from_secs(180);

/// Each read has to wait for 64 seconds after the one before. Whatever ends the throttle, or has to
/// wait for the reads, ends their wait.
fn held_up(_: &Ctx) -> Result<Outcome> {
    let drive = fresh_drive("drive0")?;
    let slow = ["throttle", "--read-bps", "64", "--burst", "0s"];
    let ends: [(&str, &[&str]); 5] = [
        ("detached", &[]),
        ("detached with two queues", &["-q", "2"]),
        ("detached with slots", &["--lend", "slot", "-q", "2"]),
        ("upgraded", &["--on-death", "reissue"]),
        ("stopped", &[]),
    ];
    for (how, options) in ends {
        let device = Device::add_loop(&drive.path(), options)?;
        let (id, file) = (device.id(), Arc::new(direct::open(device.path()?)?));
        let attach = [&[PROGRAM, "interpose", "attach", "-n", &id][..], &slow].concat();
        process::run(&attach)?;
        let readers = reads(&file, 10);
        wait_for_held(&id, 8).context(how)?;
        let began = Instant::now();
        let interpose =
            |arguments: &[&str]| process::run(&[&[PROGRAM, "interpose"], arguments].concat());
        match how {
            // What is stopped while it is open answers what it has.
            "stopped" => process::signal(device.pid()?, Signal::SIGTERM)?,
            "upgraded" => process::run(&[PROGRAM, "upgrade", "-n", &id]).map(drop).context(how)?,
            _ => {
                let detach = ["detach", "-n", &id, "throttle", "--timeout", "2"];
                interpose(&detach).map(drop).context(how)?;
            }
        }
        join(readers).context(how)?;
        ensure!(began.elapsed() < QUICK, "{how}: {:?}", began.elapsed());
        if how == "upgraded" {
            let listed = interpose(&["list", "-n", &id])?.stdout;
            ensure!(listed.contains("--read-bps 64 --burst 0s"), "{listed}");
            // A change among those that wait; they go on waiting.
            let readers = reads(&file, 3);
            wait_for_held(&id, 2).context(how)?;
            interpose(&["attach", "-n", &id, "fault", "--rule", "short"])?;
            wait_for_held(&id, 2).context("after a change")?;
            interpose(&["detach", "-n", &id, "throttle"])?;
            join(readers).context(how)?;
        }
        drop(file);
        if how == "stopped" {
            device.wait_until_gone()?;
        } else {
            verify(&device.described)?;
            device.delete()?;
        }
    }
    Ok(Outcome::Pass)
}

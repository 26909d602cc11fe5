//! The load of a stack: checksums at a great depth, a storm of fsyncs, and little memory. Nothing
//! may stall, differ, or grow.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::super::device::{Device, text};
use super::stages::Stages;
use crate::guest::pressure::{Pressure, Suffered};
use crate::guest::{Ctx, fio};

/// How long all stacks are loaded together, and in the long run.
const NORMAL: Duration = Duration::from_secs(40);
const LONG: Duration = Duration::from_secs(600);
const STACKS: u32 = 5;

/// How much the memory of a server may grow, in KiB. What measures latencies takes half a MiB of
/// that for each queue, once, when it sees more of them.
const GROWTH_KIB: u64 = 2048;

/// Loads `raw`, a device, and `files`, a mounted file system. No request may take longer than
/// `stall`. Returns what was measured.
pub fn run(
    ctx: &Ctx,
    raw: &Path,
    files: &Path,
    servers: &[&Device],
    stall: Duration,
) -> Result<Vec<String>> {
    let time = if ctx.long { LONG } else { NORMAL } / STACKS;
    // The short run is for any machine, also one that is busy with something else: what hangs in a
    // deadlock hangs for longer.
    let stall = if ctx.long { stall } else { 4 * stall };
    let stages = servers.iter().map(|server| Stages::watch(ctx, server));
    let stages = stages.collect::<Result<Vec<_>>>()?;
    // The first load lets the servers touch all that they ever use.
    verified_round(ctx, raw, 0, 4)?;
    std::fs::File::open(files)?.sync_all()?;
    let before = servers.iter().map(|server| Memory::of(server)).collect::<Result<Vec<_>>>()?;

    let watch = HungTasks::watch(stall)?;
    let pressure = Pressure::start(&files.join("rewritten"), 64)?;
    let storm = storm(ctx, &files.join("storm"), time)?;
    let raw = rounds(ctx, raw, time)?;
    let storm = storm.finish().context("the storm of fsyncs")?;
    let suffered = pressure.end()?;
    suffered.written.check()?;
    watch.end()?;

    ensure!(storm.write.requests > 0 && storm.longest_sync > Duration::ZERO, "{storm:?}");
    ensure!(suffered.reclaimed.all() > 1000, "memory was not short: {suffered:?}");
    ensure!(suffered.written.mib > 0, "nothing was written through the page cache");
    let mut figures = figures(&raw, &storm, &suffered);
    for server in stages {
        figures.push(server.end()?);
    }
    for line in &figures {
        println!("{line}");
    }
    // Not so the writes of the pressure itself: the kernel makes whoever dirties most wait for as
    // long as it takes to write enough of that back (`balance_dirty_pages`).
    let stalls = [
        ("a request", raw.longest),
        ("a write of the storm", storm.longest_request),
        ("an fsync", storm.longest_sync),
    ];
    for (what, longest) in stalls {
        ensure!(longest <= stall, "{what} took {:.1} s", longest.as_secs_f64());
    }
    figures.push(grown(servers, &before)?);
    Ok(figures)
}

/// What the rounds of checksums did.
struct Raw {
    rounds: u64,
    written: u64,
    verified: u64,
    longest: Duration,
}

fn figures(raw: &Raw, storm: &fio::Report, suffered: &Suffered) -> Vec<String> {
    let seconds = |time: Duration| format!("{:.2} s", time.as_secs_f64());
    let written = &suffered.written;
    vec![
        format!(
            "QD128 x 2: {} rounds, {} writes, {} reads verified; longest request {}",
            raw.rounds,
            raw.written,
            raw.verified,
            seconds(raw.longest)
        ),
        format!(
            "{} fsyncs; longest {}, longest write before one {}; {} MiB buffered, longest write {}",
            storm.write.requests,
            seconds(storm.longest_sync),
            seconds(storm.longest_request),
            written.mib,
            seconds(written.longest)
        ),
        format!(
            "{} MiB held, {} pages reclaimed by kswapd, {} directly",
            suffered.held_mib, suffered.reclaimed.by_kswapd, suffered.reclaimed.directly
        ),
    ]
}

/// Writes, and reads with checksums in between and at the end, until the time is over.
fn rounds(ctx: &Ctx, raw: &Path, time: Duration) -> Result<Raw> {
    let start = Instant::now();
    let mut all = Raw { rounds: 0, written: 0, verified: 0, longest: Duration::ZERO };
    while start.elapsed() < time {
        all.rounds += 1;
        let report = verified_round(ctx, raw, all.rounds, 16)?;
        all.written += report.write.requests;
        all.verified += report.read.requests;
        all.longest = all.longest.max(report.longest_request);
    }
    Ok(all)
}

fn verified_round(ctx: &Ctx, raw: &Path, number: u64, mib: u64) -> Result<fio::Report> {
    let options = [
        &format!("filename={}", text(raw)?),
        &format!("randseed={}", 7 + number),
        "rw=randwrite",
        "bssplit=4k/80:16k/15:64k/5",
        "iodepth=128",
        // Each job has an area of its own.
        "numjobs=2",
        &format!("size={mib}m"),
        "offset_increment=64m",
        "ioengine=io_uring",
        "direct=1",
        "verify=crc32c",
        "verify_fatal=1",
        "verify_backlog=256",
    ];
    let report = fio::run(ctx, &options).with_context(|| format!("round {number}"))?;
    let (read, written) = (report.read.bytes, report.write.bytes);
    ensure!(read == written && written == mib << 21, "{read} of {written} bytes were verified");
    Ok(report)
}

fn storm(ctx: &Ctx, file: &Path, time: Duration) -> Result<fio::Running> {
    let options = [
        &format!("filename={}", text(file)?),
        &format!("runtime={}", time.as_secs()),
        "time_based",
        "rw=randwrite",
        "bs=4k",
        "size=4m",
        "ioengine=psync",
        "fsync=1",
    ];
    fio::start(ctx, "storm", &options)
}

/// The kernel's own watch over tasks that do not get on. What it finds is in its log, too, where it
/// fails the test.
struct HungTasks {
    seconds: String,
    found: String,
}

const TIMEOUT: &str = "/proc/sys/kernel/hung_task_timeout_secs";
const FOUND: &str = "/proc/sys/kernel/hung_task_detect_count";
/// What else the kernel shows then (Linux 6.19).
const SHOWN: &str = "/proc/sys/kernel/hung_task_sys_info";

impl HungTasks {
    fn watch(stall: Duration) -> Result<Self> {
        let read = |file| std::fs::read_to_string(file).context(file);
        let watch = Self { seconds: read(TIMEOUT)?, found: read(FOUND)? };
        let _ = std::fs::write(SHOWN, "blocked_tasks"); // a help only
        std::fs::write(TIMEOUT, stall.as_secs().to_string())?;
        Ok(watch)
    }

    fn end(self) -> Result<()> {
        let found = std::fs::read_to_string(FOUND)?;
        ensure!(found == self.found, "tasks hung: {} and now {}", self.found.trim(), found.trim());
        Ok(())
    }
}

impl Drop for HungTasks {
    fn drop(&mut self) {
        let _ = std::fs::write(TIMEOUT, &self.seconds);
    }
}

/// Memory of a process in KiB.
#[derive(Clone, Copy, Debug)]
struct Memory {
    resident: u64,
    locked: u64,
}

impl Memory {
    fn of(server: &Device) -> Result<Self> {
        let path = format!("/proc/{}/status", server.pid()?);
        let status = std::fs::read_to_string(&path).with_context(|| path)?;
        let kib = |name: &str| -> Result<u64> {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            let number = line.and_then(|rest| rest.split_whitespace().next()).context("a line")?;
            number.parse().with_context(|| format!("{name} {number}"))
        };
        Ok(Self { resident: kib("VmRSS:")?, locked: kib("VmLck:")? })
    }
}

fn grown(servers: &[&Device], before: &[Memory]) -> Result<String> {
    let mut text = "memory of the servers, KiB resident and locked:".to_owned();
    for (server, before) in servers.iter().zip(before) {
        let (now, id) = (Memory::of(server)?, server.described.id);
        text.push_str(&format!(
            " {id}: {} and {}, then {} and {};",
            before.resident, before.locked, now.resident, now.locked
        ));
        ensure!(now.locked > 0, "server {id} can be evicted while memory is short");
        let [before, now] = [before, &now].map(|memory| memory.resident + memory.locked);
        ensure!(now <= before + GROWTH_KIB, "server {id} has grown from {before} to {now} KiB");
    }
    Ok(text)
}

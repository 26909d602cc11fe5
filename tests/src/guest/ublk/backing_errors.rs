//! Backings that fail and backings that hang: errors reach exactly the requests that meet them,
//! and nothing is given back while an operation may still use it.

use std::os::unix::fs::FileExt;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::Value;

use super::device::{Device, PROGRAM, fresh_drive, text};
use crate::config::DEFAULT;
use crate::guest::direct::{self, Aligned};
use crate::guest::dm::Mapper;
use crate::guest::drives::Drive;
use crate::guest::udev::QuietUdev;
use crate::guest::{Ctx, Outcome, TestCase, fio, process, wait_for};

pub const TESTS: &[TestCase] = &[
    failing("errors_hit_the_requests_that_meet_them_fused", |ctx| errors(ctx, "fused")),
    failing("errors_hit_the_requests_that_meet_them_slot", |ctx| errors(ctx, "slot")),
    failing("errors_hit_the_requests_that_meet_them_user_copy", |ctx| errors(ctx, "user-copy")),
    failing("errors_hit_the_requests_that_meet_them_copy", |ctx| errors(ctx, "copy")),
    failing("a_slot_is_quarantined_while_the_backing_hangs", hanging),
    failing("a_second_signal_cancels_a_third_does_not_wait", signals),
];

const fn failing(name: &'static str, run: fn(&Ctx) -> Result<Outcome>) -> TestCase {
    TestCase::guest(name, DEFAULT, run).seconds(600)
}

/// First sector and number of sectors, in order: one block, three sectors in two blocks, a MiB.
/// None is where udev looks for signatures.
const BAD: [(u64, u64); 3] = [(5000, 8), (10_007, 3), (16_384, 2048)];

/// How many blocks of so many bytes, of the first `span` bytes, meet a bad sector.
fn bad_blocks(block: u64, span: u64) -> u64 {
    let sectors = block / 512;
    let is_bad =
        |at: u64| BAD.iter().any(|(first, count)| at < first + count && *first < at + sectors);
    let blocks = (0..span / block).filter(|number| is_bad(number * sectors));
    u64::try_from(blocks.count()).unwrap_or(u64::MAX)
}

fn errors(ctx: &Ctx, lend: &str) -> Result<Outcome> {
    let drive = fresh_drive("drive0")?;
    let mapper = Mapper::with_bad_sectors("ublk-bad", &drive, &BAD)?;
    let device = Device::add_loop(&mapper.path(), &["--lend", lend])?;
    let udev = QuietUdev::new()?;
    let kib: u64 = device.attribute("queue/max_sectors_kb")?.parse()?;
    let (longest, mut expected) = (kib << 10, 0);
    for (rw, block, depth, mib) in [
        ("write", 4 << 10, 1, 16),
        ("read", 4 << 10, 32, 16),
        ("randwrite", 64 << 10, 32, 16),
        ("read", 1 << 20, 128, 16),
        ("randread", 512, 128, 6),
    ] {
        let span = mib << 20;
        let options = [
            &format!("filename={}", device.path()?),
            &format!("rw={rw}"),
            &format!("bs={block}"),
            &format!("iodepth={depth}"),
            &format!("size={span}"),
            "ioengine=io_uring",
            "direct=1",
            "buffer_pattern=0x5a",
            "continue_on_error=all",
        ];
        let errors = fio::run_for_errors(ctx, &options)?;
        let bad = bad_blocks(block, span);
        println!("{lend} {rw} {block}: {errors} of {} requests failed", span / block);
        ensure!(errors == bad && bad > 0, "{rw} {block}: {errors} errors, {bad} bad blocks");
        // The kernel splits what is longer than the device takes.
        expected += bad_blocks(block.min(longest), span);
    }
    // What is not bad holds what was written.
    let file = direct::open(device.path()?)?;
    let mut buffer = Aligned::new(64 << 10, 0);
    for offset in (0..4).map(|number| number * (64 << 10)) {
        file.read_exact_at(buffer.bytes(), offset)?;
        ensure!(buffer.bytes().iter().all(|byte| *byte == 0x5a), "at {offset}");
    }
    drop(file);
    let counters = device.stop_and_count();
    drop(udev);
    let counters = counters?;
    ensure!(counters.get("failed") == expected, "{expected} were injected: {counters:?}");
    counters.ensure_none(&["retries", "copied", "failed registrations", "stale", "unexpected"])?;
    mapper.remove()?;
    Ok(Outcome::Pass)
}

/// A device on a backing that can be made to hang.
struct Hanging {
    device: Device,
    mapper: Mapper,
}

const NAME: &str = "ublk-hang";

impl Hanging {
    fn new(drive: &Drive, options: &[&str]) -> Result<Self> {
        let mapper = Mapper::with_bad_sectors(NAME, drive, &[])?;
        let device = Device::add_loop(&mapper.path(), options)?;
        crate::guest::udev::settle()?;
        Ok(Self { device, mapper })
    }

    /// Operations of the backing do not complete while this lives.
    fn suspend(&self) -> Result<Suspended> {
        process::run(&["dmsetup", "suspend", "--noflush", "--nolockfs", NAME])?;
        Ok(Suspended)
    }

    /// Reads a block, in another process.
    fn start_read(&self, output: &str) -> Result<Child> {
        let input = format!("if={}", self.device.path()?);
        let child = Command::new("dd")
            .args([&input, output, "bs=4k", "count=1", "skip=5", "iflag=direct", "status=none"])
            .stderr(Stdio::null())
            .spawn()?;
        Ok(child)
    }

    /// What `stats` says of the only lane.
    fn lane(&self) -> Result<Value> {
        let argv = [PROGRAM, "stats", "-n", &self.device.id(), "--json", "--interval", "0.1"];
        let printed = process::run(&[&argv[..], &["--slots"]].concat())?;
        let stats: Value = serde_json::from_str(&printed.stdout)?;
        Ok(stats["lanes"][0].clone())
    }
}

/// A backing that hangs, also for whoever would clean up after a test that failed.
struct Suspended;

impl Drop for Suspended {
    fn drop(&mut self) {
        // If that fails, the test does: it waits for what hangs.
        let _ = process::run(&["dmsetup", "resume", NAME]);
    }
}

fn hanging(ctx: &Ctx) -> Result<Outcome> {
    for lend in ["fused", "slot", "user-copy", "copy"] {
        let drive = fresh_drive("drive0")?;
        let hanging = Hanging::new(&drive, &["--lend", lend, "--io-timeout", "0.3"])?;
        let mut block = Aligned::new(4096, 0x77);
        // Open until the end: when a writer closes a device, udev reads it, and would hang too.
        let writer = direct::open(hanging.device.path()?)?;
        writer.write_all_at(block.bytes(), 5 * 4096)?;

        let suspended = hanging.suspend()?;
        let read = ctx.directory().join("read");
        let mut reader = hanging.start_read(&format!("of={}", text(&read)?))?;
        let lane = wait_for("a slot in quarantine", Duration::from_secs(30), || {
            let lane = hanging.lane()?;
            Ok((lane["slots"]["quarantined"] == 1).then_some(lane))
        })?;
        println!("{lend}: {lane}");
        ensure!(lane["in_flight"] == 1 && lane["slots"]["leaked"] == 0, "{lane}");
        ensure!(lane["lent"][0]["state"] == "quarantined", "{lane}");
        ensure!(lane["lent"][0]["borrowers"][0]["op"]["kind"] == "read", "{lane}");
        ensure!(reader.try_wait()?.is_none(), "answered while the drive may still write");

        drop(suspended);
        ensure!(reader.wait()?.success(), "late is not wrong");
        ensure!(std::fs::read(&read)? == block.bytes(), "the data is what was written");
        let lane = hanging.lane()?;
        ensure!(lane["slots"]["quarantined"] == 0 && lane["in_flight"] == 0, "{lane}");
        drop(writer);
        let counters = hanging.device.stop_and_count()?;
        for name in ["timed out", "cancelled", "lost ops"] {
            ensure!(counters.get(name) == 1, "{name}: {counters:?}");
        }
        counters.ensure_none(&["failed", "unexpected"])?;
        hanging.mapper.remove()?;
    }
    Ok(Outcome::Pass)
}

fn signals(_ctx: &Ctx) -> Result<Outcome> {
    let drive = fresh_drive("drive0")?;
    let hanging = Hanging::new(&drive, &["-n", "6"])?;
    let pid = hanging.device.pid()?.to_string();
    let logged = |line: &str| {
        wait_for(line, Duration::from_secs(30), || {
            let log = std::fs::read_to_string("/var/log/ublk-target/6.log")?;
            let log = log.rsplit("] serving ").next().unwrap_or_default().to_owned();
            Ok(log.contains(line).then_some(()))
        })
    };
    let suspended = hanging.suspend()?;
    let mut reader = hanging.start_read("of=/dev/null")?;
    wait_for("the read", Duration::from_secs(30), || {
        Ok((hanging.lane()?["in_flight"] == 1).then_some(()))
    })?;
    process::run(&["kill", "-TERM", &pid])?;
    logged("SIGTERM: stopping")?;
    process::run(&["kill", "-TERM", &pid])?;
    logged("SIGTERM again: cancelling")?;
    process::run(&["kill", "-TERM", &pid])?;
    logged("SIGTERM again: ending with I/O outstanding")?;
    drop(suspended);
    reader.wait()?;
    hanging.device.delete()?;
    hanging.mapper.remove()?;
    Ok(Outcome::Pass)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_with_bad_sectors_are_counted() {
        assert_eq!(bad_blocks(512, 16 << 20), 8 + 3 + 2048);
        assert_eq!(bad_blocks(512, 6 << 20), 8 + 3);
        assert_eq!(bad_blocks(4096, 16 << 20), 1 + 2 + 256);
        assert_eq!(bad_blocks(1 << 20, 16 << 20), 3);
    }
}

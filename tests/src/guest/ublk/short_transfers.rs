//! Transfers that come short: all bytes arrive, and the driver has delivered each request once.
//!
//! What a driver makes of a short result differs: from Linux 7.3 on it takes one for the whole. So
//! nothing here is written and read back by way of the device: what was written there is looked
//! for on the drives, and what is read there was put on them.

use std::fs::File;
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::device::{Device, PROGRAM, fresh_drives, text};
use crate::config::DEFAULT;
use crate::guest::direct::{self, Aligned};
use crate::guest::drives::Drive;
use crate::guest::udev::QuietUdev;
use crate::guest::{Ctx, Outcome, TestCase, process};

pub const TESTS: &[TestCase] = &[
    short("short_transfers_arrive_whole_on_a_loop", |_| serve(1, Route::Block)),
    short("short_transfers_arrive_whole_on_a_stripe", |_| serve(3, Route::Block)),
    short("short_transfers_arrive_whole_by_passthrough", |_| serve(2, Route::Namespace)),
];

const fn short(name: &'static str, run: fn(&Ctx) -> Result<Outcome>) -> TestCase {
    TestCase::guest(name, DEFAULT, run).seconds(600)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Route {
    Block,
    Namespace,
}

const MODES: [&str; 5] = ["fused", "slot", "slot --io-lane", "user-copy", "copy"];
const CHUNK: usize = 4096;
/// Where the rules apply, so that they do not meet whoever looks for partitions.
const START: usize = 64 << 20;
/// Lengths of requests, one after the other; the third is one block, which cannot come short.
const LENGTHS: [usize; 5] = [64 << 10, 4096, 512, 3584, 12 << 10];
const ROUNDS: usize = 24;
const SIZE: usize = ROUNDS * (84 << 10);

/// All reads and writes come short, some of them after a while.
const RULES: [&str; 2] = ["range=64M+32M,p=0.2,short,delay=100us", "range=64M+32M,short"];

fn serve(width: usize, route: Route) -> Result<Outcome> {
    let drives = fresh_drives(u32::try_from(width)?)?;
    for (lend, number) in MODES.into_iter().zip(0..) {
        let device = add(&drives, route, lend)?;
        let udev = QuietUdev::new()?;
        let (written, put) = (pattern(2 * number), pattern(2 * number + 1));
        // Whoever opens a device may have the kernel read its partition table again.
        let file = direct::open(device.path()?)?;
        let before = delivered(&device)?;
        let done = write(&file, &written)?;
        ensure!(on_drives(&drives)? == written, "{lend}: what was written is not on the drives");
        put_on_drives(&drives, &put)?;
        ensure!(read(&file)? == put, "{lend}: what was read is not what is on the drives");
        let after = delivered(&device)?;
        drop(file);
        let counters = device.stop_and_count()?;
        drop(udev);
        println!("{route:?} {width} {lend}: {done} reads and as many writes, {counters:?}");
        let asked = [after[0] - before[0], after[1] - before[1]];
        ensure!(asked == [done; 2], "{lend}: {done} requests each were delivered as {asked:?}");
        let blocks = u64::try_from(ROUNDS)?;
        let short = counters.get("planned short");
        ensure!(short == 2 * (done - blocks), "{lend}: {short} came short: {counters:?}");
        ensure!(counters.get("partial") >= short && counters.get("delays") > 0, "{counters:?}");
        counters.ensure_none(&["failed", "retries", "copied", "stale", "unexpected"])?;
    }
    Ok(Outcome::Pass)
}

fn add(drives: &[Drive], route: Route, lend: &str) -> Result<Device> {
    let mut arguments = vec!["fault"];
    RULES.iter().for_each(|rule| arguments.extend(["--rule", rule]));
    match drives {
        [_] => arguments.push("loop"),
        _ => arguments.extend(["stripe", "--chunk", "4K"]),
    }
    let paths: Vec<_> = drives.iter().map(Drive::path).collect();
    for path in &paths {
        arguments.extend(["-f", text(path)?]);
    }
    if route == Route::Namespace {
        arguments.push("--passthru");
    }
    arguments.push("--lend");
    arguments.extend(lend.split(' '));
    Device::add(&arguments)
}

/// Bytes that differ from one block to the next, and from one number to another.
fn pattern(number: usize) -> Vec<u8> {
    let mix = |word: usize| (word + number * SIZE).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (0..SIZE / 8).flat_map(|word| mix(word).to_le_bytes()).collect()
}

/// The requests, one after the other: where in the pattern each begins, and how long it is.
fn requests() -> impl Iterator<Item = (usize, usize)> {
    let lengths = LENGTHS.into_iter().cycle().take(ROUNDS * LENGTHS.len());
    lengths.scan(0, |next, length| {
        let at = *next;
        *next += length;
        Some((at, length))
    })
}

fn write(file: &File, bytes: &[u8]) -> Result<u64> {
    let mut done = 0;
    for (at, length) in requests() {
        let mut buffer = Aligned::new(length, 0);
        buffer.bytes().copy_from_slice(&bytes[at..at + length]);
        let written = file.write_at(buffer.bytes(), (START + at).try_into()?);
        ensure!(written.with_context(|| format!("write {at}"))? == length, "a short write");
        done += 1;
    }
    Ok(done)
}

fn read(file: &File) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    for (at, length) in requests() {
        let mut buffer = Aligned::new(length, 0x5a);
        let read = file.read_at(buffer.bytes(), (START + at).try_into()?);
        ensure!(read.with_context(|| format!("read {at}"))? == length, "a short read");
        bytes.extend_from_slice(buffer.bytes());
    }
    Ok(bytes)
}

/// Where each chunk of the pattern is: its drive, and where on it.
fn places(width: usize) -> impl Iterator<Item = (usize, u64)> {
    let chunks = START / CHUNK..(START + SIZE) / CHUNK;
    chunks.map(move |chunk| (chunk % width, (chunk / width * CHUNK) as u64))
}

fn on_drives(drives: &[Drive]) -> Result<Vec<u8>> {
    let files =
        drives.iter().map(|drive| direct::open(drive.path())).collect::<Result<Vec<_>>>()?;
    let (mut bytes, mut buffer) = (Vec::new(), Aligned::new(CHUNK, 0));
    for (drive, offset) in places(drives.len()) {
        files[drive].read_exact_at(buffer.bytes(), offset)?;
        bytes.extend_from_slice(buffer.bytes());
    }
    Ok(bytes)
}

fn put_on_drives(drives: &[Drive], bytes: &[u8]) -> Result<()> {
    let files =
        drives.iter().map(|drive| direct::open(drive.path())).collect::<Result<Vec<_>>>()?;
    let mut buffer = Aligned::new(CHUNK, 0);
    for ((drive, offset), chunk) in places(drives.len()).zip(bytes.chunks(CHUNK)) {
        buffer.bytes().copy_from_slice(chunk);
        files[drive].write_all_at(buffer.bytes(), offset)?;
    }
    Ok(())
}

/// How many reads and writes the driver has delivered.
fn delivered(device: &Device) -> Result<[u64; 2]> {
    let argv = [PROGRAM, "stats", "-n", &device.id(), "--json", "--interval", "0.1"];
    let stats: Value = serde_json::from_str(&process::run(&argv)?.stdout)?;
    let count = |kind: &str| {
        let requests = stats["total"]["requests"][kind]["requests"].as_u64();
        requests.with_context(|| format!("requests of kind {kind} in {stats}"))
    };
    Ok([count("read")?, count("write")?])
}

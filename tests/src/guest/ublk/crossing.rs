//! Requests that cross chunks of a stripe, verified, and counted: how many operations they become
//! follows from their number and their bytes.

use std::fs::File;
use std::os::unix::fs::FileExt;

use anyhow::{Result, ensure};
use nix::fcntl::{Flock, FlockArg};

use super::device::{Device, fresh_drives, text};
use super::stats::reports::{number, report};
use crate::config::STACKS;
use crate::guest::direct::{self, Aligned};
use crate::guest::drives::Drive;
use crate::guest::{Ctx, Outcome, TestCase, fio};

pub const TESTS: &[TestCase] = &[
    crossing("verify_requests_across_chunks_of_4_drives_fused", |ctx| across(ctx, "fused")),
    crossing("verify_requests_across_chunks_of_4_drives_slot", |ctx| across(ctx, "slot")),
    crossing("verify_requests_across_chunks_of_4_drives_user_copy", |ctx| across(ctx, "user-copy")),
    crossing("verify_requests_across_chunks_of_4_drives_copy", |ctx| across(ctx, "copy")),
    crossing("stripes_of_great_chunks_are_served", great_chunks),
];

const fn crossing(name: &'static str, run: fn(&Ctx) -> Result<Outcome>) -> TestCase {
    TestCase::guest(name, STACKS, run).seconds(300)
}

/// Operations that a planner may give at a time (`WINDOW_OPS`).
const WINDOW: u64 = 8;

/// Requests that begin in the middle of a chunk.
#[derive(Clone, Copy)]
struct Load {
    chunk: u64,
    /// Bytes of a request: a multiple of the chunk.
    block: u64,
    mib: u32,
    depth: u32,
}

const CHUNKS: [u64; 2] = [4 << 10, 64 << 10];
const LOADS: [Load; 5] = [
    Load { chunk: 4 << 10, block: 4 << 10, mib: 4, depth: 128 },
    Load { chunk: 4 << 10, block: 64 << 10, mib: 8, depth: 32 },
    Load { chunk: 4 << 10, block: 1 << 20, mib: 16, depth: 32 },
    Load { chunk: 64 << 10, block: 64 << 10, mib: 16, depth: 128 },
    Load { chunk: 64 << 10, block: 1 << 20, mib: 32, depth: 32 },
];

fn across(ctx: &Ctx, lend: &str) -> Result<Outcome> {
    let drives = fresh_drives(4)?;
    let paths: Vec<_> = drives.iter().map(Drive::path).collect();
    for chunk in CHUNKS {
        let chunk_text = chunk.to_string();
        let mut arguments = vec!["stripe", "--chunk", &chunk_text, "--lend", lend];
        for path in &paths {
            arguments.extend(["-f", text(path)?]);
        }
        let device = Device::add(&arguments)?;
        ensure!(device.described.size_bytes == 4 << 30, "{:?}", device.described);
        // When a writer closes a device, udev reads its partition table, but for a locked one.
        crate::guest::udev::settle()?;
        let lock = Flock::lock(File::open(device.path()?)?, FlockArg::LockExclusive);
        let lock = lock.map_err(|(_, errno)| errno)?;
        for load in LOADS.iter().filter(|load| load.chunk == chunk) {
            count(ctx, &device, *load)?;
        }
        drop(lock);
        let counters = device.stop_and_count()?;
        counters.ensure_none(&["failed", "retries", "stale", "unexpected", "copied"])?;
    }
    Ok(Outcome::Pass)
}

/// A row of chunks may be as long as 2 GiB or more, which no limit of a queue can hold.
fn great_chunks(_ctx: &Ctx) -> Result<Outcome> {
    let drives = fresh_drives(4)?;
    let paths: Vec<_> = drives.iter().map(Drive::path).collect();
    for (count, chunk, mib) in [(2, "512M", 512_u64), (4, "128M", 128), (4, "1G", 1024)] {
        let mut arguments = vec!["stripe", "--chunk", chunk];
        for path in &paths[..count] {
            arguments.extend(["-f", text(path)?]);
        }
        let device = Device::add(&arguments)?;
        let size = device.described.size_bytes;
        ensure!(size == (count as u64) << 30, "{count} x {chunk}: {size} bytes");
        // Half of it at the end of the first chunk, half at the start of the second.
        let boundary = mib << 20;
        let mut block = Aligned::new(8192, 0);
        block.bytes()[..4096].fill(0x11);
        block.bytes()[4096..].fill(0x22);
        direct::open(device.path()?)?.write_all_at(block.bytes(), boundary - 4096)?;
        crate::guest::udev::settle()?;
        device.delete()?;
        for (path, at, expected) in [(&paths[0], boundary - 4096, 0x11), (&paths[1], 0, 0x22)] {
            let mut found = Aligned::new(4096, 0);
            direct::open(text(path)?)?.read_exact_at(found.bytes(), at)?;
            let is_there = found.bytes().iter().all(|byte| *byte == expected);
            ensure!(is_there, "{count} x {chunk}: {} at {at}", path.display());
        }
        drives.iter().try_for_each(Drive::wipe)?;
    }
    Ok(Outcome::Pass)
}

/// What a server has done with data.
#[derive(Clone, Copy, Debug)]
struct Done {
    requests: u64,
    bytes: u64,
    ops: u64,
}

impl Done {
    fn by(device: &Device) -> Result<Self> {
        let report = report(device)?;
        let both = |what: &str| -> Result<u64> {
            let of = |kind: &str| number(&report, &format!("/total/requests/{kind}/{what}"));
            Ok(of("read")? + of("write")?)
        };
        let ops = number(&report, "/total/counters/ops")?;
        Ok(Self { requests: both("requests")?, bytes: both("bytes")?, ops })
    }

    fn since(self, before: Self) -> Self {
        Self {
            requests: self.requests - before.requests,
            bytes: self.bytes - before.bytes,
            ops: self.ops - before.ops,
        }
    }
}

fn count(ctx: &Ctx, device: &Device, load: Load) -> Result<()> {
    let Load { chunk, block, mib, depth } = load;
    let before = Done::by(device)?;
    let options = [
        &format!("filename={}", device.path()?),
        &format!("bs={block}"),
        &format!("offset={}", chunk / 2),
        &format!("size={mib}m"),
        &format!("iodepth={depth}"),
        "rw=randrw",
        "ioengine=io_uring",
        "direct=1",
        "verify=crc32c",
        "verify_fatal=1",
    ];
    let fio = fio::run(ctx, &options)?;
    let done = Done::by(device)?.since(before);
    println!("chunks of {chunk}, requests of {block}, depth {depth}: {done:?}");
    let bytes = fio.read.bytes + fio.write.bytes;
    ensure!(done.bytes == bytes && bytes > 0, "fio moved {bytes} bytes: {done:?}");
    // However the kernel splits and merges: a request of n chunks that begins in the middle of one
    // has bytes in n + 1.
    ensure!(done.ops == done.bytes / chunk + done.requests, "{done:?}");
    ensure!(done.ops >= 2 * done.requests, "none may fit into a chunk: {done:?}");
    if block == 1 << 20 {
        // Then some have more.
        ensure!(done.ops > WINDOW * done.requests, "no request needs a second window: {done:?}");
    }
    Ok(())
}

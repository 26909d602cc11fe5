//! fio with checksums over block sizes and queue depths.

use anyhow::{Result, ensure};

use crate::guest::{Ctx, fio};

/// Block sizes, and how many MiB each run covers.
pub const BLOCKS: [(&str, u32); 4] =
    [("bsrange=512-64k", 8), ("bs=4k", 8), ("bs=64k", 16), ("bs=1m", 32)];

/// Fewer, for what is like something that is verified with all.
pub const SHORTER: [(&str, u32); 2] = [("bsrange=512-64k", 8), ("bs=1m", 16)];

/// Runs fio with checksums on a device at all block sizes and depths. Returns how many reads and
/// writes were done.
pub fn verify(ctx: &Ctx, device: &str, blocks: &[(&str, u32)]) -> Result<u64> {
    run(ctx, device, blocks, 1, 1)
}

/// As [`verify`], for longer in the long run.
pub fn verify_at_length(ctx: &Ctx, device: &str, blocks: &[(&str, u32)]) -> Result<u64> {
    // More loops over twice the data, rather than more data: what counts are requests, and the
    // host has to store what is written.
    let (factor, loops) = if ctx.long { (2, 6) } else { (1, 1) };
    run(ctx, device, blocks, factor, loops)
}

fn run(ctx: &Ctx, device: &str, blocks: &[(&str, u32)], factor: u32, loops: u32) -> Result<u64> {
    let (filename, loops) = (format!("filename={device}"), format!("loops={loops}"));
    let shared = [
        &filename,
        &loops,
        "rw=randrw",
        "ioengine=io_uring",
        "direct=1",
        "registerfiles=1",
        "verify=crc32c",
        "verify_fatal=1",
        "randseed=7",
    ];
    let mut jobs = Vec::new();
    for (block, mib) in blocks {
        for depth in ["1", "32", "128"] {
            let size = format!("size={}m", mib * factor);
            jobs.push(vec![(*block).to_owned(), format!("iodepth={depth}"), size]);
        }
    }
    let mut requests = 0;
    for (job, report) in jobs.iter().zip(fio::run_each(ctx, &shared, &jobs)?) {
        ensure!(report.error == 0, "{job:?}: fio reported error {}", report.error);
        ensure!(report.write.requests > 0 && report.read.requests > 0, "nothing was done: {job:?}");
        println!("{}: {} reads verified", job.join(" "), report.read.requests);
        requests += report.read.requests + report.write.requests;
    }
    Ok(requests)
}

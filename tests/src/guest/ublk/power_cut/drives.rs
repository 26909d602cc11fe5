//! The drives themselves, without any server.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use anyhow::{Result, ensure};
use rand::SeedableRng as _;
use rand_xoshiro::SplitMix64;

use super::super::device::text;
use super::{BIG_BLOCKS, seeded};
use crate::guest::direct::{self, Aligned};
use crate::guest::volatile::{Asked, Lost, Moment, Survival, VolatileDrives};
use crate::guest::{Ctx, Outcome, fio};

/// Of four blocks that are written in each round, the one that was flushed and the one that was
/// written with FUA are kept, and of the others what was there before.
pub fn forget(ctx: &Ctx) -> Result<Outcome> {
    seeded(ctx, || {
        let mut drives =
            VolatileDrives::new(&[BIG_BLOCKS], &mut SplitMix64::seed_from_u64(ctx.seed))?;
        let mut lost = Lost::default();
        let rounds = 1..=4;
        drives.power_on()?;
        for round in rounds.clone() {
            let path = drives.paths()?.remove(0);
            let file = direct::open(&path)?;
            let mut block = Aligned::new(4096, 0);
            let mut write = |number: u64, content: u8| {
                block.bytes().fill(content);
                file.write_all_at(block.bytes(), number * 4096)
            };
            write(0, round)?;
            write(1, round)?;
            file.sync_data()?;
            let flushed = drives.asked();
            // Over what is on stable storage, and over what never was.
            write(1, 100 + round)?;
            write(2, 100 + round)?;
            write_with_fua(ctx, &path, 3, round)?;
            let Asked { writes, fua, flushes } = drives.asked();
            let expected = Asked { writes: writes - 3, fua: fua - 1, flushes };
            ensure!(flushed == expected, "{flushed:?}, {:?}", drives.asked());
            let newest = [round, 100 + round, 100 + round, round];
            ensure!(first_bytes(&file)? == newest, "the drive forgets without a cut");
            drop(file);

            lost += drives.cut(Moment::Now, Duration::ZERO, Survival::Nothing);
            drives.unplug()?;
            drives.wait_until_gone()?;
            drives.power_on()?;
            let kept = first_bytes(&direct::open(&drives.paths()?[0])?)?;
            ensure!(kept == [round, round, 0, round], "after cut {round}: {kept:?}");
        }
        drives.remove()?;
        let expected = 2 * u64::from(*rounds.end());
        ensure!(lost == Lost { cached: expected, lost: expected }, "{lost:?}");
        Ok(format!(
            "{} cuts: {} blocks written without flush or FUA, {} of them lost, no others",
            rounds.end(),
            lost.cached,
            lost.lost
        ))
    })
}

/// The first bytes of the first four blocks.
fn first_bytes(file: &File) -> Result<[u8; 4]> {
    let mut bytes = Aligned::new(4 * 4096, 0xff);
    file.read_exact_at(bytes.bytes(), 0)?;
    Ok([0, 1, 2, 3].map(|number| bytes.bytes()[number * 4096]))
}

/// Writes a block with FUA and without a flush. For that the write has to be asynchronous: for
/// others that are to be durable, the kernel sends a flush after the write.
fn write_with_fua(ctx: &Ctx, path: &Path, number: u64, content: u8) -> Result<()> {
    let options = [
        &format!("filename={}", text(path)?),
        &format!("offset={}", number * 4096),
        &format!("buffer_pattern={content}"),
        "rw=write",
        "bs=4k",
        "size=4k",
        "ioengine=io_uring",
        "direct=1",
        "sync=dsync",
    ];
    fio::run(ctx, &options).map(drop)
}

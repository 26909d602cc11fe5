//! Power cuts: what was flushed, or written with FUA, is there afterwards, and what a file system
//! or a database may assume then holds.
//!
//! The drives lose at a cut what they were not told to keep, and the tests of servers that ignore
//! flushes or FUA show that this is found out.

mod broken_promises;
mod database;
mod drives;
mod files;
mod in_a_file;
mod records;
mod rig;
mod storm;
mod tally;
mod writers;

use anyhow::{Context, Result, ensure};

use super::filesystem::{EXT4, Kind, XFS};
use crate::config::DEFAULT;
use crate::guest::volatile::Shape;
use crate::guest::{Ctx, FIGURE, Outcome, TestCase, process};
use database::{Database, Habit};
use in_a_file::InAFile;
use rig::{Plan, Rig};
use storm::Storm;
use tally::{Tally, load_and_cut};

pub const TESTS: &[TestCase] = &[
    cutting("power_cut_loses_what_was_not_flushed", drives::forget),
    cutting("power_cut_under_a_database_fused", |ctx| database(ctx, FUSED)),
    cutting("power_cut_under_a_database_slot", |ctx| database(ctx, SLOT)),
    cutting("power_cut_under_a_database_io_lane", |ctx| database(ctx, IO_LANE)),
    cutting("power_cut_under_a_database_user_copy", |ctx| database(ctx, USER_COPY)),
    cutting("power_cut_under_a_database_copy", |ctx| database(ctx, COPY)),
    cutting("power_cut_under_a_database_passthrough", |ctx| database(ctx, PASSTHROUGH)),
    cutting("power_cut_under_a_database_on_a_stripe", |ctx| database(ctx, STRIPE)),
    cutting("power_cut_under_a_database_on_a_stripe_half_without_fua", |ctx| {
        database(ctx, STRIPE_HALF_WITHOUT_FUA)
    }),
    cutting("power_cut_under_a_database_in_a_file", database_in_a_file),
    cutting("power_cut_under_ext4_fused", |ctx| file_system(ctx, EXT4, FILES_FUSED)),
    cutting("power_cut_under_xfs_fused", |ctx| file_system(ctx, XFS, FILES_FUSED)),
    cutting("power_cut_under_ext4_on_a_stripe_slot", |ctx| file_system(ctx, EXT4, FILES_STRIPE)),
    cutting("power_cut_under_xfs_on_a_stripe_copy", |ctx| file_system(ctx, XFS, FILES_STRIPE_COPY)),
    cutting("power_cut_finds_out_who_ignores_flushes", broken_promises::ignored_flushes),
    cutting("power_cut_finds_out_who_ignores_fua", broken_promises::ignored_fua),
    cutting(
        "power_cut_under_ext4_finds_out_who_ignores_flushes",
        broken_promises::ignored_flushes_under_ext4,
    ),
];

const fn cutting(name: &'static str, run: fn(&Ctx) -> Result<Outcome>) -> TestCase {
    TestCase::guest(name, DEFAULT, run).seconds(1200)
}

const SMALL: Shape = Shape { mib: 64, block_bytes: 512, fua: true };
const BIG_BLOCKS: Shape = Shape { mib: 64, block_bytes: 4096, fua: true };
/// The smallest that xfs takes. Neither file system is made for blocks that are torn.
const FOR_FILES: Shape = Shape { mib: 320, block_bytes: 4096, fua: true };
const FOR_STRIPED_FILES: Shape = Shape { mib: 192, block_bytes: 4096, fua: true };

const fn plan(arguments: &'static [&'static str], drives: &'static [Shape]) -> Plan {
    Plan { arguments, drives, faults: None, passthrough: false }
}

const FUSED: Plan = plan(&["loop", "--lend", "fused", "-q", "2"], &[SMALL]);
const SLOT: Plan = plan(&["loop", "--lend", "slot"], &[BIG_BLOCKS]);
const IO_LANE: Plan = plan(&["loop", "--lend", "slot", "--io-lane"], &[SMALL]);
const USER_COPY: Plan = plan(&["loop", "--lend", "user-copy"], &[BIG_BLOCKS]);
const COPY: Plan = plan(&["loop", "--lend", "copy", "-q", "2"], &[BIG_BLOCKS]);
const STRIPE: Plan = plan(&["stripe", "--chunk", "16K", "--lend", "fused"], &[BIG_BLOCKS; 2]);
const PASSTHROUGH: Plan =
    Plan { passthrough: true, ..plan(&["loop", "--lend", "fused"], &[BIG_BLOCKS]) };
/// One of the drives has no FUA: below the device, the block layer makes flushes of it.
const STRIPE_HALF_WITHOUT_FUA: Plan = plan(
    &["stripe", "--chunk", "4K", "--lend", "slot", "-q", "2"],
    &[SMALL, Shape { fua: false, ..SMALL }],
);
const FILES_FUSED: Plan = plan(&["loop", "--lend", "fused", "-q", "2"], &[FOR_FILES]);
const FILES_STRIPE: Plan =
    plan(&["stripe", "--chunk", "64K", "--lend", "slot"], &[FOR_STRIPED_FILES; 2]);
const FILES_STRIPE_COPY: Plan =
    plan(&["stripe", "--chunk", "16K", "--lend", "copy", "-q", "2"], &[FOR_STRIPED_FILES; 2]);

/// Blocks of a database.
const BLOCKS: usize = 2048;

/// Whether there were enough cuts: so many, and more until one had something to lose.
fn is_enough(ctx: &Ctx, short: u64, cuts: u64, is_convincing: bool) -> bool {
    let count = if ctx.long { 10 } else { short };
    cuts >= count && (is_convincing || cuts >= 4 * count)
}

/// Runs a test that draws lots.
fn seeded(ctx: &Ctx, run: impl FnOnce() -> Result<String>) -> Result<Outcome> {
    let figure = run().with_context(|| format!("seed {}", ctx.seed))?;
    println!("{FIGURE}{figure}; seed {}", ctx.seed);
    Ok(Outcome::Pass)
}

/// Records on the device itself.
fn database(ctx: &Ctx, plan: Plan) -> Result<Outcome> {
    seeded(ctx, || {
        let mut rig = Rig::new(ctx.seed, plan)?;
        let block_bytes = rig.device()?.attribute("queue/logical_block_size")?.parse()?;
        let database = Database::new(BLOCKS, block_bytes);
        let mut tally = Tally::default();
        while !is_enough(ctx, 2, rig.cuts, tally.is_convincing(&rig)) {
            let path = rig.device()?.described.device.clone();
            let acknowledged = load_and_cut(&mut rig, &database, &path, Habit::Both)?;
            rig.power_on()?;
            let findings = database.check(&path)?;
            tally.add(acknowledged, &findings).with_context(|| format!("cut {}", rig.cuts))?;
        }
        let figure = tally.figure(&rig)?;
        rig.end()?;
        Ok(figure)
    })
}

fn database_in_a_file(ctx: &Ctx) -> Result<Outcome> {
    seeded(ctx, || {
        let mut this = InAFile::new(ctx, ctx.seed, FILES_FUSED)?;
        let mut tally = Tally::default();
        while !is_enough(ctx, 2, this.rig.cuts, tally.is_convincing(&this.rig)) {
            let habit = if this.rig.cuts % 2 == 0 { Habit::Fua } else { Habit::Both };
            let (acknowledged, _) = this.load_and_cut(habit)?;
            let findings = this.check()?;
            let cut = this.rig.cuts;
            tally.add(acknowledged, &findings).with_context(|| format!("cut {cut}"))?;
            process::run(&[XFS.check, &[this.rig.device()?.path()?]].concat())?;
        }
        let figure = tally.figure(&this.rig)?;
        this.rig.end()?;
        Ok(figure)
    })
}

fn file_system(ctx: &Ctx, kind: Kind, plan: Plan) -> Result<Outcome> {
    seeded(ctx, || {
        let mut storm = Storm::new(ctx, ctx.seed, kind, plan)?;
        while !is_enough(ctx, 2, storm.rig.cuts, storm.is_convincing()) {
            storm.cut()?;
            let wrong = storm.check().with_context(|| format!("cut {}", storm.rig.cuts))?;
            ensure!(wrong.is_empty(), "cut {}: {}", storm.rig.cuts, wrong.join("; "));
        }
        ensure!(storm.is_convincing(), "nothing to lose: {:?}", storm.rig.lost);
        let figure = format!(
            "{} cuts; {} changes acknowledged, {} files checked, all right and fsck clean; {} were \
             being changed; {}",
            storm.rig.cuts,
            storm.acknowledged,
            storm.checked.right,
            storm.checked.uncertain,
            storm.rig.figure()
        );
        storm.rig.end()?;
        Ok(figure)
    })
}

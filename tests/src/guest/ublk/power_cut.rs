//! Power cuts: what was flushed, or written with FUA, is there afterwards, and what a file system
//! or a database may assume then holds.
//!
//! The drives lose at a cut what they were not told to keep, and the tests of servers that ignore
//! flushes or FUA show that this is found out.

mod database;
mod files;
mod records;
mod rig;
mod storm;
mod writers;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use super::device::{Mount, text};
use super::filesystem::{EXT4, Kind, XFS};
use crate::config::DEFAULT;
use crate::guest::direct::{self, Aligned};
use crate::guest::rng::Rng;
use crate::guest::volatile::{Asked, Lost, Moment, Shape, Survival, VolatileDrives};
use crate::guest::{Ctx, FIGURE, Outcome, TestCase, fio, process};
use database::{Database, Habit};
use records::{Findings, Wrong};
use rig::{Plan, Rig};
use storm::Storm;

pub const TESTS: &[TestCase] = &[
    cutting("power_cut_loses_what_was_not_flushed", drives_forget),
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
    cutting("power_cut_finds_out_who_ignores_flushes", ignored_flushes),
    cutting("power_cut_finds_out_who_ignores_fua", ignored_fua),
    cutting("power_cut_under_ext4_finds_out_who_ignores_flushes", ignored_flushes_under_ext4),
];

const fn cutting(name: &'static str, run: fn(&Ctx) -> Result<Outcome>) -> TestCase {
    TestCase::guest(name, DEFAULT, run).seconds(300)
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
const BLOCKS: usize = 4096;

fn cuts(ctx: &Ctx, short: u64) -> u64 {
    if ctx.long { 32 } else { short }
}

/// Runs a test that draws lots.
fn seeded(ctx: &Ctx, run: impl FnOnce() -> Result<String>) -> Result<Outcome> {
    let figure = run().with_context(|| format!("seed {}", ctx.seed))?;
    println!("{FIGURE}{figure}; seed {}", ctx.seed);
    Ok(Outcome::Pass)
}

/// The drives themselves, without any server: of four blocks that were written in each round, the
/// one that was flushed and the one that was written with FUA are kept, and of the others what was
/// there before.
fn drives_forget(ctx: &Ctx) -> Result<Outcome> {
    seeded(ctx, || {
        let mut drives = VolatileDrives::new(&[BIG_BLOCKS], &mut Rng::new(ctx.seed))?;
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

/// What all cuts of a test came to.
#[derive(Debug, Default)]
struct Tally {
    acknowledged: u64,
    findings: Findings,
}

/// Loads the database, cuts the power at some instant, and waits until nobody writes any more.
fn load_and_cut(rig: &mut Rig, database: &Database, path: &Path, habit: Habit) -> Result<u64> {
    let writers = database.start(path, habit, &mut rig.rng)?;
    writers.wait_for(5 + rig.rng.below(60))?;
    rig.power_off(|| writers.expect_cut())?;
    let acknowledged = writers.acknowledged();
    writers.join()?;
    Ok(acknowledged)
}

fn ensure_right(findings: &Findings) -> Result<()> {
    let first: Vec<_> = findings.wrong.iter().take(5).map(Wrong::to_string).collect();
    ensure!(first.is_empty(), "{} blocks are wrong: {}", findings.wrong.len(), first.join("; "));
    Ok(())
}

impl Tally {
    fn add(&mut self, acknowledged: u64, findings: Findings) {
        self.acknowledged += acknowledged;
        let all = &mut self.findings;
        all.durable += findings.durable;
        all.uncertain += findings.uncertain;
        all.undone += findings.undone;
        all.wrong.extend(findings.wrong);
    }

    /// The cuts have to have had something to lose.
    fn figure(&self, rig: &Rig) -> Result<String> {
        let (lost, found, asked) = (rig.lost, &self.findings, rig.asked());
        ensure!(lost.lost > 0 && found.undone > 0, "nothing was lost: {lost:?}, {found:?}");
        ensure!(found.durable > 0 && asked.flushes > 0, "nothing was flushed: {asked:?}");
        Ok(format!(
            "{} cuts; {} flushes and FUA writes acknowledged, {} blocks durable, all there; {} \
             blocks not durable, {} of them lost; {} of {} cached blocks lost by the drives, which \
             had {} writes ({} with FUA) and {} flushes",
            rig.cuts,
            self.acknowledged,
            found.durable,
            found.uncertain,
            found.undone,
            lost.lost,
            lost.cached,
            asked.writes,
            asked.fua,
            asked.flushes
        ))
    }
}

/// Records on the device itself.
fn database(ctx: &Ctx, plan: Plan) -> Result<Outcome> {
    seeded(ctx, || {
        let mut rig = Rig::new(ctx, plan)?;
        let block_bytes = rig.device()?.attribute("queue/logical_block_size")?.parse()?;
        let database = Database::new(BLOCKS, block_bytes);
        let mut tally = Tally::default();
        for _ in 0..cuts(ctx, 5) {
            let path = rig.device()?.described.device.clone();
            let acknowledged = load_and_cut(&mut rig, &database, &path, Habit::Both)?;
            rig.power_on()?;
            let findings = database.check(&path)?;
            ensure_right(&findings).with_context(|| format!("cut {}", rig.cuts))?;
            tally.add(acknowledged, findings);
        }
        let figure = tally.figure(&rig)?;
        rig.end()?;
        Ok(figure)
    })
}

/// Records in a file that does not change otherwise, where a write with `RWF_DSYNC` is one with
/// FUA and nothing more: on a block device the kernel makes it a write with FUA and a flush.
struct InAFile<'a> {
    ctx: &'a Ctx,
    rig: Rig,
    database: Database,
}

impl<'a> InAFile<'a> {
    fn new(ctx: &'a Ctx, plan: Plan) -> Result<Self> {
        let rig = Rig::new(ctx, plan)?;
        let this = Self { ctx, rig, database: Database::new(BLOCKS, 4096) };
        process::run(&[XFS.make, &[this.rig.device()?.path()?]].concat())?;
        let mount = this.mount()?;
        this.database.lay_out(&mount.point().join("records"))?;
        mount.unmount()?;
        Ok(this)
    }

    fn mount(&self) -> Result<Mount> {
        Mount::new(self.ctx, self.rig.device()?.path()?, "records")
    }

    /// Returns what was acknowledged, and how many flushes the drives had meanwhile.
    fn load_and_cut(&mut self, habit: Habit) -> Result<(u64, u64)> {
        let mount = self.mount()?;
        let path = mount.point().join("records");
        let before = self.rig.asked().flushes;
        let acknowledged = load_and_cut(&mut self.rig, &self.database, &path, habit)?;
        let flushes = self.rig.asked().flushes - before;
        mount.unmount()?;
        self.rig.power_on()?;
        Ok((acknowledged, flushes))
    }

    fn check(&self) -> Result<Findings> {
        let mount = self.mount()?;
        let findings = self.database.check(&mount.point().join("records"))?;
        mount.unmount()?;
        Ok(findings)
    }
}

fn database_in_a_file(ctx: &Ctx) -> Result<Outcome> {
    seeded(ctx, || {
        let mut this = InAFile::new(ctx, FILES_FUSED)?;
        let mut tally = Tally::default();
        for number in 0..cuts(ctx, 5) {
            let habit = if number % 2 == 0 { Habit::Fua } else { Habit::Both };
            let (acknowledged, _) = this.load_and_cut(habit)?;
            let findings = this.check()?;
            ensure_right(&findings).with_context(|| format!("cut {}", this.rig.cuts))?;
            process::run(&[XFS.check, &[this.rig.device()?.path()?]].concat())?;
            tally.add(acknowledged, findings);
        }
        let figure = tally.figure(&this.rig)?;
        this.rig.end()?;
        Ok(figure)
    })
}

fn file_system(ctx: &Ctx, kind: Kind, plan: Plan) -> Result<Outcome> {
    seeded(ctx, || {
        let mut storm = Storm::new(ctx, kind, plan)?;
        for _ in 0..cuts(ctx, 4) {
            storm.cut()?;
            let wrong = storm.check().with_context(|| format!("cut {}", storm.rig.cuts))?;
            ensure!(wrong.is_empty(), "cut {}: {}", storm.rig.cuts, wrong.join("; "));
        }
        let (lost, asked, checked) = (storm.rig.lost, storm.rig.asked(), &storm.checked);
        ensure!(lost.lost > 0, "nothing was lost: {lost:?}");
        ensure!(asked.flushes > 0 && checked.uncertain > 0, "{asked:?}, {checked:?}");
        let figure = format!(
            "{} cuts; {} changes acknowledged, {} files checked after the cuts, all right and fsck \
             clean; {} were being changed; {} of {} cached blocks lost by the drives, which had {} \
             writes ({} with FUA) and {} flushes",
            storm.rig.cuts,
            storm.acknowledged,
            checked.right,
            checked.uncertain,
            lost.lost,
            lost.cached,
            asked.writes,
            asked.fua,
            asked.flushes
        );
        storm.rig.end()?;
        Ok(figure)
    })
}

/// Cuts after which a broken promise has to have been found out.
const ATTEMPTS: u64 = 5;

fn ignored_flushes(ctx: &Ctx) -> Result<Outcome> {
    seeded(ctx, || {
        let mut rig = Rig::new(ctx, Plan { faults: Some("ignore-flush"), ..FUSED })?;
        let database = Database::new(BLOCKS, 512);
        for _ in 0..ATTEMPTS {
            let path = rig.device()?.described.device.clone();
            load_and_cut(&mut rig, &database, &path, Habit::Flush)?;
            rig.power_on()?;
            let findings = database.check(&path)?;
            if let Some(figure) = found_out(&findings, rig.cuts)? {
                ensure!(rig.asked().flushes == 0, "the server sends flushes: {:?}", rig.asked());
                rig.end()?;
                return Ok(figure);
            }
        }
        bail!("a server that ignores flushes was not found out in {ATTEMPTS} cuts");
    })
}

fn ignored_fua(ctx: &Ctx) -> Result<Outcome> {
    seeded(ctx, || {
        let plan = Plan { faults: Some("ignore-fua"), ..FILES_FUSED };
        let mut this = InAFile::new(ctx, plan)?;
        for _ in 0..ATTEMPTS {
            let (_, flushes) = this.load_and_cut(Habit::Fua)?;
            println!("{flushes} flushes under load");
            let findings = this.check()?;
            if let Some(figure) = found_out(&findings, this.rig.cuts)? {
                ensure!(this.rig.asked().fua == 0, "the server sends FUA: {:?}", this.rig.asked());
                this.rig.end()?;
                return Ok(figure);
            }
        }
        bail!("a server that ignores FUA was not found out in {ATTEMPTS} cuts");
    })
}

/// What was found out of a server that breaks its promises: nothing but that.
fn found_out(findings: &Findings, cuts: u64) -> Result<Option<String>> {
    let is_lost = |wrong: &&Wrong| matches!(wrong, Wrong::Lost { .. });
    let lost = findings.wrong.iter().filter(is_lost).count();
    ensure!(lost == findings.wrong.len(), "more than lost records: {:?}", findings.wrong);
    Ok((lost > 0).then(|| {
        format!("found out by cut {cuts}: {lost} of {} durable blocks are lost", findings.durable)
    }))
}

fn ignored_flushes_under_ext4(ctx: &Ctx) -> Result<Outcome> {
    seeded(ctx, || {
        let plan = Plan { faults: Some("ignore-flush"), ..FILES_FUSED };
        for attempt in 1..=ATTEMPTS {
            let mut storm = Storm::new(ctx, EXT4, plan)?;
            storm.cut()?;
            let figure = match storm.check() {
                Ok(wrong) if wrong.is_empty() => None,
                Ok(wrong) => Some(format!("{} files are wrong, first {}", wrong.len(), wrong[0])),
                Err(error) => Some(format!("{error:#}")),
            };
            storm.rig.end()?;
            if let Some(figure) = figure {
                let line = figure.lines().next().unwrap_or_default();
                return Ok(format!("found out by cut {attempt}: {line}"));
            }
        }
        bail!("a server that ignores flushes was not found out in {ATTEMPTS} cuts");
    })
}

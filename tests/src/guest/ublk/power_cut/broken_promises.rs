//! Servers that break their promises, and are found out.

use anyhow::{Result, bail, ensure};

use super::super::filesystem::EXT4;
use super::database::{Database, Habit};
use super::in_a_file::InAFile;
use super::records::{Findings, Wrong};
use super::rig::{Plan, Rig};
use super::storm::Storm;
use super::tally::load_and_cut;
use super::{BLOCKS, FILES_FUSED, FUSED, seeded};
use crate::guest::{Ctx, Outcome};

/// Cuts after which a broken promise has to have been found out.
const ATTEMPTS: u64 = 5;

/// Repeats a cut until it finds something out.
fn until_found_out(
    ctx: &Ctx,
    mut cut: impl FnMut(u64) -> Result<Option<String>>,
) -> Result<Outcome> {
    seeded(ctx, || {
        for attempt in 0..ATTEMPTS {
            if let Some(found) = cut(ctx.seed + attempt)? {
                return Ok(format!("found out by cut {}: {found}", attempt + 1));
            }
        }
        bail!("a server that breaks its promise was not found out in {ATTEMPTS} cuts");
    })
}

pub fn ignored_flushes(ctx: &Ctx) -> Result<Outcome> {
    until_found_out(ctx, |seed| {
        let mut rig = Rig::new(seed, Plan { faults: Some("ignore-flush"), ..FUSED })?;
        let database = Database::new(BLOCKS, 512);
        let path = rig.device()?.described.device.clone();
        load_and_cut(&mut rig, &database, &path, Habit::Flush)?;
        rig.power_on()?;
        let findings = database.check(&path)?;
        ensure!(rig.asked().flushes == 0, "the server sends flushes: {:?}", rig.asked());
        rig.end()?;
        found_out(&findings)
    })
}

pub fn ignored_fua(ctx: &Ctx) -> Result<Outcome> {
    until_found_out(ctx, |seed| {
        let plan = Plan { faults: Some("ignore-fua"), ..FILES_FUSED };
        let mut this = InAFile::new(ctx, seed, plan)?;
        let (_, flushes) = this.load_and_cut(Habit::Fua)?;
        let findings = this.check();
        ensure!(this.rig.asked().fua == 0, "the server sends FUA: {:?}", this.rig.asked());
        this.rig.end()?;
        match findings {
            Ok(findings) => {
                Ok(found_out(&findings)?
                    .map(|found| format!("{found}, {flushes} flushes meanwhile")))
            }
            // The file system has lost of its own, but the question is what a database loses.
            Err(error) => {
                println!("{error:#}");
                Ok(None)
            }
        }
    })
}

/// What was found out of a server that breaks its promises: nothing but that.
fn found_out(findings: &Findings) -> Result<Option<String>> {
    let is_lost = |wrong: &&Wrong| matches!(wrong, Wrong::Lost { .. });
    let lost = findings.wrong.iter().filter(is_lost).count();
    ensure!(lost == findings.wrong.len(), "more than lost records: {:?}", findings.wrong);
    let durable = findings.durable;
    Ok((lost > 0).then(|| format!("{lost} of {durable} blocks that were durable are lost")))
}

pub fn ignored_flushes_under_ext4(ctx: &Ctx) -> Result<Outcome> {
    until_found_out(ctx, |seed| {
        let plan = Plan { faults: Some("ignore-flush"), ..FILES_FUSED };
        let mut storm = Storm::new(ctx, seed, EXT4, plan)?;
        storm.cut()?;
        let found = match storm.check() {
            Ok(wrong) if wrong.is_empty() => None,
            Ok(wrong) => Some(format!("{} files are wrong, first {}", wrong.len(), wrong[0])),
            Err(error) => Some(format!("{error:#}")),
        };
        storm.rig.end()?;
        Ok(found.map(|found| found.lines().next().unwrap_or_default().to_owned()))
    })
}

//! A database under power cuts: one of them, and what all of them came to.

use std::path::Path;

use anyhow::{Result, ensure};
use rand::RngExt as _;

use super::database::{Database, Habit};
use super::records::{Findings, Wrong};
use super::rig::Rig;

/// Loads the database, cuts the power at some instant, and waits until nobody writes any more.
/// Returns how many flushes and writes with FUA were acknowledged.
pub fn load_and_cut(rig: &mut Rig, database: &Database, path: &Path, habit: Habit) -> Result<u64> {
    let writers = database.start(path, habit, &mut rig.rng)?;
    writers.wait_for(rig.rng.random_range(5..65))?;
    rig.power_off(|| writers.expect_cut())?;
    let acknowledged = writers.acknowledged();
    writers.join()?;
    Ok(acknowledged)
}

/// What all cuts of a test came to.
#[derive(Debug, Default)]
pub struct Tally {
    acknowledged: u64,
    findings: Findings,
}

impl Tally {
    /// Adds what was found after a cut, in which nothing may be wrong.
    pub fn add(&mut self, acknowledged: u64, findings: &Findings) -> Result<()> {
        let first: Vec<_> = findings.wrong.iter().take(5).map(Wrong::to_string).collect();
        let count = findings.wrong.len();
        ensure!(first.is_empty(), "{count} blocks are wrong: {}", first.join("; "));
        self.acknowledged += acknowledged;
        let all = &mut self.findings;
        all.durable += findings.durable;
        all.uncertain += findings.uncertain;
        all.undone += findings.undone;
        Ok(())
    }

    /// Whether the cuts had something to lose, and something to keep.
    pub fn is_convincing(&self, rig: &Rig) -> bool {
        let found = &self.findings;
        rig.lost.lost > 0 && found.undone > 0 && found.durable > 0 && rig.asked().flushes > 0
    }

    /// What happened.
    pub fn figure(&self, rig: &Rig) -> Result<String> {
        let (lost, found, asked) = (rig.lost, &self.findings, rig.asked());
        ensure!(self.is_convincing(rig), "nothing to lose or keep: {lost:?}, {self:?}, {asked:?}");
        Ok(format!(
            "{} cuts; {} flushes and FUA writes acknowledged, {} blocks durable, all there; {} \
             blocks not durable, {} of them lost; {}",
            rig.cuts,
            self.acknowledged,
            found.durable,
            found.uncertain,
            found.undone,
            rig.figure()
        ))
    }
}

//! A database in a file.

use anyhow::Result;

use super::super::device::Mount;
use super::super::filesystem::XFS;
use super::BLOCKS;
use super::database::{Database, Habit};
use super::records::Findings;
use super::rig::{Plan, Rig};
use super::tally::load_and_cut;
use crate::guest::{Ctx, process};

/// Records in a file that does not change otherwise, where a write with `RWF_DSYNC` is one with
/// FUA and nothing more: on a block device the kernel makes it a write with FUA and a flush.
pub struct InAFile<'a> {
    ctx: &'a Ctx,
    pub rig: Rig,
    database: Database,
}

impl<'a> InAFile<'a> {
    /// Makes the file, on xfs.
    pub fn new(ctx: &'a Ctx, seed: u64, plan: Plan) -> Result<Self> {
        let rig = Rig::new(seed, plan)?;
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
    pub fn load_and_cut(&mut self, habit: Habit) -> Result<(u64, u64)> {
        let mount = self.mount()?;
        let path = mount.point().join("records");
        let before = self.rig.asked().flushes;
        let acknowledged = load_and_cut(&mut self.rig, &self.database, &path, habit)?;
        let flushes = self.rig.asked().flushes - before;
        mount.unmount()?;
        self.rig.power_on()?;
        Ok((acknowledged, flushes))
    }

    /// Recovers the file system, and looks at every record.
    pub fn check(&self) -> Result<Findings> {
        let mount = self.mount()?;
        let findings = self.database.check(&mount.point().join("records"))?;
        mount.unmount()?;
        Ok(findings)
    }
}

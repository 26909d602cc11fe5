//! A file system whose files are changed in a storm, over power cuts.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::thread;

use anyhow::Result;
use rand::{RngExt as _, SeedableRng as _};
use rand_xoshiro::SplitMix64;

use super::super::device::Mount;
use super::super::filesystem::Kind;
use super::files::{Changer, Checked, Files};
use super::rig::{Plan, Rig};
use super::writers::Writers;
use crate::guest::direct::{self, Aligned};
use crate::guest::{Ctx, process};

/// Threads that change files, each in a directory of its own.
const CHANGERS: usize = 3;

fn directory(mount: &Mount, number: usize) -> PathBuf {
    mount.point().join(format!("own-{number}"))
}

/// Writes past the page cache what nobody flushes, so that there is something to lose.
struct Scribbler {
    file: File,
    buffer: Aligned,
    rng: SplitMix64,
}

impl Scribbler {
    const PIECE: usize = 16 << 10;
    const PIECES: u64 = 64;

    fn new(path: &Path, rng: &mut SplitMix64) -> Result<Self> {
        File::create(path)?;
        let buffer = Aligned::new(Self::PIECE, 0x5c);
        Ok(Self { file: direct::open(path)?, buffer, rng: rng.fork() })
    }

    fn scribble(&mut self) -> Result<()> {
        for _ in 0..self.rng.random_range(0..4) {
            let offset = self.rng.random_range(0..Self::PIECES) * u64::try_from(Self::PIECE)?;
            self.file.write_all_at(self.buffer.bytes(), offset)?;
        }
        Ok(())
    }
}

/// Starts the storm of changes.
fn start_storm(mount: &Mount, files: Vec<Files>, rng: &mut SplitMix64) -> Result<Writers<Files>> {
    let mut files = files.into_iter();
    Writers::start(CHANGERS, |number, ending, acknowledged| {
        let known = files.next().unwrap_or_default();
        let mut changer =
            Changer::new(directory(mount, number), known, ending.clone(), rng.fork())?;
        let mut scribbler = Scribbler::new(&mount.point().join(format!("scratch-{number}")), rng)?;
        let run = move || {
            while !ending.is_wanted() {
                match scribbler.scribble().and_then(|()| changer.change()) {
                    Ok(()) => drop(acknowledged.fetch_add(1, Ordering::Relaxed)),
                    Err(error) => {
                        ending.excuse(error)?;
                        break;
                    }
                }
            }
            Ok(changer.files)
        };
        Ok(thread::Builder::new().name(format!("changer-{number}")).spawn(run)?)
    })
}

/// A file system in a storm of changes, over power cuts.
pub struct Storm<'a> {
    ctx: &'a Ctx,
    pub rig: Rig,
    kind: Kind,
    files: Vec<Files>,
    pub checked: Checked,
    /// Changes that were acknowledged as durable.
    pub acknowledged: u64,
}

impl<'a> Storm<'a> {
    /// Makes the file system.
    pub fn new(ctx: &'a Ctx, seed: u64, kind: Kind, plan: Plan) -> Result<Self> {
        let rig = Rig::new(seed, plan)?;
        process::run(&[kind.make, &[rig.device()?.path()?]].concat())?;
        let (files, checked) = (Vec::new(), Checked::default());
        Ok(Self { ctx, rig, kind, files, checked, acknowledged: 0 })
    }

    fn mount(&self) -> Result<Mount> {
        Mount::new(self.ctx, self.rig.device()?.path()?, "storm")
    }

    /// A storm, and a cut in the middle of it.
    pub fn cut(&mut self) -> Result<()> {
        let mount = self.mount()?;
        let files = std::mem::take(&mut self.files);
        let writers = start_storm(&mount, files, &mut self.rig.rng)?;
        writers.wait_for(self.rig.rng.random_range(5..65))?;
        self.rig.power_off(|| writers.expect_cut())?;
        self.acknowledged += writers.acknowledged();
        self.files = writers.join()?;
        mount.unmount()?;
        self.rig.power_on()
    }

    /// Whether the cuts had something to lose, and some changes to interrupt.
    pub fn is_convincing(&self) -> bool {
        self.rig.lost.lost > 0 && self.checked.uncertain > 0 && self.acknowledged > 0
    }

    /// Recovers the file system and looks at every file. Says what is wrong.
    pub fn check(&mut self) -> Result<Vec<String>> {
        let mount = self.mount()?;
        for (number, files) in self.files.iter_mut().enumerate() {
            files.check(&directory(&mount, number), &mut self.checked)?;
        }
        mount.unmount()?;
        process::run(&[self.kind.check, &[self.rig.device()?.path()?]].concat())?;
        Ok(std::mem::take(&mut self.checked.wrong))
    }
}

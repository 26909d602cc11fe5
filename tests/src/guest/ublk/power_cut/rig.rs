//! A device of ours on drives whose power can be cut.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rand::SeedableRng as _;
use rand_xoshiro::SplitMix64;

use super::super::device::{Counters, Device, text};
use crate::guest::nvmet::NvmeOverBlock;
use crate::guest::volatile::{Asked, Lost, Moment, Shape, Survival, VolatileDrives};

/// How long a moment to cut the power is waited for; then any will do.
const PATIENCE: Duration = Duration::from_secs(2);

/// What a device is made of.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    /// What follows `ublk-target add`, before the backings.
    pub arguments: &'static [&'static str],
    /// Its backings.
    pub drives: &'static [Shape],
    /// Faults of its server.
    pub faults: Option<&'static str>,
    /// The drive is reached by NVMe commands: it is the namespace of a controller.
    pub passthrough: bool,
}

/// The device and its drives.
#[derive(Debug)]
pub struct Rig {
    plan: Plan,
    device: Option<Device>,
    controller: Option<NvmeOverBlock>,
    drives: VolatileDrives,
    pub rng: SplitMix64,
    /// Power cuts so far.
    pub cuts: u64,
    /// What was lost in them.
    pub lost: Lost,
}

impl Rig {
    /// Adds the device, on drives that read as zeros.
    pub fn new(seed: u64, plan: Plan) -> Result<Self> {
        let mut rng = SplitMix64::seed_from_u64(seed);
        let drives = VolatileDrives::new(plan.drives, &mut rng)?;
        let mut rig = Self {
            plan,
            device: None,
            controller: None,
            drives,
            rng,
            cuts: 0,
            lost: Lost::default(),
        };
        rig.start()?;
        Ok(rig)
    }

    fn start(&mut self) -> Result<()> {
        let mut arguments: Vec<_> = self.plan.arguments.iter().map(|&it| it.to_owned()).collect();
        self.drives.power_on()?;
        for path in self.drives.paths()? {
            let path = if self.plan.passthrough {
                self.controller.insert(NvmeOverBlock::new(&path)?).char_path()?
            } else {
                path
            };
            arguments.extend(["-f".to_owned(), text(&path)?.to_owned()]);
        }
        let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
        self.device = Some(match self.plan.faults {
            Some(faults) => Device::add_with_faults(faults, &arguments)?,
            None => Device::add(&arguments)?,
        });
        Ok(())
    }

    /// The device.
    pub fn device(&self) -> Result<&Device> {
        self.device.as_ref().context("the power is off")
    }

    /// What the drives were asked for so far.
    pub fn asked(&self) -> Asked {
        self.drives.asked()
    }

    /// What the drives did and lost.
    pub fn figure(&self) -> String {
        let (Lost { cached, lost }, asked) = (self.lost, self.asked());
        format!(
            "drives had {} writes ({} with FUA), {} flushes, and lost {lost} of {cached} blocks in \
             their caches",
            asked.writes, asked.fua, asked.flushes
        )
    }

    /// Cuts the power, of all drives at once. The server dies of it, without the chance to write
    /// or answer anything more; from then on all requests fail, which `is_near` is told before.
    pub fn power_off(&mut self, is_near: impl FnOnce()) -> Result<()> {
        let (moment, survival) = (Moment::draw(&mut self.rng), Survival::draw(&mut self.rng));
        let lost = self.drives.cut(moment, PATIENCE, survival);
        is_near();
        let pid = self.device()?.pid()?;
        kill(Pid::from_raw(i32::try_from(pid)?), Signal::SIGKILL)?;
        self.drives.unplug()?;
        self.cuts += 1;
        self.lost += lost;
        println!("cut {} {moment:?}, {survival:?} survives: {lost:?}", self.cuts);
        Ok(())
    }

    /// Gives the drives power again, and adds the device again.
    pub fn power_on(&mut self) -> Result<()> {
        self.device.take().context("the power is off")?.delete()?;
        self.controller.take().map_or(Ok(()), NvmeOverBlock::remove)?;
        self.drives.wait_until_gone()?;
        self.start()
    }

    /// Takes everything away. Returns what the last server counted.
    pub fn end(mut self) -> Result<Counters> {
        let counters = self.device.take().context("the power is off")?.stop_and_count()?;
        self.controller.take().map_or(Ok(()), NvmeOverBlock::remove)?;
        self.drives.remove()?;
        ensure!(counters.get("commits") == counters.get("requests"), "{counters:?}");
        counters.ensure_none(&["failed", "stale", "unexpected"])?;
        Ok(counters)
    }
}

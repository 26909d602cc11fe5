//! Drives with a volatile write cache that is really lost when their power is cut.
//!
//! The kernel sees NBD devices; the servers are threads here. Commands are carried out in any
//! order, as drives do, and what was not flushed is gone after a cut, or some of it is not. The
//! kernel's own `null_blk` does not do: it has a cache (`cache_size`) that is lost when it is
//! turned off, but a page that was ever flushed is from then on written past that cache
//! (`null_lookup_page()` in `drivers/block/null_blk/main.c`, seen in 7.2), so that a server which
//! ignores flushes would lose next to nothing.

mod drive;
mod medium;
mod power;
mod wire;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Result;

use drive::Drive;
use power::Power;
use rand_xoshiro::SplitMix64;

pub use super::nbd::Shape;
pub use medium::{Lost, Survival};
pub use power::Moment;

/// What drives were asked for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Asked {
    /// Writes, those with FUA included.
    pub writes: u64,
    /// Writes with FUA.
    pub fua: u64,
    /// Flushes.
    pub flushes: u64,
}

/// Drives whose power is cut at the same instant. Their contents live as long as their handle.
#[derive(Debug)]
pub struct VolatileDrives {
    power: Arc<Power>,
    drives: Vec<Drive>,
}

impl VolatileDrives {
    /// Drives that read as zeros and have no power yet.
    ///
    /// # Errors
    /// When a block size is none.
    pub fn new(shapes: &[Shape], rng: &mut SplitMix64) -> Result<Self> {
        let power = Arc::new(Power::new());
        let drive = |shape: &Shape| Drive::new(*shape, Arc::clone(&power), rng);
        let drives = shapes.iter().map(drive).collect::<Result<_>>()?;
        Ok(Self { power, drives })
    }

    /// Gives them power, and the kernel their devices.
    ///
    /// # Errors
    /// When the kernel does not take one, or they have power.
    pub fn power_on(&mut self) -> Result<()> {
        self.power.turn_on();
        self.drives.iter_mut().try_for_each(Drive::plug_in)
    }

    /// The block devices.
    ///
    /// # Errors
    /// When they have no power.
    pub fn paths(&self) -> Result<Vec<PathBuf>> {
        self.drives.iter().map(Drive::path).collect()
    }

    /// What they were asked for so far, all together.
    pub fn asked(&self) -> Asked {
        self.drives.iter().map(Drive::asked).fold(Asked::default(), |sum, drive| Asked {
            writes: sum.writes + drive.writes,
            fua: sum.fua + drive.fua,
            flushes: sum.flushes + drive.flushes,
        })
    }

    /// Cuts their power when the moment has come, or after `limit` if it does not come. From then
    /// on they do nothing and answer nothing; what is lost of the caches is lost.
    pub fn cut(&self, moment: Moment, limit: Duration, survival: Survival) -> Lost {
        self.power.cut_at(moment);
        let deadline = Instant::now() + limit;
        while self.power.is_on() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
        self.power.cut();
        let mut lost = Lost::default();
        self.drives.iter().for_each(|drive| lost += drive.lose(survival));
        lost
    }

    /// Ends the devices after their power was cut: what is in flight fails. They may not get power
    /// again before [`VolatileDrives::wait_until_gone`] says so.
    ///
    /// # Errors
    /// When the kernel does not let go of one.
    pub fn unplug(&mut self) -> Result<()> {
        self.drives.iter_mut().try_for_each(Drive::unplug)
    }

    /// Waits until nobody has a device open any more.
    ///
    /// # Errors
    /// When somebody keeps one open.
    pub fn wait_until_gone(&mut self) -> Result<()> {
        self.drives.iter_mut().try_for_each(Drive::wait_until_gone)
    }

    /// Takes them away for good, and the driver with them.
    ///
    /// # Errors
    /// When somebody keeps one open.
    pub fn remove(mut self) -> Result<()> {
        self.cut(Moment::Now, Duration::ZERO, Survival::Nothing);
        self.unplug()?;
        self.wait_until_gone()?;
        super::nbd::unload()
    }
}

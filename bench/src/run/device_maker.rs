//! Makes the devices to measure, one at a time.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use ublk_target::backing::{Backing, Opening, usage};

use super::backing::{self, CheckedBacking};
use super::commands::{Commands, Interrupted, find, wait_until};
use super::made_device::{LIMIT, MadeDevice, free_ublk_id};
use super::programs::Programs;
use super::record::Record;
use super::subject::{Maker, QUEUE};

/// How long the kernel and others may take to close a backing.
const LET_GO: std::time::Duration = std::time::Duration::from_secs(10);

/// What is needed to make devices.
#[derive(Debug)]
pub struct DeviceMaker {
    /// Runs programs.
    pub commands: Commands,
    /// The server programs.
    pub programs: Programs,
    /// The backing.
    pub backing: CheckedBacking,
    /// Whether devices must not be written.
    pub read_only: bool,
    /// The record of the device that exists.
    pub record: Record,
}

/// A device, or the backing itself. Removed on drop.
#[derive(Debug)]
pub struct Device<'a> {
    device_maker: &'a DeviceMaker,
    made: Option<MadeDevice>,
    /// What to measure.
    pub path: String,
    /// The process that serves it.
    pub server: Option<u32>,
    /// The exclusive claim of the backing.
    _claim: Option<Backing>,
}

/// The output of `ublk-target add --json`.
#[derive(Deserialize)]
struct Added {
    lend: String,
    pid: Option<u32>,
}

impl DeviceMaker {
    /// Makes a device, and waits until udev has read it.
    pub fn make(&self, maker: Maker) -> Result<Device<'_>> {
        self.commands.check()?;
        let device = match maker {
            Maker::Raw => self.raw()?,
            Maker::DmLinear => self.dm_linear()?,
            Maker::KernelLoop => self.kernel_loop()?,
            Maker::Rublk(options) => self.rublk(options)?,
            Maker::Ours(lend, options) => self.ours(lend, options)?,
        };
        self.settle();
        self.commands.check()?;
        Ok(device)
    }

    /// Waits until udev has read a device that has appeared or was written. Without udev there is
    /// nothing to wait for.
    fn settle(&self) {
        if find("udevadm").is_some() {
            let _ = self.commands.run(&["udevadm", "settle", "--timeout=10"]);
        }
    }

    /// The backing, claimed exclusively. Its last server may still be closing it.
    fn raw(&self) -> Result<Device<'_>> {
        let path = Path::new(&self.backing.path);
        wait_until(LET_GO, || !backing::is_in_use(path));
        let claim = Some(Backing::open(path, Opening::ALONE)?);
        let path = self.backing.path.clone();
        Ok(Device { device_maker: self, made: None, path, server: None, _claim: claim })
    }

    /// Records a device before it is made.
    fn begin(&self, made: MadeDevice) -> Result<Device<'_>> {
        ensure!(!self.record.is_full(), "the device before it could not be removed");
        self.record.write(Some(&made))?;
        let path = made.path();
        Ok(Device { device_maker: self, made: Some(made), path, server: None, _claim: None })
    }

    fn dm_linear(&self) -> Result<Device<'_>> {
        ensure!(self.backing.is_block, "it needs a block device below, and this is a file");
        self.load_driver("dm_mod");
        let name = format!("ublk-bench-{}", std::process::id());
        let device = self.begin(MadeDevice::Mapper { name: name.clone() })?;
        let sectors = self.backing.described.size_bytes / 512;
        let table = format!("0 {sectors} linear {} 0", self.backing.path);
        let mut argv = vec!["dmsetup", "create", &name, "--table", &table];
        argv.extend(self.read_only.then_some("--readonly"));
        self.commands.run(&argv)?;
        device.appears()
    }

    fn kernel_loop(&self) -> Result<Device<'_>> {
        self.load_driver("loop");
        let free = self.commands.run(&["losetup", "--find"])?.trim().to_owned();
        let name = free.strip_prefix("/dev/").context("losetup named no device")?;
        let made = MadeDevice::Loop { path: free.clone(), backing: self.backing.path.clone() };
        let device = self.begin(made)?;
        let block = self.backing.described.logical_block_bytes.to_string();
        let mut argv = vec!["losetup", "--direct-io=on", "--sector-size", &block];
        argv.extend(self.read_only.then_some("--read-only"));
        argv.extend([free.as_str(), &self.backing.path]);
        self.commands.run(&argv)?;
        let direct = std::fs::read_to_string(format!("/sys/block/{name}/loop/dio"))?;
        ensure!(direct.trim() == "1", "the driver does no direct I/O on this backing");
        Ok(device)
    }

    fn rublk(&self, options: &[&str]) -> Result<Device<'_>> {
        let program = self.programs.rublk()?;
        self.load_driver("ublk_drv");
        let id = free_ublk_id()?;
        let mut device =
            self.begin(MadeDevice::Rublk { id, backing: self.backing.path.clone() })?;
        let number = id.to_string();
        let file = ["-f", &self.backing.path, "-n", &number];
        let mut argv = [&[program, "add", "loop"], &QUEUE[..], options, &file].concat();
        argv.extend(self.read_only.then_some("--read-only"));
        self.commands.run(&argv)?;
        device = device.appears()?;
        device.server = usage::servers_of(id).first().map(|server| server.pid);
        Ok(device)
    }

    fn ours(&self, lend: &str, options: &[&str]) -> Result<Device<'_>> {
        self.programs.ensure_known(options)?;
        self.load_driver("ublk_drv");
        let id = free_ublk_id()?;
        let mut device = self.begin(MadeDevice::Ours { id, backing: self.backing.path.clone() })?;
        let number = id.to_string();
        let file = ["--lend", lend, "-f", &self.backing.path, "-n", &number, "--json"];
        let add = [self.programs.ublk_target()?, "add", "loop"];
        // It removes its device when it is killed.
        let said = self.commands.run_bound(&[&add, &QUEUE[..], &file, options].concat())?;
        let added: Added = serde_json::from_str(&said).context("what ublk-target said")?;
        ensure!(added.lend == lend, "ublk-target chose lend mode {} for {lend}", added.lend);
        device.server = added.pid;
        device.appears()
    }

    /// Errors are ignored: whatever needs the driver reports them.
    fn load_driver(&self, module: &str) {
        if !Path::new("/sys/module").join(module).exists() {
            let _ = self.commands.run(&["modprobe", module]);
        }
    }
}

/// Removes the device that a killed run has left. Returns whether it still existed.
pub fn remove_leftover(
    commands: &Commands,
    programs: &Programs,
    record: &Record,
    left: &MadeDevice,
) -> Result<bool> {
    let removed = || -> Result<bool> {
        // It may have been removed, for example by the server of an abandoned `add`.
        let is_left = left.is_there(commands) && left.is_the_same(commands, programs)?;
        if is_left {
            left.remove(commands, programs)?;
        }
        Ok(is_left)
    };
    let was_left = removed().with_context(|| {
        format!("{} is left of a run that was killed, and has to be removed first", left.path())
    })?;
    record.write(None)?;
    Ok(was_left)
}

/// Waits until the backing of a killed run is no longer in use.
pub fn wait_for_backing(path: &Path) {
    wait_until(LET_GO, || !backing::is_in_use(path));
}

impl Device<'_> {
    fn appears(self) -> Result<Self> {
        if !wait_until(LIMIT, || Path::new(&self.path).exists()) {
            bail!("{} does not appear", self.path);
        }
        Ok(self)
    }

    /// Removes it.
    pub fn remove(mut self) -> Result<()> {
        let Some(made) = self.made.take() else { return Ok(()) };
        let DeviceMaker { commands, programs, record, .. } = self.device_maker;
        let removed = made.remove(commands, programs);
        let stuck = |error| Stuck(format!("{} cannot be removed: {error:#}", made.path()));
        removed.map_err(stuck)?;
        record.write(None)
    }
}

impl Drop for Device<'_> {
    fn drop(&mut self) {
        let Some(made) = self.made.take() else { return };
        let DeviceMaker { commands, programs, record, .. } = self.device_maker;
        // It may not have been made.
        let removed = match made.is_there(commands) {
            true => made.remove(commands, programs),
            false => Ok(()),
        };
        match removed.and_then(|()| record.write(None)) {
            Ok(()) => {}
            Err(error) => eprintln!("ublk-bench: {} is left: {error:#}", made.path()),
        }
    }
}

/// A device cannot be removed. The next run tries again.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Stuck(String);

/// Whether an error ends the run, not only the measurement of a subject: a signal has arrived, or a
/// device cannot be removed.
pub fn ends_the_run(error: &anyhow::Error) -> bool {
    error.downcast_ref::<Interrupted>().is_some() || error.downcast_ref::<Stuck>().is_some()
}

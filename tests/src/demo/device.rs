//! A device of the demonstration, and the backing without one.

use std::fs::File;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

use anyhow::{Context, Result, anyhow, ensure};
use nix::errno::Errno;
use nix::fcntl::OFlag;

use super::commands::Commands;
use super::environment::DemoTarget;
use super::undo;

/// How the device is added: `ublk-target add loop -f PATH --lend MODE`.
pub fn arguments<'a>(backing: &'a str, lend: &'a str) -> [&'a str; 6] {
    ["add", "loop", "-f", backing, "--lend", lend]
}

/// A live device on the backing.
#[derive(Debug)]
pub struct Device {
    /// The block device.
    pub path: String,
    id: String,
}

impl Device {
    /// Adds one that lends in a mode. Nobody else may be serving the backing: until it is deleted
    /// again, devices on the backing count as ours.
    pub fn add(commands: &Commands, target: &DemoTarget, lend: &str) -> Result<Self> {
        let backing = text(&target.backing)?;
        undo::remember_target(Some(target.clone()));
        let argv = [&[text(&target.program)?], arguments(backing, lend).as_slice()].concat();
        let printed = commands.run_to_the_end("adding the device", &argv).inspect_err(|_| {
            // What there is now, if anything, is somebody else's.
            undo::remember_target(None);
        })?;
        let path = printed.trim().to_owned();
        let id = path.strip_prefix("/dev/ublkb").context("`add` named no device")?.to_owned();
        Ok(Self { path, id })
    }

    /// The arguments that delete it.
    pub fn del_arguments(&self) -> [&str; 3] {
        ["del", "-n", &self.id]
    }

    /// Deletes it, and looks whether it is gone.
    pub fn delete(self, commands: &Commands, target: &DemoTarget) -> Result<()> {
        settle(commands);
        let argv = [&[text(&target.program)?], self.del_arguments().as_slice()].concat();
        commands.run_to_the_end("deleting the device", &argv)?;
        for left in [self.path.clone(), format!("/dev/ublkc{}", self.id)] {
            ensure!(!Path::new(&left).exists(), "{left} is still there after its deletion");
        }
        undo::remember_target(None);
        Ok(())
    }
}

/// Waits until nobody looks at a device that has just appeared or been written.
pub fn settle(commands: &Commands) {
    // Without udev there is nothing to wait for.
    let _ = commands.run("waiting for udev", &["udevadm", "settle", "--timeout=10"]);
}

/// Keeps others away from the backing while no device of ours does.
pub fn claim(backing: &Path) -> Result<File> {
    let mut options = File::options();
    options.read(true);
    if std::fs::metadata(backing)?.file_type().is_block_device() {
        options.custom_flags(OFlag::O_EXCL.bits());
    }
    options.open(backing).map_err(|error| {
        let path = backing.display();
        if error.raw_os_error() == Some(Errno::EBUSY as i32) {
            return anyhow!("{path} is in use: mounted, or held by another device or program");
        }
        anyhow::Error::new(error).context(format!("open {path}"))
    })
}

/// A path as an argument.
pub fn text(path: &Path) -> Result<&str> {
    path.to_str().with_context(|| format!("{} is not UTF-8", path.display()))
}

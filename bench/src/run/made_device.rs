//! Devices that were made, and their removal.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use ublk_target::backing::usage;

use super::commands::{Commands, wait_until};
use super::programs::Programs;

/// How long a device may take to appear or disappear.
pub const LIMIT: Duration = Duration::from_secs(20);
/// How long a process that has ended may keep a device open.
const LINGER: Duration = Duration::from_secs(5);

/// A device, identified by the name that was chosen before it was made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "kind")]
pub enum MadeDevice {
    /// A device-mapper device.
    Mapper {
        /// Its name.
        name: String,
    },
    /// A loop device.
    Loop {
        /// Its path.
        path: String,
        /// Its backing.
        backing: String,
    },
    /// A device of rublk.
    Rublk {
        /// Its id.
        id: u32,
        /// Its backing.
        backing: String,
    },
    /// A device of ublk-target.
    Ours {
        /// Its id.
        id: u32,
        /// Its backing.
        backing: String,
    },
}

impl MadeDevice {
    /// The block device.
    pub fn path(&self) -> String {
        match self {
            Self::Mapper { name } => format!("/dev/mapper/{name}"),
            Self::Loop { path, .. } => path.clone(),
            Self::Rublk { id, .. } | Self::Ours { id, .. } => format!("/dev/ublkb{id}"),
        }
    }

    /// Whether the kernel has a device of this name.
    pub fn is_there(&self, commands: &Commands) -> bool {
        match self {
            Self::Mapper { name } => commands.run(&["dmsetup", "info", name]).is_ok(),
            Self::Loop { path, backing } => {
                attached(path).is_some_and(|attached| attached == *backing)
            }
            Self::Rublk { id, .. } | Self::Ours { id, .. } => ublk_exists(*id),
        }
    }

    /// Whether the device with this name is the one that was made: another one may have the name by
    /// now.
    pub fn is_the_same(&self, commands: &Commands, programs: &Programs) -> Result<bool> {
        Ok(match self {
            // Nothing else uses such names, and a loop device is identified by its backing.
            Self::Mapper { .. } | Self::Loop { .. } => self.is_there(commands),
            Self::Rublk { id, backing } => {
                let id = id.to_string();
                let listed = commands.run(&[programs.rublk()?, "list", "-n", &id]);
                listed.is_ok_and(|listed| listed.contains(backing.as_str()))
            }
            Self::Ours { id, backing } => {
                let id = id.to_string();
                let argv = [programs.ublk_target()?, "list", "-n", &id, "--json"];
                let listed = commands.run(&argv);
                let quoted = serde_json::to_string(backing)?;
                listed.is_ok_and(|listed| listed.contains(&quoted))
            }
        })
    }

    /// Removes it, and waits until it has disappeared together with everything that belongs to it.
    pub fn remove(&self, commands: &Commands, programs: &Programs) -> Result<()> {
        match self {
            // Retries while udev has it open.
            Self::Mapper { name } => {
                commands.run(&["dmsetup", "remove", "--retry", name]).map(drop)
            }
            Self::Loop { path, .. } => {
                commands.run(&["losetup", "--detach", path])?;
                // While udev has it open, the driver delays this.
                ensure!(wait_until(LIMIT, || attached(path).is_none()), "{path} stays attached");
                Ok(())
            }
            Self::Rublk { id, .. } => remove_rublk(*id, commands, programs),
            Self::Ours { id, .. } => {
                let argv = [programs.ublk_target()?, "del", "-n", &id.to_string()];
                let mut deleted = commands.run(&argv);
                // The ring of a killed load closes the device with a delay.
                wait_until(LINGER, || {
                    if deleted.is_err() {
                        deleted = commands.run(&argv);
                    }
                    deleted.is_ok()
                });
                deleted.map(drop)
            }
        }
    }
}

/// Its server also deletes the device once it is stopped, and `del` fails if it comes later. What
/// counts is that device and server disappear.
fn remove_rublk(id: u32, commands: &Commands, programs: &Programs) -> Result<()> {
    let servers = usage::servers_of(id);
    let said = commands.run(&[programs.rublk()?, "del", "-n", &id.to_string()]);
    let has_gone = || {
        !ublk_exists(id)
            && servers.iter().all(|server| !Path::new(&format!("/proc/{}", server.pid)).exists())
    };
    if wait_until(LIMIT, has_gone) {
        return Ok(());
    }
    said.and_then(|_| anyhow::bail!("/dev/ublkb{id} of rublk does not go"))
}

/// The backing of a loop device.
fn attached(path: &str) -> Option<String> {
    let name = path.strip_prefix("/dev/")?;
    let text = fs::read_to_string(format!("/sys/block/{name}/loop/backing_file")).ok()?;
    Some(text.trim_end().to_owned())
}

fn ublk_exists(id: u32) -> bool {
    Path::new(&format!("/sys/class/ublk-char/ublkc{id}")).exists()
}

/// The lowest free id of a ublk device.
pub fn free_ublk_id() -> Result<u32> {
    (0..1 << 20).find(|id| !ublk_exists(*id)).context("no id of a ublk device is free")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_read_back_as_they_were_written() {
        let backing = "/dev/nvme1n1".to_owned();
        for (made, path) in [
            (MadeDevice::Mapper { name: "ublk-bench-7".into() }, "/dev/mapper/ublk-bench-7"),
            (
                MadeDevice::Loop { path: "/dev/loop3".into(), backing: backing.clone() },
                "/dev/loop3",
            ),
            (MadeDevice::Rublk { id: 4, backing: backing.clone() }, "/dev/ublkb4"),
            (MadeDevice::Ours { id: 5, backing }, "/dev/ublkb5"),
        ] {
            let text = serde_json::to_string(&made).unwrap();
            assert_eq!(serde_json::from_str::<MadeDevice>(&text).unwrap(), made, "{text}");
            assert_eq!(made.path(), path);
        }
    }
}

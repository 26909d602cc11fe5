//! Devices that are made, by whomever, and how they are removed.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use ublk_target::backing::usage;

use super::commands::{Commands, wait_until};
use super::programs::Programs;

/// How long a device may take to appear or to go.
pub const LIMIT: Duration = Duration::from_secs(20);
/// How long somebody may have a device open who has ended.
const LINGER: Duration = Duration::from_secs(5);

/// A device, by the name that it was given before it was made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "kind")]
pub enum Made {
    /// A device-mapper device.
    Mapper {
        /// Its name.
        name: String,
    },
    /// A loop device.
    Loop {
        /// Its path.
        path: String,
        /// What it is on.
        backing: String,
    },
    /// A device of rublk's.
    Rublk {
        /// Its id.
        id: u32,
        /// What it is on.
        backing: String,
    },
    /// A device of ublk-target's.
    Ours {
        /// Its id.
        id: u32,
        /// What it is on.
        backing: String,
    },
}

impl Made {
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

    /// Whether the device of this name is the one that was made: a name may have passed to another
    /// one since.
    pub fn is_the_same(&self, commands: &Commands, programs: &Programs) -> Result<bool> {
        Ok(match self {
            // No one else gives such names, and a loop device is known by its backing.
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

    /// Removes it, and waits until it has gone with all that belongs to it.
    pub fn remove(&self, commands: &Commands, programs: &Programs) -> Result<()> {
        match self {
            // Again if udev has it open just now.
            Self::Mapper { name } => {
                commands.run(&["dmsetup", "remove", "--retry", name]).map(drop)
            }
            Self::Loop { path, .. } => {
                commands.run(&["losetup", "--detach", path])?;
                // While udev has it open, the driver puts it off.
                ensure!(wait_until(LIMIT, || attached(path).is_none()), "{path} stays attached");
                Ok(())
            }
            Self::Rublk { id, .. } => remove_rublk(*id, commands, programs),
            Self::Ours { id, .. } => {
                let argv = [programs.ublk_target()?, "del", "-n", &id.to_string()];
                let mut deleted = commands.run(&argv);
                // The ring of a load that was killed lets go of the device a moment after its end.
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

/// Its server deletes the device too once it is stopped, and `del` fails if it is the later of the
/// two: what counts is that device and server go.
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

/// What a loop device is on.
fn attached(path: &str) -> Option<String> {
    let name = path.strip_prefix("/dev/")?;
    let text = fs::read_to_string(format!("/sys/block/{name}/loop/backing_file")).ok()?;
    Some(text.trim_end().to_owned())
}

fn ublk_exists(id: u32) -> bool {
    Path::new(&format!("/sys/class/ublk-char/ublkc{id}")).exists()
}

/// The least id of a ublk device that is free.
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
            (Made::Mapper { name: "ublk-bench-7".into() }, "/dev/mapper/ublk-bench-7"),
            (Made::Loop { path: "/dev/loop3".into(), backing: backing.clone() }, "/dev/loop3"),
            (Made::Rublk { id: 4, backing: backing.clone() }, "/dev/ublkb4"),
            (Made::Ours { id: 5, backing }, "/dev/ublkb5"),
        ] {
            let text = serde_json::to_string(&made).unwrap();
            assert_eq!(serde_json::from_str::<Made>(&text).unwrap(), made, "{text}");
            assert_eq!(made.path(), path);
        }
    }
}

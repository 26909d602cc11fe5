//! A device to delete: its users and its processes.

use std::fs;
use std::time::Duration;

use uring_ext::control::{Control, ControlError};
use uring_ext::sys;

use crate::backing::usage;
use crate::device::description;
use crate::device::mark::Nonce;
use crate::device::paths;
use crate::device::processes::{self, Process, Role};
use crate::os::procfs::{self, parse_devt};

/// The users of a device, in words, without workers of udev, which close it by themselves.
#[must_use]
pub fn users(id: u32) -> Vec<String> {
    number_of(id).map_or_else(Vec::new, |number| users_of(number).0)
}

fn number_of(id: u32) -> Option<(u32, u32)> {
    let devt = fs::read_to_string(format!("/sys/block/ublkb{id}/dev")).ok()?;
    parse_devt(&devt)
}

/// The lasting users of a block device, and whether anybody has it open.
pub(super) fn users_of((major, minor): (u32, u32)) -> (Vec<String>, bool) {
    let mut users = usage::users_of_device(major, minor);
    let openers = usage::openers_of_device(major, minor);
    let lasting = openers.iter().filter(|opener| !opener.is_udev());
    users.extend(lasting.map(|opener| format!("open by {opener}")));
    (users, !openers.is_empty())
}

/// A device to delete.
pub(super) struct DeviceToDelete {
    pub id: u32,
    /// The number of its block device, if it has one.
    pub number: Option<(u32, u32)>,
    /// The numbers of its block device and its partitions.
    pub numbers: Vec<(u32, u32)>,
    /// Distinguishes it from a later device of the same id.
    pub identity: Option<u64>,
    /// Processes that end with it.
    pub processes: Vec<Process>,
    /// A process that serves it among others, and continues without it.
    pub fleet: Option<Process>,
    /// The time when it was last seen, since boot.
    pub seen: Duration,
}

impl DeviceToDelete {
    pub fn new(id: u32, info: &sys::ublksrv_ctrl_dev_info) -> Self {
        let number = number_of(id);
        let numbers = number.map(|(major, minor)| usage::numbers_of_device(major, minor));
        // The state file of a started device names its server.
        let adder = Nonce::of(info).filter(|_| !description::has_disk(info));
        let (mut fleet, mut processes): (Vec<_>, Vec<_>) = processes::of_device(id, adder)
            .into_iter()
            .partition(|process| process.role == Role::Fleet);
        // A supervisor waits for its server. If the server hangs, the message must name the server.
        processes.sort_by_key(|process| process.role != Role::Server);
        Self {
            id,
            number,
            numbers: numbers.unwrap_or_default(),
            identity: description::identity(id),
            processes,
            fleet: fleet.pop(),
            seen: procfs::now(),
        }
    }

    /// Whether the driver has no device of this id, or another one.
    pub fn is_gone(&self, control: &Control) -> Result<bool, ControlError> {
        match control.info(self.id) {
            Err(error) if description::is_missing(&error) => Ok(true),
            Err(error) => Err(error),
            Ok(_) => {
                let now = description::identity(self.id);
                Ok(now.is_some() && now != self.identity)
            }
        }
    }

    /// Whether its I/O is served: its server is alive, or is not visible from here while the driver
    /// has not noticed its end.
    pub fn is_served(&self, control: &Control) -> bool {
        control.info(self.id).is_ok_and(|info| {
            let is_alive = u32::try_from(info.ublksrv_pid).is_ok_and(procfs::is_alive);
            let is_unseen = info.ublksrv_pid <= 0;
            u32::from(info.state) == sys::UBLK_S_DEV_LIVE && (is_alive || is_unseen)
        })
    }

    pub fn is_started(&self, control: &Control) -> bool {
        control.info(self.id).is_ok_and(|info| description::has_disk(&info))
            && description::identity(self.id).is_none()
    }

    /// The users of its block device, in words.
    pub fn users(&self) -> Vec<String> {
        let mut users = usage::users_of(&self.numbers);
        let openers = usage::openers_of(&self.numbers);
        users.extend(openers.iter().map(|opener| format!("open by {opener}")));
        users
    }

    /// The processes that keep it from going away, in words.
    pub fn holders(&self) -> String {
        let mut holders: Vec<_> = usage::servers_of(self.id)
            .iter()
            .map(|server| format!("{server}, which serves it"))
            .collect();
        holders.extend(self.users());
        if holders.is_empty() { "the kernel".to_owned() } else { holders.join(", ") }
    }
}

impl std::fmt::Display for DeviceToDelete {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", paths::block_path(self.id).display())?;
        let server = self.processes.iter().find(|process| process.role == Role::Server);
        match server.or(self.fleet.as_ref()) {
            Some(server) => write!(f, ", which is served by {server}"),
            None => Ok(()),
        }
    }
}

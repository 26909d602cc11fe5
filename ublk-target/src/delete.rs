//! Deleting devices: live ones, dead ones, and what dead servers left behind.
//!
//! Deletion is never done by the process that serves the device, except at its own orderly end:
//! a server that waits on its own device cannot serve what the wait needs.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use std::os::fd::AsFd;
use uring_ext::control::{Control, ControlError};
use uring_ext::feature::SAFE_STOP_DEV;
use uring_ext::{Errno, sys};

use crate::backing::sysfs::parse_devt;
use crate::backing::usage;
use crate::state::{self, RUN_DIR, StateFile};
use crate::stats;

/// Why a device was not deleted.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum DeleteError {
    /// There is none.
    #[error("there is no ublk device {0}; `ublk-target list` shows those that are")]
    NoDevice(u32),
    /// Somebody uses it.
    #[error("{} is in use: {}; stop that use first", state::block_path(*id).display(), users.join(", "))]
    InUse {
        /// The device.
        id: u32,
        /// Its users, in words.
        users: Vec<String>,
    },
    /// Somebody waits for something that does not come.
    #[error("gave up waiting after {} s for {what}; the deletion may still complete", waited.as_secs())]
    Stuck {
        /// What was waited for.
        what: String,
        /// How long.
        waited: Duration,
    },
    /// The driver said no.
    #[error(transparent)]
    Control(#[from] ControlError),
}

/// The longest wait for each of: outstanding I/O, the end of the server, the driver's clean-up.
const PATIENCE: Duration = Duration::from_secs(30);

/// Deletes the device `id`. Refuses one that is open or mounted. Returns when nothing is left of
/// it. `progress` is told what is waited for, when a wait gets long.
///
/// # Errors
/// [`DeleteError`].
pub fn delete(
    control: &Control,
    id: u32,
    progress: &mut dyn FnMut(&str),
) -> Result<(), DeleteError> {
    let info = match control.info(id) {
        Ok(info) => info,
        Err(error) if state::is_missing(&error) => {
            remove_files(id);
            return Err(DeleteError::NoDevice(id));
        }
        Err(error) => return Err(error.into()),
    };
    let server = Server::of(&info);
    // A device that is not started, or whose server is dead, has nothing to be stopped; a server
    // that is just starting it ends when its device is removed.
    if u32::from(info.state) != sys::UBLK_S_DEV_DEAD {
        stop(control, id, progress)?;
        if let Some(server) = &server {
            server.wait_for_its_end(progress)?;
        }
    }
    remove(control, id, server.as_ref(), progress)?;
    remove_files(id);
    Ok(())
}

/// Removes what a dead server has left in the directory of the state files.
fn remove_files(id: u32) {
    StateFile::remove(Path::new(RUN_DIR), id);
    stats::remove_stale_socket(Path::new(RUN_DIR), id);
}

/// Stops a device that nobody uses.
fn stop(control: &Control, id: u32, progress: &mut dyn FnMut(&str)) -> Result<(), DeleteError> {
    let can_try = control.features().is_ok_and(|features| features.has(SAFE_STOP_DEV));
    let what = format!("the outstanding I/O of {}", state::block_path(id).display());
    let began = Instant::now();
    loop {
        wait_until_unused(id, progress)?;
        let mut stop = if can_try { control.try_stop(id)? } else { control.stop(id)? };
        match wait_with(&what, progress, |slice| control.wait(&mut stop, slice))? {
            // It went away meanwhile, which is what was wanted.
            Err(error) if state::is_missing(&error) => return Ok(()),
            // Opened since it was looked at.
            Err(error) if error.errno() == Some(Errno::EBUSY) && began.elapsed() < PATIENCE => {}
            Err(error) if error.errno() == Some(Errno::EBUSY) => {
                let users = vec!["a program that cannot be told has it open".to_owned()];
                return Err(DeleteError::InUse { id, users });
            }
            stopped => return stopped.map(drop).map_err(DeleteError::from),
        }
    }
}

/// The users of a device, in words, but for workers of udev, which let go of it by themselves.
#[must_use]
pub fn users(id: u32) -> Vec<String> {
    device_number(id).map_or_else(Vec::new, |devt| users_of(devt).0)
}

fn device_number(id: u32) -> Option<(u32, u32)> {
    let devt = std::fs::read_to_string(format!("/sys/block/ublkb{id}/dev")).ok()?;
    parse_devt(&devt)
}

/// The lasting users of a device, and whether anybody has it open.
fn users_of((major, minor): (u32, u32)) -> (Vec<String>, bool) {
    let mut users = usage::users_of_device(major, minor);
    let openers = usage::openers_of_device(major, minor);
    let lasting = openers.iter().filter(|opener| !opener.is_udev());
    users.extend(lasting.map(|opener| format!("open by {opener}")));
    (users, !openers.is_empty())
}

/// Refuses a device that somebody uses. Workers of udev are no users: they look at a device that
/// was just made or written to, and are waited for.
fn wait_until_unused(id: u32, progress: &mut dyn FnMut(&str)) -> Result<(), DeleteError> {
    let Some(devt) = device_number(id) else { return Ok(()) };
    let what = format!("udev to let go of {}", state::block_path(id).display());
    wait_with(&what, progress, |slice| {
        let (users, is_open) = users_of(devt);
        if !users.is_empty() {
            return Some(Err(DeleteError::InUse { id, users }));
        }
        if !is_open {
            return Some(Ok(()));
        }
        // Nobody tells when a device is closed.
        std::thread::sleep(slice.min(Duration::from_millis(10)));
        None
    })?
}

/// The process that serves a device.
struct Server {
    pid: u32,
    name: String,
    pidfd: OwnedFd,
}

impl Server {
    fn of(info: &sys::ublksrv_ctrl_dev_info) -> Option<Self> {
        let pid = Pid::from_raw(info.ublksrv_pid)?;
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).ok()?;
        let pid = u32::try_from(info.ublksrv_pid).ok()?;
        Some(Self { pid, name: usage::process_name(pid), pidfd })
    }

    /// Waits until the process is gone. One that is not a server of ours is not waited for: it
    /// may serve other devices, or have got the process id of a dead server.
    fn wait_for_its_end(&self, progress: &mut dyn FnMut(&str)) -> Result<(), DeleteError> {
        if self.name != env!("CARGO_PKG_NAME") {
            return Ok(());
        }
        let what = format!("the server ({}) to end", self.pid);
        wait_with(&what, progress, |slice| {
            let mut fds = [PollFd::new(self.pidfd.as_fd(), PollFlags::POLLIN)];
            let timeout = PollTimeout::try_from(slice).unwrap_or(PollTimeout::MAX);
            matches!(poll(&mut fds, timeout), Ok(1..)).then_some(())
        })
    }
}

fn remove(
    control: &Control,
    id: u32,
    server: Option<&Server>,
    progress: &mut dyn FnMut(&str),
) -> Result<(), DeleteError> {
    match control.delete(id).and_then(|pending| control.finish(pending)) {
        // The server has deleted it at its end.
        Err(error) if state::is_missing(&error) => return Ok(()),
        deleted => deleted?,
    };
    let holder = server.map_or_else(
        || "whoever has its character device open".to_owned(),
        |server| format!("{} ({}), which serves it", server.name, server.pid),
    );
    let what = format!("{holder}, to let go of device {id}");
    wait_with(&what, progress, |slice| match control.info(id) {
        Err(error) if state::is_missing(&error) => Some(Ok(())),
        Err(error) => Some(Err(error)),
        Ok(_) => {
            // The driver tells nobody when it has let go of an id.
            std::thread::sleep(slice.min(Duration::from_millis(5)));
            None
        }
    })??;
    Ok(())
}

/// Calls `attempt` with slices of time until it gives a result; tells `progress` when that takes
/// long, and gives up after [`PATIENCE`].
fn wait_with<T>(
    what: &str,
    progress: &mut dyn FnMut(&str),
    mut attempt: impl FnMut(Duration) -> Option<T>,
) -> Result<T, DeleteError> {
    let began = Instant::now();
    let mut next_word = Duration::from_secs(2);
    loop {
        if let Some(result) = attempt(Duration::from_millis(100)) {
            return Ok(result);
        }
        let waited = began.elapsed();
        if waited >= PATIENCE {
            return Err(DeleteError::Stuck { what: what.to_owned(), waited });
        }
        if waited >= next_word {
            progress(&format!("waiting for {what}"));
            next_word += Duration::from_secs(10);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_ends_with_its_condition() {
        let mut left = 3;
        let waited = wait_with("it", &mut |_| {}, |_| {
            left -= 1;
            (left == 0).then_some(7)
        });
        assert_eq!(waited.unwrap(), 7);
    }

    #[test]
    fn a_server_that_is_gone_is_not_waited_for() {
        let info = sys::ublksrv_ctrl_dev_info { ublksrv_pid: i32::MAX, ..Default::default() };
        assert!(Server::of(&info).is_none());
    }
}

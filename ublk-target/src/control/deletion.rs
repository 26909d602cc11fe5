//! Deletes devices in any state, with their processes.
//!
//! The process that serves a device deletes it only at its own orderly end: a server that waits for
//! its own device cannot serve the I/O that the wait needs. A helper gives the driver the commands,
//! not the process that the user waits for. A command that waits for outstanding I/O cannot be
//! cancelled, and its process does not end before it.

use std::fmt;
use std::io;
use std::ops::ControlFlow;
use std::os::fd::AsFd;
use std::process::Child;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use uring_ext::Errno;
use uring_ext::control::{Control, ControlError, Pending};
use uring_ext::feature::SAFE_STOP_DEV;

use crate::backing::usage;
use crate::control::device_to_delete::{DeviceToDelete, users_of};
use crate::control::leftovers;
use crate::device::description;
use crate::device::paths;
use crate::device::processes::{self, Process, Role};
use crate::os::process::Watch;
use crate::os::procfs;
use crate::os::steps::step;
use crate::os::wait::{Unmet, Wait, Words};

pub use crate::control::device_to_delete::users;

/// Why a device was not deleted.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum DeleteError {
    /// It does not exist.
    #[error("there is no ublk device {0}; `ublk-target list` lists the existing ones")]
    NoDevice(u32),
    /// It is in use.
    #[error(
        "{} is in use: {}; stop that use first, or use --force, which fails its I/O",
        paths::block_path(*id).display(), users.join(", ")
    )]
    InUse {
        /// The device.
        id: u32,
        /// Its users, in words.
        users: Vec<String>,
    },
    /// It is in use, and its users may wait for a server.
    #[error(
        "{} is in use: {}; its server is dead: `ublk-target recover -n {id}` lets that use go on, \
         `ublk-target del -n {id} --force` fails its I/O",
        paths::block_path(*id).display(), users.join(", ")
    )]
    Waited {
        /// The device.
        id: u32,
        /// Its users, in words.
        users: Vec<String>,
    },
    /// A wait has timed out.
    #[error("gave up waiting after {} s for {what}; the deletion may still complete", waited.as_secs())]
    Stuck {
        /// What the wait was for.
        what: String,
        /// How long it took.
        waited: Duration,
    },
    /// The helper process could not be started.
    #[error("cannot start a process that stops the device: {0}")]
    NoHelper(Errno),
    /// The helper process has failed, and has reported the reason.
    #[error("the driver did not delete device {0}")]
    Refused(u32),
    /// The driver refused.
    #[error(transparent)]
    Control(#[from] ControlError),
}

/// A command that a helper gives to the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Command {
    /// Stop a device that nobody has open (`TRY_STOP_DEV`)
    StopUnused,
    /// Stop a device (`STOP_DEV`)
    Stop,
    /// Remove a device (`DEL_DEV_ASYNC`)
    Remove,
}

/// Exit code of a helper if the device is in use.
pub const IN_USE: u8 = 16;

/// Gives the driver a command and waits for its end, without a limit. For a device that is gone,
/// stopping and removing succeed.
///
/// # Errors
/// `EBUSY` for a device in use, and other errors of the driver.
pub fn command(id: u32, command: Command) -> Result<(), ControlError> {
    let control = Control::open()?;
    let sent = match command {
        Command::StopUnused => control.try_stop(id),
        Command::Stop => control.stop(id),
        Command::Remove => control.delete(id),
    };
    step("command-sent");
    let answer = sent.and_then(|mut pending: Pending| {
        loop {
            if let Some(answer) = control.wait(&mut pending, Duration::from_secs(10)) {
                return answer;
            }
        }
    });
    match answer {
        Err(error) if !description::is_missing(&error) => Err(error),
        Ok(_) | Err(_) => Ok(()),
    }
}

/// The longest wait for each of these: outstanding I/O, the end of a process, the driver's
/// clean-up.
const PATIENCE: Duration = Duration::from_secs(30);
/// With --force, a process of ours is killed after this time.
const BEFORE_KILL: Duration = Duration::from_secs(5);
/// A user without a visible process or mount.
pub(crate) const UNSEEN: &str =
    "the kernel, or a process in another pid namespace, has it open (an export, for instance)";
/// The time that a process may take to close a device. After that it counts as a user.
const TO_LET_GO: Duration = Duration::from_secs(2);

/// Options and callbacks of deletions.
pub struct Deletion<'a> {
    /// The driver.
    pub control: &'a Control,
    /// Stop a device that is in use, and kill a server that does not end.
    pub force: bool,
    /// Starts a process that runs [`command`]. It ends with 0, with [`IN_USE`], or with another
    /// code after it has reported the reason.
    pub helper: &'a dyn Fn(u32, Command) -> io::Result<Child>,
    /// Called with what a long wait is for, and with what remains.
    pub progress: &'a mut dyn FnMut(&str),
}

impl Deletion<'_> {
    /// Deletes the device `id`. Refuses a device that is open or mounted, unless `force` is set.
    /// Returns when the device is gone from the driver, and its server and supervisor have ended.
    /// If users of a forced device still have it open, its id stays in use until they close it.
    ///
    /// # Errors
    /// [`DeleteError`].
    pub fn delete(&mut self, id: u32) -> Result<(), DeleteError> {
        let info = match self.control.info(id) {
            Ok(info) => info,
            Err(error) if description::is_missing(&error) => {
                leftovers::remove_files_of(self.control, id);
                return Err(DeleteError::NoDevice(id));
            }
            Err(error) => return Err(error.into()),
        };
        let mut device = DeviceToDelete::new(id, &info);
        step("del-found");
        if description::has_disk(&info) {
            self.stop(&device)?;
            device.seen = procfs::now();
            // The server then deletes the device itself.
            self.await_end(&device.processes, None)?;
        }
        step("del-stopped");
        if !device.is_gone(self.control)? {
            self.run(&device, Command::Remove, "the driver to remove it")?;
        }
        step("del-removed");
        self.await_end(&device.processes, Some(&device))?;
        self.await_removal(&device)?;
        // Processes that were started meanwhile by others that have ended now.
        let mut late = processes::of_device(id, None);
        late.retain(|process| process.role != Role::Fleet && process.started <= device.seen);
        self.await_end(&late, None)?;
        leftovers::remove_files_of(self.control, id);
        step("del-cleaned");
        Ok(())
    }

    /// Ends processes of ours that have no device.
    ///
    /// # Errors
    /// [`DeleteError::Stuck`].
    pub fn end(&mut self, process: Process) -> Result<(), DeleteError> {
        process.tell(Signal::SIGTERM);
        self.await_end(&[process], None)
    }

    /// Stops a device that is not in use, or with `force` any.
    fn stop(&mut self, device: &DeviceToDelete) -> Result<(), DeleteError> {
        let id = device.id;
        let can_try = self.control.features().is_ok_and(|features| features.has(SAFE_STOP_DEV));
        let what = format!("the outstanding I/O of {device}");
        let mut attempt = || {
            let gently = !self.force && self.await_users(device)?;
            let command = if gently && can_try { Command::StopUnused } else { Command::Stop };
            self.run(device, command, &what)
        };
        let stopped =
            Wait::at_most(TO_LET_GO).every(Duration::from_millis(10)).until(|| match attempt() {
                Ok(false) => ControlFlow::Continue(UNSEEN),
                Ok(true) => ControlFlow::Break(Ok(())),
                Err(error) => ControlFlow::Break(Err(error)),
            });
        // A process has opened it since the check; or an invisible user does not close it.
        stopped.unwrap_or_else(|unmet| {
            Err(DeleteError::InUse { id, users: vec![unmet.reason.to_owned()] })
        })
    }

    /// Refuses a device in use. Workers of udev do not count: they look at a device after it was
    /// made or written to. They are waited for, unless nobody serves their I/O. Returns whether the
    /// device may be stopped only if it is unused.
    fn await_users(&mut self, device: &DeviceToDelete) -> Result<bool, DeleteError> {
        let Some((major, minor)) = device.number else { return Ok(true) };
        let (id, control) = (device.id, self.control);
        let what = format!("udev to close {device}");
        // Nothing reports when a device is closed.
        patient(self.progress).every(Duration::from_millis(10)).until(|| {
            let (users, is_open) = users_of((major, minor));
            if !users.is_empty() {
                return ControlFlow::Break(Err(DeleteError::InUse { id, users }));
            }
            if !is_open {
                return ControlFlow::Break(Ok(true));
            }
            if !device.is_served(control) {
                return ControlFlow::Break(Ok(false));
            }
            ControlFlow::Continue(&what)
        })?
    }

    /// Lets a helper give the driver a command. Returns whether it was carried out; a device in use
    /// is not stopped.
    fn run(
        &mut self,
        device: &DeviceToDelete,
        command: Command,
        what: &str,
    ) -> Result<bool, DeleteError> {
        let failed = |error: io::Error| DeleteError::NoHelper(Errno::of(&error));
        let mut helper = (self.helper)(device.id, command).map_err(failed)?;
        let watch = Watch::on(helper.id());
        let (force, processes) = (self.force, &device.processes);
        let mut wait = patient(self.progress);
        let began = Instant::now();
        let ended = wait.until_or(watch.fd(), || {
            if force && began.elapsed() > BEFORE_KILL {
                kill(processes);
            }
            match helper.try_wait() {
                Ok(None) => ControlFlow::Continue(what),
                Ok(Some(status)) => ControlFlow::Break(Ok(status)),
                Err(error) => ControlFlow::Break(Err(error)),
            }
        });
        if ended.is_err() {
            // It ends together with the command.
            let _ = helper.kill();
        }
        let status = ended?.map_err(failed)?;
        match status.code() {
            Some(0) => Ok(true),
            Some(code) if code == i32::from(IN_USE) => Ok(false),
            // It has reported the reason.
            _ => Err(DeleteError::Refused(device.id)),
        }
    }

    /// Waits until processes have ended. With `force` it kills those that do not end. `removed` is
    /// the device if the driver has removed it already.
    fn await_end(
        &mut self,
        processes: &[Process],
        removed: Option<&DeviceToDelete>,
    ) -> Result<(), DeleteError> {
        let (control, force, began) = (self.control, self.force, Instant::now());
        for process in processes {
            while !process.has_ended() {
                // A server that was about to start a device may still start it.
                let restarted = removed.filter(|device| device.is_started(control));
                if let Some(device) = restarted {
                    self.run(device, Command::Stop, "the driver to stop it again")?;
                }
                let what = Words(|| format!("{process} to end"));
                patient(self.progress).until_or(Some(process.as_fd()), || {
                    if force && began.elapsed() > BEFORE_KILL {
                        kill(processes);
                    }
                    let is_started = removed.is_some_and(|device| device.is_started(control));
                    if process.has_ended() || is_started {
                        ControlFlow::Break(())
                    } else {
                        ControlFlow::Continue(&what)
                    }
                })?;
            }
        }
        Ok(())
    }

    /// Waits until the driver has freed the id.
    fn await_removal(&mut self, device: &DeviceToDelete) -> Result<(), DeleteError> {
        let control = self.control;
        let force = self.force;
        let what = format!("{}, to close device {}", device.holders(), device.id);
        let began = Instant::now();
        // Nothing reports when the driver frees an id.
        let users = patient(self.progress).every(Duration::from_millis(5)).until(|| {
            match device.is_gone(control) {
                Err(error) => return ControlFlow::Break(Err(error)),
                Ok(true) => return ControlFlow::Break(Ok(Vec::new())),
                Ok(false) => {}
            }
            let is_used = force && began.elapsed() > TO_LET_GO;
            if is_used && usage::servers_of(device.id).is_empty() {
                let users = device.users();
                if !users.is_empty() {
                    return ControlFlow::Break(Ok(users));
                }
            }
            ControlFlow::Continue(&what)
        })??;
        if !users.is_empty() {
            let users = users.join(", ");
            (self.progress)(&format!("note: id {} stays in use while it is {users}", device.id));
        }
        Ok(())
    }
}

/// Kills processes; supervisors first, since they would start other servers. A server of several
/// devices is spared: the other devices need it.
fn kill(processes: &[Process]) {
    for role in [Role::Supervisor, Role::Server] {
        for process in processes.iter().filter(|process| process.role == role) {
            process.tell(Signal::SIGKILL);
        }
    }
}

/// A wait that reports to `progress` when it takes long, and times out after [`PATIENCE`].
fn patient<'a>(progress: &'a mut dyn FnMut(&str)) -> Wait<'a> {
    Wait::at_most(PATIENCE).every(Duration::from_millis(100)).reporting(
        Duration::from_secs(2),
        Duration::from_secs(10),
        move |what, _| progress(&format!("waiting for {what} …")),
    )
}

impl<R: fmt::Display> From<Unmet<R>> for DeleteError {
    fn from(unmet: Unmet<R>) -> Self {
        Self::Stuck { what: unmet.reason.to_string(), waited: unmet.waited }
    }
}

//! Deleting devices, in whatever state they are, and what sees to them.
//!
//! Deletion is never done by the process that serves the device, except at its own orderly end:
//! a server that waits on its own device cannot serve what the wait needs. Nor are the driver's
//! commands given by the process that the user waits for, but by a helper: a command that waits for
//! outstanding I/O cannot be taken back, and keeps its process from ending.

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
    /// There is none.
    #[error("there is no ublk device {0}; `ublk-target list` lists the existing ones")]
    NoDevice(u32),
    /// Somebody uses it.
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
    /// Somebody uses it, and may wait for a server.
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
    /// Somebody waits for something that does not come.
    #[error("gave up waiting after {} s for {what}; the deletion may still complete", waited.as_secs())]
    Stuck {
        /// What was waited for.
        what: String,
        /// How long.
        waited: Duration,
    },
    /// The process that gives the driver's commands could not be started.
    #[error("cannot start a process that stops the device: {0}")]
    NoHelper(Errno),
    /// That process has failed, and said why.
    #[error("the driver did not delete device {0}")]
    Refused(u32),
    /// The driver said no.
    #[error(transparent)]
    Control(#[from] ControlError),
}

/// What a helper has the driver do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Command {
    /// Stop a device that nobody has open (`TRY_STOP_DEV`)
    StopUnused,
    /// Stop a device (`STOP_DEV`)
    Stop,
    /// Remove a device (`DEL_DEV_ASYNC`)
    Remove,
}

/// How a helper ends that found the device in use.
pub const IN_USE: u8 = 16;

/// Gives the driver a command and waits for its end, for as long as that takes. A device that is
/// gone is stopped and removed.
///
/// # Errors
/// `EBUSY` for one that is in use, and the driver's others.
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

/// The longest wait for each of: outstanding I/O, the end of a process, the driver's clean-up.
const PATIENCE: Duration = Duration::from_secs(30);
/// After so much of it a process of ours is killed, if that was asked for.
const BEFORE_KILL: Duration = Duration::from_secs(5);
/// A user of which no process and no mount is to be seen.
pub(crate) const UNSEEN: &str =
    "the kernel, or a process in another pid namespace, has it open (an export, for instance)";
/// How long what is on its way to close a device may take; what has it open after that uses it.
const TO_LET_GO: Duration = Duration::from_secs(2);

/// How devices are deleted.
pub struct Deletion<'a> {
    /// The driver.
    pub control: &'a Control,
    /// Stop a device that is in use, and kill a server that does not end.
    pub force: bool,
    /// Starts a process that carries out [`command`]; it ends with 0, with [`IN_USE`], or has said
    /// why it has failed.
    pub helper: &'a dyn Fn(u32, Command) -> io::Result<Child>,
    /// Is told what is waited for, when a wait gets long, and what is left.
    pub progress: &'a mut dyn FnMut(&str),
}

impl Deletion<'_> {
    /// Deletes the device `id`. Refuses one that is open or mounted, unless it is forced. Returns
    /// when nothing is left of it, neither in the driver nor its server and supervisor. After a
    /// device was forced out of the hands of its users, its id is taken until they let go of it.
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
        // Those that were started meanwhile by those that have ended by now.
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

    /// Stops a device that nobody uses, or whoever does.
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
        // Opened since it was looked at; or by who cannot be seen from here, and does not let go.
        stopped.unwrap_or_else(|unmet| {
            Err(DeleteError::InUse { id, users: vec![unmet.reason.to_owned()] })
        })
    }

    /// Refuses a device that somebody uses. Workers of udev are no users: they look at a device that
    /// was just made or written to, and are waited for, unless nobody serves what they wait for.
    /// Whether the device is to be stopped only if it is unused.
    fn await_users(&mut self, device: &DeviceToDelete) -> Result<bool, DeleteError> {
        let Some((major, minor)) = device.number else { return Ok(true) };
        let (id, control) = (device.id, self.control);
        let what = format!("udev to close {device}");
        // Nobody tells when a device is closed.
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

    /// Has a helper give the driver a command. Whether it was carried out; a device in use is not
    /// stopped.
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
            // It ends when the command does, and not before.
            let _ = helper.kill();
        }
        let status = ended?.map_err(failed)?;
        match status.code() {
            Some(0) => Ok(true),
            Some(code) if code == i32::from(IN_USE) => Ok(false),
            // It has said why.
            _ => Err(DeleteError::Refused(device.id)),
        }
    }

    /// Waits until processes are gone, and kills those that do not end, if that was asked for.
    /// `removed` is the device if the driver has removed it already.
    fn await_end(
        &mut self,
        processes: &[Process],
        removed: Option<&DeviceToDelete>,
    ) -> Result<(), DeleteError> {
        let (control, force, began) = (self.control, self.force, Instant::now());
        for process in processes {
            while !process.has_ended() {
                // A server that was about to start a device still can.
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

    /// Waits until the driver has let go of the id.
    fn await_removal(&mut self, device: &DeviceToDelete) -> Result<(), DeleteError> {
        let control = self.control;
        let force = self.force;
        let what = format!("{}, to close device {}", device.holders(), device.id);
        let began = Instant::now();
        // The driver tells nobody when it has let go of an id.
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

/// Kills processes; supervisors first, for they would put others in the place of servers. A server
/// of several devices is not among them: the others need it.
fn kill(processes: &[Process]) {
    for role in [Role::Supervisor, Role::Server] {
        for process in processes.iter().filter(|process| process.role == role) {
            process.tell(Signal::SIGKILL);
        }
    }
}

/// A wait that tells `progress` when it takes long, and that gives up after [`PATIENCE`].
fn patient<'a>(progress: &'a mut dyn FnMut(&str)) -> Wait<'a> {
    Wait::at_most(PATIENCE).every(Duration::from_millis(100)).telling(
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

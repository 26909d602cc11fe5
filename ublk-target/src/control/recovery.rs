//! Gives a device a new server after the death of the old one.

use std::fmt::Display;
use std::fs::File;
use std::ops::ControlFlow;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use uring_ext::control::Control;
use uring_ext::{Errno, sys};

use crate::backing::usage;
use crate::backing::{BackingError, BackingProblem};
use crate::config::lend::Choice;
use crate::control::error::{AnnounceError, LayoutError, PlanError, RecoverError, SetupError};
use crate::control::helpers::{Helpers, protect_server, ready};
use crate::control::plan::Plan;
use crate::control::recoverable::{
    check, check_limits, config_of, missing, read, refuse_unserved, server_of,
};
use crate::control::server::Server;
use crate::device::description::{self, Description};
use crate::device::paths::{self, RUN_DIR};
use crate::device::processes::{Process, Role};
use crate::device::state_file::StateFile;
use crate::device::trouble::Trouble;
use crate::os::kernel;
use crate::os::steps::step;
use crate::os::wait::{Unmet, Wait, Words};

/// The longest wait for the remains of the dead server.
const PATIENCE: Duration = Duration::from_secs(30);
/// The interval of checks.
const PAUSE: Duration = Duration::from_millis(2);
/// The interval of progress messages.
const WORDS: Duration = Duration::from_secs(2);

/// Serves a device after its server has died, as [`serve`](crate::control::server::serve) does
/// after it has added one. `progress` is called with what a long wait is for. `is_next` says that
/// the calling process was the server before it became another program. Then nobody else recovers
/// the device if this fails, so signals wait until the device is live.
///
/// # Errors
/// [`RecoverError`]; the device has not changed.
pub fn recover(
    id: u32,
    supervisor: Option<u32>,
    is_next: bool,
    helpers: &Helpers<'_>,
    progress: &mut dyn FnMut(&str),
    on_live: impl FnOnce(&Description, &Choice) -> Result<(), AnnounceError>,
) -> Result<(), RecoverError> {
    let node = Control::open_node()?;
    // There is only one thread at this point: the control ring has kernel workers. An unreadable
    // record gives an error below.
    let record = StateFile::read(Path::new(RUN_DIR), id);
    protect_server(&record.as_ref().map_or_else(|_| Vec::new(), |it| it.config.target.files()));
    let control = Control::with(node)?;
    let wakeups = ready(helpers.hangup())?;
    step("signals-blocked");
    // The recorded process is alive: it is this one.
    let record = if is_next { read(&control, id)? } else { check(&control, id)? };
    if !is_next {
        refuse_unserved(&control, id, &record)?;
    }
    // This server was faster than the supervisor; the supervisor watches it all the same.
    let is_supervisor = |pid: &u32| {
        let is_of_it = |it: Process| it.device.is_none_or(|other| other == id);
        Process::find(*pid).is_some_and(|it| it.role == Role::Supervisor && is_of_it(it))
    };
    // A supervisor that has given up is about to end.
    let has_given_up = Trouble::read(Path::new(RUN_DIR), id).is_some_and(|it| it.given_up);
    let recorded = record.supervisor.filter(|_| !has_given_up);
    let supervisor = supervisor.or_else(|| recorded.filter(is_supervisor));
    let mut server = Server::new(Rc::new(control), wakeups, id, supervisor);
    server.leave();
    let taken = take_over(&mut server, &record, !is_next, progress)?;
    server.keep();
    // The device existed before this recovery was requested. It stays if the caller is gone.
    let served = server.live(taken.plan, helpers, |description, choice| {
        if let Err(error) = on_live(description, choice) {
            log::warn!("recovered, but: {error}");
        }
        log::info!("recovered: {}", taken.times);
        Ok(())
    });
    let ended = server.take_down();
    Ok(served.and(ended)?)
}

/// A device that the calling process has taken over.
pub(super) struct Taken {
    pub plan: Plan,
    /// The times of the steps, in words.
    pub times: String,
}

/// Takes over a device without a server.
pub(super) fn take_over(
    server: &mut Server,
    record: &StateFile,
    heeds_signals: bool,
    progress: &mut dyn FnMut(&str),
) -> Result<Taken, RecoverError> {
    let (id, began) = (server.id, Instant::now());
    let wakeups = Arc::clone(&server.wakeups);
    let tell = |what: &dyn Display, _| progress(&format!("waiting for {what}"));
    // Nothing reports the end of the remains.
    let mut wait = Wait::at_most(PATIENCE).since(began).every(PAUSE).reporting(WORDS, WORDS, tell);
    if heeds_signals {
        wait = wait.or_signal(&wakeups);
    }
    let cdev = Arc::new(claim(server, &mut wait)?);
    let claimed = began.elapsed();
    server.cdev = Some(Arc::clone(&cdev));
    step("claimed");
    // From here on no other process can have the device, so its information is final.
    let info = server.control.info(id)?;
    let plan = plan(server, record, &info, &mut wait)?;
    let opened = began.elapsed();
    step("planned");
    server.start_lanes(&info, &plan, &cdev)?;
    step("lanes-up");
    server.take_charge(&plan)?;
    let ready = began.elapsed();
    let end = server.control.end_recovery(id, std::process::id())?;
    step("start-sent");
    server.await_recovery(end)?;
    let live = began.elapsed();
    let times = format!(
        "{} ms until the device was free, {} to open the backings, {} to start the lanes, {} to be live",
        claimed.as_millis(),
        (opened - claimed).as_millis(),
        (ready - opened).as_millis(),
        (live - ready).as_millis()
    );
    Ok(Taken { plan, times })
}

/// The error of a wait for the remains of the dead server.
fn given_up(unmet: Unmet<impl Display>) -> RecoverError {
    match unmet.signal {
        Some(_) => RecoverError::NotRecovered,
        None => RecoverError::Stuck { what: unmet.reason.to_string(), waited: unmet.waited },
    }
}

/// Waits until the driver has all buffers of the dead server back, and opens the character device.
/// Only one process can have it open.
fn claim(server: &Server, wait: &mut Wait<'_>) -> Result<File, RecoverError> {
    let id = server.id;
    let path = paths::char_path(id);
    let holder = Words(|| {
        let openers = usage::openers_of_char_device(&path);
        match openers.first() {
            Some(opener) => format!("{opener} to close {}", path.display()),
            None => format!("the kernel to end the I/O of the dead server of device {id}"),
        }
    });
    let attempt = || match server.control.start_recovery(id) {
        Ok(()) => match File::options().read(true).write(true).open(&path) {
            Ok(file) if usage::is_char_device_of(&file, id) => Ok(Some(file)),
            Ok(_) => Err(wrong_node(&path).into()),
            // Another process was faster.
            Err(error) if Errno::of(&error) == Errno::EBUSY => Ok(None),
            Err(error) => {
                let doing = format!("cannot open {}", path.display());
                Err(SetupError::new(doing, Errno::of(&error)).into())
            }
        },
        Err(error) if error.errno() == Some(Errno::EBUSY) => {
            // Another process has recovered it meanwhile, or stopped it.
            let info = server.control.info(id).map_err(|error| missing(id, error))?;
            if !description::has_disk(&info) {
                return Err(RecoverError::NotStarted(id));
            }
            server_of(&info).map_or(Ok(None), |server| Err(RecoverError::Served { id, server }))
        }
        // It has been stopped.
        Err(error) if error.errno() == Some(Errno::EINVAL) => Err(RecoverError::NotStarted(id)),
        Err(error) => Err(missing(id, error)),
    };
    let claimed = wait.until(|| match attempt() {
        Ok(None) => ControlFlow::Continue(&holder),
        Ok(Some(file)) => ControlFlow::Break(Ok(file)),
        Err(error) => ControlFlow::Break(Err(error)),
    });
    claimed.map_err(given_up)?
}

/// Another file is at the path of the character device.
pub(super) fn wrong_node(path: &Path) -> SetupError {
    let doing = format!(
        "{} is not the driver's character device; remove it, and have `udevadm trigger` or mknod(1) make \
         the right one",
        path.display()
    );
    SetupError::new(doing, Errno::ENODEV)
}

/// Opens the backings and makes the same device of them. The dead server's files are closed some
/// time after its end.
fn plan(
    server: &Server,
    record: &StateFile,
    info: &sys::ublksrv_ctrl_dev_info,
    wait: &mut Wait<'_>,
) -> Result<Plan, RecoverError> {
    let params = server.control.params(record.id)?;
    let config = config_of(record, info, &params);
    let features = kernel::features(&server.control)?;
    let planned =
        wait.until(|| match Plan::for_driver(&config, features, Some(&record.backings)) {
            Err(PlanError::Layout(LayoutError::Backing(BackingError {
                path,
                problem: BackingProblem::InUse(users),
            }))) => {
                let what =
                    move || format!("{} to be closed ({})", path.display(), users.join(", "));
                ControlFlow::Continue(Words(what))
            }
            planned => ControlFlow::Break(planned),
        });
    let mut plan = planned.map_err(given_up)??;
    check_limits(&plan, &params, info)?;
    // The requested block size, not the one that the device has got.
    plan.config.block_size = record.config.block_size;
    plan.layout.buffer_bytes = info.max_io_buf_bytes;
    plan.incarnation = record.incarnation.wrapping_add(1);
    Ok(plan)
}

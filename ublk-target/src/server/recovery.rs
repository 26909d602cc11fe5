//! A device gets a new server in the place of a dead one.

use std::fs::File;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ublk_engine::lend::LendMode;
use ublk_engine::units::{Bytes, Sectors};
use uring_ext::control::{Control, ControlError};
use uring_ext::feature::{Features, IO_DESC_SIZE};
use uring_ext::params::Params;
use uring_ext::{Errno, sys};

use super::config::{DeviceConfig, DeviceError};
use super::device::{Helpers, Server};
use super::on_death::OnDeath;
use super::plan::Plan;
use super::protection::protect;
use super::signals::Wakeups;
use crate::backing::below::Below;
use crate::backing::usage::{self, Opener};
use crate::backing::{BackingError, BackingProblem};
use crate::kernel;
use crate::lend::Choice;
use crate::mark::Nonce;
use crate::processes::{Process, Role};
use crate::standing::Recorded;
use crate::state::{self, Description, RUN_DIR, StateFile, StateProblem};
use crate::stats::client;
use crate::steps::step;
use crate::trouble::Trouble;

/// Why a device cannot be recovered, and what to do.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum CannotRecoverDevice {
    /// There is none.
    #[error("there is no ublk device {0}; `ublk-target list` shows those that are")]
    NoDevice(u32),
    /// A device below it has no server.
    #[error(
        "device {id} stands on device {lower}, which has no server; `ublk-target recover -n {lower}` first, \
         or `recover --all`"
    )]
    Below {
        /// The device.
        id: u32,
        /// The one below it.
        lower: u32,
    },
    /// It goes away with its server.
    #[error(
        "device {0} was added with `--on-death fail` and goes away with its server; \
         `ublk-target del -n {0}` cleans up"
    )]
    NotRecoverable(u32),
    /// It has no disk.
    #[error(
        "device {0} was never started, or has been stopped; `ublk-target del -n {0}` removes it, \
         then add it again"
    )]
    NotStarted(u32),
    /// It has a server.
    #[error("device {id} is served by {server}; nothing is to be recovered")]
    Served {
        /// The device.
        id: u32,
        /// Its server, in words.
        server: String,
    },
    /// Its state is not to be had.
    #[error(
        "{problem}; without it nobody knows what device {id} is made of: delete it \
         (`ublk-target del -n {id}`) and add it again"
    )]
    State {
        /// The device.
        id: u32,
        /// What is wrong.
        problem: StateProblem,
    },
    /// The state file is of an earlier device of this id, or has been tampered with.
    #[error(
        "the state file of device {id} is not this device's: {difference}; delete the device \
         (`ublk-target del -n {id}`) and add it again"
    )]
    OtherDevice {
        /// The device.
        id: u32,
        /// How they differ.
        difference: String,
    },
    /// The backings take less than the device promises.
    #[error(
        "the backings of device {id} are not what they were: {difference}; give the device its own \
         ones back, or delete it"
    )]
    LimitsChanged {
        /// The device.
        id: u32,
        /// How they differ.
        difference: String,
    },
    /// It took too long.
    #[error("gave up waiting after {} s for {what}", waited.as_secs())]
    Stuck {
        /// What was waited for.
        what: String,
        /// How long.
        waited: Duration,
    },
}

/// The longest wait for what is left of the dead server.
const PATIENCE: Duration = Duration::from_secs(30);
/// How often it is looked at. Nobody tells.
const PAUSE: Duration = Duration::from_millis(2);

/// Serves a device whose server is dead, as [`serve`](super::device::serve) does one that it has
/// added. `progress` is told what is waited for, when that takes long. `is_next` says that the
/// calling process was the server before it became one of another program, so that nobody else will
/// recover the device if it does not; signals wait until the device is live then.
///
/// # Errors
/// [`DeviceError`]; the device is as it was before.
pub fn recover(
    id: u32,
    supervisor: Option<u32>,
    is_next: bool,
    helpers: &Helpers<'_>,
    progress: &mut dyn FnMut(&str),
    on_live: impl FnOnce(&Description, &Choice) -> Result<(), DeviceError>,
) -> Result<(), DeviceError> {
    let node = Control::open_node()?;
    // While there is one thread: the control ring has workers of the kernel's. A record that cannot be
    // read is an error below.
    let record = StateFile::read(Path::new(RUN_DIR), id);
    protect(&record.as_ref().map_or_else(|_| Vec::new(), |it| it.config.target.files()));
    let control = Control::with(node)?;
    let wakeups = Wakeups::ready(helpers.hangup())?;
    step("signals-blocked");
    // Its process is alive: it is this one.
    let record = if is_next { read(&control, id)? } else { check(&control, id)? };
    if !is_next {
        refuse_unserved(&control, id, &record)?;
    }
    // One that was faster than the supervisor is supervised all the same.
    let is_supervisor = |pid: &u32| {
        let is_of_it = |it: Process| it.device.is_none_or(|other| other == id);
        Process::find(*pid).is_some_and(|it| it.role == Role::Supervisor && is_of_it(it))
    };
    // One that has given up is about to end.
    let has_given_up = Trouble::read(Path::new(RUN_DIR), id).is_some_and(|it| it.given_up);
    let recorded = record.supervisor.filter(|_| !has_given_up);
    let supervisor = supervisor.or_else(|| recorded.filter(is_supervisor));
    let mut server = Server::new(Rc::new(control), wakeups, id, supervisor);
    server.leave();
    let taken = take_over(&mut server, &record, !is_next, progress)?;
    server.keep();
    // The device was there before whoever asked for its recovery, and stays if he is gone.
    let served = server.live(taken.plan, helpers, |description, choice| {
        if let Err(error) = on_live(description, choice) {
            log::warn!("recovered, but: {error}");
        }
        log::info!("recovered: {}", taken.times);
        Ok(())
    });
    let ended = server.take_down();
    served.and(ended)
}

/// A device that is the calling process's now.
pub(super) struct Taken {
    pub plan: Plan,
    /// What took how long, in words.
    pub times: String,
}

/// Makes a device whose server is gone the calling process's.
pub(super) fn take_over(
    server: &mut Server,
    record: &StateFile,
    heeds_signals: bool,
    progress: &mut dyn FnMut(&str),
) -> Result<Taken, DeviceError> {
    let (id, began) = (server.id, Instant::now());
    let mut wait = Wait { began, said: 0, heeds_signals, progress };
    let cdev = Arc::new(claim(server, &mut wait)?);
    let claimed = began.elapsed();
    server.cdev = Some(Arc::clone(&cdev));
    step("claimed");
    // Nobody else can have the device from here on, so this is what it is.
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
        "{} ms until the device was let go of, {} to open the backings, {} to start the lanes, {} to be \
         live",
        claimed.as_millis(),
        (opened - claimed).as_millis(),
        (ready - opened).as_millis(),
        (live - ready).as_millis()
    );
    Ok(Taken { plan, times })
}

/// Whether a device can be recovered: what is known of it.
///
/// # Errors
/// [`CannotRecoverDevice`], and those of the driver.
pub fn check(control: &Control, id: u32) -> Result<StateFile, DeviceError> {
    let info = lasting(control, id)?;
    if let Some(server) = server_of(&info) {
        return Err(CannotRecoverDevice::Served { id, server }.into());
    }
    read(control, id)
}

/// What the driver says of a device that outlives its server.
fn lasting(control: &Control, id: u32) -> Result<sys::ublksrv_ctrl_dev_info, DeviceError> {
    let info = control.info(id).map_err(|error| missing(id, error))?;
    if OnDeath::of_flags(info.flags) == OnDeath::Fail {
        return Err(CannotRecoverDevice::NotRecoverable(id).into());
    }
    if !state::has_disk(&info) {
        return Err(CannotRecoverDevice::NotStarted(id).into());
    }
    Ok(info)
}

/// Whether a device can have another server, now or when its present one is dead: what is known of
/// it.
///
/// # Errors
/// [`CannotRecoverDevice`], and those of the driver.
pub fn read(control: &Control, id: u32) -> Result<StateFile, DeviceError> {
    let info = lasting(control, id)?;
    let record = StateFile::read(Path::new(RUN_DIR), id)
        .map_err(|problem| CannotRecoverDevice::State { id, problem })?;
    match difference(&record, &info, state::diskseq(id)) {
        Some(difference) => Err(CannotRecoverDevice::OtherDevice { id, difference }.into()),
        None => Ok(record),
    }
}

/// Refuses a device that stands on itself, or on one without a server: opening its backing would wait for
/// that one's next server. Only what is below without a doubt counts.
pub(super) fn refuse_unserved(
    control: &Control,
    id: u32,
    record: &StateFile,
) -> Result<(), DeviceError> {
    let paths: Vec<_> = record.backings.iter().map(|it| it.path.clone()).collect();
    let below = Below::paths(&paths, &Recorded::default());
    if below.has(id) {
        return Err(DeviceError::OnItself(id));
    }
    match unserved(control, &below) {
        Some(lower) => Err(CannotRecoverDevice::Below { id, lower }.into()),
        None => Ok(()),
    }
}

/// As [`refuse_unserved`], for a device that is to be added on these backings.
pub(super) fn refuse_new_on_unserved(
    control: &Control,
    backings: &[&Path],
) -> Result<(), DeviceError> {
    let paths: Vec<_> = backings.iter().map(|path| path.to_path_buf()).collect();
    let below = Below::paths(&paths, &Recorded::default());
    unserved(control, &below).map_or(Ok(()), |lower| Err(DeviceError::OnUnserved(lower)))
}

/// A device below that waits for a server.
fn unserved(control: &Control, below: &Below) -> Option<u32> {
    let waiting = [sys::UBLK_S_DEV_QUIESCED, sys::UBLK_S_DEV_FAIL_IO];
    below
        .certain()
        .find(|lower| control.info(*lower).is_ok_and(|info| waiting.contains(&info.state.into())))
}

fn missing(id: u32, error: ControlError) -> DeviceError {
    if state::is_missing(&error) { CannotRecoverDevice::NoDevice(id).into() } else { error.into() }
}

/// The live server of a device, in words, unless it is the calling process: that has let go of the device,
/// which the driver notices when the last ring has gone, or has the process id of a dead one by chance.
fn server_of(info: &sys::ublksrv_ctrl_dev_info) -> Option<String> {
    let pid = u32::try_from(info.ublksrv_pid).ok();
    if u32::from(info.state) != sys::UBLK_S_DEV_LIVE || pid == Some(std::process::id()) {
        return None;
    }
    match pid.filter(|pid| state::is_alive(*pid)) {
        Some(pid) => Some(Opener::of(pid).to_string()),
        // It has no process id here, or is dead.
        None => {
            client::is_served(info.dev_id).then(|| "a process of another pid namespace".to_owned())
        }
    }
}

/// How a state file differs from the device that it should be of.
fn difference(
    record: &StateFile,
    info: &sys::ublksrv_ctrl_dev_info,
    diskseq: Option<u64>,
) -> Option<String> {
    let config = &record.config;
    let differs = |what: &str, recorded: &dyn std::fmt::Display, is: &dyn std::fmt::Display| {
        Some(format!("it says {what} {recorded}, and the driver {is}"))
    };
    let lend = LendMode::of_flags(info.flags);
    let on_death = OnDeath::of_flags(info.flags);
    match (record.diskseq, diskseq) {
        (Some(recorded), Some(is)) if recorded != is => differs("disk", &recorded, &is),
        // The mark is another for each device, and is there before the disk is.
        _ if record.nonce != Nonce::of(info) => Some("its mark is another device's".to_owned()),
        // The driver gives no more queues than there are CPUs.
        _ if config.queues < info.nr_hw_queues => {
            differs("queues", &config.queues, &info.nr_hw_queues)
        }
        _ if config.depth != info.queue_depth => differs("depth", &config.depth, &info.queue_depth),
        _ if config.lend != lend.into() => Some(format!("it does not lend by {lend}")),
        _ if config.on_death != on_death => differs("--on-death", &config.on_death, &on_death),
        _ if Features(info.flags).has(IO_DESC_SIZE) => {
            Some("its request descriptors have a size of their own".to_owned())
        }
        _ => None,
    }
}

/// A wait for what is left of the dead server.
struct Wait<'a> {
    began: Instant,
    said: u64,
    heeds_signals: bool,
    progress: &'a mut dyn FnMut(&str),
}

impl Wait<'_> {
    fn pause(&mut self, server: &Server, what: &dyn Fn() -> String) -> Result<(), DeviceError> {
        let waited = self.began.elapsed();
        if waited >= PATIENCE {
            return Err(CannotRecoverDevice::Stuck { what: what(), waited }.into());
        }
        if waited.as_secs() / 2 > self.said {
            self.said = waited.as_secs() / 2;
            (self.progress)(&format!("waiting for {}", what()));
        }
        std::thread::sleep(PAUSE);
        if self.heeds_signals && server.wakeups.take_signal().is_some() {
            return Err(DeviceError::NotRecovered);
        }
        Ok(())
    }
}

/// Waits until the driver has all buffers of the dead server back, and takes the character device:
/// only one process can have it.
fn claim(server: &Server, wait: &mut Wait<'_>) -> Result<File, DeviceError> {
    let id = server.id;
    let path = state::char_path(id);
    let holder = || {
        let openers = usage::openers_of_char_device(&path);
        match openers.first() {
            Some(opener) => format!("{opener} to let go of {}", path.display()),
            None => format!("the kernel to end the I/O of the dead server of device {id}"),
        }
    };
    loop {
        match server.control.start_recovery(id) {
            Ok(()) => match File::options().read(true).write(true).open(&path) {
                Ok(file) if usage::is_char_device_of(&file, id) => return Ok(file),
                Ok(_) => return Err(wrong_node(&path)),
                // Another one was faster.
                Err(error) if Errno::of(&error) == Errno::EBUSY => {}
                Err(error) => {
                    let doing = format!("cannot open {}", path.display());
                    return Err(DeviceError::setup(doing, Errno::of(&error)));
                }
            },
            Err(error) if error.errno() == Some(Errno::EBUSY) => {
                // Recovered by another one meanwhile, or stopped.
                let info = server.control.info(id).map_err(|error| missing(id, error))?;
                if !state::has_disk(&info) {
                    return Err(CannotRecoverDevice::NotStarted(id).into());
                }
                if let Some(server) = server_of(&info) {
                    return Err(CannotRecoverDevice::Served { id, server }.into());
                }
            }
            // It has been stopped.
            Err(error) if error.errno() == Some(Errno::EINVAL) => {
                return Err(CannotRecoverDevice::NotStarted(id).into());
            }
            Err(error) => return Err(missing(id, error)),
        }
        wait.pause(server, &holder)?;
    }
}

/// Something else is in the place of a character device.
pub(super) fn wrong_node(path: &Path) -> DeviceError {
    let doing = format!(
        "{} is not the driver's character device; remove it, and have `udevadm trigger` or mknod(1) make \
         the right one",
        path.display()
    );
    DeviceError::setup(doing, Errno::ENODEV)
}

/// Whether the program that runs could serve a device which another server has: what it would be made
/// of is looked at, and nothing claimed.
///
/// # Errors
/// [`DeviceError`].
pub fn check_upgrade(control: &Control, id: u32) -> Result<(), DeviceError> {
    let record = read(control, id)?;
    refuse_unserved(control, id, &record)?;
    let info = control.info(id).map_err(|error| missing(id, error))?;
    let params = control.params(id)?;
    let config = config_of(&record, &info, &params);
    let plan = Plan::look(&config, kernel::features(control)?, Some(&record.backings))?;
    check_limits(&plan, &params, &info)
}

/// What a device is made of, as it was recorded and as the driver has it.
fn config_of(
    record: &StateFile,
    info: &sys::ublksrv_ctrl_dev_info,
    params: &Params,
) -> DeviceConfig {
    DeviceConfig {
        id: Some(record.id),
        queues: info.nr_hw_queues,
        depth: info.queue_depth,
        // Those of the device stay what they are. A file whose file system wants larger ones by now, as
        // XFS does once blocks of it are shared, goes through the page cache.
        block_size: Some(1 << params.basic().logical_bs_shift.min(12)),
        ..record.config.clone()
    }
}

fn check_limits(
    plan: &Plan,
    params: &Params,
    info: &sys::ublksrv_ctrl_dev_info,
) -> Result<(), DeviceError> {
    match stricter(plan, params, info) {
        Some(difference) => {
            Err(CannotRecoverDevice::LimitsChanged { id: info.dev_id, difference }.into())
        }
        None => Ok(()),
    }
}

/// Opens the backings and makes the same device of them. The dead server's files are let go of some
/// time after its end.
fn plan(
    server: &Server,
    record: &StateFile,
    info: &sys::ublksrv_ctrl_dev_info,
    wait: &mut Wait<'_>,
) -> Result<Plan, DeviceError> {
    let params = server.control.params(record.id)?;
    let config = config_of(record, info, &params);
    let mut plan = loop {
        match Plan::make(&config, &server.control, Some(&record.backings)) {
            Err(DeviceError::Backing(BackingError {
                path,
                problem: BackingProblem::InUse(users),
            })) => {
                let what = || format!("{} to be let go of ({})", path.display(), users.join(", "));
                wait.pause(server, &what)?;
            }
            made => break made?,
        }
    };
    check_limits(&plan, &params, info)?;
    // Blocks that were asked for, not those that the device has come to.
    plan.config.block_size = record.config.block_size;
    plan.layout.buffer_bytes = info.max_io_buf_bytes;
    plan.incarnation = record.incarnation.wrapping_add(1);
    Ok(plan)
}

/// What the backings take less of than the device was started with.
fn stricter(
    plan: &Plan,
    params_were: &Params,
    info: &sys::ublksrv_ctrl_dev_info,
) -> Option<String> {
    let layout = &plan.layout;
    let now_params = layout.limits.params(layout.size, info.max_io_buf_bytes);
    let (now, was) = (now_params.basic(), params_were.basic());
    let has_now = |attribute: u32| now.attrs & attribute > was.attrs & attribute;
    let size = |sectors| Bytes::from(Sectors(sectors));
    if now.dev_sectors < was.dev_sectors {
        let (now, was) = (size(now.dev_sectors), size(was.dev_sectors));
        Some(format!("they hold {now}, and the device has {was}"))
    } else if now.logical_bs_shift > was.logical_bs_shift {
        let (now, was) = (1_u32 << now.logical_bs_shift, 1_u32 << was.logical_bs_shift);
        Some(format!("their blocks have {now} bytes, and those of the device {was}"))
    } else if now.max_sectors < was.max_sectors && !layout.limits.can_cut() {
        let (now, was) = (size(now.max_sectors.into()), size(was.max_sectors.into()));
        Some(format!("they take requests of {now}, and the device up to {was}"))
    } else if has_now(sys::UBLK_ATTR_READ_ONLY) {
        Some("they are read-only now".to_owned())
    } else if has_now(sys::UBLK_ATTR_VOLATILE_CACHE) {
        // Its users send no flushes, and nothing would be durable.
        Some(
            "they have a volatile write cache, and the device has none (set the drive's to `write \
             through` again, in queue/write_cache)"
                .to_owned(),
        )
    } else if layout.limits.dma_alignment > params_were.dma_alignment().unwrap_or(512) {
        let (now, was) = (layout.limits.dma_alignment, params_were.dma_alignment().unwrap_or(512));
        Some(format!(
            "their buffers begin at multiples of {now} bytes, and those of the device of {was}"
        ))
    } else if layout.has_namespace() {
        segments_stricter(now_params.segments()?, params_were.segments()?)
    } else {
        None
    }
}

/// Commands to a namespace are neither split nor copied by the kernel, as others are.
fn segments_stricter(
    now: &sys::ublk_param_segment,
    was: &sys::ublk_param_segment,
) -> Option<String> {
    let differs = |what: &str, now: u32, was: u32| {
        (now < was).then(|| format!("they take {now} {what}, and the device sends up to {was}"))
    };
    differs("segments", now.max_segments.into(), was.max_segments.into())
        .or_else(|| differs("bytes in a segment", now.max_segment_size, was.max_segment_size))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::server::config::TargetConfig;

    #[test]
    fn a_state_file_of_another_device_is_told() {
        let target = TargetConfig::Null { size: Bytes(1 << 20) };
        let config = DeviceConfig {
            on_death: OnDeath::Wait,
            lend: LendMode::Copy.into(),
            queues: 2,
            ..DeviceConfig::of_target(target)
        };
        let mut record = StateFile::new(3, "null", Vec::new(), config);
        record.diskseq = Some(17);
        record.nonce = Some(Nonce::own());
        let info = sys::ublksrv_ctrl_dev_info {
            nr_hw_queues: 2,
            queue_depth: 128,
            ublksrv_flags: Nonce::own().flags(),
            flags: uring_ext::feature::USER_RECOVERY.bit,
            ..Default::default()
        };
        assert_eq!(difference(&record, &info, Some(17)), None);
        // An older kernel does not tell the number.
        assert_eq!(difference(&record, &info, None), None);
        let differs = |record: &StateFile, info: &sys::ublksrv_ctrl_dev_info, diskseq| {
            difference(record, info, Some(diskseq)).unwrap()
        };
        assert!(differs(&record, &info, 18).contains("disk 17"));
        let other = |change: fn(&mut sys::ublksrv_ctrl_dev_info)| {
            let mut info = info;
            change(&mut info);
            differs(&record, &info, 17)
        };
        assert!(other(|info| info.nr_hw_queues = 3).contains("queues 2"));
        assert!(other(|info| info.queue_depth = 64).contains("depth 128"));
        // Other programs' devices have no mark.
        assert!(other(|info| info.ublksrv_flags = 0).contains("mark"));
        let reissue = |info: &mut sys::ublksrv_ctrl_dev_info| {
            info.flags |= uring_ext::feature::USER_RECOVERY_REISSUE.bit;
        };
        assert_eq!(other(reissue), "it says --on-death wait, and the driver reissue");
        assert!(other(|info| info.flags |= IO_DESC_SIZE.bit).contains("descriptors"));
        record.diskseq = None;
        assert_eq!(difference(&record, &info, Some(17)), None);
        record.nonce = Some(Nonce::draw());
        assert!(difference(&record, &info, Some(17)).unwrap().contains("mark"));
    }
}

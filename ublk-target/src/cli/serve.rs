//! `serve`.

mod file;

use std::io::{self, Write};
use std::process::ExitCode;

use sd_notify::NotifyState;
use ublk_target::control::fleet::{self, FleetError, FleetEvent, FleetHooks};
use ublk_target::device::role_file::Role;
use ublk_target::os::inherited;

use super::Serve;
use super::logging::{self, To};
use super::partitions;
use super::processes::{delete_by, quiesce_by};
use super::role;
use super::terminal::{print_line, say};

/// Serves the devices of a file.
pub fn serve(args: &Serve, verbose: u8) -> anyhow::Result<ExitCode> {
    logging::start(verbose, "info", To::Terminal);
    let path = std::path::absolute(&args.config)?;
    let config = match file::read(&path) {
        Ok(config) => config,
        Err(faults) => return Ok(refuse(&faults)),
    };
    if args.check {
        match fleet::check(&config) {
            Ok(unknown) => {
                unknown.iter().for_each(|why| say!("the driver's features were not checked: {why}"))
            }
            Err(faults) => return Ok(refuse(&faults)),
        }
        let count = config.devices.len();
        let devices = if count == 1 { "device" } else { "devices" };
        print_line(format_args!("{}: {count} {devices}, no errors", path.display()))?;
        return Ok(ExitCode::SUCCESS);
    }
    inherited::shed();
    let _file = role::say_of_device(Role::Fleet, None);
    let hooks = FleetHooks {
        read: Box::new(|| file::read(&path)),
        command: Box::new(delete_by),
        quiesce: Box::new(quiesce_by),
        tell: Box::new(tell),
    };
    match fleet::serve(config, &hooks) {
        Ok(()) => Ok(ExitCode::SUCCESS),
        Err(FleetError::Faults(faults)) => Ok(refuse(&faults)),
        Err(error) => Err(error.into()),
    }
}

/// Prints a line for each error.
fn refuse(faults: &[String]) -> ExitCode {
    for fault in faults {
        say!("{fault}");
    }
    ExitCode::FAILURE
}

/// The longest start of a device, in microseconds: each wait for leftovers of a dead server is
/// bounded by 30 s. A service manager with a shorter limit would stop the devices that are already
/// live.
const LONGEST_BEGIN_US: u32 = 180_000_000;

/// Notifies the service manager, and prints live devices on standard output.
fn tell(news: &FleetEvent) {
    let states = match news {
        FleetEvent::Begins(done, wanted) => {
            let status = format!("starting device {} of {wanted}", done + 1);
            let extended = NotifyState::ExtendTimeoutUsec(LONGEST_BEGIN_US);
            return notify(&[extended, NotifyState::Status(&status)]);
        }
        FleetEvent::Ready(devices, wanted) => {
            partitions::await_all(devices.iter().map(|device| device.id));
            let mut out = io::stdout().lock();
            for device in devices {
                let _ = writeln!(out, "{}", device.device.display());
            }
            let _ = out.flush();
            let status = format!("{} of {wanted} devices", devices.len());
            return notify(&[NotifyState::Ready, NotifyState::Status(&status)]);
        }
        FleetEvent::Reloading => match NotifyState::monotonic_usec_now() {
            Ok(now) => vec![NotifyState::Reloading, now],
            Err(_) => vec![NotifyState::Reloading],
        },
        FleetEvent::Reloaded(made, count) => {
            partitions::await_all(made.iter().copied());
            let status = format!("{count} devices");
            log::info!("the file was read again: {status}");
            return notify(&[NotifyState::Ready, NotifyState::Status(&status)]);
        }
    };
    notify(&states);
}

fn notify(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        log::warn!("cannot tell the service manager: {error}");
    }
}

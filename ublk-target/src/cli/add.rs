//! `add`.

use std::io::{self, Write};
use std::process::ExitCode;

use ublk_target::lend::Choice;
use ublk_target::server::config::{DeviceConfig, DeviceError, TargetConfig};
use ublk_target::server::device::serve;
use ublk_target::state::{Description, log_path};
use uring_ext::Errno;

use super::device::Device;
use super::{Target, daemon, start_log};

/// Adds a device and serves it, here or in a process of its own.
pub fn add(target: &Target, verbose: u8) -> anyhow::Result<ExitCode> {
    let (target, device) = resolve(target);
    if !device.foreground && !device.daemon {
        return daemon::start_server();
    }
    start_log(verbose, "info");
    let config = DeviceConfig {
        id: device.id,
        queues: device.queues,
        depth: device.depth,
        lend: device.lend,
        first_slot: device.first_slot,
        io_lane: device.io_lane,
        io_timeout: device.io_timeout,
        passthru: device.passthru,
        polling: device.polling(),
        unpolled: device.unpolled(),
        target,
    };
    if device.daemon {
        daemon::leave_session()?;
        if verbose == 0 {
            // Until the log is a file it is the user's terminal.
            log::set_max_level(log::LevelFilter::Warn);
        }
    }
    serve(&config, &daemon::start_stopper, |description, choice| {
        announce(device, description, choice)
    })?;
    Ok(ExitCode::SUCCESS)
}

/// The target, and the options of the device.
fn resolve(target: &Target) -> (TargetConfig, &Device) {
    match target {
        Target::Null { size, device } => (TargetConfig::Null { size: *size }, device),
        Target::Loop { file, device } => (TargetConfig::Loop { file: file.clone() }, device),
        Target::Linear { file, device } => {
            let extents = file.iter().map(|extent| extent.0.clone()).collect();
            (TargetConfig::Linear { extents }, device)
        }
        Target::Stripe { file, chunk, device } => {
            (TargetConfig::Stripe { chunk: *chunk, files: file.clone() }, device)
        }
        Target::Fault { rule, seed, target } => {
            let (target, device) = resolve(target);
            let target = Box::new(target);
            (TargetConfig::Fault { rules: rule.clone(), seed: *seed, target }, device)
        }
    }
}

/// Tells the user that the device is live. A server in the background has its log by then.
fn announce(
    device: &Device,
    description: &Description,
    choice: &Choice,
) -> Result<(), DeviceError> {
    if choice.is_fallback {
        eprintln!("ublk-target: note: lend mode {}: {}", choice.mode, choice.reason);
    }
    let line = if device.json {
        serde_json::to_string(description).map_err(|_| DeviceError::Abandoned)?
    } else {
        description.device.display().to_string()
    };
    if !device.daemon {
        return say(&mut io::stdout().lock(), &line);
    }
    let log = log_path(description.id);
    let mut user = daemon::log_to(&log).map_err(|error| DeviceError::Setup {
        doing: format!("cannot log to {}", log.display()),
        errno: Errno::of(&error),
    })?;
    log::set_max_level(log::LevelFilter::Trace);
    log::info!("serving {line}");
    say(&mut user, &line)
}

fn say(user: &mut impl Write, line: &str) -> Result<(), DeviceError> {
    writeln!(user, "{line}").and_then(|()| user.flush()).map_err(|_| DeviceError::Abandoned)
}

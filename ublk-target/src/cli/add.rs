//! `add`.

use std::io::{self, Write};
use std::process::ExitCode;

use ublk_target::lend::Choice;
use ublk_target::server::device::{DeviceConfig, TargetConfig, serve};
use ublk_target::state::{Description, log_path};

use super::{Device, Target, daemon, start_log};

/// Adds a device and serves it, here or in a process of its own.
pub fn add(target: &Target, verbose: u8) -> anyhow::Result<ExitCode> {
    let (target, device) = match target {
        Target::Null { size, device } => (TargetConfig::Null { size: *size }, device),
        Target::Loop { file, device } => (TargetConfig::Loop { file: file.clone() }, device),
    };
    if !device.foreground && !device.daemon {
        return daemon::start_server();
    }
    start_log(verbose, "info");
    let config = DeviceConfig {
        id: device.id,
        queues: device.queues,
        depth: device.depth,
        lend: device.lend,
        target,
    };
    if device.daemon {
        daemon::leave_session()?;
        if verbose == 0 {
            // Until the log is a file it is the user's terminal.
            log::set_max_level(log::LevelFilter::Warn);
        }
    }
    serve(&config, |description, choice| announce(device, description, choice))?;
    Ok(ExitCode::SUCCESS)
}

/// Tells the user that the device is live.
fn announce(device: &Device, description: &Description, choice: &Choice) -> io::Result<()> {
    if choice.is_fallback {
        eprintln!("ublk-target: note: lend mode {}: {}", choice.mode, choice.reason);
    }
    let mut out = io::stdout().lock();
    if device.json {
        writeln!(out, "{}", serde_json::to_string(description)?)?;
    } else {
        writeln!(out, "{}", description.device.display())?;
    }
    out.flush()?;
    if device.daemon {
        daemon::log_to(&log_path(description.id))?;
        log::set_max_level(log::LevelFilter::Trace);
        log::info!("serving {}", serde_json::to_string(description)?);
    }
    Ok(())
}

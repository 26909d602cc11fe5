//! `add`.

use std::process::ExitCode;

use ublk_target::config::on_death::OnDeath;
use ublk_target::config::{DeviceConfig, TargetConfig};
use ublk_target::control::recoverable;
use ublk_target::control::server::serve;
use uring_ext::control::Control;

use super::Target;
use super::device::{Device, Life};
use super::partitions;
use super::processes::{self, announce};

/// Adds a device and serves it, in this process or in its own.
pub fn add(target: &Target, verbose: u8) -> anyhow::Result<ExitCode> {
    let (config, device) = config(target);
    if device.life.supervise && config.on_death == OnDeath::Fail {
        anyhow::bail!(
            "--supervise needs a device that outlives its server; use `--on-death reissue` (or wait, \
             or error)"
        );
    }
    processes::live(&device.life, verbose, |life: &Life| {
        let waiting = device.id.filter(|_| device.or_recover).filter(|id| is_waiting(*id));
        if let Some(id) = waiting {
            return super::recover::serve(id, life);
        }
        serve(&config, life.supervisor, &processes::helpers(life), |description, choice| {
            if !config.no_part_scan {
                partitions::await_all(std::iter::once(description.id));
            }
            announce(life, description, Some(choice))
        })
    })
}

/// The configuration of a device, and its options.
pub fn config(target: &Target) -> (DeviceConfig, &Device) {
    let (target, device) = resolve(target);
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
        busy_wait: device.busy_wait,
        unpolled: device.unpolled(),
        on_death: device.on_death(),
        block_size: device.block_size,
        no_part_scan: device.no_part_scan,
        target,
    };
    (config, device)
}

/// Whether a device exists and its server is dead.
fn is_waiting(id: u32) -> bool {
    Control::open().is_ok_and(|control| recoverable::check(&control, id).is_ok())
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

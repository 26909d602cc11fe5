//! `add`.

use std::process::ExitCode;

use ublk_target::config::on_death::OnDeath;
use ublk_target::config::{BadLayers, DeviceConfig, LayerKind, Layers, TargetConfig};
use ublk_target::control::recoverable;
use ublk_target::control::server::serve;
use uring_ext::control::Control;

use super::Target;
use super::arguments::Layer;
use super::device::{Device, Life};
use super::partitions;
use super::processes::{self, announce};

/// Adds a device and serves it, in this process or in its own.
pub fn add(target: &Target, verbose: u8) -> anyhow::Result<ExitCode> {
    let (config, device) = config(target)?;
    if device.life.supervise && config.on_death == OnDeath::Fail {
        anyhow::bail!(
            "--supervise needs a device that outlives its server; use `--on-death reissue` (or wait, \
             or error)"
        );
    }
    processes::live(&device.life, None, verbose, |life: &Life| {
        let waiting = device.id.filter(|_| device.or_recover).filter(|id| is_waiting(*id));
        if let Some(id) = waiting {
            return Ok(super::recover::serve(id, life)?);
        }
        let helpers = processes::helpers(life);
        let served = serve(&config, life.supervisor, &helpers, |description, choice| {
            if !config.no_part_scan {
                partitions::await_all(std::iter::once(description.id));
            }
            announce(life, description, Some(choice))
        });
        Ok(served?)
    })
}

/// The configuration of a device, and its options.
///
/// # Errors
/// There are too many layers.
pub fn config(target: &Target) -> Result<(DeviceConfig, &Device), BadLayers> {
    let mut layers = Vec::new();
    let (target, device) = resolve(target, &mut layers);
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
        layers: {
            let inner = device.layer.iter().map(|layer| (layer.name.clone(), layer.kind.clone()));
            Layers::named(layers.into_iter().map(|kind| (None, kind)).chain(inner))?
        },
    };
    Ok((config, device))
}

/// Whether a device exists and its server is dead.
fn is_waiting(id: u32) -> bool {
    Control::open().is_ok_and(|control| recoverable::check(&control, id).is_ok())
}

/// The target, and the options of the device. What is given around the target are its layers.
pub fn resolve<'a>(target: &'a Target, layers: &mut Vec<LayerKind>) -> (TargetConfig, &'a Device) {
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
        Target::Fault { faults, target } => {
            layers.push(Layer::Fault(faults.clone()).kind());
            resolve(target, layers)
        }
    }
}

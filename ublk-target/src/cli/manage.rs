//! `del`, `list` and `features`.

use std::io::Write;
use std::process::ExitCode;

use serde_json::json;
use ublk_target::delete::delete as delete_device;
use ublk_target::state::{self, Description};
use ublk_target::units::Bytes;
use ublk_target::{kernel, state::device_ids};
use uring_ext::control::Control;
use uring_ext::feature;

use super::table::{Align, table};
use super::{Del, Features, List};

/// Deletes one device or all.
pub fn delete(del: &Del) -> anyhow::Result<ExitCode> {
    let control = Control::open()?;
    let mut progress = |what: &str| eprintln!("ublk-target: {what} …");
    if let Some(id) = del.which.id {
        delete_device(&control, id, &mut progress)?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut code = ExitCode::SUCCESS;
    for id in device_ids() {
        if let Some(server) = foreign_server(&control, id) {
            eprintln!("ublk-target: note: device {id} is served by {server} and is left alone");
            continue;
        }
        match delete_device(&control, id, &mut progress) {
            // Deleted by somebody else meanwhile.
            Ok(()) | Err(ublk_target::delete::DeleteError::NoDevice(_)) => {}
            Err(error) => {
                eprintln!("ublk-target: {error}");
                code = ExitCode::FAILURE;
            }
        }
    }
    Ok(code)
}

/// The live process of another program that serves a device.
fn foreign_server(control: &Control, id: u32) -> Option<String> {
    let pid = Description::of(control, id).ok()?.pid?;
    let name = ublk_target::backing::usage::process_name(pid);
    (name != env!("CARGO_PKG_NAME")).then(|| format!("{name} ({pid})"))
}

/// Shows one device or all.
pub fn list(list: &List) -> anyhow::Result<ExitCode> {
    let control = Control::open()?;
    let devices: Vec<_> = match list.id {
        Some(id) => {
            let described = Description::of(&control, id);
            if described.as_ref().is_err_and(state::is_missing) {
                anyhow::bail!("there is no ublk device {id}");
            }
            vec![described?]
        }
        // One that goes away meanwhile is not shown.
        None => device_ids().iter().filter_map(|id| Description::of(&control, *id).ok()).collect(),
    };
    let mut out = std::io::stdout().lock();
    if list.json {
        match (list.id, devices.first()) {
            (Some(_), Some(device)) => writeln!(out, "{}", serde_json::to_string_pretty(device)?)?,
            _ => writeln!(out, "{}", serde_json::to_string_pretty(&devices)?)?,
        }
    } else {
        let header = [
            "ID", "DEVICE", "STATE", "TARGET", "LEND", "PID", "QUEUES", "DEPTH", "SIZE", "BACKINGS",
        ];
        let mut rows = vec![header.map(str::to_owned)];
        rows.extend(devices.iter().map(row));
        write!(out, "{}", table(&rows, Align::Left))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn row(device: &Description) -> [String; 10] {
    let backings = device.backings.iter().map(|path| path.display().to_string());
    let or_dash = |text: String| if text.is_empty() { "-".to_owned() } else { text };
    [
        device.id.to_string(),
        device.device.display().to_string(),
        device.state.clone(),
        device.target.clone(),
        device.lend.clone(),
        or_dash(device.pid.map_or_else(String::new, |pid| pid.to_string())),
        device.queues.to_string(),
        device.depth.to_string(),
        Bytes(device.size_bytes).to_string(),
        or_dash(backings.collect::<Vec<_>>().join(",")),
    ]
}

/// Shows the features of the driver.
pub fn features(args: &Features) -> anyhow::Result<ExitCode> {
    let found = kernel::features(&Control::open()?)?;
    let release = kernel::release().unwrap_or_default();
    let mut out = std::io::stdout().lock();
    if args.json {
        let named: serde_json::Map<_, _> = feature::ALL
            .iter()
            .map(|feature| (feature.name.to_owned(), found.has(*feature).into()))
            .collect();
        let all = json!({
            "kernel": release,
            "bits": format!("{:#x}", found.0),
            "features": named,
            "unknown_bits": format!("{:#x}", found.unknown_bits()),
        });
        writeln!(out, "{}", serde_json::to_string_pretty(&all)?)?;
        return Ok(ExitCode::SUCCESS);
    }
    writeln!(out, "kernel {release}, ublk features {:#x}", found.0)?;
    let mut rows = vec![["FEATURE", "HERE", "SINCE"].map(str::to_owned)];
    for feature in feature::ALL {
        let here = if found.has(*feature) { "yes" } else { "no" };
        rows.push([feature.name, here, feature.since].map(str::to_owned));
    }
    write!(out, "{}", table(&rows, Align::Left))?;
    if found.unknown_bits() != 0 {
        writeln!(out, "and bits that this program does not know: {:#x}", found.unknown_bits())?;
    }
    Ok(ExitCode::SUCCESS)
}

//! `del` and `list`.

use std::collections::BTreeSet;
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

use ublk_engine::units::Bytes;
use ublk_target::backing::usage;
use ublk_target::control::deletion::{self, DeleteError, Deletion};
use ublk_target::control::leftovers;
use ublk_target::device::description::{self, Description, device_ids};
use ublk_target::device::paths::RUN_DIR;
use ublk_target::device::processes::{self, Role};
use ublk_target::device::standing::{Order, sorted};
use ublk_target::device::state_file::recorded_ids;
use uring_ext::Errno;
use uring_ext::control::Control;

use super::processes::delete_by;
use super::role;
use super::table::{Align, table};
use super::terminal::say;
use super::{Del, List};

/// Deletes one device or all.
pub fn delete(del: &Del) -> anyhow::Result<ExitCode> {
    let control = Control::open()?;
    let mut deletion = Deletion {
        control: &control,
        force: del.force,
        helper: &delete_by,
        progress: &mut |what| say!("{what}"),
    };
    if let Some(id) = del.which.id() {
        deletion.delete(id)?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut failed = false;
    let mut failure = |error: DeleteError| {
        say!("{error}");
        failed = true;
    };
    for id in sorted(&all_ids(), Order::UpperFirst) {
        if let Some(server) = foreign_server(id) {
            say!("note: device {id} is served by {server} and is left alone");
            continue;
        }
        match deletion.delete(id) {
            // Deleted by somebody else meanwhile.
            Ok(()) | Err(DeleteError::NoDevice(_)) => {}
            Err(error) => failure(error),
        }
    }
    for process in leftovers::without_device(&control) {
        if let Err(error) = deletion.end(process) {
            failure(error);
        }
    }
    let _ = leftovers::remove_files(&control);
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// The ids of all devices, including deleted devices that are still open.
fn all_ids() -> BTreeSet<u32> {
    let mut ids: BTreeSet<u32> = device_ids().into_iter().collect();
    ids.extend(recorded_ids(Path::new(RUN_DIR)));
    ids.extend(processes::all().iter().filter_map(|process| process.device));
    ids
}

/// Gives the driver a command, for a process that must not do it itself.
pub fn command(id: u32, command: deletion::Command) -> anyhow::Result<ExitCode> {
    let _file = role::say_of_device(Role::Helper, Some(id));
    match deletion::command(id, command) {
        Err(error) if error.errno() == Some(Errno::EBUSY) => Ok(ExitCode::from(deletion::IN_USE)),
        ended => ended.map(|()| ExitCode::SUCCESS).map_err(Into::into),
    }
}

/// The process of another program that serves a device.
fn foreign_server(id: u32) -> Option<String> {
    let servers = usage::servers_of(id);
    let foreign = servers.iter().find(|server| server.name != env!("CARGO_PKG_NAME"))?;
    Some(foreign.to_string())
}

/// Shows one device or all.
pub fn list(list: &List) -> anyhow::Result<ExitCode> {
    let control = Control::open()?;
    let mut code = ExitCode::SUCCESS;
    let devices: Vec<_> = match list.which.id() {
        Some(id) => {
            let described = Description::of(&control, id);
            if described.as_ref().is_err_and(description::is_missing) {
                anyhow::bail!("there is no ublk device {id}");
            }
            vec![described?]
        }
        None => {
            let described = |id: u32| match Description::of(&control, id) {
                Ok(described) => Some(described),
                // It has gone away meanwhile.
                Err(error) if description::is_missing(&error) => None,
                Err(error) => {
                    say!("device {id}: {error}");
                    code = ExitCode::FAILURE;
                    None
                }
            };
            all_ids().into_iter().filter_map(described).collect()
        }
    };
    if list.which.id().is_none() {
        name_leftovers(&control);
    }
    let mut out = std::io::stdout().lock();
    if list.json {
        match (list.which.id(), devices.first()) {
            (Some(_), Some(device)) => writeln!(out, "{}", serde_json::to_string_pretty(device)?)?,
            _ => writeln!(out, "{}", serde_json::to_string_pretty(&devices)?)?,
        }
    } else {
        let header = [
            "ID",
            "DEVICE",
            "STATE",
            "TARGET",
            "LEND",
            "ON-DEATH",
            "PID",
            "SUPERVISOR",
            "QUEUES",
            "SIZE",
            "BACKINGS",
        ];
        let mut rows = vec![header.map(str::to_owned)];
        rows.extend(devices.iter().map(row));
        write!(out, "{}", table(&rows, Align::Left))?;
    }
    Ok(code)
}

fn row(device: &Description) -> [String; 11] {
    let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
    let backings = device.backings.iter().map(|path| path.display().to_string());
    let mut backings = backings.collect::<Vec<_>>().join(",");
    if device.page_cache {
        backings.push_str(" (page cache)");
    }
    let supervisor = match (device.supervisor, &device.given_up) {
        (_, Some(_)) => Some("given up".to_owned()),
        (Some(pid), None) if device.trouble.is_some() => Some(format!("{pid} (trying)")),
        (Some(pid), None) => Some(pid.to_string()),
        (None, None) => None,
    };
    [
        device.id.to_string(),
        device.device.display().to_string(),
        device.state.clone(),
        device.target.clone(),
        device.lend.clone(),
        device.on_death.clone(),
        or_dash(device.pid.map(|pid| pid.to_string())),
        or_dash(supervisor),
        format!("{} x {}", device.queues, device.depth),
        Bytes(device.size_bytes).to_string(),
        or_dash(Some(backings).filter(|backings| !backings.is_empty())),
    ]
}

/// Removes files without a device, and lists other leftovers of dead servers.
fn name_leftovers(control: &Control) {
    for file in leftovers::remove_files(control) {
        say!("note: removed {}, which belonged to no device", file.display());
    }
    for process in leftovers::processes(control) {
        say!("note: {process} has no device; `ublk-target del --all` ends it");
    }
}

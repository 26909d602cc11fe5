//! Leftovers of dead servers: files of deleted devices, and processes without a device.
//!
//! A device that is being added is not a leftover. A file is stale once its device is gone, or once
//! no process writes it any more. A device gets its files only after it was added.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use uring_ext::control::Control;

use crate::device::description;
use crate::device::paths::RUN_DIR;
use crate::device::processes::{self, Process, Role};
use crate::device::role_file;
use crate::os::own_files;
use crate::os::procfs;
use crate::socket;

/// A younger process without a device may be about to add one.
const TIME_TO_ADD: Duration = Duration::from_secs(5);

/// An entry in the directory of the state files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Entry {
    Record(u32),
    /// A supervisor's report on a device.
    Trouble(u32),
    /// An unfinished file.
    HalfWritten,
    Socket(u32),
    /// The log of a device that had no log in the usual directory.
    Log(u32),
}

impl Entry {
    fn parse(name: &str) -> Option<Self> {
        let (id, kind) = name.split_once('.')?;
        let id = id.parse().ok()?;
        match kind {
            "json" => Some(Self::Record(id)),
            "sock" => Some(Self::Socket(id)),
            "log" => Some(Self::Log(id)),
            "trouble" => Some(Self::Trouble(id)),
            _ => {
                let is_written = matches!(own_files::whole_name(kind)?, "json" | "trouble");
                is_written.then_some(Self::HalfWritten)
            }
        }
    }

    /// Whether nobody needs it any more.
    fn is_left(self, control: &Control, directory: &Path, path: &Path) -> bool {
        match self {
            Self::HalfWritten => !own_files::is_being_written(path),
            // A device gets its files only after it was added.
            Self::Record(id) | Self::Log(id) | Self::Trouble(id) => is_gone(control, id),
            Self::Socket(id) => socket::is_deserted(directory, id) && is_gone(control, id),
        }
    }
}

fn is_gone(control: &Control, id: u32) -> bool {
    control.info(id).is_err_and(|error| description::is_missing(&error))
}

/// Removes the files that belong to no device, and returns them.
#[must_use]
pub fn remove_files(control: &Control) -> Vec<PathBuf> {
    role_file::sweep(Path::new(RUN_DIR));
    remove(control, Path::new(RUN_DIR), |_| true)
}

/// Removes the files of a device that is gone.
pub fn remove_files_of(control: &Control, id: u32) {
    role_file::sweep(Path::new(RUN_DIR));
    let _ = remove(control, Path::new(RUN_DIR), |name| {
        name.split_once('.').is_some_and(|(of, _)| of.parse() == Ok(id))
    });
}

fn remove(control: &Control, directory: &Path, which: impl Fn(&str) -> bool) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(directory) else { return Vec::new() };
    let mut removed = Vec::new();
    for found in entries.flatten() {
        let name = found.file_name();
        let Some(name) = name.to_str().filter(|name| which(name)) else { continue };
        let is_left = Entry::parse(name)
            .is_some_and(|entry| entry.is_left(control, directory, &found.path()));
        // Another process has removed a missing one.
        if is_left && fs::remove_file(found.path()).is_ok() {
            removed.push(found.path());
        }
    }
    removed.sort();
    removed
}

/// Servers and supervisors of this program without a device, old enough to have added one.
#[must_use]
pub fn processes(control: &Control) -> Vec<Process> {
    let mut found = without_device(control);
    let now = procfs::now();
    found.retain(|process| process.started + TIME_TO_ADD < now);
    found
}

/// Servers and supervisors of this program without a device, including those that are about to add
/// one.
#[must_use]
pub fn without_device(control: &Control) -> Vec<Process> {
    let mut found = processes::all();
    let pids = without_device_among(&found, &description::device_ids(), |id| is_gone(control, id));
    found.retain(|process| pids.contains(&process.pid));
    found
}

/// The ids of the processes in `found` that belong to none of the devices `ids`.
fn without_device_among(
    found: &[Process],
    ids: &[u32],
    is_gone: impl Fn(u32) -> bool,
) -> BTreeSet<u32> {
    let known: BTreeSet<u32> =
        ids.iter().flat_map(|id| processes::pids_of_device(found, *id, None)).collect();
    let is_one = |process: &&Process| {
        let is_about_none = process.device.is_none_or(&is_gone);
        // Devices of a fleet come and go.
        let may_be_left = !matches!(process.role, Role::Command | Role::Fleet);
        may_be_left && is_about_none && !known.contains(&process.pid)
    };
    found.iter().filter(is_one).map(|process| process.pid).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::paths::MAX_ID;

    #[test]
    fn entries_are_told_apart() {
        let table = [
            ("3.json", Some(Entry::Record(3))),
            ("3.json.00123456789a", Some(Entry::HalfWritten)),
            ("3.json.77", None),
            ("3.trouble", Some(Entry::Trouble(3))),
            ("3.trouble.00123456789a", Some(Entry::HalfWritten)),
            ("3.log.00123456789a", None),
            ("3.log", Some(Entry::Log(3))),
            ("12.sock", Some(Entry::Socket(12))),
            ("3.json.", None),
            ("x.json", None),
            ("json", None),
            ("notes", None),
            ("3.txt", None),
        ];
        for (name, entry) in table {
            assert_eq!(Entry::parse(name), entry, "{name}");
        }
    }

    /// All facts come from one reading of the processes.
    #[test]
    fn processes_without_a_device_are_told_apart() {
        use Role::{Command, Fleet, Helper, Server, Supervisor};
        // Far above the ids of devices.
        let (there, too, gone) = (MAX_ID - 2, MAX_ID - 1, MAX_ID);
        let table = [
            (Server, Some(there), Some(102), false),
            // It supervises the one before. Its command line has no device.
            (Supervisor, None, None, false),
            (Supervisor, None, None, true),
            (Server, Some(gone), Some(103), true),
            (Server, None, None, true),
            (Helper, Some(too), None, false),
            (Helper, Some(gone), None, true),
            (Fleet, None, None, false),
            (Command, None, None, false),
            // The device has just been added.
            (Server, Some(there - 1), None, false),
        ];
        let found: Vec<_> = (101..)
            .zip(table)
            .map(|(pid, (role, device, supervisor, _))| {
                Process::made_up(pid, role, device, supervisor)
            })
            .collect();
        let wanted: BTreeSet<u32> =
            (101..).zip(table).filter(|(_, it)| it.3).map(|(pid, _)| pid).collect();
        assert_eq!(without_device_among(&found, &[there, too], |id| id == gone), wanted);
    }
}

//! Leftovers of dead servers: files of deleted devices, and processes without a device.
//!
//! A device that is being added is not a leftover. A file is stale once its device is gone, or once
//! no process writes it any more. A device gets its files only after it was added.

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
    let known: Vec<_> = description::device_ids()
        .into_iter()
        .flat_map(|id| processes::of_device(id, None))
        .map(|process| process.pid)
        .collect();
    found.retain(|process| {
        let is_about_none = process.device.is_none_or(|id| is_gone(control, id));
        // Devices of a fleet come and go.
        let may_be_left = !matches!(process.role, Role::Command | Role::Fleet);
        may_be_left && is_about_none && !known.contains(&process.pid)
    });
    found
}

#[cfg(test)]
mod tests {
    use super::*;

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
}

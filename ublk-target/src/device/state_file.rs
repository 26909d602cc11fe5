//! The state file of each device: what the next server needs.
//!
//! A state file is untrusted input. It is used only for data that the driver does not have (the
//! target and its backings), and only for the disk that it was written for. All its content is
//! checked as if a user had typed it.

mod version_3;

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use serde::{Deserialize, Serialize};

use crate::backing::identity::Known;
use crate::config::DeviceConfig;
use crate::device::mark::Nonce;
use crate::device::trouble::Trouble;
use crate::os::own_files;

/// The format of devices with layers that format 3 cannot hold.
const VERSION: u32 = 4;
/// The oldest format that is read. All other devices are written in it, so that earlier programs can
/// read their files after an upgrade: supervisors, which look for the program in them, and a server
/// that continues because the new program could not serve.
const OLDEST: u32 = 3;
/// The field of the checksum.
const CHECKSUM: &str = "crc32c";
/// The longest state file that is read, in bytes.
const MAX_BYTES: u64 = 1 << 20;

/// The path of this process's program, if its own mounts may lack it.
static PROGRAM: OnceLock<PathBuf> = OnceLock::new();

/// Sets the path of this process's program. Without effect on a second call.
pub fn adopt_program(path: &Path) {
    let _ = PROGRAM.set(path.to_owned());
}

/// The content of a state file: everything that the next server needs to serve the device as this
/// one does.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StateFile {
    /// Device id.
    pub id: u32,
    /// The disk's sequence number, unique since boot (Linux 5.15); absent until the device is live.
    pub diskseq: Option<u64>,
    /// The mark of the device, which distinguishes it from those of other processes.
    pub nonce: Option<Nonce>,
    /// Process id of the server.
    pub pid: u32,
    /// Process id of the supervisor.
    pub supervisor: Option<u32>,
    /// The program of the server.
    pub program: PathBuf,
    /// The number of servers that the device has had before.
    pub incarnation: u32,
    /// Name of the target with its layers.
    pub target: String,
    /// The backings, in the order of their index; none for targets without data.
    pub backings: Vec<Known>,
    /// The configuration of the device; paths are absolute.
    pub config: DeviceConfig,
}

/// Why a state file cannot be used.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum StateProblem {
    /// It does not exist.
    #[error("there is no state file {}", .0.display())]
    Missing(PathBuf),
    /// Others could have written it.
    #[error(
        "the state file {} is not trusted: it belongs to user {uid} and has mode {mode:o}; only \
         root may be able to write it", path.display()
    )]
    NotTrusted {
        /// The file.
        path: PathBuf,
        /// Its owner.
        uid: u32,
        /// Its permissions.
        mode: u32,
    },
    /// It cannot be read.
    #[error("the state file {} cannot be read: {error}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// The error.
        error: io::Error,
    },
    /// Its content is invalid.
    #[error("the state file {} is corrupt: {reason}", path.display())]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// The error.
        reason: String,
    },
    /// It is of another version of this program.
    #[error("the state file {} has format {found}, and this program knows {OLDEST} to \
             {VERSION}", path.display())]
    Version {
        /// The file.
        path: PathBuf,
        /// Its format.
        found: u64,
    },
}

impl StateFile {
    /// A state file for a device of the calling process.
    #[must_use]
    pub fn new(id: u32, backings: Vec<Known>, config: DeviceConfig) -> Self {
        Self {
            id,
            diskseq: None,
            nonce: None,
            pid: std::process::id(),
            supervisor: None,
            program: PROGRAM
                .get()
                .cloned()
                .or_else(|| std::env::current_exe().ok())
                .unwrap_or_default(),
            incarnation: 0,
            target: config.target_name(),
            backings,
            config,
        }
    }

    /// The path of a device's state file.
    #[must_use]
    pub fn path(directory: &Path, id: u32) -> PathBuf {
        directory.join(format!("{id}.json"))
    }

    /// Writes the file atomically.
    ///
    /// # Errors
    /// Errors of the file system; `EPERM` if others can write to the directory, `EFBIG` if it would be
    /// longer than what is read.
    pub fn write(&self, directory: &Path) -> io::Result<()> {
        own_files::directory(directory)?;
        let path = Self::path(directory, self.id);
        let mut text = self.to_text()?;
        text.push('\n');
        if text.len() as u64 > MAX_BYTES {
            return Err(io::Error::from_raw_os_error(libc::EFBIG));
        }
        own_files::replace(&path, text.as_bytes())?;
        // The device has a server now: the one that has written this.
        Trouble::is_over(directory, self.id);
        Ok(())
    }

    /// The record with its format, and a checksum over everything else.
    fn to_text(&self) -> io::Result<String> {
        let mut value = serde_json::to_value(self)?;
        let is_old = version_3::can_hold(&self.config.layers);
        if is_old {
            version_3::fold(&mut value);
        }
        value["version"] = if is_old { OLDEST } else { VERSION }.into();
        value[CHECKSUM] = checksum_of(&value).into();
        Ok(serde_json::to_string_pretty(&value)?)
    }

    /// Reads the file of a device. It checks the form and the checksum only; the caller must check
    /// the content.
    ///
    /// # Errors
    /// [`StateProblem`].
    pub fn read(directory: &Path, id: u32) -> Result<Self, StateProblem> {
        let path = Self::path(directory, id);
        let unreadable = |error: io::Error| {
            if error.kind() == io::ErrorKind::NotFound {
                StateProblem::Missing(path.clone())
            } else {
                StateProblem::Unreadable { path: path.clone(), error }
            }
        };
        let file = own_files::regular(&path, libc::O_NOFOLLOW).map_err(unreadable)?;
        let meta = file.metadata().map_err(unreadable)?;
        if !own_files::is_own(&meta) {
            let (uid, mode) = (meta.uid(), meta.mode() & 0o7777);
            return Err(StateProblem::NotTrusted { path, uid, mode });
        }
        let text = own_files::read_whole(&file, MAX_BYTES).map_err(unreadable)?;
        Self::parse(&text, id, &path)
    }

    fn parse(text: &str, id: u32, path: &Path) -> Result<Self, StateProblem> {
        let corrupt = |reason: String| StateProblem::Corrupt { path: path.to_owned(), reason };
        let mut value: serde_json::Value =
            serde_json::from_str(text).map_err(|error| corrupt(error.to_string()))?;
        let found = value.get("version").and_then(serde_json::Value::as_u64);
        let found = found.ok_or_else(|| corrupt("it has no version".to_owned()))?;
        if !(u64::from(OLDEST)..=u64::from(VERSION)).contains(&found) {
            return Err(StateProblem::Version { path: path.to_owned(), found });
        }
        // The file was changed, or a bit has flipped.
        let recorded = value.as_object_mut().and_then(|fields| fields.remove(CHECKSUM));
        let is = checksum_of(&value);
        if recorded.as_ref().and_then(serde_json::Value::as_str) != Some(&is) {
            return Err(corrupt(format!("its checksum is not {is}")));
        }
        // Supervisors of earlier programs wrote to it, too.
        for field in ["version", "given_up", "trouble"] {
            let _ = value.as_object_mut().and_then(|fields| fields.remove(field));
        }
        if found == u64::from(OLDEST) {
            version_3::unfold(&mut value).map_err(corrupt)?;
        }
        let state: Self =
            serde_json::from_value(value).map_err(|error| corrupt(error.to_string()))?;
        if state.id != id {
            return Err(corrupt(format!("it belongs to device {}", state.id)));
        }
        Ok(state)
    }

    /// Removes the files of a device, if there are any.
    pub fn remove(directory: &Path, id: u32) {
        // A missing file is fine. After another error, the remaining file is not trusted.
        let _ = fs::remove_file(Self::path(directory, id));
        Trouble::is_over(directory, id);
        // Its log, if it could not be in the directory of logs.
        let _ = fs::remove_file(directory.join(format!("{id}.log")));
        let Ok(entries) = fs::read_dir(directory) else { return };
        let half_written = ["json", "trouble"].map(|kind| format!("{id}.{kind}."));
        for entry in entries.flatten() {
            let name = entry.file_name();
            if half_written.iter().any(|start| name.to_string_lossy().starts_with(start)) {
                let _ = fs::remove_file(entry.path());
            }
        }
    }
}

/// The CRC-32C of a value as JSON without blanks, with sorted fields.
fn checksum_of(value: &serde_json::Value) -> String {
    format!("{:08x}", crc32c::crc32c(value.to_string().as_bytes()))
}

/// The ids of all devices that have a state file, in order.
#[must_use]
pub fn recorded_ids(directory: &Path) -> Vec<u32> {
    let Ok(entries) = fs::read_dir(directory) else { return Vec::new() };
    let mut ids: Vec<u32> = entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.strip_suffix(".json")?.parse().ok())
        .collect();
    ids.sort_unstable();
    ids
}

#[cfg(test)]
mod tests;

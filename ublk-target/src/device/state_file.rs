//! What is known about devices: the state file of each, and what the driver and sysfs say.
//!
//! A state file is untrusted when it is read back: it is used only for what the driver does not
//! know (the target and its backings), only for the disk that it was written for, and all that it
//! says is checked as if a user had typed it.

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

/// The format that this version writes and reads.
const VERSION: u32 = 3;
/// The field of the checksum.
const CHECKSUM: &str = "crc32c";
/// The longest state file that is read, in bytes.
const MAX_BYTES: u64 = 1 << 20;

/// Where the program of this process was found, if its own mounts need not have it.
static PROGRAM: OnceLock<PathBuf> = OnceLock::new();

/// Says where the program of this process was found. Without effect if that was said before.
pub fn adopt_program(path: &Path) {
    let _ = PROGRAM.set(path.to_owned());
}

/// The contents of a state file: all that the next server needs to serve the device as this one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StateFile {
    version: u32,
    /// Device id.
    pub id: u32,
    /// The disk's sequence number, which no other disk has had since the machine was booted
    /// (Linux 5.15); absent until the device is live.
    pub diskseq: Option<u64>,
    /// The mark of the device, which tells it from those of other processes.
    pub nonce: Option<Nonce>,
    /// Process id of the server.
    pub pid: u32,
    /// Process id of the supervisor.
    pub supervisor: Option<u32>,
    /// The program of the server.
    pub program: PathBuf,
    /// Servers that the device has had before.
    pub incarnation: u32,
    /// Name of the target.
    pub target: String,
    /// The backings, in the order of their index; none for targets without data.
    pub backings: Vec<Known>,
    /// What the device is made of; paths are absolute.
    pub config: DeviceConfig,
}

/// Why a state file cannot be used.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum StateProblem {
    /// There is none.
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
        /// Why.
        error: io::Error,
    },
    /// It makes no sense.
    #[error("the state file {} is corrupt: {reason}", path.display())]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// It is of another version of this program.
    #[error("the state file {} has format {found}, and this program reads {VERSION}", path.display())]
    Version {
        /// The file.
        path: PathBuf,
        /// Its format.
        found: u64,
    },
}

impl StateFile {
    /// A state file of this version, of the calling process.
    #[must_use]
    pub fn new(id: u32, target: &str, backings: Vec<Known>, config: DeviceConfig) -> Self {
        Self {
            version: VERSION,
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
            target: target.to_owned(),
            backings,
            config,
        }
    }

    /// The file of a device.
    #[must_use]
    pub fn path(directory: &Path, id: u32) -> PathBuf {
        directory.join(format!("{id}.json"))
    }

    /// Writes the file, whole or not at all.
    ///
    /// # Errors
    /// Those of the file system; `EPERM` if others can write to the directory.
    pub fn write(&self, directory: &Path) -> io::Result<()> {
        own_files::directory(directory)?;
        let path = Self::path(directory, self.id);
        let mut text = self.to_text()?;
        text.push('\n');
        own_files::replace(&path, text.as_bytes())?;
        // There is a server that has written this.
        Trouble::is_over(directory, self.id);
        Ok(())
    }

    /// The record with a checksum over all the rest of it.
    fn to_text(&self) -> io::Result<String> {
        let mut value = serde_json::to_value(self)?;
        let checksum = checksum_of(&value);
        if let Some(fields) = value.as_object_mut() {
            fields.insert(CHECKSUM.to_owned(), checksum.into());
        }
        Ok(serde_json::to_string_pretty(&value)?)
    }

    /// Reads the file of a device. Nothing that it says is believed because it is there: it is of
    /// the right shape, and no more.
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
        let (uid, mode) = (meta.uid(), meta.mode() & 0o7777);
        if uid != nix::unistd::geteuid().as_raw() || mode & 0o022 != 0 {
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
        match found.ok_or_else(|| corrupt("it has no version".to_owned()))? {
            found if found == u64::from(VERSION) => {}
            found => return Err(StateProblem::Version { path: path.to_owned(), found }),
        }
        // Somebody has changed it, or a bit has flipped on the way.
        let recorded = value.as_object_mut().and_then(|fields| fields.remove(CHECKSUM));
        let is = checksum_of(&value);
        if recorded.as_ref().and_then(serde_json::Value::as_str) != Some(&is) {
            return Err(corrupt(format!("its checksum is not {is}")));
        }
        // Supervisors wrote to it before, too.
        for field in ["given_up", "trouble"] {
            let _ = value.as_object_mut().and_then(|fields| fields.remove(field));
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
        // A missing file is what is wanted; another error leaves a file that nobody trusts.
        let _ = fs::remove_file(Self::path(directory, id));
        Trouble::is_over(directory, id);
        // Its log, if that could not be where logs belong.
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

/// The CRC-32C of a value as JSON without blanks, its fields in the order of their names.
fn checksum_of(value: &serde_json::Value) -> String {
    format!("{:08x}", crc32c::crc32c(value.to_string().as_bytes()))
}

/// The ids of all devices that there are state files of, in order.
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
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use ublk_engine::units::Bytes;

    use super::*;
    use crate::config::TargetConfig;

    fn state() -> StateFile {
        let known = Known {
            path: PathBuf::from("/dev/nvme0n1"),
            size: Bytes(1 << 30),
            identity: "wwid nvme.1".to_owned(),
            page_cache: false,
        };
        let file = PathBuf::from("/dev/nvme0n1");
        let config = DeviceConfig::of_target(TargetConfig::Fault {
            rules: vec!["p=0.5,error=EIO".parse().unwrap()],
            seed: 7,
            target: Box::new(TargetConfig::Loop { file }),
        });
        StateFile::new(3, "fault(loop)", vec![known], config)
    }

    #[test]
    fn a_state_file_is_read_back() {
        let directory = tempfile::tempdir().unwrap();
        let run = directory.path().join("run");
        state().write(&run).unwrap();
        assert_eq!(StateFile::read(&run, 3).unwrap(), state());
        assert!(matches!(StateFile::read(&run, 4), Err(StateProblem::Missing(_))));
        assert_eq!(recorded_ids(&run), [3]);
        // What a server that was killed has left.
        fs::write(run.join("3.json.77"), "{").unwrap();
        fs::write(run.join("33.json.77"), "{").unwrap();
        StateFile::remove(&run, 3);
        let left: Vec<_> = fs::read_dir(&run).unwrap().flatten().map(|e| e.file_name()).collect();
        assert_eq!(left, ["33.json.77"]);
        assert!(recorded_ids(&run).is_empty());
    }

    /// As the first programs with this format wrote it, whose supervisors wrote to it, too. Their devices
    /// are recovered and upgraded by later programs.
    const RECORDED: &str = r#"{"backings":[{"identity":"wwid nvme.1","page_cache":false,
        "path":"/dev/nvme0n1","size":1073741824}],"config":{"block_size":null,"busy_wait":"auto",
        "depth":128,"first_slot":null,"id":null,"io_lane":false,"io_timeout":null,"lend":"auto",
        "on_death":"fail","passthru":false,"polling":"off","queues":1,"target":{"fault":{"rules":
        ["p=0.5,error=EIO"],"seed":7,"target":{"loop":{"file":"/dev/nvme0n1"}}}},"unpolled":"refuse"},
        "crc32c":"e91c6068","diskseq":17,"given_up":null,"id":3,"incarnation":0,
        "nonce":"00123456789a","pid":4711,"program":"/usr/sbin/ublk-target","supervisor":null,
        "target":"fault(loop)","trouble":"the server (77) has died","version":3}"#;

    #[test]
    fn a_state_file_of_an_earlier_program_is_read() {
        let read = StateFile::parse(RECORDED, 3, Path::new("3.json")).unwrap();
        let expected = StateFile {
            diskseq: Some(17),
            nonce: Some("00123456789a".parse().unwrap()),
            pid: 4711,
            program: "/usr/sbin/ublk-target".into(),
            ..state()
        };
        assert_eq!(read, expected);
    }

    #[test]
    fn a_corrupt_state_file_is_not_believed() {
        let directory = tempfile::tempdir().unwrap();
        let whole = state().to_text().unwrap();
        let good = serde_json::to_value(state()).unwrap().to_string();
        // As somebody would change it who knows of the checksum.
        let summed = |old: &str, new: &str| {
            let changed = good.replace(old, new);
            assert_ne!(changed, good, "{old}");
            let sum = checksum_of(&serde_json::from_str(&changed).unwrap());
            format!("{{\"{CHECKSUM}\":\"{sum}\",{}", &changed[1..])
        };
        let bad = [
            (String::new(), "is corrupt"),
            (whole[..whole.len() / 2].to_owned(), "is corrupt"),
            ("[2]".to_owned(), "has no version"),
            (good.clone(), "its checksum"),
            (whole.replace("1073741824", "1073741840"), "its checksum"),
            (whole.replace("\"version\": 3", "\"version\": 99"), "has format 99"),
            (summed("\"id\":3", "\"id\":4"), "it belongs to device 4"),
            (summed("auto", "telepathy"), "telepathy"),
            (summed("error=EIO", "error=EGAD"), "EGAD"),
            (summed("\"queues\":1", "\"queues\":-1"), "is corrupt"),
            (summed("\"queues\":1", "\"queues\":1,\"quacks\":1"), "quacks"),
        ];
        for (text, expected) in bad {
            let path = StateFile::path(directory.path(), 3);
            fs::write(&path, &text).unwrap();
            let refused = StateFile::read(directory.path(), 3).unwrap_err().to_string();
            assert!(refused.contains(expected), "{text}: {refused}");
        }
    }

    #[test]
    fn no_flipped_bit_is_believed() {
        let good = state();
        let text = good.to_text().unwrap().into_bytes();
        for bit in 0..text.len() * 8 {
            let mut flipped = text.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            let Ok(flipped) = String::from_utf8(flipped) else { continue };
            // A blank may have become another one.
            if let Ok(read) = StateFile::parse(&flipped, 3, Path::new("3.json")) {
                assert_eq!(read, good, "bit {bit}");
            }
        }
    }

    #[test]
    fn a_state_file_that_others_can_write_is_not_trusted() {
        let directory = tempfile::tempdir().unwrap();
        state().write(directory.path()).unwrap();
        let path = StateFile::path(directory.path(), 3);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).unwrap();
        let refused = StateFile::read(directory.path(), 3).unwrap_err().to_string();
        assert!(refused.contains("mode 666"), "{refused}");
        // Nor is a link, which may lead anywhere.
        fs::rename(&path, directory.path().join("real")).unwrap();
        std::os::unix::fs::symlink("real", &path).unwrap();
        assert!(matches!(
            StateFile::read(directory.path(), 3),
            Err(StateProblem::Unreadable { .. })
        ));
    }

    #[test]
    fn a_pipe_in_the_place_of_a_state_file_is_not_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        for name in ["3.json", "3.json.00123456789a"] {
            let mode = nix::sys::stat::Mode::S_IRWXU;
            nix::unistd::mkfifo(&directory.path().join(name), mode).unwrap();
        }
        let refused = StateFile::read(directory.path(), 3).unwrap_err().to_string();
        assert!(refused.ends_with("cannot be read: it is not a regular file"), "{refused}");
        assert!(!own_files::is_being_written(&directory.path().join("3.json.00123456789a")));
    }
}

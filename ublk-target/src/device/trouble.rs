//! The reason why a device has no server, written by its supervisor.
//!
//! The supervisor writes it to its own file. The state file belongs to the server: a server that
//! was started by hand meanwhile must not lose what it has just recorded.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::os::own_files;

/// A supervisor's report on a device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trouble {
    /// Why there is no server: the last error of the last one, or how it died.
    pub why: String,
    /// The supervisor has given up.
    pub given_up: bool,
}

/// The longest file that is read, in bytes.
const MAX_BYTES: u64 = 64 << 10;

impl Trouble {
    fn path(directory: &Path, id: u32) -> PathBuf {
        directory.join(format!("{id}.trouble"))
    }

    /// Writes it, unless the file already has it.
    ///
    /// # Errors
    /// Errors of the file system; `EPERM` if others can write to the directory.
    pub fn write(&self, directory: &Path, id: u32) -> io::Result<()> {
        if Self::read(directory, id).as_ref() == Some(self) {
            return Ok(());
        }
        own_files::directory(directory)?;
        own_files::replace(&Self::path(directory, id), serde_json::to_string(self)?.as_bytes())
    }

    /// The report on a device, if there is a valid one that no other user can have written.
    #[must_use]
    pub fn read(directory: &Path, id: u32) -> Option<Self> {
        let file = own_files::regular(&Self::path(directory, id), libc::O_NOFOLLOW).ok()?;
        if !own_files::is_own(&file.metadata().ok()?) {
            return None;
        }
        serde_json::from_str(&own_files::read_whole(&file, MAX_BYTES).ok()?).ok()
    }

    /// Removes the report: the device has a server, or is gone.
    pub fn is_over(directory: &Path, id: u32) {
        // A missing file is fine. A file that stays is ignored while the device has a server.
        let _ = fs::remove_file(Self::path(directory, id));
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn trouble_is_told_until_it_is_over() {
        let directory = tempfile::tempdir().unwrap();
        let run = directory.path().join("run");
        let trouble = Trouble { why: "it is so".to_owned(), given_up: true };
        trouble.write(&run, 3).unwrap();
        assert_eq!(Trouble::read(&run, 3), Some(trouble));
        assert_eq!(Trouble::read(&run, 4), None);
        fs::write(run.join("3.trouble"), "{").unwrap();
        assert_eq!(Trouble::read(&run, 3), None);
        Trouble::is_over(&run, 3);
        // Other users could have written this file, and nothing waits for a supervisor that has given up.
        let planted = run.join("3.trouble");
        fs::write(&planted, r#"{"why":"so","given_up":true}"#).unwrap();
        for (mode, is_believed) in [(0o644, true), (0o664, false), (0o646, false)] {
            fs::set_permissions(&planted, fs::Permissions::from_mode(mode)).unwrap();
            assert_eq!(Trouble::read(&run, 3).is_some(), is_believed, "{mode:o}");
        }
        Trouble::is_over(&run, 3);
        assert_eq!(fs::read_dir(&run).unwrap().count(), 0);
    }
}

//! Finds the emulated drives.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::wait_for;

/// A namespace of an NVMe drive, as the guest's kernel sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Drive {
    /// Name of the controller (`nvme1`).
    pub controller: String,
    /// Name of the block device (`nvme1n1`).
    pub name: String,
}

impl Drive {
    /// Finds the first namespace of the drive with a serial number.
    ///
    /// # Errors
    /// When there is none within a time that covers scanning.
    pub fn by_serial(serial: &str) -> Result<Self> {
        Self::by_serial_and_nsid(serial, 1)
    }

    /// Finds a namespace of the drive with a serial number.
    ///
    /// # Errors
    /// When there is none within a time that covers scanning.
    pub fn by_serial_and_nsid(serial: &str, nsid: u32) -> Result<Self> {
        wait_for(&format!("NVMe drive {serial}"), Duration::from_secs(30), || {
            Ok(find(Path::new("/sys/class/nvme"), serial, nsid))
        })
    }

    /// The block device.
    pub fn path(&self) -> PathBuf {
        Path::new("/dev").join(&self.name)
    }

    /// The character device for passthrough commands (`/dev/ng1n1`).
    pub fn char_path(&self) -> PathBuf {
        Path::new("/dev").join(self.name.replacen("nvme", "ng", 1))
    }

    /// Reads an attribute below `/sys/block/NAME`.
    ///
    /// # Errors
    /// When it is not there.
    pub fn attribute(&self, attribute: &str) -> Result<String> {
        let path = Path::new("/sys/block").join(&self.name).join(attribute);
        let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
        Ok(text.trim().to_owned())
    }

    /// Reads an attribute that is a number.
    ///
    /// # Errors
    /// When it is not there or no number.
    pub fn number(&self, attribute: &str) -> Result<u64> {
        let text = self.attribute(attribute)?;
        text.parse().with_context(|| format!("{attribute} of {}: {text}", self.name))
    }

    /// Size in bytes.
    ///
    /// # Errors
    /// When the attribute cannot be read.
    pub fn size_bytes(&self) -> Result<u64> {
        Ok(self.number("size")? * 512)
    }

    /// Makes the drive read as zeros again.
    ///
    /// # Errors
    /// When the discard fails.
    pub fn wipe(&self) -> Result<()> {
        let path = self.path();
        let Some(path) = path.to_str() else { bail!("odd name") };
        super::process::run(&["blkdiscard", "--force", path]).map(drop)
    }
}

/// Goes by attributes: the numbers in device names follow the order in which
/// namespaces were found, not their identifiers.
fn find(class: &Path, serial: &str, nsid: u32) -> Option<Drive> {
    let attribute = |path: PathBuf| fs::read_to_string(path).unwrap_or_default().trim().to_owned();
    for controller in fs::read_dir(class).ok()?.flatten() {
        if attribute(controller.path().join("serial")) != serial {
            continue;
        }
        for entry in fs::read_dir(controller.path()).ok()?.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let is_block = name.starts_with("nvme") && entry.path().join("size").exists();
            if is_block && attribute(entry.path().join("nsid")) == nsid.to_string() {
                let controller = controller.file_name().to_string_lossy().into_owned();
                return Some(Drive { controller, name });
            }
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drives_are_found_by_serial_and_nsid() {
        let class = tempfile::tempdir().unwrap();
        for (controller, serial) in [("nvme0", "ublk-root"), ("nvme3", "drive0")] {
            let path = class.path().join(controller);
            // Found in this order; passthrough nodes have no size.
            for (name, nsid) in [("n1", 12), ("n2", 1)] {
                let namespace = path.join(format!("{controller}{name}"));
                fs::create_dir_all(&namespace).unwrap();
                fs::write(namespace.join("size"), "8\n").unwrap();
                fs::write(namespace.join("nsid"), format!("{nsid}\n")).unwrap();
            }
            fs::create_dir_all(path.join("ng3n2")).unwrap();
            fs::write(path.join("ng3n2/nsid"), "2\n").unwrap();
            fs::write(path.join("serial"), format!("{serial:<20}\n")).unwrap();
        }
        let name = |serial, nsid| find(class.path(), serial, nsid).map(|drive| drive.name);
        assert_eq!(name("drive0", 1).as_deref(), Some("nvme3n2"));
        assert_eq!(name("drive0", 12).as_deref(), Some("nvme3n1"));
        assert_eq!(name("drive0", 2), None);
        assert_eq!(name("drive", 1), None);
    }

    #[test]
    fn passthrough_has_a_node_of_its_own() {
        let drive = Drive { controller: "nvme1".into(), name: "nvme1n2".into() };
        assert_eq!(drive.char_path(), Path::new("/dev/ng1n2"));
    }
}

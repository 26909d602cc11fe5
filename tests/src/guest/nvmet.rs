//! NVMe controllers of the kernel's own (`nvmet`, transport `loop`), whose namespace is another
//! block device.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};

use super::{process, wait_for};

const CONFIG: &str = "/sys/kernel/config/nvmet";
/// By which the namespace is recognised.
const UUID: &str = "75626c6b-0000-4000-8000-000000000001";
const NAME: &str = "ublk-power-cut";

/// A controller that goes with its handle. There can be one at a time.
#[derive(Debug)]
pub struct NvmeOverBlock {
    instance: Option<u32>,
    gone: bool,
}

fn subsystem() -> PathBuf {
    Path::new(CONFIG).join("subsystems").join(NAME)
}

fn namespace() -> PathBuf {
    subsystem().join("namespaces/1")
}

fn port() -> PathBuf {
    Path::new(CONFIG).join("ports/1")
}

fn put(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("write {text} to {}", path.display()))
}

impl NvmeOverBlock {
    /// Makes a controller with one namespace, and connects it.
    ///
    /// # Errors
    /// When the kernel lacks the modules, or there is one already.
    pub fn new(device: &Path) -> Result<Self> {
        process::run(&["modprobe", "nvme-loop"])?;
        let mut this = Self { instance: None, gone: false };
        fs::create_dir(subsystem())?;
        put(&subsystem().join("attr_allow_any_host"), "1")?;
        fs::create_dir(namespace())?;
        put(&namespace().join("device_path"), &device.to_string_lossy())?;
        put(&namespace().join("device_uuid"), UUID)?;
        put(&namespace().join("enable"), "1")?;
        fs::create_dir(port())?;
        put(&port().join("addr_trtype"), "loop")?;
        symlink(subsystem(), port().join("subsystems").join(NAME))?;
        this.instance = Some(connect().context("connect an NVMe controller")?);
        Ok(this)
    }

    /// The generic character device of the namespace (`/dev/ng1n1`).
    ///
    /// # Errors
    /// When it does not come.
    pub fn char_path(&self) -> Result<PathBuf> {
        wait_for("a namespace over a block device", Duration::from_secs(30), || {
            for entry in fs::read_dir("/sys/block")?.flatten() {
                let name = entry.file_name().to_string_lossy().into_owned();
                let uuid = fs::read_to_string(entry.path().join("uuid")).unwrap_or_default();
                let node = Path::new("/dev").join(name.replacen("nvme", "ng", 1));
                // The paths of a namespace (`nvme1c1n1`) have no node.
                if uuid.trim() == UUID && node.exists() {
                    return Ok(Some(node));
                }
            }
            Ok(None)
        })
    }

    /// Takes it away.
    ///
    /// # Errors
    /// When something of it is in use.
    pub fn remove(mut self) -> Result<()> {
        self.gone = true;
        self.take_down()
    }

    fn take_down(&mut self) -> Result<()> {
        if let Some(instance) = self.instance {
            let controller = PathBuf::from(format!("/sys/class/nvme/nvme{instance}"));
            put(&controller.join("delete_controller"), "1")?;
            wait_for("an NVMe controller to go", Duration::from_secs(30), || {
                Ok((!controller.exists()).then_some(()))
            })?;
        }
        let link = port().join("subsystems").join(NAME);
        if link.is_symlink() {
            fs::remove_file(link)?;
        }
        for directory in [port(), namespace(), subsystem()] {
            if directory.exists() {
                let removed = fs::remove_dir(&directory);
                removed.with_context(|| format!("remove {}", directory.display()))?;
            }
        }
        Ok(())
    }
}

impl Drop for NvmeOverBlock {
    fn drop(&mut self) {
        if !self.gone {
            // The test has failed already; what this leaves is found by the check for leaks.
            let _ = self.take_down();
        }
    }
}

/// Returns the number of the controller.
fn connect() -> Result<u32> {
    let mut fabrics = File::options().read(true).write(true).open("/dev/nvme-fabrics")?;
    fabrics.write_all(format!("transport=loop,nqn={NAME}").as_bytes())?;
    let mut answer = String::new();
    fabrics.read_to_string(&mut answer)?;
    let number = answer.split(',').find_map(|part| part.trim().strip_prefix("instance="));
    number.context("no instance")?.parse().with_context(|| answer.clone())
}

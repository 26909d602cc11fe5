//! A ublk device in a test.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use crate::guest::{Ctx, drives::Drive, process, wait_for};

/// The program under test.
pub const PROGRAM: &str = "ublk-target";

/// A device as `add --json` and `list --json` describe it. A field that is missing, or one that
/// is not expected, fails the test.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Description {
    pub id: u32,
    pub device: PathBuf,
    pub state: String,
    pub target: String,
    pub lend: String,
    pub pid: Option<u32>,
    pub queues: u16,
    pub depth: u16,
    pub size_bytes: u64,
    pub backings: Vec<PathBuf>,
}

/// A device that is deleted with its handle.
#[derive(Debug)]
pub struct Device {
    pub described: Description,
    deleted: bool,
}

impl Device {
    /// Adds a device: `arguments` follow `ublk-target add`.
    pub fn add(arguments: &[&str]) -> Result<Self> {
        Self::add_by(&[PROGRAM], arguments)
    }

    /// Adds a device whose server does not get its buffers registered by the driver, and so has
    /// to register each itself.
    pub fn add_without_auto_registration(arguments: &[&str]) -> Result<Self> {
        Self::add_by(&["env", "UBLK_TARGET_FAULT=auto-register", PROGRAM], arguments)
    }

    fn add_by(program: &[&str], arguments: &[&str]) -> Result<Self> {
        load_driver()?;
        let argv = [program, &["add"], arguments, &["--json"]].concat();
        let printed = process::run(&argv)?;
        let described = serde_json::from_str(&printed.stdout)
            .with_context(|| format!("not a description: {}", printed.stdout))?;
        Ok(Self { described, deleted: false })
    }

    /// Adds a loop device on a backing.
    pub fn add_loop(backing: &Path, more: &[&str]) -> Result<Self> {
        let backing = text(backing)?;
        Self::add(&[&["loop", "-f", backing], more].concat())
    }

    /// The block device.
    pub fn path(&self) -> Result<&str> {
        text(&self.described.device)
    }

    /// The id as an argument.
    pub fn id(&self) -> String {
        self.described.id.to_string()
    }

    /// The process that serves it.
    pub fn pid(&self) -> Result<u32> {
        self.described.pid.context("a live device has a server")
    }

    /// Reads an attribute below `/sys/block/ublkbN`.
    pub fn attribute(&self, attribute: &str) -> Result<String> {
        let path = format!("/sys/block/ublkb{}/{attribute}", self.described.id);
        let text = std::fs::read_to_string(&path).with_context(|| path)?;
        Ok(text.trim().to_owned())
    }

    /// Deletes it and checks that nothing is left.
    pub fn delete(mut self) -> Result<()> {
        self.deleted = true;
        process::run(&[PROGRAM, "del", "-n", &self.id()])?;
        self.assert_gone()
    }

    /// Waits for its server to end, and checks that nothing is left.
    pub fn wait_until_gone(mut self) -> Result<()> {
        self.deleted = true;
        let pid = self.pid()?;
        wait_for("the server to end", Duration::from_secs(30), || {
            Ok((!Path::new(&format!("/proc/{pid}")).exists()).then_some(()))
        })?;
        self.assert_gone()
    }

    fn assert_gone(&self) -> Result<()> {
        for left in [
            self.described.device.clone(),
            PathBuf::from(format!("/dev/ublkc{}", self.described.id)),
            PathBuf::from(format!("/run/ublk-target/{}.json", self.described.id)),
        ] {
            ensure!(!left.exists(), "{} is left", left.display());
        }
        Ok(())
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        if !self.deleted {
            // The test has failed already; what this leaves is found by the check for leaks.
            let _ = process::run(&[PROGRAM, "del", "-n", &self.id()]);
        }
    }
}

/// Loads the driver, as a user would.
pub fn load_driver() -> Result<()> {
    process::run(&["modprobe", "ublk_drv"]).map(drop)
}

/// A path as an argument.
pub fn text(path: &Path) -> Result<&str> {
    path.to_str().context("a path that is not UTF-8")
}

/// A drive of the group, wiped.
pub fn fresh_drive(serial: &str) -> Result<Drive> {
    let drive = Drive::by_serial(serial)?;
    drive.wipe()?;
    Ok(drive)
}

/// A mounted file system that is unmounted with its handle.
#[derive(Debug)]
pub struct Mount {
    point: PathBuf,
    mounted: bool,
}

impl Mount {
    /// Mounts a device on a directory of the test's own.
    pub fn new(ctx: &Ctx, device: &str, name: &str) -> Result<Self> {
        let point = ctx.directory().join(name);
        std::fs::create_dir_all(&point)?;
        process::run(&["mount", device, text(&point)?])?;
        Ok(Self { point, mounted: true })
    }

    /// Where it is mounted.
    pub fn point(&self) -> &Path {
        &self.point
    }

    /// Unmounts it.
    pub fn unmount(mut self) -> Result<()> {
        self.mounted = false;
        process::run(&["umount", text(&self.point)?]).map(drop)
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if self.mounted {
            let _ = process::run(&["umount", "--lazy", &self.point.to_string_lossy()]);
        }
    }
}

/// A file of `mib` MiB on an ext4 file system on a drive.
pub fn file_on_drive(ctx: &Ctx, serial: &str, mib: u64) -> Result<(Mount, PathBuf)> {
    let drive = fresh_drive(serial)?;
    process::run(&["mkfs.ext4", "-q", "-F", text(&drive.path())?])?;
    let mount = Mount::new(ctx, text(&drive.path())?, "backing")?;
    let file = mount.point().join("disk.img");
    std::fs::File::create(&file)?.set_len(mib << 20)?;
    Ok((mount, file))
}

/// Starts a load that goes on until the device is gone.
pub fn start_load(device: &str) -> Result<Child> {
    let child = Command::new("fio")
        .args(["--name=load", "--rw=randrw", "--bs=4k", "--iodepth=64", "--ioengine=io_uring"])
        .args(["--direct=1", "--size=256m", "--time_based", "--runtime=100", "--output=/dev/null"])
        .arg(format!("--filename={device}"))
        .stderr(Stdio::null())
        .spawn()?;
    Ok(child)
}

/// Waits until the device has done so many requests more.
pub fn wait_for_requests(device: &Device, requests: u64) -> Result<()> {
    let done = || -> Result<u64> {
        let stat = device.attribute("stat")?;
        let fields: Vec<u64> = stat.split_whitespace().filter_map(|n| n.parse().ok()).collect();
        Ok(fields[0] + fields[4])
    };
    let goal = done()? + requests;
    wait_for("the load", Duration::from_secs(60), || Ok((done()? >= goal).then_some(())))
}

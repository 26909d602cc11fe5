//! A ublk device in a test.

use std::collections::BTreeMap;
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
    pub base: String,
    pub layers: Vec<Layer>,
    pub lend: String,
    pub on_death: String,
    pub pid: Option<u32>,
    pub supervisor: Option<u32>,
    pub given_up: Option<String>,
    pub trouble: Option<String>,
    pub queues: u16,
    pub depth: u16,
    pub size_bytes: u64,
    pub backings: Vec<PathBuf>,
    pub page_cache: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Layer {
    pub name: String,
    pub kind: String,
}

impl Description {
    /// The names of its layers, the outermost first.
    pub fn layers(&self) -> Vec<&str> {
        self.layers.iter().map(|layer| layer.name.as_str()).collect()
    }
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

    /// Adds a device whose server meets faults, as `UBLK_TARGET_FAULT` takes them.
    pub fn add_with_faults(faults: &str, arguments: &[&str]) -> Result<Self> {
        let faults = format!("UBLK_TARGET_FAULT={faults}");
        Self::add_by(&["env", &faults, PROGRAM], arguments)
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

    /// Somebody else has deleted it.
    pub fn was_deleted(mut self) {
        self.deleted = true;
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

    /// Ends the server by a signal, and reads from its log what it has counted in all lanes.
    pub fn stop_and_count(self) -> Result<Counters> {
        let log = format!("/var/log/ublk-target/{}.log", self.described.id);
        process::run(&["kill", "-TERM", &self.pid()?.to_string()])?;
        self.wait_until_gone()?;
        let text = std::fs::read_to_string(&log).with_context(|| log.clone())?;
        std::fs::remove_file(&log)?;
        ensure!(!text.contains("leaked: "), "{text}");
        Ok(Counters::parse(&text))
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

/// What a server counted, by name; what is not named is 0.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Counters(BTreeMap<String, u64>);

impl Counters {
    /// Adds the lines of all queues up: `queue 0: 753 requests, 3 retries`. The log may tell of
    /// earlier servers.
    fn parse(log: &str) -> Self {
        let mut counters = BTreeMap::new();
        let log = log.rsplit("] serving ").next().unwrap_or(log);
        let reports =
            log.lines().filter_map(|line| line.split_once("] queue ")?.1.split_once(": "));
        for (_, report) in reports {
            let report = report.strip_prefix("faults asked for: ").unwrap_or(report);
            for part in report.split(", ") {
                let Some((count, name)) = part.split_once(' ') else { continue };
                let Ok(count) = count.parse::<u64>() else { continue };
                *counters.entry(name.to_owned()).or_default() += count;
            }
        }
        Self(counters)
    }

    /// A counter.
    pub fn get(&self, name: &str) -> u64 {
        self.0.get(name).copied().unwrap_or(0)
    }

    /// Fails unless all these are 0.
    pub fn ensure_none(&self, names: &[&str]) -> Result<()> {
        for name in names {
            ensure!(self.get(name) == 0, "{} {name}: {self:?}", self.get(name));
        }
        Ok(())
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

/// The drives `drive0`, `drive1` and so on, wiped.
pub fn fresh_drives(count: u32) -> Result<Vec<Drive>> {
    (0..count).map(|number| fresh_drive(&format!("drive{number}"))).collect()
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
            let unmounting = Command::new("umount").arg("--lazy").arg(&self.point).spawn();
            let Ok(mut unmounting) = unmounting else { return };
            // Where nobody serves the device any more it ends when that is deleted, and the test
            // has to come to that.
            let ended = || Ok(unmounting.try_wait()?.map(drop));
            let _ = wait_for("umount", Duration::from_secs(10), ended);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_of_all_queues_are_added_up() {
        let log = "[T INFO  m] serving /dev/ublkb3\n[T INFO  m] queue 0: 9 requests\n\
                   [T INFO  m] serving /dev/ublkb3\n\
                   [T INFO  m] queue 0: 753 requests, 753 commits, 3 need reg buf\n\
                   [T WARN  m] queue 0: faults asked for: 150 short, 114 again\n\
                   [T INFO  m] queue 1: 7 requests, 7 commits, 1 retries\n";
        let counters = Counters::parse(log);
        let counted = ["requests", "need reg buf", "short", "again", "retries", "leaks"];
        assert_eq!(counted.map(|name| counters.get(name)), [760, 3, 150, 114, 1, 0]);
        assert!(counters.ensure_none(&["leaks"]).is_ok());
        assert!(counters.ensure_none(&["leaks", "retries"]).is_err());
    }
}

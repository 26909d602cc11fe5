//! The description of a device, from the driver, sysfs and the state file.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use ublk_engine::lend::LendMode;
use ublk_engine::units::{Bytes, Sectors};
use uring_ext::control::{Control, ControlError};
use uring_ext::{Errno, sys};

use crate::config::LayerConfig;
use crate::config::on_death::OnDeath;
use crate::device::paths::{RUN_DIR, block_path};
use crate::device::processes;
use crate::device::state_file::StateFile;
use crate::device::trouble::Trouble;
use crate::os::procfs::is_alive;

/// The sequence number of a device's disk, if it has one and the kernel shows it.
#[must_use]
pub fn diskseq(id: u32) -> Option<u64> {
    fs::read_to_string(format!("/sys/block/ublkb{id}/diskseq")).ok()?.trim().parse().ok()
}

/// A device, in the form that `list` and `add` show.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Description {
    /// Device id.
    pub id: u32,
    /// The block device.
    pub device: PathBuf,
    /// The driver's state: `LIVE`, `DEAD`, `QUIESCED` or `FAIL_IO`.
    pub state: String,
    /// Name of the target with its layers, such as `fault(loop)`; `unknown` for a device of another
    /// program.
    pub target: String,
    /// Name of the target without its layers, such as `loop`; `unknown` for a device of another program.
    // An earlier program, which may have started the server, sends neither this nor the layers.
    #[serde(default)]
    pub base: String,
    /// The layers before the target, outermost first.
    #[serde(default)]
    pub layers: Vec<DescribedLayer>,
    /// How the device lends.
    pub lend: String,
    /// What happens to it when its server dies: `fail`, `wait`, `reissue` or `error`.
    pub on_death: String,
    /// Process id of the server, `null` if it is gone.
    pub pid: Option<u32>,
    /// Process id of the supervisor, `null` if there is none.
    pub supervisor: Option<u32>,
    /// Why the supervisor has given up; `null` if it has not.
    pub given_up: Option<String>,
    /// Why the device has no server while the supervisor tries to start one; `null` if it has one.
    pub trouble: Option<String>,
    /// Number of queues.
    pub queues: u16,
    /// Tags of each queue.
    pub depth: u16,
    /// Size in bytes.
    pub size_bytes: u64,
    /// Canonical paths of the backings.
    pub backings: Vec<PathBuf>,
    /// Some backings go through the page cache, since their blocks are larger than the device's.
    pub page_cache: bool,
}

/// A layer of a device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DescribedLayer {
    /// Its name, unique in the device.
    pub name: String,
    /// Its kind: `fault`.
    pub kind: String,
}

impl DescribedLayer {
    fn of(layer: &LayerConfig) -> Self {
        Self { name: layer.name.to_string(), kind: layer.kind.name().to_owned() }
    }
}

impl Description {
    /// Describes the device `id`.
    ///
    /// # Errors
    /// `ENODEV` if there is no such device, and errors of the driver.
    pub fn of(control: &Control, id: u32) -> Result<Self, ControlError> {
        let info = control.info(id)?;
        // A device that was never started has no parameters to read.
        let sectors = control.params(id).map_or(0, |params| params.basic().dev_sectors);
        let pid = u32::try_from(info.ublksrv_pid).ok().filter(|pid| is_alive(*pid));
        let file = StateFile::read(Path::new(RUN_DIR), id).ok();
        // A stopped device has no disk to compare with.
        let is_its = |file: &StateFile| match (file.diskseq, diskseq(id)) {
            (Some(recorded), Some(is)) => recorded == is,
            (_, None) | (None, _) => true,
        };
        let file = file.filter(is_its);
        let lend = LendMode::of_flags(info.flags).to_string();
        let on_death = OnDeath::of_flags(info.flags).to_string();
        let mut described = Self {
            id,
            device: block_path(id),
            state: state_name(info.state).to_owned(),
            target: "unknown".to_owned(),
            base: "unknown".to_owned(),
            layers: Vec::new(),
            lend,
            on_death,
            pid,
            supervisor: None,
            given_up: None,
            trouble: None,
            queues: info.nr_hw_queues,
            depth: info.queue_depth,
            size_bytes: Bytes::from(Sectors(sectors)).0,
            backings: Vec::new(),
            page_cache: false,
        };
        let is_served = described.state == "LIVE" && pid.is_some();
        match Trouble::read(Path::new(RUN_DIR), id).filter(|_| !is_served && file.is_some()) {
            Some(Trouble { why, given_up: true }) => described.given_up = Some(why),
            Some(Trouble { why, given_up: false }) => described.trouble = Some(why),
            None => {}
        }
        if let Some(file) = file {
            described.target = file.target;
            described.base = file.config.target.name().to_owned();
            described.layers = file.config.layers.iter().map(DescribedLayer::of).collect();
            described.supervisor = file.supervisor.filter(|pid| processes::is_ours(*pid));
            described.page_cache = file.backings.iter().any(|known| known.page_cache);
            described.backings = file.backings.into_iter().map(|known| known.path).collect();
        }
        Ok(described)
    }
}

/// The ids of all ublk devices, of this and other programs, in order.
#[must_use]
pub fn device_ids() -> Vec<u32> {
    let Ok(entries) = fs::read_dir("/sys/class/ublk-char") else { return Vec::new() };
    let mut ids: Vec<u32> = entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.strip_prefix("ublkc")?.parse().ok())
        .collect();
    ids.sort_unstable();
    ids
}

/// The driver's name of a device state (`UBLK_S_DEV_*`).
fn state_name(state: u16) -> &'static str {
    match u32::from(state) {
        sys::UBLK_S_DEV_DEAD => "DEAD",
        sys::UBLK_S_DEV_LIVE => "LIVE",
        sys::UBLK_S_DEV_QUIESCED => "QUIESCED",
        sys::UBLK_S_DEV_FAIL_IO => "FAIL_IO",
        _ => "UNKNOWN",
    }
}

/// Whether a device has its block device: it was started and has not been stopped since.
#[must_use]
pub fn has_disk(info: &sys::ublksrv_ctrl_dev_info) -> bool {
    u32::from(info.state) != sys::UBLK_S_DEV_DEAD
}

/// The number of its character device. It distinguishes a device from a later one of the same id
/// while the character device exists.
#[must_use]
pub fn identity(id: u32) -> Option<u64> {
    fs::metadata(format!("/sys/class/ublk-char/ublkc{id}")).ok().map(|directory| directory.ino())
}

/// Whether an error means that there is no such device.
#[must_use]
pub fn is_missing(error: &ControlError) -> bool {
    error.errno() == Some(Errno::ENODEV)
}

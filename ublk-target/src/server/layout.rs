//! From a configuration to open backings, a planner and limits.

use std::path::PathBuf;
use std::sync::Arc;

use uring_ext::iod::page_size;

use super::config::{DeviceConfig, DeviceError, TargetConfig};
use crate::backing::Backing;
use crate::backing::limits::Limits;
use crate::lend::LendMode;
use crate::target::{AnyTarget, LoopTarget, NullTarget};
use crate::units::Bytes;

/// The greatest request in copy mode, whose buffers take memory.
const COPY_MAX_IO: u32 = 512 << 10;

/// Target, backings and limits of a device.
pub(super) struct Layout {
    pub name: &'static str,
    pub target: AnyTarget,
    pub backings: Arc<[Backing]>,
    pub limits: Limits,
    pub size: Bytes,
    pub buffer_bytes: u32,
}

impl Layout {
    pub fn open(config: &DeviceConfig, lend: LendMode) -> Result<Self, DeviceError> {
        let (name, target, backing, limits, size) = match &config.target {
            TargetConfig::Null { size } if size.sectors().0 == 0 => {
                return Err(DeviceError::TooSmall(size.0));
            }
            TargetConfig::Null { size } => {
                let backing = Backing::zero()?;
                let limits =
                    Limits { discard: None, physical_block: 512, io_min: 512, ..*backing.limits() };
                ("null", AnyTarget::Null(NullTarget), backing, limits, *size)
            }
            TargetConfig::Loop { file } => {
                let backing = Backing::open(file)?;
                let (limits, size) = (*backing.limits(), backing.size());
                ("loop", AnyTarget::Loop(LoopTarget { size: size.0 }), backing, limits, size)
            }
        };
        let page = u32::try_from(page_size()).unwrap_or(4096);
        let cap = match lend {
            LendMode::Fused => u32::MAX,
            LendMode::Copy => COPY_MAX_IO,
        };
        let buffer_bytes = limits.buffer_bytes(cap, page);
        let layout = Self { name, target, backings: [backing].into(), limits, size, buffer_bytes };
        layout.check_memory(config, lend)?;
        Ok(layout)
    }

    /// Buffers that do not fit would bring the machine down instead of failing.
    fn check_memory(&self, config: &DeviceConfig, lend: LendMode) -> Result<(), DeviceError> {
        let (queues, depth) = (config.queues, config.depth);
        let needed = u64::from(queues) * u64::from(depth) * u64::from(self.buffer_bytes);
        let Some(available) = available_memory() else { return Ok(()) };
        if lend == LendMode::Copy && needed > available / 2 {
            let (needed, available) = (Bytes(needed), Bytes(available));
            return Err(DeviceError::BuffersTooBig { queues, depth, needed, available });
        }
        Ok(())
    }

    /// The paths that the user gave, canonical.
    pub fn backing_paths(&self) -> Vec<PathBuf> {
        match self.target {
            AnyTarget::Null(_) => Vec::new(),
            AnyTarget::Loop(_) => self.backings.iter().map(|b| b.path().to_owned()).collect(),
        }
    }
}

/// `MemAvailable` in bytes.
fn available_memory() -> Option<u64> {
    let meminfo = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

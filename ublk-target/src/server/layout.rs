//! From a configuration to open backings, a planner and limits.

use std::path::PathBuf;
use std::sync::Arc;

use uring_ext::feature::{Features, USER_COPY};
use uring_ext::iod::page_size;
use uring_ext::ring::MAX_BUFFER_SLOTS;

use super::config::{DeviceConfig, DeviceError, TargetConfig};
use crate::backing::Backing;
use crate::backing::limits::Limits;
use crate::engine::{SlotChoice, SlotTable};
use crate::lend::{Choice, LendMode};
use crate::request::Geometry;
use crate::target::{AnyTarget, LoopTarget, NullTarget};
use crate::units::Bytes;

/// The greatest request in the copy modes, whose buffers take memory.
const COPY_MAX_IO: u32 = 512 << 10;
/// Buffers of a lane for requests whose own cannot be registered. That is rare, and they wait
/// for each other.
const SPARE_BUFFERS: u16 = 2;

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
            LendMode::Fused | LendMode::Slot => u32::MAX,
            LendMode::UserCopy | LendMode::Copy => COPY_MAX_IO,
        };
        let buffer_bytes = limits.buffer_bytes(cap, page);
        let layout = Self { name, target, backings: [backing].into(), limits, size, buffer_bytes };
        Ok(layout)
    }

    /// What requests of the device have to keep to.
    pub fn geometry(&self) -> Geometry {
        let (size, block) = (self.size.0, self.limits.logical_block);
        Geometry { size, block, max_bytes: self.buffer_bytes }
    }

    /// Buffers that do not fit would bring the machine down instead of failing.
    pub fn check_memory(
        &self,
        queues: u16,
        depth: u16,
        lend: LendMode,
        slots: &SlotTable,
    ) -> Result<(), DeviceError> {
        let needed = u64::from(queues) * u64::from(slots.pool) * u64::from(self.buffer_bytes);
        let Some(available) = available_memory() else { return Ok(()) };
        if needed > available / 2 {
            let (needed, available) = (Bytes(needed), Bytes(available));
            return Err(DeviceError::BuffersTooBig { lend, queues, depth, needed, available });
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

/// The buffer table of each lane.
pub(super) fn slot_table(config: &DeviceConfig, choice: &Choice) -> Result<SlotTable, DeviceError> {
    let depth = config.depth;
    let spare = if Features(choice.flags).has(USER_COPY) { SPARE_BUFFERS } else { 0 };
    let table = match (choice.mode, config.first_slot) {
        (LendMode::Slot, None) => {
            SlotTable { lent: depth, pool: spare, choice: SlotChoice::AnyFree }
        }
        (LendMode::Fused | LendMode::Slot, first) => {
            let first = first.unwrap_or(0);
            let lent = first
                .checked_add(depth)
                .filter(|lent| u32::from(*lent) + u32::from(spare) <= MAX_BUFFER_SLOTS);
            let lent = lent.ok_or(DeviceError::TooManySlots { first, depth })?;
            SlotTable { lent, pool: spare, choice: SlotChoice::From(first) }
        }
        (lend @ (LendMode::UserCopy | LendMode::Copy), Some(_)) => {
            return Err(DeviceError::Mismatch {
                option: "--first-slot",
                needs: "a mode that lends the request's own buffer",
                lend,
                instead: "leave it out, or use `--lend fused` or `--lend slot`",
            });
        }
        (LendMode::UserCopy | LendMode::Copy, None) => {
            SlotTable { lent: 0, pool: depth, choice: SlotChoice::From(0) }
        }
    };
    Ok(table)
}

/// `MemAvailable` in bytes.
fn available_memory() -> Option<u64> {
    let meminfo = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

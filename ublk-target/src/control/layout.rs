//! Turns a configuration into open backings, a planner and limits.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use ublk_engine::engine::{SlotChoice, SlotTable};
use ublk_engine::lend::LendMode;
use ublk_engine::plan::{BackingIndex, Planner};
use ublk_engine::request::Geometry;
use ublk_engine::target::{
    AnyLayer, AnyTarget, BaseTarget, FaultLayer, LinearTarget, LoopTarget, NullTarget,
    StripeTarget, ThrottleLayer,
};
use ublk_engine::units::Bytes;
use uring_ext::feature::{Features, USER_COPY};
use uring_ext::iod::page_size;
use uring_ext::ring::{MAX_BUFFER_SLOTS, Polling};

use crate::backing::below::Below;
use crate::backing::identity::Known;
use crate::backing::limits::Limits;
use crate::backing::{Backing, Opening};
use crate::config::lend::Choice;
use crate::config::{DeviceConfig, ExtentConfig, LayerKind, Layers, TargetConfig};
use crate::control::error::{ExtentProblem, LayoutError, PlanError};
use crate::control::polling;
use crate::device::standing::Recorded;
use crate::os::memory;

/// The longest request in the copy modes, whose buffers take memory.
const COPY_MAX_IO: u32 = 512 << 10;
/// The longest request in the other modes. It may be longer than one operation: a request is
/// delivered once, and the target cuts it.
const LENT_MAX_IO: u32 = 1 << 20;
/// Buffers of a lane for requests whose own buffer cannot be registered. That is rare, so the
/// queues of a lane wait for each other.
const SPARE_BUFFERS: u16 = 1;

/// Target, backings and limits of a device.
pub(super) struct Layout {
    pub target: AnyTarget,
    pub backings: Arc<[Backing]>,
    /// The limits of the device.
    pub limits: Limits,
    /// The limits of operations on the backings.
    backing_limits: Limits,
    pub size: Bytes,
    pub buffer_bytes: u32,
    pub polling: Polling,
    /// The ublk devices below the backings.
    pub below: Below,
}

impl Layout {
    /// `known` are the backings of a device to recover. If the backings are not claimed, they are
    /// only checked.
    pub fn open(
        config: &DeviceConfig,
        lend: LendMode,
        known: Option<&[Known]>,
        claims: bool,
    ) -> Result<Self, LayoutError> {
        let how = Opening { passthru: config.passthru, claims, block_size: config.block_size };
        let Parts { base, backings, limits, size } = Opener { how, known }.parts(&config.target)?;
        // Larger blocks consist of several blocks of the backings.
        let block = config.block_size.unwrap_or(0).max(limits.logical_block);
        let target = layered(&config.layers, block, base);
        let physical_block = limits.physical_block.max(block);
        let backing_limits = Limits { logical_block: block, physical_block, ..limits };
        let size = Bytes(size.0 / u64::from(block) * u64::from(block));
        let polling = polling::choose(config, &backings)?;
        let page = u32::try_from(page_size()).unwrap_or(4096);
        let has_commands = backings.iter().any(|backing| backing.route().is_namespace());
        let (longest, cap) = match lend {
            LendMode::Fused | LendMode::Slot if has_commands => (0, u32::MAX),
            LendMode::Fused | LendMode::Slot => (LENT_MAX_IO, u32::MAX),
            LendMode::UserCopy | LendMode::Copy => (0, COPY_MAX_IO),
        };
        let limits = backing_limits.of_cut_requests(longest);
        let buffer_bytes = limits.buffer_bytes(cap, page);
        let below = Below::backings(&backings, &Recorded::default());
        let backings = backings.into();
        Ok(Self { target, backings, limits, backing_limits, size, buffer_bytes, polling, below })
    }

    /// The limits of the device's requests.
    pub fn geometry(&self) -> Geometry {
        let (size, block) = (self.size.0, self.limits.logical_block);
        Geometry { size, block, max_bytes: self.buffer_bytes }
    }

    /// Whether operations are commands to NVMe namespaces.
    pub fn has_namespace(&self) -> bool {
        self.backings.iter().any(|backing| backing.route().is_namespace())
    }

    /// Size of each of the server's buffers in bytes.
    pub fn pool_bytes(&self) -> u32 {
        self.buffer_bytes.max(self.target.scratch_bytes())
    }

    /// Checks that the buffers fit into memory: too many would make the whole machine run out of
    /// it. `program` is what the server needs besides.
    pub fn check_memory(
        &self,
        queues: u16,
        depth: u16,
        lend: LendMode,
        slots: &SlotTable,
        program: u64,
    ) -> Result<(), PlanError> {
        let buffers = u64::from(queues) * u64::from(slots.buffers()) * u64::from(self.pool_bytes());
        let needed = buffers.saturating_add(program);
        if let Some(shortage) = memory::shortage(needed, buffers) {
            let (needed, buffers) = (Bytes(needed), Bytes(buffers));
            return Err(PlanError::NoMemory { needed, buffers, shortage });
        }
        let needed = buffers;
        let Some(available) = available_memory() else { return Ok(()) };
        if needed > available / 2 {
            let (needed, available) = (Bytes(needed), Bytes(available));
            return Err(PlanError::BuffersTooBig { lend, queues, depth, needed, available });
        }
        Ok(())
    }

    /// The same device on backings that have grown since it was added, with their new identities.
    pub fn grown(&self, config: &TargetConfig) -> Result<Grown, LayoutError> {
        let is_null = self.target.base().is_null();
        let mut known = self.known();
        for (known, backing) in known.iter_mut().zip(self.backings.iter()) {
            // A shrunk backing is the concern of its users.
            known.size = backing.size_now()?.max(known.size);
        }
        let sizes: Vec<_> = known.iter().map(|known| known.size.0).collect();
        let (base, size) = target_of(config, &sizes, &self.backing_limits)?;
        let block = u64::from(self.limits.logical_block);
        let size = Bytes(size.0 / block * block);
        if !is_null && !base.extends(self.target.base()) {
            return Err(LayoutError::WouldMove);
        }
        Ok(Grown { base, size, known })
    }

    /// The same target with other layers.
    pub fn with_layers(&self, layers: &Layers) -> AnyTarget {
        layered(layers, self.limits.logical_block, self.target.base().clone())
    }

    /// The identities of the backings, to recognise them later.
    pub fn known(&self) -> Vec<Known> {
        let backings = self.backings.iter().filter(|_| !self.target.base().is_null());
        backings.map(Backing::known).collect()
    }
}

/// A device that has grown.
pub(super) struct Grown {
    /// The target without layers.
    pub base: BaseTarget,
    pub size: Bytes,
    pub known: Vec<Known>,
}

/// The parts of a target.
struct Parts {
    base: BaseTarget,
    backings: Vec<Backing>,
    limits: Limits,
    size: Bytes,
}

/// Opens the backings of a target.
#[derive(Clone, Copy)]
struct Opener<'a> {
    how: Opening,
    known: Option<&'a [Known]>,
}

impl Opener<'_> {
    fn parts(self, config: &TargetConfig) -> Result<Parts, LayoutError> {
        match config {
            TargetConfig::Null { .. } if self.how.passthru => Err(LayoutError::NoPassthru),
            TargetConfig::Null { size } => null(*size),
            TargetConfig::Loop { .. }
            | TargetConfig::Linear { .. }
            | TargetConfig::Stripe { .. } => self.of_backings(config),
        }
    }

    fn of_backings(self, config: &TargetConfig) -> Result<Parts, LayoutError> {
        let backings = self.all(&files_of(config)?)?;
        let sizes: Vec<_> = backings.iter().map(|backing| backing.size().0).collect();
        let limits = limits_of(config, &backings).ok_or(LayoutError::NoBackings)?;
        let (base, size) = target_of(config, &sizes, &limits)?;
        Ok(Parts { base, backings, limits, size })
    }

    fn all(self, files: &[PathBuf]) -> Result<Vec<Backing>, LayoutError> {
        if self.known.is_some_and(|known| known.len() != files.len()) {
            return Err(LayoutError::BackingsDiffer);
        }
        let open = |(index, file): (usize, &PathBuf)| {
            let backing = Backing::open(file, self.how)?;
            match self.known {
                Some(known) => Ok(backing.keep_to(&known[index])?),
                None => Ok(backing),
            }
        };
        files.iter().enumerate().map(open).collect()
    }
}

fn null(size: Bytes) -> Result<Parts, LayoutError> {
    let (base, size) = null_target(size)?;
    let backing = Backing::zero()?;
    let limits = Limits { discard: None, physical_block: 512, io_min: 512, ..*backing.limits() };
    Ok(Parts { base, backings: vec![backing], limits, size })
}

fn null_target(size: Bytes) -> Result<(BaseTarget, Bytes), LayoutError> {
    if size.sectors().0 == 0 {
        return Err(LayoutError::TooSmall(size.0));
    }
    Ok((BaseTarget::Null(NullTarget), size))
}

/// The backings in the order of their index.
fn files_of(config: &TargetConfig) -> Result<Vec<PathBuf>, LayoutError> {
    match config {
        TargetConfig::Null { .. } => Ok(Vec::new()),
        TargetConfig::Loop { file } => Ok(vec![file.clone()]),
        // A backing with several extents is opened once.
        TargetConfig::Linear { extents } => {
            let mut files = Vec::new();
            for file in extents.iter().map(|extent| canonical(&extent.file)) {
                if !files.contains(&file) {
                    files.push(file);
                }
            }
            Ok(files)
        }
        TargetConfig::Stripe { files, .. } => {
            let mut known: Vec<PathBuf> = Vec::new();
            for file in files {
                if known.contains(&canonical(file)) {
                    return Err(LayoutError::GivenTwice(file.clone()));
                }
                known.push(canonical(file));
            }
            Ok(files.clone())
        }
    }
}

fn canonical(file: &Path) -> PathBuf {
    file.canonicalize().unwrap_or_else(|_| file.to_owned())
}

/// A target with its layers, for a device with blocks of `block` bytes.
fn layered(layers: &Layers, block: u32, base: BaseTarget) -> AnyTarget {
    let layers = layers.iter().map(|it| layer(&it.kind, block));
    AnyTarget::new(layers.collect::<Vec<_>>(), base)
}

/// A layer of a device with blocks of `block` bytes.
fn layer(kind: &LayerKind, block: u32) -> AnyLayer {
    match kind {
        LayerKind::Fault { rules, seed } => {
            AnyLayer::Fault(FaultLayer::new(rules.clone(), *seed, block))
        }
        LayerKind::Throttle(rates) => AnyLayer::Throttle(ThrottleLayer::new(*rates)),
    }
}

/// The limits of operations on all backings; `None` if there are none.
fn limits_of(config: &TargetConfig, backings: &[Backing]) -> Option<Limits> {
    let common = Limits::of_all(backings.iter().map(Backing::limits))?;
    let limits = match (config, backings) {
        (TargetConfig::Loop { .. }, [backing]) => *backing.limits(),
        (TargetConfig::Stripe { chunk, .. }, _) => {
            let row = chunk.0.checked_mul(backings.len() as u64);
            Limits {
                io_min: u32::try_from(chunk.0).unwrap_or(common.io_min).max(common.io_min),
                io_opt: row.and_then(|row| u32::try_from(row).ok()).unwrap_or(0),
                ..common
            }
        }
        _ => common,
    };
    Some(limits)
}

/// The target on backings of these sizes in bytes, and its size.
fn target_of(
    config: &TargetConfig,
    sizes: &[u64],
    limits: &Limits,
) -> Result<(BaseTarget, Bytes), LayoutError> {
    let limit = limits.transfer_limit();
    match config {
        TargetConfig::Null { size } => null_target(*size),
        TargetConfig::Loop { .. } => {
            let size = sizes.first().copied().unwrap_or_default();
            Ok((BaseTarget::Loop(LoopTarget::new(size).within(limit)), Bytes(size)))
        }
        TargetConfig::Linear { extents } => {
            let target = LinearTarget::new(placed(extents, sizes, limits.logical_block)?)?;
            let target = target.within(limit);
            let size = Bytes(target.size());
            Ok((BaseTarget::Linear(target), size))
        }
        TargetConfig::Stripe { chunk, .. } => {
            let target = StripeTarget::new(chunk.0, sizes)?.within(limit);
            let size = Bytes(target.size());
            Ok((BaseTarget::Stripe(target), size))
        }
    }
}

/// Extents: index of the backing, first byte, length.
fn placed(
    extents: &[ExtentConfig],
    sizes: &[u64],
    block: u32,
) -> Result<Vec<(BackingIndex, u64, u64)>, LayoutError> {
    let mut files: Vec<PathBuf> = Vec::new();
    let mut placed: Vec<(BackingIndex, u64, u64)> = Vec::new();
    for extent in extents {
        let file = canonical(&extent.file);
        let index = files.iter().position(|known| *known == file).unwrap_or_else(|| {
            files.push(file);
            files.len() - 1
        });
        let problem = |problem| LayoutError::Extent {
            file: extent.file.clone(),
            offset: extent.offset,
            problem,
        };
        let (start, size) = (extent.offset.0, sizes[index]);
        let left = size.checked_sub(start).filter(|left| *left > 0);
        let left = left.ok_or_else(|| problem(ExtentProblem::Beyond(size)))?;
        let bytes = u64::from(block);
        let len = extent.len.map_or(left / bytes * bytes, |len| len.0);
        if len > left {
            return Err(problem(ExtentProblem::Beyond(size)));
        }
        if start % bytes != 0 || len % bytes != 0 {
            return Err(problem(ExtentProblem::Unaligned(block)));
        }
        let index = BackingIndex(u16::try_from(index).unwrap_or(u16::MAX));
        let overlaps = placed.iter().any(|(other, other_start, other_len)| {
            *other == index && start < other_start + other_len && *other_start < start + len
        });
        if overlaps {
            return Err(problem(ExtentProblem::Overlapping));
        }
        placed.push((index, start, len));
    }
    Ok(placed)
}

/// The buffer table of each lane, with or without scratch buffers.
pub(super) fn slot_table(
    config: &DeviceConfig,
    choice: &Choice,
    target: &AnyTarget,
) -> Result<SlotTable, PlanError> {
    let depth = config.depth;
    let scratch = if target.scratch_bytes() > 0 { depth } else { 0 };
    let spare = if Features(choice.flags).has(USER_COPY) { SPARE_BUFFERS } else { 0 };
    let table = match (choice.mode, config.first_slot) {
        (LendMode::Slot, None) => {
            SlotTable { lent: depth, pool: spare, scratch, choice: SlotChoice::AnyFree }
        }
        (LendMode::Fused | LendMode::Slot, first) => {
            let first = first.unwrap_or(0);
            let lent = first.checked_add(depth).filter(|lent| {
                let slots = u32::from(*lent) + u32::from(spare) + u32::from(scratch);
                slots <= MAX_BUFFER_SLOTS
            });
            let lent = lent.ok_or(PlanError::TooManySlots { first, depth })?;
            SlotTable { lent, pool: spare, scratch, choice: SlotChoice::From(first) }
        }
        (lend @ (LendMode::UserCopy | LendMode::Copy), Some(_)) => {
            return Err(PlanError::Mismatch {
                option: "--first-slot",
                needs: "a mode that lends the request's own buffer",
                lend,
                instead: "leave it out, or use `--lend fused` or `--lend slot`",
            });
        }
        (LendMode::UserCopy | LendMode::Copy, None) => {
            SlotTable { lent: 0, pool: depth, scratch, choice: SlotChoice::From(0) }
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

//! What a seed chooses: the device, its lend mode and planner, and how hostile the kernel is.

use rand_xoshiro::SplitMix64;
use rand_xoshiro::rand_core::SeedableRng as _;
use ublk_engine::engine::{SlotChoice, SlotTable};
use ublk_engine::lane::TableRange;
use ublk_engine::lend::LendMode;
use ublk_engine::plan::Planner;
use ublk_engine::request::Geometry;
use ublk_engine::route::{DiscardCall, Route};
use uring_ext::nvme::{Namespace, RetryDelays};

use crate::MAX_REQUEST;
use crate::command::{BLOCK_SHIFT, NSID};
use crate::draw::Draw as _;
use crate::fault::{Fault, Rates};
use crate::layout;
use crate::mapping::Mapping;

/// Maximum number of tags.
pub const MAX_DEPTH: u16 = 8;
/// Maximum number of slots before those that the queue uses.
const MAX_FIRST: u16 = 3;
/// Maximum number of spare buffers.
const MAX_SPARE: u16 = 2;
/// Slots of the largest table.
pub const MAX_SLOTS: usize = (2 * MAX_DEPTH + MAX_FIRST + MAX_SPARE) as usize;
/// Buffers of the largest pool, scratch buffers included.
pub const MAX_POOL: u16 = 2 * MAX_DEPTH + MAX_SPARE;

/// Which faults happen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Hostility {
    /// No faults for every eighth seed, all faults for half of the seeds, some for the rest.
    #[default]
    Mixed,
    /// All faults for every seed.
    All,
    /// No faults.
    None,
}

/// How the driver handles a success with fewer bytes than the request has. Our servers must not
/// commit one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ShortResults {
    /// It requeues the rest of the request (up to Linux 7.2).
    Redelivered,
    /// It treats the request as done, except for reads that the driver copies itself (from Linux
    /// 7.3 on).
    Believed,
}

impl ShortResults {
    /// All kinds, in the order of the counters.
    pub const ALL: [Self; 2] = [Self::Redelivered, Self::Believed];

    /// A description of drivers of this kind.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Redelivered => "would deliver the rest of a short result again",
            Self::Believed => "would take a short result for the whole",
        }
    }
}

/// What happens to open requests when their server has died.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recovery {
    /// The next server gets them.
    Reissue,
    /// They fail.
    Fail,
    /// Either, at random.
    Either,
}

/// The configuration that a seed chooses.
#[derive(Clone, Debug)]
pub struct Setup {
    /// Tags.
    pub depth: u16,
    /// The lend mode.
    pub lend: LendMode,
    /// How the driver handles short results.
    pub short_results: ShortResults,
    /// The buffer table.
    pub slots: SlotTable,
    /// The planner.
    pub mapping: Mapping,
    /// Bytes of each backing.
    pub backings: Vec<u64>,
    /// The device.
    pub geometry: Geometry,
    /// The deadline after which operations are cancelled, in nanoseconds.
    pub deadline: Option<u64>,
    /// Operations are issued from a second ring.
    pub io_lane: bool,
    /// The size of a submission queue, in entries.
    pub queue_entries: usize,
    /// The weight of steps in which the kernel takes entries from it.
    pub submit_weight: u32,
    /// The first ring polls, and refuses other operations.
    pub polled: bool,
    /// The route to each backing.
    pub routes: Vec<Route>,
    /// The rate of each fault.
    pub rates: Rates,
    /// Whether there are any faults.
    pub hostile: bool,
    /// How often a server is killed, out of 1024 steps.
    pub kill_rate: u32,
    /// What happens to open requests then.
    pub recovery: Recovery,
    /// Faults of the lane's port.
    pub port_faults: Option<&'static str>,
    /// Whether latencies are measured.
    pub measure: bool,
    /// Whether the planner is replaced sometimes.
    pub swaps: bool,
    /// A backing on which every operation fails.
    pub dead_leg: Option<usize>,
    /// The queue's files and slots in the tables of the ring, which it shares with other queues.
    pub table_range: TableRange,
}

impl Setup {
    /// The configuration of a seed.
    #[must_use]
    pub fn of(seed: u64, hostility: Hostility) -> Self {
        // Not the generator that the run itself uses.
        let mut rng = SplitMix64::seed_from_u64(!seed);
        let some = seed % 8 >= 5;
        let hostile = match hostility {
            Hostility::Mixed => seed % 8 != 0,
            Hostility::All => true,
            Hostility::None => false,
        };
        let rates = match hostility {
            _ if !hostile => Rates::none(),
            Hostility::Mixed if some => Rates::scaled(|| rng.pick(&[0, 0, 1, 2, 6])),
            Hostility::Mixed | Hostility::All | Hostility::None => {
                Rates::scaled(|| rng.pick(&[1, 2, 3]))
            }
        };
        let depth = u16::try_from(rng.below(u32::from(MAX_DEPTH)) + 1).unwrap_or(1);
        let lend = rng.pick(&[
            LendMode::Fused,
            LendMode::Fused,
            LendMode::Slot,
            LendMode::Slot,
            LendMode::UserCopy,
            LendMode::Copy,
        ]);
        let mut slots = slot_table(&mut rng, lend, depth, hostile);
        let block = rng.pick(&[512, 512, 512, 1024, 4096]);
        let (mapping, size, backings) = layout::draw(&mut rng, hostile, block);
        let routes = routes(&mut rng, backings.len());
        if mapping.scratch_bytes() > 0 {
            slots.scratch = depth;
        }
        let deadline = (hostile && rng.chance(640)).then(|| u64::from(rng.below(900) + 100) * 1000);
        let port_faults = (hostile && rng.chance(100)).then(|| {
            rng.pick(&[
                "auto-register",
                "register",
                "short=3",
                "again=5",
                "auto-register,short=4,again=7",
            ])
        });
        let setup = Self {
            depth,
            lend,
            short_results: ShortResults::Redelivered,
            slots,
            mapping,
            backings,
            geometry: Geometry { size, block, max_bytes: MAX_REQUEST },
            deadline,
            // Automatic registration would go to the wrong ring.
            io_lane: lend != LendMode::Fused && rng.chance(300),
            queue_entries: rng.pick(&[4, 5, 8, 16, 64]),
            submit_weight: rng.pick(&[20, 20, 6, 1]),
            polled: false,
            routes,
            rates,
            hostile,
            kill_rate: if hostile { rng.pick(&[0, 1, 2, 4]) } else { 0 },
            recovery: rng.pick(&[Recovery::Reissue, Recovery::Fail, Recovery::Either]),
            port_faults,
            measure: rng.chance(16),
            swaps: rng.chance(200),
            dead_leg: None,
            table_range: TableRange {
                first_file: rng.pick(&[0, 0, 1, 700]),
                first_slot: rng.pick(&[0, 0, 1, 9000]),
                spare: None,
            },
        };
        let polled = !setup.io_lane && rng.chance(256);
        let short_results = rng.pick(&ShortResults::ALL);
        Self { polled, short_results, ..setup }.with_shared_spare(&mut rng)
    }

    /// Lets some queues share their spare buffer with other queues.
    fn with_shared_spare(mut self, rng: &mut SplitMix64) -> Self {
        if self.lend.is_zero_copy() && self.slots.pool > 0 && rng.chance(400) {
            self.slots.pool = 1;
            self.table_range.spare = Some(12_000);
        }
        self
    }

    /// The rate of a fault, out of 1024.
    #[must_use]
    pub const fn rate(&self, fault: Fault) -> u32 {
        self.rates.of(fault)
    }
}

/// Draws the routes. Some backings are namespaces.
fn routes(rng: &mut SplitMix64, backings: usize) -> Vec<Route> {
    let namespaces = rng.pick(&[0, 0, 512, 1024]);
    let files = [DiscardCall::BlockCommand, DiscardCall::PunchHole];
    let route = |_| {
        if rng.chance(namespaces) {
            let namespace = Namespace {
                nsid: NSID,
                block_shift: BLOCK_SHIFT,
                retry_delays: RetryDelays::default(),
            };
            return Route::Namespace { namespace, deallocates_zeroes: rng.chance(512) };
        }
        Route::File(rng.pick(&files))
    };
    (0..backings).map(route).collect()
}

fn slot_table(rng: &mut SplitMix64, lend: LendMode, depth: u16, hostile: bool) -> SlotTable {
    let spare = rng.pick(&[0, 1, MAX_SPARE]);
    let first = rng.pick(&[0, 1, MAX_FIRST]);
    let from =
        SlotTable { lent: first + depth, pool: spare, scratch: 0, choice: SlotChoice::From(first) };
    match lend {
        LendMode::Fused => from,
        LendMode::Slot if rng.chance(512) => from,
        LendMode::Slot => {
            // With fewer slots than tags, some requests have to be copied.
            let scarce = hostile && spare > 0 && depth > 2 && rng.chance(256);
            let lent = if scarce { depth - 2 } else { depth };
            SlotTable { lent, pool: spare, scratch: 0, choice: SlotChoice::AnyFree }
        }
        LendMode::UserCopy | LendMode::Copy => {
            SlotTable { lent: 0, pool: depth, scratch: 0, choice: SlotChoice::From(0) }
        }
    }
}

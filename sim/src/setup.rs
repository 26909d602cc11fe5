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

/// Greatest number of tags.
pub const MAX_DEPTH: u16 = 8;
/// Greatest number of slots in front of those that are used.
const MAX_FIRST: u16 = 3;
/// Greatest number of spare buffers.
const MAX_SPARE: u16 = 2;
/// Slots of the largest table.
pub const MAX_SLOTS: usize = (2 * MAX_DEPTH + MAX_FIRST + MAX_SPARE) as usize;
/// Buffers of the largest pool, scratch buffers included.
pub const MAX_POOL: u16 = 2 * MAX_DEPTH + MAX_SPARE;

/// Which faults there are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Hostility {
    /// A sound kernel for every eighth seed, all faults for half of them, some for the rest.
    #[default]
    Mixed,
    /// Every fault, whatever the seed.
    All,
    /// A sound kernel.
    None,
}

/// What the driver makes of a success of fewer bytes than a request has. No server of ours may
/// commit one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ShortResults {
    /// What is left of the request is a request again (up to Linux 7.2).
    Redelivered,
    /// It is taken for the whole, but for reads that the driver copies itself (from Linux 7.3 on).
    Believed,
}

impl ShortResults {
    /// All kinds, as they are counted.
    pub const ALL: [Self; 2] = [Self::Redelivered, Self::Believed];

    /// What is said of drivers of this kind.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Redelivered => "would deliver the rest of a short result again",
            Self::Believed => "would take a short result for the whole",
        }
    }
}

/// What becomes of open requests when their server has died.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recovery {
    /// They are given to the next one.
    Reissue,
    /// They fail.
    Fail,
    /// Either, at random.
    Either,
}

/// What a seed chooses.
#[derive(Clone, Debug)]
pub struct Setup {
    /// Tags.
    pub depth: u16,
    /// How the device lends.
    pub lend: LendMode,
    /// What the driver makes of short results.
    pub short_results: ShortResults,
    /// The buffer table.
    pub slots: SlotTable,
    /// The planner.
    pub mapping: Mapping,
    /// Bytes of each backing.
    pub backings: Vec<u64>,
    /// The device.
    pub geometry: Geometry,
    /// Nanoseconds after which operations are cancelled.
    pub deadline: Option<u64>,
    /// Operations are issued from a ring of their own.
    pub io_lane: bool,
    /// Entries that a submission queue holds.
    pub queue_entries: usize,
    /// How readily the kernel takes what is in it.
    pub submit_weight: u32,
    /// The first ring polls, and refuses much.
    pub polled: bool,
    /// How operations reach each backing.
    pub routes: Vec<Route>,
    /// How likely each fault is.
    pub rates: Rates,
    /// Whether there are faults at all.
    pub hostile: bool,
    /// Whether a server may be killed, out of 1024 chances a step.
    pub kill_rate: u32,
    /// What becomes of open requests then.
    pub recovery: Recovery,
    /// Faults that the lane's own port is asked for.
    pub port_faults: Option<&'static str>,
    /// Whether latencies are measured.
    pub measure: bool,
    /// Whether the planner is replaced now and then.
    pub swaps: bool,
    /// A backing on which nothing succeeds.
    pub dead_leg: Option<usize>,
    /// Where in the tables of its ring the queue has its files and slots: other queues share it.
    pub place: TableRange,
}

impl Setup {
    /// What this seed chooses.
    #[must_use]
    pub fn of(seed: u64, hostility: Hostility) -> Self {
        // Not the stream that the run itself uses.
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
            place: TableRange {
                first_file: rng.pick(&[0, 0, 1, 700]),
                first_slot: rng.pick(&[0, 0, 1, 9000]),
            },
        };
        let polled = !setup.io_lane && rng.chance(256);
        Self { polled, short_results: rng.pick(&ShortResults::ALL), ..setup }
    }

    /// How likely a fault is, out of 1024 chances.
    #[must_use]
    pub const fn rate(&self, fault: Fault) -> u32 {
        self.rates.of(fault)
    }
}

/// Some devices have namespaces among their backings.
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
            // With fewer slots than tags the rest has to be copied.
            let scarce = hostile && spare > 0 && depth > 2 && rng.chance(256);
            let lent = if scarce { depth - 2 } else { depth };
            SlotTable { lent, pool: spare, scratch: 0, choice: SlotChoice::AnyFree }
        }
        LendMode::UserCopy | LendMode::Copy => {
            SlotTable { lent: 0, pool: depth, scratch: 0, choice: SlotChoice::From(0) }
        }
    }
}

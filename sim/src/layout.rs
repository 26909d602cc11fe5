//! Draws the planner of a seed and the sizes of its backings.

use std::num::NonZeroU64;

use rand_xoshiro::SplitMix64;
use rand_xoshiro::rand_core::Rng as _;
use ublk_engine::plan::BackingIndex;
use ublk_engine::target::{
    AnyLayer, BaseTarget, FaultLayer, Layered, LinearTarget, LoopTarget, MIN_CHUNK, NullTarget,
    Rate, Rates, StripeTarget, ThrottleLayer, TransferLimit,
};
use ublk_engine::units::Nanos;

use crate::SECTOR;
use crate::cow::Cow;
use crate::draw::Draw as _;
use crate::mapping::{Mapping, Spread, Trap};
use crate::mirror::Mirror;

/// The unit of device sizes, so that they are multiples of any block size.
const PAGE: u64 = 4096;

/// Draws a planner for a device with this block size. Returns it with the sizes of the device and
/// of each backing.
pub fn draw(rng: &mut SplitMix64, hostile: bool, block: u32) -> (Mapping, u64, Vec<u64>) {
    let (mut mapping, size, backings) = sound(rng, hostile);
    if rng.chance(300) {
        mapping = with_layers(rng, hostile, block, mapping);
    }
    (mapping, size, backings)
}

/// First rules with which requests succeed, then rules with which some fail. No other fault has
/// their errors.
const RULES: [&str; 8] = [
    "p=0.3,short",
    "op=write,p=0.2,delay=40us",
    "op=read,p=0.1,short,delay=15us",
    "count=9,delay=150us",
    "p=0.1,error=EILSEQ",
    "op=write+write-zeroes,p=0.2,range=8K+24K,delay=30us,error=EREMOTEIO",
    "op=flush+discard,p=0.3,error=ENODATA",
    "op=read,p=0.2,delay=400us",
];
const GENTLE: usize = 4;

/// Puts one to three layers of faults before a planner, or a throttle, or both.
pub fn with_layers(rng: &mut SplitMix64, hostile: bool, block: u32, base: Mapping) -> Mapping {
    let all = if hostile { &RULES[..] } else { &RULES[..GENTLE] };
    let layer = |rng: &mut SplitMix64| {
        let rules = (0..1 + rng.below(3)).map(|_| rng.pick(all).parse());
        let rules = rules.map(|rule| rule.unwrap_or_else(|error| panic!("{error}")));
        let rules: Vec<_> = rules.collect();
        AnyLayer::Fault(FaultLayer::new(rules, rng.next_u64(), block))
    };
    let has_throttle = rng.chance(400);
    let count = match (has_throttle, rng.below(10)) {
        (true, 0..4) => 0,
        (_, 7..) => 2 + rng.below(2),
        (_, _) => 1,
    };
    let mut layers: Vec<_> = (0..count).map(|_| layer(rng)).collect();
    layers.extend(has_throttle.then(|| throttle(rng)));
    Mapping::Layered(Box::new(Layered::new(layers, base)))
}

/// A throttle that lets a few requests pass in a run of a request, so that the others wait.
fn throttle(rng: &mut SplitMix64) -> AnyLayer {
    let iops = [None, NonZeroU64::new(20_000), NonZeroU64::new(200_000)];
    let bps = [None, NonZeroU64::new(100 << 20), NonZeroU64::new(2 << 30)];
    let mut rate = || Rate { iops: rng.pick(&iops), bps: rng.pick(&bps) };
    let (read, write) = (rate(), rate());
    let burst = Nanos(rng.pick(&[0, 0, 20_000, 500_000]));
    AnyLayer::Throttle(ThrottleLayer::new(Rates { read, write, burst }))
}

fn sound(rng: &mut SplitMix64, hostile: bool) -> (Mapping, u64, Vec<u64>) {
    let size = u64::from(rng.below(24) + 16) * PAGE;
    match rng.below(17) {
        0..4 => {
            let target = LoopTarget::new(size).within(transfer_limit(rng));
            (Mapping::Target(BaseTarget::Loop(target).into()), size, vec![size])
        }
        4 => (Mapping::Target(BaseTarget::Null(NullTarget).into()), size, vec![size]),
        5 | 6 => linear(rng),
        7 | 8 => stripe(rng),
        9..12 => {
            let spread = spread(rng, hostile);
            let row = spread.chunk * u64::from(spread.backings);
            let bytes = size.div_ceil(row) * spread.chunk;
            (Mapping::Stripe(spread), size, vec![bytes; usize::from(spread.backings)])
        }
        12..15 => {
            let spread = spread(rng, hostile);
            let backings = vec![size; usize::from(spread.backings)];
            (Mapping::Mirror(Mirror::new(spread)), size, backings)
        }
        _ => {
            let cow = Cow::new(PAGE << rng.below(2));
            let backing = size.div_ceil(cow.chunk) * cow.chunk;
            (Mapping::Cow(cow), size, vec![backing; 2])
        }
    }
}

/// The transfer limit of the backings: none, or so small that many requests need several windows.
pub fn transfer_limit(rng: &mut SplitMix64) -> TransferLimit {
    if rng.chance(512) {
        return TransferLimit::UNLIMITED;
    }
    // A page is a multiple of any block.
    let block = u32::try_from(PAGE).unwrap_or(4096);
    let boundary = u64::from(rng.below(4)) * PAGE;
    TransferLimit::new(block, rng.pick(&[1, 1, 2, 5]) * block, boundary, block)
}

/// A few short extents of up to three backings.
fn linear(rng: &mut SplitMix64) -> (Mapping, u64, Vec<u64>) {
    let mut ends = [0; 3];
    let mut extents = Vec::new();
    for _ in 0..4 + rng.below(8) {
        let backing = rng.below(3) as usize;
        let start = ends[backing] + u64::from(rng.below(3)) * SECTOR;
        let len = u64::from(1 + rng.below(8)) * PAGE;
        ends[backing] = start + len;
        extents.push((BackingIndex(u16::try_from(backing).unwrap_or(0)), start, len));
    }
    // Requests are at most a quarter of the device, and this extent has to fit them.
    extents.push((BackingIndex(0), ends[0], 16 * PAGE));
    ends[0] += 16 * PAGE;
    let target = LinearTarget::new(extents).unwrap_or_else(|error| panic!("{error}"));
    let target = target.within(transfer_limit(rng));
    let size = target.size();
    (Mapping::Target(BaseTarget::Linear(target).into()), size, ends.to_vec())
}

/// The minimum chunk size or twice that, on two to four backings of different sizes.
fn stripe(rng: &mut SplitMix64) -> (Mapping, u64, Vec<u64>) {
    let chunk = MIN_CHUNK << rng.below(2);
    let bytes =
        |rng: &mut SplitMix64| chunk * u64::from(4 + rng.below(12)) + u64::from(rng.below(4096));
    let sizes: Vec<_> = (0..2 + rng.below(3)).map(|_| bytes(rng) + 4 * PAGE).collect();
    let target = StripeTarget::new(chunk, &sizes).unwrap_or_else(|error| panic!("{error}"));
    let target = target.within(transfer_limit(rng));
    let size = target.size();
    (Mapping::Target(BaseTarget::Stripe(target).into()), size, sizes)
}

fn spread(rng: &mut SplitMix64, hostile: bool) -> Spread {
    Spread {
        backings: u16::try_from(rng.below(3) + 2).unwrap_or(2),
        chunk: u64::from(rng.pick(&[1, 2, 3, 5, 8, 16_u32])) * SECTOR,
        pieces: rng.pick(&[1, 3, 8, 8]),
        flush_stage: rng.chance(512),
        trap: (hostile && rng.chance(300))
            .then(|| (u64::from(rng.below(64)) * SECTOR, rng.pick(&[Trap::Refuse, Trap::Idle]))),
    }
}

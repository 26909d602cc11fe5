//! Converts the state of a lane into the form for clients.

use std::collections::BTreeMap;

use bufreg::{Lent, SlotIndex};
use hdrhistogram::Histogram;
use ublk_engine::engine::{EngineStats, Holdings, Recorder, STAGES};
use ublk_engine::lane::fault::Injected;
use ublk_engine::plan::{Op, OpKind};
use ublk_engine::request::RequestKind;

use crate::io_thread::message::LaneSnapshot;
use crate::socket::protocol::{
    Activity, Borrower, LaneStats, Latency, LentSlot, Operation, Requests, Slots,
};

/// A lane's snapshot for clients, without latencies.
pub(super) fn lane_stats(lane: &LaneSnapshot, slots: bool) -> LaneStats {
    let named = |lent: &Lent| lent_slot(lane, lent);
    LaneStats {
        qid: lane.qid.0,
        at_ns: lane.at,
        activity: Activity {
            in_flight: lane.holdings.map_or(0, |holdings| count(holdings.requests)),
            requests: requests(&lane.stats),
            counters: counters(&lane.stats),
            slots: lane.holdings.as_ref().map_or_else(Slots::default, slot_counts),
        },
        injected: (lane.injected != Injected::default()).then_some(lane.injected),
        lent: slots.then(|| lane.lent.iter().map(named).collect()),
        leaks: lane.leaks.iter().map(|leak| named(&leak.lent)).collect(),
        latencies: Vec::new(),
    }
}

fn requests(stats: &EngineStats) -> BTreeMap<String, Requests> {
    let counts = stats.requests.iter().zip(stats.bytes);
    let counts = counts.map(|(requests, bytes)| Requests { requests: *requests, bytes });
    RequestKind::NAMES.map(str::to_owned).into_iter().zip(counts).collect()
}

fn counters(stats: &EngineStats) -> BTreeMap<String, u64> {
    stats.named().into_iter().map(|(name, count)| (name.to_owned(), count)).collect()
}

fn slot_counts(holdings: &Holdings) -> Slots {
    let counts = &holdings.slots;
    Slots {
        capacity: counts.capacity.into(),
        free: counts.free.into(),
        lent: (counts.capacity - counts.free).into(),
        reserved: counts.reserved.into(),
        active: counts.active.into(),
        borrowed: counts.borrowed.into(),
        borrows: counts.borrows.into(),
        retiring: counts.retiring.into(),
        quarantined: counts.quarantined.into(),
        leaked: count(holdings.leaked),
    }
}

fn lent_slot(lane: &LaneSnapshot, lent: &Lent) -> LentSlot {
    LentSlot {
        slot: lent.slot.0,
        state: lent.state.to_string(),
        device: lent.owner.device,
        qid: lent.owner.qid,
        tag: lent.owner.tag,
        age_ns: lane.at.saturating_sub(lent.since),
        borrowers: borrowers(lane, lent.slot),
    }
}

fn borrowers(lane: &LaneSnapshot, slot: SlotIndex) -> Vec<Borrower> {
    let of_slot = lane.borrowers.iter().filter(|borrower| borrower.slot == slot);
    of_slot
        .map(|borrower| Borrower {
            label: borrower.label.to_string(),
            op: borrower.op.map(|(_, op)| operation(&op)),
        })
        .collect()
}

fn operation(op: &Op) -> Operation {
    let kind = match op.kind {
        OpKind::Read => "read",
        OpKind::Write { fua: false } => "write",
        OpKind::Write { fua: true } => "write-fua",
        OpKind::Flush => "flush",
        OpKind::Discard => "discard",
        OpKind::WriteZeroes { .. } => "write-zeroes",
        OpKind::ReadScratch => "read-scratch",
        OpKind::WriteScratch { .. } => "write-scratch",
        OpKind::Delay => "delay",
    };
    Operation { kind: kind.to_owned(), backing: op.backing.0, offset: op.offset, len: op.len }
}

/// The latencies of a recorder.
pub(super) fn latencies(recorder: &Recorder) -> Vec<Latency> {
    let mut found = Vec::new();
    for (kind, kind_name) in RequestKind::NAMES.into_iter().enumerate() {
        for (stage, stage_name) in STAGES.into_iter().enumerate() {
            let histogram = recorder.histogram(kind, stage);
            if !histogram.is_empty() {
                found.push(latency(kind_name, stage_name, histogram));
            }
        }
    }
    found
}

fn latency(kind: &str, stage: &str, histogram: &Histogram<u32>) -> Latency {
    Latency {
        kind: kind.to_owned(),
        stage: stage.to_owned(),
        count: histogram.len(),
        mean_ns: mean(histogram),
        min_ns: histogram.min(),
        p50_ns: histogram.value_at_quantile(0.5),
        p90_ns: histogram.value_at_quantile(0.9),
        p99_ns: histogram.value_at_quantile(0.99),
        p99_9_ns: histogram.value_at_quantile(0.999),
        max_ns: histogram.max(),
    }
}

/// The mean in whole nanoseconds, 0 if nothing is recorded.
fn mean(histogram: &Histogram<u32>) -> u64 {
    let values = histogram.iter_recorded().map(|value| {
        let middle = histogram.median_equivalent(value.value_iterated_to());
        u128::from(middle) * u128::from(value.count_at_value())
    });
    let mean = values.sum::<u128>().checked_div(histogram.len().into()).unwrap_or(0);
    u64::try_from(mean).unwrap_or(u64::MAX)
}

fn count(number: usize) -> u64 {
    u64::try_from(number).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use bufreg::{Incarnation, Owner, Registry};
    use ublk_engine::engine::Stamps;
    use ublk_engine::plan::BackingIndex;
    use ublk_engine::units::{Qid, Tag};

    use super::*;
    use crate::io_thread::message::BorrowingOp;

    #[test]
    fn latencies_are_summed_up_by_kind_and_stage() {
        let mut recorder = Recorder::new();
        assert!(latencies(&recorder).is_empty());
        for backing_us in 1..=1000 {
            let stamps = Stamps {
                reaped: 1_000_000,
                begun: 1_001_000,
                issued: 1_003_000,
                done: 1_003_000 + backing_us * 1000,
            };
            recorder.record(RequestKind::Write { fua: true }, stamps, stamps.done + 2000);
        }
        let latencies = latencies(&recorder);
        let stages: Vec<_> = latencies.iter().map(|l| (&*l.kind, &*l.stage, l.count)).collect();
        let expected = STAGES.map(|stage| ("write", stage, 1000));
        assert_eq!(stages, expected);
        // Two digits are kept, and 64 ns are not divided.
        let near = |value: u64, expected: u64| value.abs_diff(expected) <= 64.max(expected / 50);
        let backing = &latencies[2];
        for (value, expected) in [
            (backing.mean_ns, 500_500),
            (backing.min_ns, 1000),
            (backing.p50_ns, 500_000),
            (backing.p90_ns, 900_000),
            (backing.p99_ns, 990_000),
            (backing.p99_9_ns, 999_000),
            (backing.max_ns, 1_000_000),
            (latencies[4].mean_ns, 505_500),
        ] {
            assert!(near(value, expected), "{value} is not about {expected}: {backing:?}");
        }
    }

    #[test]
    fn leaks_are_named_with_their_borrowers() {
        let mut registry = Registry::new(4, Incarnation(0));
        let owner = Owner { device: 9, qid: 1, tag: 17 };
        let lease = registry.reserve(SlotIndex(2), owner, 1000).unwrap();
        let lease = registry.activate(lease);
        let labels = [bufreg::Borrower(0x50), bufreg::Borrower(0x51)];
        for label in labels {
            registry.borrow(&lease, label).unwrap();
        }
        let mut lane = LaneSnapshot::new(Qid(1), 0);
        lane.at = 5000;
        let slots = registry.counts();
        lane.holdings = Some(Holdings { requests: 0, slots, leaked: 1 });
        lane.leaks.extend(registry.leaks(5000, |_| false));
        let (kind, backing) = (OpKind::Write { fua: true }, BackingIndex(3));
        let op = Op { kind, backing, offset: 8192, len: 4096, buf_offset: 0 };
        let slot = SlotIndex(2);
        for (label, op) in labels.into_iter().zip([Some((Tag(17), op)), None]) {
            lane.borrowers.push(BorrowingOp { slot, label, op });
        }
        let told = lane_stats(&lane, false);
        assert_eq!((told.activity.slots.leaked, told.activity.slots.lent), (1, 1));
        assert_eq!((told.lent, told.injected), (None, None));
        let kind = "write-fua".to_owned();
        let operation = Operation { kind, backing: 3, offset: 8192, len: 4096 };
        let expected = LentSlot {
            slot: 2,
            state: "active".into(),
            device: 9,
            qid: 1,
            tag: 17,
            age_ns: 4000,
            borrowers: vec![
                Borrower { label: "0x50".into(), op: Some(operation) },
                Borrower { label: "0x51".into(), op: None },
            ],
        };
        assert_eq!(told.leaks, [expected]);
    }
}

//! The difference between two snapshots.

use serde::{Deserialize, Serialize};

use crate::socket::protocol::{Activity, LaneStats, Latency, Slots, Snapshot, VERSION};

/// The activity of a device in an interval, and its state at the end.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// The version of this format, [`VERSION`].
    pub version: u32,
    /// Device id.
    pub device: u32,
    /// The end of the interval, in nanoseconds of the monotonic clock.
    pub at_ns: u64,
    /// Length of the interval in nanoseconds.
    pub interval_ns: u64,
    /// All lanes together.
    pub total: Total,
    /// Each lane.
    pub lanes: Vec<LaneReport>,
    /// Latencies of all lanes together within the interval.
    pub latencies: Vec<Latency>,
}

/// All lanes together.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Total {
    /// Within the interval.
    pub rates: Rates,
    /// At its end, and since the start.
    #[serde(flatten)]
    pub activity: Activity,
}

/// One lane.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LaneReport {
    /// Within the interval.
    pub rates: Rates,
    /// At its end, and since the start; the latencies are of the interval.
    #[serde(flatten)]
    pub lane: LaneStats,
}

/// Rates per second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Rates {
    /// Reads delivered.
    pub reads_per_s: f64,
    /// Writes delivered.
    pub writes_per_s: f64,
    /// Other requests delivered.
    pub others_per_s: f64,
    /// Bytes of the reads.
    pub read_bytes_per_s: f64,
    /// Bytes of the writes.
    pub written_bytes_per_s: f64,
}

impl Report {
    /// Compares two snapshots of one connection. A lane that is missing in one of them is left out.
    #[must_use]
    pub fn between(earlier: &Snapshot, later: Snapshot) -> Self {
        let mut report = Self {
            version: VERSION,
            device: later.device,
            at_ns: 0,
            interval_ns: 0,
            total: Total::default(),
            lanes: Vec::new(),
            latencies: later.latencies,
        };
        for lane in later.lanes {
            let Some(before) = earlier.lanes.iter().find(|before| before.qid == lane.qid) else {
                continue;
            };
            let rates = Rates::between(before, &lane);
            report.at_ns = report.at_ns.max(lane.at_ns);
            report.interval_ns = report.interval_ns.max(lane.at_ns.saturating_sub(before.at_ns));
            report.total.rates.add(&rates);
            report.total.activity.add(&lane.activity);
            report.lanes.push(LaneReport { rates, lane });
        }
        report
    }
}

impl Rates {
    fn between(earlier: &LaneStats, later: &LaneStats) -> Self {
        let seconds = later.at_ns.saturating_sub(earlier.at_ns) as f64 / 1e9;
        let mut rates = Self::default();
        if seconds == 0.0 {
            return rates;
        }
        for (kind, after) in &later.activity.requests {
            let before = earlier.activity.requests.get(kind).copied().unwrap_or_default();
            let requests = after.requests.saturating_sub(before.requests) as f64 / seconds;
            let bytes = after.bytes.saturating_sub(before.bytes) as f64 / seconds;
            match kind.as_str() {
                "read" => (rates.reads_per_s, rates.read_bytes_per_s) = (requests, bytes),
                "write" => (rates.writes_per_s, rates.written_bytes_per_s) = (requests, bytes),
                _ => rates.others_per_s += requests,
            }
        }
        rates
    }

    fn add(&mut self, other: &Self) {
        self.reads_per_s += other.reads_per_s;
        self.writes_per_s += other.writes_per_s;
        self.others_per_s += other.others_per_s;
        self.read_bytes_per_s += other.read_bytes_per_s;
        self.written_bytes_per_s += other.written_bytes_per_s;
    }
}

impl Activity {
    /// Adds the rates of another lane.
    fn add(&mut self, other: &Self) {
        self.in_flight += other.in_flight;
        for (kind, requests) in &other.requests {
            let sum = self.requests.entry(kind.clone()).or_default();
            sum.requests += requests.requests;
            sum.bytes += requests.bytes;
        }
        for (name, count) in &other.counters {
            *self.counters.entry(name.clone()).or_default() += count;
        }
        self.slots.add(&other.slots);
    }
}

impl Slots {
    fn add(&mut self, other: &Self) {
        self.capacity += other.capacity;
        self.free += other.free;
        self.lent += other.lent;
        self.reserved += other.reserved;
        self.active += other.active;
        self.borrowed += other.borrowed;
        self.borrows += other.borrows;
        self.retiring += other.retiring;
        self.quarantined += other.quarantined;
        self.leaked += other.leaked;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::socket::protocol::Requests;

    fn lane(qid: u16, at_ns: u64, kinds: &[(&str, u64, u64)]) -> LaneStats {
        let mut lane = LaneStats { qid, at_ns, ..LaneStats::default() };
        for (kind, requests, bytes) in kinds {
            let requests = Requests { requests: *requests, bytes: *bytes };
            lane.activity.requests.insert((*kind).to_owned(), requests);
        }
        lane
    }

    #[test]
    fn rates_come_from_two_snapshots() {
        let nothing = [("read", 0, 0)];
        let second = 1_000_000_000;
        let table = [
            (nothing, [("read", 100, 409_600)], second, (100.0, 409_600.0)),
            (nothing, [("read", 100, 409_600)], second / 4, (400.0, 1_638_400.0)),
            ([("read", 100, 409_600)], [("read", 100, 409_600)], second, (0.0, 0.0)),
            ([("read", 100, 409_600)], [("read", 150, 614_400)], 2 * second, (25.0, 102_400.0)),
            // A counter that went back, and no time between, give no rate.
            ([("read", 9, 9)], [("read", 3, 3)], second, (0.0, 0.0)),
            (nothing, [("read", 3, 3)], 0, (0.0, 0.0)),
        ];
        for (before, after, interval, (reads, bytes)) in table {
            let rates = Rates::between(&lane(0, 5, &before), &lane(0, 5 + interval, &after));
            assert_eq!((rates.reads_per_s, rates.read_bytes_per_s), (reads, bytes), "{after:?}");
            assert_eq!((rates.writes_per_s, rates.others_per_s), (0.0, 0.0));
        }
    }

    #[test]
    fn kinds_are_told_apart_and_lanes_added() {
        let kinds =
            [("write", 10, 40_960), ("flush", 2, 0), ("discard", 3, 12_288), ("read", 1, 512)];
        let earlier = Snapshot {
            device: 4,
            lanes: vec![lane(0, 0, &[]), lane(1, 100, &[]), lane(3, 0, &[])],
            latencies: Vec::new(),
        };
        let mut later = earlier.clone();
        later.lanes =
            vec![lane(0, 1_000_000_000, &kinds), lane(1, 2_000_000_100, &kinds), lane(2, 9, &[])];
        later.lanes[0].activity.counters.insert("retries".into(), 2);
        later.lanes[1].activity.counters.insert("retries".into(), 3);
        later.lanes[1].activity.slots.leaked = 1;
        let report = Report::between(&earlier, later);
        let qids: Vec<_> = report.lanes.iter().map(|lane| lane.lane.qid).collect();
        assert_eq!(qids, [0, 1], "a lane that is not in both is left out");
        assert_eq!((report.device, report.interval_ns), (4, 2_000_000_000));
        let expected = Rates {
            reads_per_s: 1.5,
            writes_per_s: 15.0,
            others_per_s: 7.5,
            read_bytes_per_s: 768.0,
            written_bytes_per_s: 61_440.0,
        };
        assert_eq!(report.total.rates, expected);
        let total = &report.total.activity;
        assert_eq!(total.requests["write"], Requests { requests: 20, bytes: 81_920 });
        assert_eq!((total.counters["retries"], total.slots.leaked), (5, 1));
        let json = serde_json::to_string(&report).unwrap();
        assert_eq!(serde_json::from_str::<Report>(&json).unwrap(), report);
    }
}

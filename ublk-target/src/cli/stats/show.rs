//! Statistics as text.

use ublk_engine::units::Bytes;
use ublk_target::socket::protocol::{Activity, Borrower, LaneStats, Latency, LentSlot};
use ublk_target::socket::report::{Rates, Report};

use crate::cli::table::{Align, table};

/// A whole report as text.
pub fn text(report: &Report) -> String {
    let mut text = format!("/dev/ublkb{}, {}\n", report.device, time(report.interval_ns));
    text.push_str(&lanes(report));
    text.push_str(&since_the_start(&report.total.activity));
    for lane in &report.lanes {
        text.push_str(&faults(&lane.lane));
    }
    text.push_str(&latencies(&report.latencies));
    let lent: Vec<_> = report.lanes.iter().flat_map(|lane| lane.lane.lent.iter()).collect();
    if !lent.is_empty() {
        text.push_str("lent:\n");
        text.push_str(&slots(lent.into_iter().flatten()));
    }
    text.push_str(&leaks(report));
    text
}

fn lanes(report: &Report) -> String {
    let header = [
        "QUEUE",
        "r/s",
        "w/s",
        "other/s",
        "rMB/s",
        "wMB/s",
        "IN-FLIGHT",
        "LENT",
        "BORROWED",
        "QUARANTINED",
        "LEAKED",
    ];
    let mut rows = vec![header.map(str::to_owned)];
    for lane in &report.lanes {
        rows.push(row(lane.lane.qid.to_string(), &lane.rates, &lane.lane.activity));
    }
    if report.lanes.len() > 1 {
        let total = &report.total;
        rows.push(row("total".to_owned(), &total.rates, &total.activity));
    }
    table(&rows, Align::RightAfter(1))
}

fn row(name: String, rates: &Rates, activity: &Activity) -> [String; 11] {
    let rate = |rate: f64| format!("{rate:.1}");
    let slots = &activity.slots;
    [
        name,
        rate(rates.reads_per_s),
        rate(rates.writes_per_s),
        rate(rates.others_per_s),
        rate(rates.read_bytes_per_s / 1e6),
        rate(rates.written_bytes_per_s / 1e6),
        activity.in_flight.to_string(),
        slots.lent.to_string(),
        slots.borrowed.to_string(),
        slots.quarantined.to_string(),
        slots.leaked.to_string(),
    ]
}

/// Counters that are not 0.
fn since_the_start(activity: &Activity) -> String {
    let done = activity.requests.iter().filter(|(_, done)| done.requests > 0);
    let requests = done.map(|(kind, done)| match done.bytes {
        0 => format!("{kind} {}", done.requests),
        bytes => format!("{kind} {} ({})", done.requests, Bytes(bytes)),
    });
    let counted = activity.counters.iter().filter(|(_, count)| **count > 0);
    let counters = counted.map(|(name, count)| format!("{name} {count}"));
    let mut text = String::new();
    for (title, items) in [
        ("since the start", requests.collect::<Vec<_>>()),
        ("counters", counters.collect::<Vec<_>>()),
    ] {
        if !items.is_empty() {
            text.push_str(&format!("{title}: {}\n", items.join(", ")));
        }
    }
    text
}

fn faults(lane: &LaneStats) -> String {
    let Some(injected) = lane.injected else { return String::new() };
    format!("queue {}: faults asked for by a test: {injected}\n", lane.qid)
}

fn latencies(latencies: &[Latency]) -> String {
    if latencies.is_empty() {
        return String::new();
    }
    let header = ["KIND", "STAGE", "COUNT", "MEAN", "P50", "P99", "P99.9", "MAX"];
    let mut rows = vec![header.map(str::to_owned)];
    rows.extend(latencies.iter().map(|latency| {
        [
            latency.kind.clone(),
            latency.stage.clone(),
            latency.count.to_string(),
            time(latency.mean_ns),
            time(latency.p50_ns),
            time(latency.p99_ns),
            time(latency.p99_9_ns),
            time(latency.max_ns),
        ]
    }));
    table(&rows, Align::RightAfter(2))
}

fn slots<'a>(slots: impl Iterator<Item = &'a LentSlot>) -> String {
    let header = ["SLOT", "STATE", "DEVICE", "QUEUE", "TAG", "AGE", "BORROWED BY"];
    let mut rows = vec![header.map(str::to_owned)];
    rows.extend(slots.map(|slot| {
        [
            slot.slot.to_string(),
            slot.state.clone(),
            slot.device.to_string(),
            slot.qid.to_string(),
            slot.tag.to_string(),
            time(slot.age_ns),
            slot.borrowers.iter().map(borrower).collect::<Vec<_>>().join(", "),
        ]
    }));
    table(&rows, Align::Left)
}

fn borrower(borrower: &Borrower) -> String {
    match &borrower.op {
        None => format!("{}, which is not in flight", borrower.label),
        Some(op) => {
            format!("{} of {} at {} of backing {}", op.kind, Bytes(op.len), op.offset, op.backing)
        }
    }
}

fn leaks(report: &Report) -> String {
    let leaked = report.total.activity.slots.leaked;
    if leaked == 0 {
        return String::new();
    }
    let named: Vec<_> = report.lanes.iter().flat_map(|lane| &lane.lane.leaks).collect();
    let count = named.len();
    let mut text = format!("leaked:\n{}", slots(named.into_iter()));
    match leaked.saturating_sub(u64::try_from(count).unwrap_or(u64::MAX)) {
        0 => {}
        more => text.push_str(&format!("and {more} more\n")),
    }
    text
}

/// A time in the unit with one to three digits before the point.
fn time(ns: u64) -> String {
    let in_units_of = |unit: u64| ns as f64 / unit as f64;
    match ns {
        0..1_000_000 => format!("{:.1} µs", in_units_of(1000)),
        1_000_000..1_000_000_000 => format!("{:.1} ms", in_units_of(1_000_000)),
        _ => format!("{:.2} s", in_units_of(1_000_000_000)),
    }
}

#[cfg(test)]
mod tests {
    use ublk_target::socket::protocol::{Operation, Requests};
    use ublk_target::socket::report::{LaneReport, Total};

    use super::*;

    fn report(lanes: usize) -> Report {
        let mut activity = Activity { in_flight: 3, ..Activity::default() };
        activity.requests.insert("read".into(), Requests { requests: 7, bytes: 28_672 });
        activity.requests.insert("flush".into(), Requests { requests: 2, bytes: 0 });
        activity.requests.insert("write".into(), Requests::default());
        activity.counters.insert("retries".into(), 5);
        activity.counters.insert("stale".into(), 0);
        activity.slots.lent = 4;
        let rates =
            Rates { reads_per_s: 1234.56, read_bytes_per_s: 5_056_757.8, ..Rates::default() };
        let lane = |qid| LaneReport {
            rates,
            lane: LaneStats { qid, activity: activity.clone(), ..LaneStats::default() },
        };
        let qids = (0..).take(lanes);
        Report {
            version: 1,
            device: 5,
            at_ns: 9,
            interval_ns: 1_000_400_000,
            total: Total { rates, activity: activity.clone() },
            lanes: qids.map(lane).collect(),
            latencies: Vec::new(),
        }
    }

    #[test]
    fn a_lane_is_a_row() {
        let one = text(&report(1));
        let lines: Vec<_> = one.lines().collect();
        assert_eq!(lines.len(), 5, "{one}");
        assert_eq!(lines[0], "/dev/ublkb5, 1.00 s");
        let fields: Vec<_> = lines[2].split_whitespace().collect();
        assert_eq!(fields, ["0", "1234.6", "0.0", "0.0", "5.1", "0.0", "3", "4", "0", "0", "0"]);
        assert_eq!(lines[3], "since the start: flush 2, read 7 (28 KiB)");
        assert_eq!(lines[4], "counters: retries 5");
        let two = text(&report(2));
        assert!(two.lines().any(|line| line.starts_with("total ")), "{two}");
    }

    #[test]
    fn latencies_are_a_table() {
        let mut report = report(1);
        report.latencies.push(Latency {
            kind: "read".into(),
            stage: "backing".into(),
            count: 10,
            mean_ns: 90,
            min_ns: 0,
            p50_ns: 999_940,
            p90_ns: 0,
            p99_ns: 1_500_000,
            p99_9_ns: 999_900_000,
            max_ns: 61_000_000_000,
        });
        let text = text(&report);
        let row = text.lines().last().unwrap();
        let expected =
            ["read", "backing", "10", "0.1 µs", "999.9 µs", "1.5 ms", "999.9 ms", "61.00 s"];
        let cells: Vec<_> =
            row.split("  ").map(str::trim).filter(|cell| !cell.is_empty()).collect();
        assert_eq!(cells, expected);
    }

    #[test]
    fn slots_and_leaks_are_named() {
        let mut report = report(1);
        let op = Operation { kind: "write".into(), backing: 1, offset: 8192, len: 4096 };
        let borrowers = vec![
            Borrower { label: "0x10".into(), op: Some(op) },
            Borrower { label: "0x11".into(), op: None },
        ];
        let (state, age_ns) = ("active".to_owned(), 2_500_000);
        let slot = LentSlot { slot: 6, state, device: 5, qid: 0, tag: 17, age_ns, borrowers };
        report.lanes[0].lane.lent = Some(Vec::new());
        assert!(!text(&report).contains("leaked"));
        report.lanes[0].lane.lent = Some(vec![slot.clone()]);
        report.lanes[0].lane.leaks = vec![slot];
        report.total.activity.slots.leaked = 3;
        let text = text(&report);
        let named = "6     active  5       0      17   2.5 ms  write of 4 KiB at 8192 of backing 1, \
                     0x11, which is not in flight";
        assert_eq!(text.lines().filter(|line| *line == named).count(), 2, "{text}");
        assert!(text.ends_with("and 2 more\n"), "{text}");
    }
}

//! Output.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;
use ublk_sim::campaign::{Campaign, Failure};
use ublk_sim::fault::Fault;
use ublk_sim::setup::{Hostility, ShortResults};
use ublk_sim::{DEFAULT_STEPS, Options};

/// A campaign as JSON.
#[derive(Serialize)]
struct Json {
    seeds: u64,
    requests: u64,
    succeeded: u64,
    steps: u64,
    seconds: f64,
    requests_per_second: u64,
    drivers: BTreeMap<&'static str, u64>,
    faults: BTreeMap<&'static str, u64>,
    counters: BTreeMap<&'static str, u64>,
}

fn per_second(count: u64, elapsed: Duration) -> u64 {
    let nanos = elapsed.as_nanos().max(1);
    u64::try_from(u128::from(count) * 1_000_000_000 / nanos).unwrap_or(u64::MAX)
}

/// With separators between thousands.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place) % 3 == 0 {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// As a table.
pub fn table(campaign: &Campaign, elapsed: Duration) {
    let Campaign { seeds, total } = campaign;
    println!(
        "{} seeds, {} requests, {} of them with success, in {} steps",
        grouped(*seeds),
        grouped(total.requests),
        grouped(total.succeeded),
        grouped(total.steps),
    );
    println!(
        "{:.1} s on one core: {} requests a second; every answer once and right",
        elapsed.as_secs_f64(),
        grouped(per_second(total.requests, elapsed)),
    );
    println!("\nseeds whose driver");
    for (kind, seeds) in ShortResults::ALL.iter().zip(total.drivers) {
        println!("{:>14}  {}", grouped(seeds), kind.name());
    }
    println!("\nfaults");
    for fault in Fault::ALL {
        println!("{:>14}  {}", grouped(total.tally.count(*fault)), fault.name());
    }
    println!("\nwhat the engines counted");
    for (name, count) in &total.counters {
        println!("{:>14}  {}", grouped(*count), name.replace('_', " "));
    }
}

/// As JSON.
pub fn json(campaign: &Campaign, elapsed: Duration) {
    let Campaign { seeds, total } = campaign;
    let count = |fault: &Fault| (fault.name(), total.tally.count(*fault));
    let json = Json {
        seeds: *seeds,
        requests: total.requests,
        succeeded: total.succeeded,
        steps: total.steps,
        seconds: elapsed.as_secs_f64(),
        requests_per_second: per_second(total.requests, elapsed),
        drivers: ShortResults::ALL.iter().map(|it| it.name()).zip(total.drivers).collect(),
        faults: Fault::ALL.iter().map(count).collect(),
        counters: total.counters.iter().copied().collect(),
    };
    println!("{}", serde_json::json!(json));
}

/// Prints a seed that failed a check, and how to replay it.
pub fn failure(failure: &Failure, options: &Options, json: bool) {
    let mut replay = format!("cargo sim --seed {} --only --trace", failure.seed);
    if options.steps != DEFAULT_STEPS {
        replay.push_str(&format!(" --steps {}", options.steps));
    }
    match options.hostility {
        Hostility::Mixed => {}
        Hostility::All => replay.push_str(" --faults all"),
        Hostility::None => replay.push_str(" --faults none"),
    }
    if json {
        println!("{}", serde_json::json!({ "failure": failure, "replay": replay }));
    }
    eprintln!("seed {} failed: {}; replay with `{replay}`", failure.seed, failure.message);
}

/// Whether every fault was seen. Prints those that were not.
pub fn nothing_unseen(campaign: &Campaign) -> bool {
    let unseen: Vec<_> = campaign.total.tally.unseen().map(Fault::name).collect();
    if !unseen.is_empty() {
        eprintln!("never seen: {}", unseen.join(", "));
    }
    unseen.is_empty()
}

//! CPU time of machine and server while a load runs.
//!
//! The counters are read periodically from before fio starts until it has ended, since the time of
//! its measurement is known only afterwards.

use std::fs;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::unistd::{SysconfVar, sysconf};

/// Reads the counters.
#[derive(Debug)]
pub struct Meter {
    /// The process that serves the device.
    server: Option<u32>,
    ticks_per_s: f64,
    readings: Vec<Reading>,
}

#[derive(Debug, Clone, Copy, PartialEq)]
struct Reading {
    /// In milliseconds since 1970, fio's clock.
    at_ms: f64,
    /// The busy time of all processors together, in seconds, plus a constant.
    busy_s: f64,
    server_s: Option<f64>,
}

/// CPU time per second, in seconds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rates {
    /// Of the whole machine.
    pub machine: f64,
    /// Of the server, if there is one.
    pub server: Option<f64>,
}

impl Meter {
    /// A meter for a device of this server.
    pub fn new(server: Option<u32>) -> Self {
        let ticks = sysconf(SysconfVar::CLK_TCK).ok().flatten();
        let ticks_per_s =
            ticks.and_then(|ticks| i32::try_from(ticks).ok()).map_or(100.0, f64::from);
        Self { server, ticks_per_s, readings: Vec::new() }
    }

    /// How often to read: often enough for a measurement of this length, and without disturbing it.
    pub fn interval(sample: Duration) -> Duration {
        (sample / 16).clamp(Duration::from_millis(20), Duration::from_millis(500))
    }

    /// Reads the counters.
    pub fn read(&mut self) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let stat = fs::read_to_string("/proc/stat").unwrap_or_default();
        let Some(usage) = parse(&stat) else { return };
        let now_s = now.as_secs_f64();
        self.readings.push(Reading {
            at_ms: now_s * 1e3,
            busy_s: now_s * usage.processors - usage.unused_ticks / self.ticks_per_s,
            server_s: self.server.and_then(running_s),
        });
    }

    /// The rates between two times, in milliseconds since 1970. `None` without readings before and
    /// after.
    pub fn rates(&self, from_ms: f64, to_ms: f64) -> Option<Rates> {
        let (from, to) = (self.at(from_ms)?, self.at(to_ms)?);
        let seconds = (to_ms - from_ms) / 1e3;
        if seconds <= 0.0 {
            return None;
        }
        let server = to.server_s.zip(from.server_s).map(|(to, from)| (to - from) / seconds);
        Some(Rates { machine: (to.busy_s - from.busy_s) / seconds, server })
    }

    /// The counters at a time, interpolated linearly between readings.
    fn at(&self, at_ms: f64) -> Option<Reading> {
        let after = self.readings.iter().position(|reading| reading.at_ms >= at_ms)?;
        let (before, after) = (self.readings[after.checked_sub(1)?], self.readings[after]);
        let part = (at_ms - before.at_ms) / (after.at_ms - before.at_ms);
        let between = |before: f64, after: f64| before + (after - before) * part;
        let server = before.server_s.zip(after.server_s);
        Some(Reading {
            at_ms,
            busy_s: between(before.busy_s, after.busy_s),
            server_s: server.map(|(before, after)| between(before, after)),
        })
    }
}

#[derive(Debug, Clone, Copy, PartialEq)]
struct Usage {
    processors: f64,
    /// Idle, waiting for I/O, or stolen by other virtual machines.
    unused_ticks: f64,
}

/// All time that is not idle counts as busy: the kernel measures how long processors sleep, and
/// only samples what they do otherwise.
fn parse(stat: &str) -> Option<Usage> {
    let mut lines = stat.lines();
    let all = lines.next()?.strip_prefix("cpu ")?;
    let fields: Vec<f64> = all.split_whitespace().filter_map(|field| field.parse().ok()).collect();
    let [_user, _nice, _system, idle, iowait, _irq, _softirq, steal, ..] = fields[..] else {
        return None;
    };
    let processors = u32::try_from(lines.filter(|line| line.starts_with("cpu")).count()).ok()?;
    Some(Usage { processors: processors.into(), unused_ticks: idle + iowait + steal })
}

/// The CPU time of a process's threads, including io_uring's workers, in seconds.
fn running_s(pid: u32) -> Option<f64> {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).ok()?;
    let mut sum_ns = 0.0;
    for thread in threads.flatten() {
        // A thread that has just ended has no file.
        let Ok(text) = fs::read_to_string(thread.path().join("schedstat")) else { continue };
        sum_ns += running_ns(&text)?;
    }
    Some(sum_ns / 1e9)
}

fn running_ns(schedstat: &str) -> Option<f64> {
    schedstat.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn idle_waiting_and_stolen_time_is_not_used() {
        let stat = "cpu  100 20 3000 500000 6000 400 50 7 10 0\ncpu0 1 1 1 1 1 1 1 1 1 1\n\
                    cpu1 1 1 1 1 1 1 1 1 1 1\nintr 5\n";
        assert_eq!(parse(stat), Some(Usage { processors: 2.0, unused_ticks: 506_007.0 }));
        assert_eq!(parse("cpu0 1 1 1 1 1 1 1 1\n"), None);
        assert_eq!(running_ns("123456789 42 7\n"), Some(123_456_789.0));
    }

    #[test]
    fn counters_grow_evenly_between_readings() {
        let reading = |at_ms, busy_s, server_s| Reading { at_ms, busy_s, server_s };
        let readings = vec![
            reading(1000.0, 10.0, None),
            reading(1100.0, 11.0, Some(3.0)),
            reading(1300.0, 11.4, Some(3.1)),
            reading(1500.0, 11.5, Some(3.2)),
            reading(1600.0, 20.0, None),
        ];
        let meter = Meter { server: Some(1), ticks_per_s: 100.0, readings };
        let rates = meter.rates(1200.0, 1400.0).unwrap();
        assert!((rates.machine - 1.25).abs() < 1e-9, "{rates:?}");
        assert!((rates.server.unwrap() - 0.5).abs() < 1e-9, "{rates:?}");
        let rates = meter.rates(1050.0, 1400.0).unwrap();
        assert!((rates.machine - 0.95 / 0.35).abs() < 1e-9, "{rates:?}");
        assert_eq!(rates.server, None, "it was not there from the start");
        for (from, to) in [(900.0, 1400.0), (1200.0, 1700.0), (1200.0, 1200.0)] {
            assert_eq!(meter.rates(from, to), None, "{from} to {to}");
        }
    }

    #[test]
    fn a_process_that_works_is_seen_to_run() {
        let mut meter = Meter::new(Some(std::process::id()));
        meter.read();
        let first = meter.readings[0];
        let began = std::time::Instant::now();
        // The load of the rest of the machine is unknown.
        while meter.readings[meter.readings.len() - 1].server_s <= first.server_s {
            assert!(began.elapsed() < Duration::from_secs(60), "{meter:?}");
            meter.read();
        }
        let last = meter.readings[meter.readings.len() - 1];
        let rates = meter.rates(first.at_ms + 0.001, last.at_ms).unwrap();
        assert!(rates.server.unwrap() > 0.0 && rates.machine.is_finite(), "{rates:?}");
    }
}

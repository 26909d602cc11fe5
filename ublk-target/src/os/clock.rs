//! Nanoseconds of the monotonic clock.

use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

/// With the resolution of a tick: costs no system call and no clock read.
#[must_use]
pub fn coarse_now() -> u64 {
    now(ClockId::CLOCK_MONOTONIC_COARSE)
}

/// With nanosecond resolution.
#[must_use]
pub fn precise_now() -> u64 {
    now(ClockId::CLOCK_MONOTONIC)
}

fn now(clock: ClockId) -> u64 {
    let now = clock_gettime(clock).map_or(Duration::ZERO, Duration::from);
    u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)
}

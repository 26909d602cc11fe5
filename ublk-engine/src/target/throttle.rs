//! The throttle layer: no more than so many requests and bytes a second.

use std::num::NonZeroU64;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};
use uring_ext::Errno;

use super::layer::{Layer, plan_below};
use crate::plan::{Plan, Planner};
use crate::request::{Request, RequestKind};
use crate::units::Nanos;

const SECOND_NS: u64 = 1_000_000_000;

/// How much of a kind of requests may pass.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rate {
    /// Requests a second; `None` for any number.
    pub iops: Option<NonZeroU64>,
    /// Bytes a second; `None` for any number.
    pub bps: Option<NonZeroU64>,
}

/// The rates of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rates {
    /// For reads.
    pub read: Rate,
    /// For writes, discards and write-zeroes.
    pub write: Rate,
    /// What was not used for this time may pass at once.
    pub burst: Nanos,
}

impl Rates {
    /// The rate for a kind of requests; `None` for flushes, which always pass.
    fn of(&self, kind: RequestKind) -> Option<(usize, Rate)> {
        match kind {
            RequestKind::Read => Some((0, self.read)),
            RequestKind::Write { .. } | RequestKind::Discard | RequestKind::WriteZeroes { .. } => {
                Some((1, self.write))
            }
            RequestKind::Flush => None,
        }
    }
}

/// Holds requests until the rates of the device let them pass. Discards and write-zeroes count as
/// writes; discards move no bytes. Flushes pass.
///
/// Each rate has a schedule, which all queues share: the time at which everything that has passed is
/// paid for (the generic cell rate algorithm, as in ATM traffic management, ITU-T I.371). A request
/// passes when the schedules of its kind are no more than the burst ahead of the time, and then adds
/// its cost to them. So requests of a kind keep their order in each queue.
#[derive(Clone, Debug)]
pub struct ThrottleLayer {
    rates: Rates,
    schedules: Arc<[Schedules; 2]>,
}

/// The schedules of a kind of requests, in nanoseconds.
#[derive(Debug, Default)]
struct Schedules {
    requests: AtomicU64,
    bytes: AtomicU64,
}

impl Schedules {
    /// The schedules of a request with its costs.
    fn costs(&self, rate: Rate, request: &Request) -> [Option<(&AtomicU64, u64)>; 2] {
        let len = if request.kind == RequestKind::Discard { 0 } else { request.len };
        let of = |amount: u64, rate: NonZeroU64| {
            let ns = (u128::from(amount) * u128::from(SECOND_NS)).div_ceil(rate.get().into());
            u64::try_from(ns).unwrap_or(u64::MAX)
        };
        [
            rate.iops.map(|iops| (&self.requests, of(1, iops))),
            rate.bps.map(|bps| (&self.bytes, of(len, bps))),
        ]
    }
}

/// Changes a schedule, and returns what it was.
fn change(schedule: &AtomicU64, to: impl Fn(u64) -> u64) -> u64 {
    // The schedules guard no other memory.
    let changed =
        schedule.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |paid| Some(to(paid)));
    changed.unwrap_or_else(|paid| paid)
}

impl ThrottleLayer {
    /// With these rates, and a whole burst unused.
    #[must_use]
    pub fn new(rates: Rates) -> Self {
        Self { rates, schedules: Arc::default() }
    }

    /// Continues the schedules of another layer, for all queues that share this one.
    pub fn continue_from(&self, before: &Self) {
        for (mine, before) in self.schedules.iter().zip(before.schedules.iter()) {
            let pairs = [(&mine.requests, &before.requests), (&mine.bytes, &before.bytes)];
            for (mine, before) in pairs {
                // Another queue may have done so already, and gone on.
                mine.fetch_max(before.load(Ordering::Relaxed), Ordering::Relaxed);
            }
        }
    }

    /// Adds the cost of a request that comes at `now`, and returns when it may pass.
    fn admit(&self, request: &Request, now: u64) -> u64 {
        let Some((kind, rate)) = self.rates.of(request.kind) else { return now };
        let costs = self.schedules[kind].costs(rate, request).into_iter().flatten();
        let time = |paid: u64| paid.saturating_sub(self.rates.burst.0);
        let paid = costs.clone().map(|(schedule, _)| schedule.load(Ordering::Relaxed));
        let passes = paid.map(time).fold(now, u64::max);
        // It is paid for when it passes. Otherwise requests that wait for one of the rates would save
        // up the other one.
        let paid = costs
            .map(|(schedule, cost)| change(schedule, |paid| paid.max(passes).saturating_add(cost)));
        // Other queues may have been there meanwhile.
        paid.map(time).fold(passes, u64::max)
    }

    /// Takes the cost of a request back.
    fn refund(&self, request: &Request) {
        let Some((kind, rate)) = self.rates.of(request.kind) else { return };
        for (schedule, cost) in self.schedules[kind].costs(rate, request).into_iter().flatten() {
            change(schedule, |paid| paid.saturating_sub(cost));
        }
    }
}

impl Layer for ThrottleLayer {
    fn plan(
        &self,
        below: &impl Planner,
        request: &Request,
        from: u64,
        plan: &mut Plan,
    ) -> Result<(), Errno> {
        if from == 0 {
            let time = self.admit(request, plan.now_ns());
            if time > plan.now_ns() {
                plan.wait_until(time, 1);
                return Ok(());
            }
        }
        plan_below(below, request, from, plan)
    }

    fn withdrawn(&self, below: &impl Planner, request: &Request, from: u64) {
        if from > 0 {
            self.refund(request);
        }
        below.withdrawn(request, from.saturating_sub(1));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::{Layered, LoopTarget};
    use super::*;

    const MS: u64 = 1_000_000;

    fn rate(iops: u64, bps: u64) -> Rate {
        Rate { iops: NonZeroU64::new(iops), bps: NonZeroU64::new(bps) }
    }

    fn layer(read: Rate, write: Rate, burst_ns: u64) -> ThrottleLayer {
        ThrottleLayer::new(Rates { read, write, burst: Nanos(burst_ns) })
    }

    fn request(kind: RequestKind, len: u64) -> Request {
        Request { kind, offset: 0, len }
    }

    const WRITE: RequestKind = RequestKind::Write { fua: false };
    const NOW: u64 = 77 * SECOND_NS;

    /// Rates of reads and writes, burst, kind and length of the requests.
    type Case = (Rate, Rate, u64, RequestKind, u64);

    /// When so many requests that come at once may pass, in milliseconds from now.
    fn times(layer: &ThrottleLayer, kind: RequestKind, len: u64, count: usize) -> Vec<u64> {
        let time = |_| (layer.admit(&request(kind, len), NOW) - NOW) / MS;
        (0..count).map(time).collect()
    }

    #[test]
    fn each_kind_has_its_rates() {
        let zeroes = RequestKind::WriteZeroes { may_unmap: true };
        let unlimited = Rate::default();
        let table: [(Case, &[u64]); 10] = [
            // One at once, the next ones at equal intervals.
            ((rate(100, 0), unlimited, 0, RequestKind::Read, 4096), &[0, 10, 20, 30]),
            ((rate(100, 0), unlimited, 0, WRITE, 4096), &[0, 0, 0, 0]),
            ((rate(0, 4096), unlimited, 0, RequestKind::Read, 1024), &[0, 250, 500, 750]),
            // The slower of both rates decides.
            ((rate(100, 4096), unlimited, 0, RequestKind::Read, 1024), &[0, 250, 500, 750]),
            ((unlimited, rate(2, 1 << 30), 0, WRITE, 4096), &[0, 500, 1000, 1500]),
            // A burst of 25 ms is two and a half requests.
            ((rate(100, 0), unlimited, 25 * MS, RequestKind::Read, 512), &[0, 0, 0, 5, 15]),
            ((unlimited, rate(10, 0), 0, zeroes, 1 << 30), &[0, 100, 200]),
            ((unlimited, rate(0, 1 << 30), 0, zeroes, 1 << 30), &[0, 1000, 2000]),
            ((unlimited, rate(10, 1), 0, RequestKind::Discard, 1 << 30), &[0, 100, 200]),
            ((rate(1, 1), rate(1, 1), 0, RequestKind::Flush, 0), &[0, 0, 0]),
        ];
        for ((read, write, burst, kind, len), expected) in table {
            let layer = layer(read, write, burst);
            assert_eq!(times(&layer, kind, len, expected.len()), expected, "{kind:?} {layer:?}");
        }
    }

    #[test]
    fn absurd_rates_hold_for_ever_and_do_not_overflow() {
        let slowest = layer(rate(1, 1), Rate::default(), 0);
        let long = request(RequestKind::Read, u64::from(u32::MAX));
        let times: Vec<_> = (0..8).map(|_| slowest.admit(&long, NOW)).collect();
        assert!(times.is_sorted() && times[0] == NOW && times[7] == u64::MAX, "{times:?}");
        let fastest = layer(rate(u64::MAX, u64::MAX), Rate::default(), 0);
        assert_eq!(
            (0..4).map(|_| fastest.admit(&long, NOW) - NOW).collect::<Vec<_>>(),
            [0, 1, 2, 3]
        );
    }

    #[test]
    fn what_is_withdrawn_is_not_paid_for() {
        let outer = layer(rate(100, 0), Rate::default(), 0);
        let inner = layer(rate(50, 0), Rate::default(), 0);
        let target = Layered::new([outer, inner], LoopTarget::new(1 << 20));
        let read = request(RequestKind::Read, 4096);
        let mut plan = Plan::default();
        let mut ask = |from| {
            plan.clear();
            plan.set_now(NOW);
            target.plan(&read, from, &mut plan).unwrap();
            let waits = plan.waits_until().map(|until| (until - NOW) / MS);
            (waits, plan.waits_at(), plan.ops().count())
        };
        assert_eq!(ask(0), (None, None, 1));
        assert_eq!(ask(0), (Some(10), Some(1), 0), "for the outer one");
        assert_eq!(ask(1), (Some(20), Some(2), 0), "then for the inner one");
        assert_eq!(ask(2), (None, None, 1));
        // Both were paid; then only the outer one.
        assert_eq!(ask(0), (Some(20), Some(1), 0));
        assert_eq!(ask(1), (Some(40), Some(2), 0));
        target.withdrawn(&read, 2);
        assert_eq!(ask(0), (Some(20), Some(1), 0));
        target.withdrawn(&read, 1);
        assert_eq!(ask(0), (Some(20), Some(1), 0));
        assert_eq!(ask(1), (Some(40), Some(2), 0));
    }

    #[test]
    fn a_layer_that_stays_keeps_its_schedules() {
        let before = layer(rate(100, 0), Rate::default(), 0);
        let queues = [before.clone(), before.clone()];
        times(&queues[0], RequestKind::Read, 512, 3);
        times(&queues[1], RequestKind::Read, 512, 2);
        let after = layer(rate(100, 0), Rate::default(), 0);
        after.continue_from(&queues[0]);
        assert_eq!(times(&after, RequestKind::Read, 512, 2), [50, 60]);
        after.clone().continue_from(&queues[1]);
        assert_eq!(times(&after, RequestKind::Read, 512, 1), [70], "the first queue has gone on");
    }

    proptest! {
        /// In any period, no more passes than its rates allow, and a burst. Requests of a kind pass in
        /// order. None waits although the rates would let it pass.
        #[test]
        fn no_period_has_more_than_its_rates(
            (iops, bps, burst_ms) in (1..2000_u64, 1..(1_u64 << 22), 0..300_u64),
            arrivals in prop::collection::vec((0..30_000_000_u64, 1..64_u64), 1..60),
        ) {
            let throttle = layer(rate(iops, bps), Rate::default(), burst_ms * MS);
            let (mut now, mut passed): (u64, Vec<(u64, u64, u64)>) = (NOW, Vec::new());
            for (gap, sectors) in arrivals {
                now += gap;
                let len = sectors * 512;
                passed.push((throttle.admit(&request(RequestKind::Read, len), now), now, len));
            }
            prop_assert!(passed.is_sorted_by_key(|(time, ..)| *time), "{passed:?}");
            let burst = u128::from(burst_ms * MS);
            let second = u128::from(SECOND_NS);
            for (first, (start, ..)) in passed.iter().enumerate() {
                let mut bytes = 0;
                for (last, (time, _, len)) in passed.iter().enumerate().skip(first) {
                    // The last one is paid for afterwards.
                    let (period, count) = (u128::from(time - start), (last - first) as u128);
                    prop_assert!(count * second <= (period + burst) * u128::from(iops));
                    prop_assert!(bytes * second <= (period + burst) * u128::from(bps));
                    bytes += u128::from(*len);
                }
            }
            // Buckets that drip: what is in them delays a request, and nothing else does.
            let (mut filled, mut at) = ([0_u64; 2], NOW);
            for (time, came, len) in passed {
                let ready = came.max(at);
                let left = |ns: u64, from: u64, to: u64| ns.saturating_sub(to - from);
                let wait = filled.map(|ns| left(ns, at, ready).saturating_sub(burst_ms * MS));
                prop_assert_eq!(Some(time - ready), wait.into_iter().max());
                filled = filled.map(|ns| left(ns, at, time));
                at = time;
                filled[0] += SECOND_NS.div_ceil(iops);
                filled[1] += (len * SECOND_NS).div_ceil(bps);
            }
        }
    }
}

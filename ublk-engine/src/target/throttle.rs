//! The throttle layer: no more than so many requests and bytes a second.

use std::num::NonZeroU64;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};
use uring_ext::Errno;

use super::layer::Layer;
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
    /// After a rest, as much may pass at once as in this time.
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

/// The schedules of a kind of requests.
#[derive(Debug, Default)]
struct Schedules {
    requests: Schedule,
    bytes: Schedule,
    /// Requests that wait.
    waiting: AtomicU64,
}

/// The schedule of a rate, in nanoseconds.
#[derive(Debug, Default)]
struct Schedule {
    /// With the requests that wait.
    reserved: AtomicU64,
    /// Without them.
    passed: AtomicU64,
}

impl Schedules {
    /// The schedules of a request with its costs.
    fn costs(
        &self,
        rate: Rate,
        request: &Request,
    ) -> impl Iterator<Item = (&Schedule, u64)> + Clone + use<'_> {
        let len = if request.kind == RequestKind::Discard { 0 } else { request.len };
        let of = |amount: u64, rate: NonZeroU64| {
            let ns = (u128::from(amount) * u128::from(SECOND_NS)).div_ceil(rate.get().into());
            u64::try_from(ns).unwrap_or(u64::MAX)
        };
        let requests = rate.iops.map(|iops| (&self.requests, of(1, iops)));
        let bytes = rate.bps.map(|bps| (&self.bytes, of(len, bps)));
        requests.into_iter().chain(bytes)
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

    /// Continues the schedules of another layer, of which no request waits any more, for all queues
    /// that share this one.
    pub fn continue_from(&self, before: &Self) {
        for (mine, before) in self.schedules.iter().zip(before.schedules.iter()) {
            for (mine, before) in [(&mine.requests, &before.requests), (&mine.bytes, &before.bytes)]
            {
                let pairs = [(&mine.reserved, &before.reserved), (&mine.passed, &before.passed)];
                for (mine, before) in pairs {
                    // Another queue may have done so already, and gone on.
                    mine.fetch_max(before.load(Ordering::Relaxed), Ordering::Relaxed);
                }
            }
        }
    }

    /// Reserves the cost of a request that comes at `now`, and returns when it may pass: now, or later
    /// if it has to wait.
    fn admit(&self, request: &Request, now: u64) -> u64 {
        let Some((kind, rate)) = self.rates.of(request.kind) else { return now };
        let schedules = &self.schedules[kind];
        let costs = schedules.costs(rate, request);
        let time = |paid: u64| paid.saturating_sub(self.rates.burst.0);
        let paid = costs.clone().map(|(schedule, _)| schedule.reserved.load(Ordering::Relaxed));
        let passes = paid.map(time).fold(now, u64::max);
        // It is paid for when it passes. Otherwise requests that wait for one of the rates would save
        // up the other one.
        let paid = costs.map(|(schedule, cost)| {
            change(&schedule.reserved, |paid| paid.max(passes).saturating_add(cost))
        });
        // Other queues may have been there meanwhile.
        let time = paid.map(time).fold(passes, u64::max);
        if time > now {
            schedules.waiting.fetch_add(1, Ordering::Relaxed);
        } else {
            self.pass(request, now);
        }
        time
    }

    /// A request passes at `now`.
    fn pass(&self, request: &Request, now: u64) {
        let Some((kind, rate)) = self.rates.of(request.kind) else { return };
        for (schedule, cost) in self.schedules[kind].costs(rate, request) {
            change(&schedule.passed, |paid| paid.max(now).saturating_add(cost));
        }
    }

    /// A request that has waited passes at `now`.
    fn pass_after_wait(&self, request: &Request, now: u64) {
        let Some((kind, _)) = self.rates.of(request.kind) else { return };
        self.schedules[kind].waiting.fetch_sub(1, Ordering::Relaxed);
        self.pass(request, now);
    }

    /// A request that waits is taken back. When none waits any more, nothing is reserved.
    fn leave(&self, request: &Request) {
        let Some((kind, rate)) = self.rates.of(request.kind) else { return };
        let schedules = &self.schedules[kind];
        if schedules.waiting.fetch_sub(1, Ordering::Relaxed) == 1 {
            for (Schedule { reserved, passed }, _) in schedules.costs(rate, request) {
                reserved.store(passed.load(Ordering::Relaxed), Ordering::Relaxed);
            }
        }
    }

    /// A request that has passed is taken back.
    fn refund(&self, request: &Request) {
        let Some((kind, rate)) = self.rates.of(request.kind) else { return };
        for (Schedule { reserved, passed }, cost) in self.schedules[kind].costs(rate, request) {
            change(reserved, |paid| paid.saturating_sub(cost));
            change(passed, |paid| paid.saturating_sub(cost));
        }
    }
}

/// The cursor of a request that waits here. What is below has not seen it.
const WAITING: u64 = 1;
/// Afterwards the cursor is so much ahead of the cursor below.
const AHEAD: u64 = 2;

impl Layer for ThrottleLayer {
    fn plan(
        &self,
        below: &impl Planner,
        request: &Request,
        from: u64,
        plan: &mut Plan,
    ) -> Result<(), Errno> {
        let now = plan.now_ns();
        match from {
            0 => {
                let time = self.admit(request, now);
                if time > now {
                    plan.wait_until(time, WAITING);
                    return Ok(());
                }
            }
            WAITING => self.pass_after_wait(request, now),
            _ => {}
        }
        below.plan(request, from.saturating_sub(AHEAD), plan)?;
        plan.advance_cursors(AHEAD);
        Ok(())
    }

    fn withdrawn(&self, below: &impl Planner, request: &Request, from: u64) {
        match from {
            0 => {}
            WAITING => self.leave(request),
            _ => {
                self.refund(request);
                below.withdrawn(request, from - AHEAD);
            }
        }
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
        assert_eq!(ask(1), (Some(20), Some(3), 0), "then for the inner one");
        assert_eq!(ask(3), (None, None, 1));
        // Both were paid; then only the outer one.
        assert_eq!(ask(0), (Some(20), Some(1), 0));
        assert_eq!(ask(1), (Some(40), Some(3), 0));
        target.withdrawn(&read, 3);
        assert_eq!(ask(0), (Some(20), Some(1), 0));
        target.withdrawn(&read, 1);
        assert_eq!(ask(0), (Some(20), Some(1), 0));
        assert_eq!(ask(1), (Some(40), Some(3), 0));
    }

    /// Requests that wait for the slower rate reserve the faster one far ahead.
    #[test]
    fn when_all_that_wait_are_withdrawn_nothing_is_reserved() {
        let layer = layer(rate(10, 100 << 20), Rate::default(), 0);
        let read = request(RequestKind::Read, 4096);
        for _ in 0..3 {
            let waits: Vec<_> = times(&layer, RequestKind::Read, 4096, 50)
                .into_iter()
                .filter(|ms| *ms > 0)
                .collect();
            assert_eq!((waits[0], waits[1]), (100, 200));
            waits.iter().for_each(|_| layer.leave(&read));
        }
        // One of them passes after its wait, and is paid for.
        let waits = times(&layer, RequestKind::Read, 4096, 3);
        assert_eq!(waits, [100, 200, 300]);
        layer.pass_after_wait(&read, NOW + 100 * MS);
        [0; 2].iter().for_each(|_| layer.leave(&read));
        assert_eq!(times(&layer, RequestKind::Read, 4096, 1), [200]);
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

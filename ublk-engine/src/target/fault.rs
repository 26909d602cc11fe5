//! The fault layer: some requests fail, are short at first, or are delayed.

use std::cell::Cell;
use std::sync::Arc;

use uring_ext::Errno;

use super::fault_rule::{Answer, Rule};
use super::layer::{Layer, plan_below};
use crate::plan::{Plan, Planner};
use crate::random::{STEP, mix};
use crate::request::Request;

/// Injects faults. Its decisions depend only on its seed, its stream (one per queue), and the
/// requests in their order.
#[derive(Clone, Debug)]
pub struct FaultLayer {
    rules: Arc<[Rule]>,
    /// How often each rule may still apply.
    left: Box<[Cell<u64>]>,
    seed: u64,
    random: Cell<u64>,
    /// Logical block size in bytes. The length of a short transfer is a multiple of it.
    block: u32,
}

/// The decision about a request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Decision {
    /// Delay in nanoseconds before its first operation.
    pub delay_ns: u64,
    /// The error to answer it with.
    pub error: Option<Errno>,
    /// Its transfers are short at first. This random number decides how short.
    pub short: Option<u64>,
}

impl FaultLayer {
    /// For a device with blocks of `block` bytes. The first rule that matches a request applies.
    #[must_use]
    pub fn new(rules: impl Into<Arc<[Rule]>>, seed: u64, block: u32) -> Self {
        let rules = rules.into();
        let left = rules.iter().map(|rule| Cell::new(rule.count)).collect();
        let layer = Self { rules, left, seed, random: Cell::new(0), block };
        layer.begin_stream(0);
        layer
    }

    /// Uses this stream of its seed from now on.
    pub fn begin_stream(&self, stream: u64) {
        self.random.set(mix(self.seed) ^ mix(!stream));
    }

    /// Continues another layer with the same rules: its stream, and how often each rule may still
    /// apply.
    pub fn continue_from(&self, before: &Self) {
        self.random.set(before.random.get());
        for (left, before) in self.left.iter().zip(&before.left) {
            left.set(before.get());
        }
    }

    /// Decides about the next request.
    pub fn decide(&self, request: &Request) -> Decision {
        let block = u64::from(self.block);
        for (rule, left) in self.rules.iter().zip(&self.left) {
            let concerned = left.get() > 0 && rule.concerns(request, block);
            if !concerned || !rule.chance.strikes(|| self.draw()) {
                continue;
            }
            left.set(left.get() - 1);
            let (error, short) = match rule.answer {
                Answer::Whole => (None, None),
                Answer::Error(errno) => (Some(errno), None),
                Answer::Short => (None, Some(self.draw())),
            };
            return Decision { delay_ns: rule.delay_ns, error, short };
        }
        Decision::default()
    }

    /// The number of bytes that transfers ask for at first: at least one block, and less than the
    /// longest transfer of the window.
    fn at_first(&self, plan: &Plan, drawn: u64) -> u64 {
        let block = u64::from(self.block);
        let longest = plan.ops().filter(|op| op.has_data()).map(|op| op.len).max();
        // If all transfers of this window are as short as possible, a later window may have longer
        // ones.
        let most = (longest.unwrap_or(0) / block).saturating_sub(1).max(1);
        (1 + drawn % most) * block
    }

    /// splitmix64.
    fn draw(&self) -> u64 {
        self.random.set(self.random.get().wrapping_add(STEP));
        mix(self.random.get())
    }
}

/// The decision in the first window of a request holds for its later windows.
impl Layer for FaultLayer {
    fn plan(
        &self,
        below: &impl Planner,
        request: &Request,
        from: u64,
        plan: &mut Plan,
    ) -> Result<(), Errno> {
        let decision = if from == 0 { self.decide(request) } else { Decision::default() };
        let Decision { delay_ns, error, short } = decision;
        let planned = match error {
            Some(errno) => Err(errno),
            None => plan_below(below, request, from, plan),
        };
        plan.delay(delay_ns);
        planned?;
        if let Some(drawn) = short {
            plan.transfer_at_first(self.at_first(plan, drawn));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::super::oracle::{self, Geometry};
    use super::super::{Layered, LinearTarget, LoopTarget, StripeTarget};
    use super::*;
    use crate::plan::{BackingIndex, Op, OpKind};
    use crate::request::RequestKind;

    const BLOCK: u32 = 512;

    fn layer(rules: &[&str], seed: u64) -> FaultLayer {
        let rules: Vec<Rule> = rules.iter().map(|rule| rule.parse().unwrap()).collect();
        FaultLayer::new(rules, seed, BLOCK)
    }

    fn read(offset: u64, len: u64) -> Request {
        Request { kind: RequestKind::Read, offset, len }
    }

    fn decisions(layer: &FaultLayer) -> Vec<Decision> {
        (0..200).map(|number| layer.decide(&read(number * 8192, 8192))).collect()
    }

    #[test]
    fn decisions_are_determined_by_seed_and_stream() {
        let rules = ["p=0.2,error=EIO", "p=0.3,short,delay=1ms", "p=0.5,count=9,delay=2ms"];
        let with = |seed, stream| {
            let layer = layer(&rules, seed);
            layer.begin_stream(stream);
            decisions(&layer)
        };
        assert_eq!(with(1, 0), with(1, 0));
        let streams = [with(1, 0), with(2, 0), with(1, 1), with(2, 1), with(1, 1 << 32)];
        for (number, one) in streams.iter().enumerate() {
            assert!(streams[..number].iter().all(|other| one != other), "stream {number}");
            let count = |is: fn(&Decision) -> bool| one.iter().filter(|it| is(it)).count();
            assert!((20..65).contains(&count(|it| it.error == Some(Errno::EIO))));
            assert!((25..75).contains(&count(|it| it.short.is_some() && it.delay_ns == 1_000_000)));
            assert_eq!(count(|it| it.delay_ns == 2_000_000), 9, "no more than the count");
            let shorts: BTreeSet<_> = one.iter().filter_map(|it| it.short).collect();
            assert!(shorts.len() > 25, "no two are short alike");
        }
    }

    #[test]
    fn the_longest_transfer_comes_short() {
        let at_first = |lens: &[u64], drawn| {
            let mut plan = Plan::default();
            for (kind, len) in lens.iter().map(|len| (OpKind::Read, *len)).chain([FLUSH]) {
                let backing = BackingIndex(0);
                plan.push(Op { kind, backing, offset: 0, len, buf_offset: 0 }).unwrap();
            }
            layer(&["short"], 0).at_first(&plan, drawn)
        };
        const FLUSH: (OpKind, u64) = (OpKind::WriteZeroes { may_unmap: true }, 1 << 20);
        for (lens, least, greatest) in [
            (&[8192][..], 512, 7680),
            (&[512, 8192, 1024], 512, 7680),
            (&[1024], 512, 512),
            (&[1536, 512], 512, 1024),
            // Nothing can be cut in this window, perhaps in a later one.
            (&[512, 512], 512, 512),
            (&[], 512, 512),
        ] {
            let all: BTreeSet<_> = (0..100).map(|drawn| at_first(lens, drawn)).collect();
            assert!(all.iter().all(|bytes| bytes % 512 == 0), "{lens:?}: {all:?}");
            let ends = (all.first().copied(), all.last().copied());
            assert_eq!(ends, (Some(least), Some(greatest)), "{lens:?}");
        }
    }

    #[test]
    fn a_clone_begins_where_its_original_is() {
        let one = layer(&["p=0.5,count=80,error=EIO"], 3);
        decisions(&one);
        let other = one.clone();
        assert_eq!(decisions(&one), decisions(&other));
        assert!(one.left[0].get() == 0 && other.left[0].get() == 0, "counts are not shared");
    }

    #[test]
    fn the_first_rule_that_applies_decides() {
        let rules = ["range=0-8K,count=1,error=ENOSPC", "op=write,error=EILSEQ", "short"];
        let layer = layer(&rules, 0);
        let error = |request: &Request| layer.decide(request).error;
        assert_eq!(error(&read(4096, 8192)), Some(Errno::ENOSPC));
        assert!(layer.decide(&read(4096, 1024)).short.is_some());
        assert_eq!(layer.decide(&read(4096, 512)), Decision::default(), "one block is not short");
        let write = Request { kind: RequestKind::Write { fua: true }, ..read(0, 4096) };
        assert_eq!(error(&write), Some(Errno::new(libc::EILSEQ)));
        let flush = Request { kind: RequestKind::Flush, offset: 0, len: 0 };
        assert_eq!(layer.decide(&flush), Decision::default());
    }

    #[test]
    fn a_request_is_decided_on_once() {
        // Windows of a stripe below a layer that draws its decision again in each window.
        let stripe = StripeTarget::new(4096, &[1 << 20; 2]).unwrap();
        let layers = [layer(&["delay=5us,error=EIO,count=1", "delay=7us,short"], 9)];
        let target = Layered::new(layers, stripe);
        let (mut plan, long) = (Plan::default(), read(0, 80 << 10));
        assert_eq!(target.plan(&long, 0, &mut plan), Err(Errno::EIO));
        assert_eq!(plan.delay_ns(), 5000);
        plan.clear();
        target.plan(&long, 0, &mut plan).unwrap();
        assert_eq!(plan.delay_ns(), 7000);
        assert!(plan.at_first().is_some_and(|bytes| bytes < 4096), "{plan:?}");
        let mut ops = plan.len();
        while let Some(next) = plan.next() {
            plan.clear();
            target.plan(&long, next, &mut plan).unwrap();
            assert_eq!((plan.delay_ns(), plan.at_first()), (0, None));
            ops += plan.len();
        }
        assert_eq!(ops, 20, "all of the request is planned");
    }

    #[test]
    fn layers_of_faults_add_up() {
        let inner = layer(&["delay=1ms", "error=EIO"], 0);
        let outer = layer(&["delay=2ms,short,count=1", "delay=3ms,error=ENOSPC"], 0);
        let target = Layered::new([outer, inner], LoopTarget::new(1 << 20));
        let mut plan = Plan::default();
        target.plan(&read(0, 1024), 0, &mut plan).unwrap();
        assert_eq!((plan.delay_ns(), plan.at_first()), (3_000_000, Some(512)));
        plan.clear();
        assert_eq!(target.plan(&read(0, 1024), 0, &mut plan), Err(Errno::ENOSPC));
        assert_eq!(plan.delay_ns(), 3_000_000, "the inner layer has nothing to decide");
    }

    /// Rules of all kinds. Some of them rarely apply.
    fn rules() -> impl Strategy<Value = Vec<&'static str>> {
        let rules = vec![
            "p=0.3,error=EIO",
            "op=write+discard,p=0.4,error=ENOSPC",
            "p=0.5,short",
            "op=read,range=4K+8K,short",
            "op=flush,p=0.5,error=ETIMEDOUT",
            "count=2,delay=1ms",
            "p=0.2,delay=1ms,short",
        ];
        prop::sample::subsequence(rules, 1..6).prop_shuffle()
    }

    /// The rules of some layers, outermost first.
    fn stack() -> impl Strategy<Value = Vec<Vec<&'static str>>> {
        prop::collection::vec(rules(), 0..4)
    }

    /// The result equals that of the target, except for injected errors.
    fn check<P: Planner + Clone>(
        geometry: Geometry<P>,
        stack: &[Vec<&str>],
        requests: &[oracle::Asked],
    ) -> Result<(), TestCaseError> {
        let Geometry { target: base, size, backings } = geometry;
        let layers: Vec<_> = (7..).zip(stack).map(|(seed, rules)| layer(rules, seed)).collect();
        let shadows = layers.clone();
        let geometry = Geometry { target: Layered::new(layers, base), size, backings };
        oracle::check_answers(&geometry, requests, |request| {
            let inside = request.offset + request.len <= size;
            // A layer does not see a request that an outer layer has refused.
            let error = shadows.iter().find_map(|layer| layer.decide(request).error);
            error.map_or(if inside { Ok(()) } else { Err(Errno::EIO) }, Err)
        })
    }

    proptest! {
        #![proptest_config(oracle::config())]

        #[test]
        fn a_linear_device_with_faults_agrees_with_an_array(
            lens in prop::collection::vec(1..30_u64, 1..24),
            stack in stack(),
            requests in oracle::requests(),
        ) {
            let extents = lens.iter().scan([0_u64; 3], |free, len| {
                let backing = usize::try_from(len % 3).unwrap();
                let start = free[backing];
                free[backing] += len;
                Some((BackingIndex(u16::try_from(backing).unwrap()), start * 512, len * 512))
            });
            let target = LinearTarget::new(extents).unwrap();
            let size = target.size();
            let backings = 0..=lens.iter().map(|len| len % 3).max().unwrap();
            let backings = backings.map(|_| size).collect();
            check(Geometry { target, size, backings }, &stack, &requests)?;
        }

        #[test]
        fn a_striped_device_with_faults_agrees_with_an_array(
            sizes in prop::collection::vec(4096..40_000_u64, 2..12),
            stack in stack(),
            requests in oracle::requests(),
        ) {
            let target = StripeTarget::new(4096, &sizes).unwrap();
            let size = target.size();
            check(Geometry { target, size, backings: sizes }, &stack, &requests)?;
        }
    }
}

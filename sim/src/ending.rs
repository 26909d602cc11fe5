//! The checks at the end of an incarnation, and at the end of a run.

use ublk_engine::engine::STAGES;
use ublk_engine::request::RequestKind;

use crate::cow::Cow;
use crate::draw::Draw as _;
use crate::fault::{Fault, Tally};
use crate::kernel::Kernel;
use crate::setup::ShortResults;
use crate::world::World;

/// The result of a run, or of several.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Requests of the clients. Each was answered once, or failed at its server's death.
    pub requests: u64,
    /// Requests that were answered with success.
    pub succeeded: u64,
    /// Steps, including those of the end. All checks ran after each.
    pub steps: u64,
    /// Runs by their driver's handling of short results, in the order of [`ShortResults::ALL`].
    pub drivers: [u64; ShortResults::ALL.len()],
    /// How often each fault happened.
    pub tally: Tally,
    /// The engines' counters, by name.
    pub counters: Vec<(&'static str, u64)>,
    /// A hash of everything that happened.
    pub hash: u64,
}

impl Outcome {
    /// Adds the result of another run.
    pub fn merge(&mut self, other: &Self) {
        self.requests += other.requests;
        self.succeeded += other.succeeded;
        self.steps += other.steps;
        self.drivers.iter_mut().zip(other.drivers).for_each(|(mine, other)| *mine += other);
        self.tally.merge(&other.tally);
        add_counters(&mut self.counters, &other.counters);
        self.hash = self.hash.rotate_left(1) ^ other.hash;
    }
}

/// Adds counters. Their names are the same every time.
fn add_counters(sums: &mut Vec<(&'static str, u64)>, counters: &[(&'static str, u64)]) {
    if sums.is_empty() {
        return sums.extend_from_slice(counters);
    }
    for (sum, (_, count)) in sums.iter_mut().zip(counters) {
        sum.1 += count;
    }
}

impl World {
    /// Checks the engine's counters at the end of an incarnation.
    pub(crate) fn settle_accounts(&mut self) {
        let stats = *self.lane.engine().stats();
        assert_eq!(stats.stale + stats.unexpected, self.noise, "{stats}");
        assert_eq!(stats.all_requests(), self.delivered, "{stats}");
        let open = self.lane.engine().holdings().requests;
        assert_eq!(stats.commits + open as u64, self.delivered, "{stats}");
        if let Some(recorder) = self.lane.engine().recorder() {
            let total = |kind| recorder.histogram(kind, STAGES.len() - 1).len();
            let recorded: u64 = (0..RequestKind::NAMES.len()).map(total).sum();
            assert!(recorded <= stats.commits, "{recorded} latencies; {stats}");
            let sound = !self.kernel.borrow().setup.hostile;
            assert!(!sound || recorded == stats.commits, "{recorded} latencies; {stats}");
        }
        add_counters(&mut self.counters, &stats.named());
        let injected = self.lane.injected();
        let mut kernel = self.kernel.borrow_mut();
        kernel.tally.add(Fault::PortShort, injected.short);
        kernel.tally.add(Fault::PortAgain, injected.again);
        kernel.tally.add(Fault::PlannedShort, stats.planned_short);
        kernel.tally.add(Fault::Throttled, stats.throttled);
    }

    /// Ends the run: no new requests come, the open ones end, and then the lane.
    pub(crate) fn end(&mut self) {
        {
            let mut kernel = self.kernel.borrow_mut();
            (kernel.closing, kernel.broken) = (true, None);
        }
        if self.lane.engine().is_holding() {
            self.release();
        }
        // In half of the runs the device is stopped while requests are open.
        let abruptly = self.kernel.borrow_mut().rng.chance(512);
        self.run_until("requests come to an end", |kernel| kernel.is_quiet(abruptly));
        self.kernel.borrow_mut().stop();
        self.run_until("fetches come to an end", |kernel| kernel.is_quiet(false));
        let kernel = self.kernel.borrow();
        let engine = self.lane.engine();
        assert!(engine.is_finished(), "all fetches have ended");
        let (stats, holdings) = (engine.stats(), engine.holdings());
        assert_eq!((holdings.requests, holdings.leaked), (0, 0), "{holdings:?}");
        assert_eq!(holdings.slots.quarantined + holdings.slots.free, holdings.slots.capacity);
        assert_eq!(stats.commits, kernel.answered - self.answered_before, "commits");
        assert_eq!(kernel.asked, kernel.answered + kernel.failed_at_death, "answers");
        kernel.check_snapshot();
        let locked = engine.planner().snapshot().is_some_and(Cow::is_locked);
        assert!(!locked, "a request has settled and its planner was not notified");
        if !kernel.setup.hostile {
            assert_eq!(kernel.succeeded, kernel.asked, "a sound kernel's requests succeed");
            let troubles = [stats.failed, stats.retries, stats.stale];
            assert_eq!(troubles, [0; 3], "{stats}");
            // Exactly the transfers that were planned short are short.
            let (partial, short) = (stats.partial, stats.planned_short);
            assert!(partial >= short && (short > 0 || partial == 0), "{stats}");
            assert_eq!((stats.unexpected, stats.cancelled, stats.lost_ops), (0, 0, 0), "{stats}");
        }
        drop(kernel);
        self.settle_accounts();
    }

    fn run_until(&mut self, what: &str, is_reached: impl Fn(&Kernel) -> bool) {
        for number in 0..200_000_u32 {
            if is_reached(&self.kernel.borrow()) {
                return;
            }
            self.step();
            // Operations that are held back complete in the end.
            if number % 64 == 63 {
                self.kernel.borrow_mut().now += 200_000;
            }
        }
        panic!("{what} never: {:?}", self.lane.engine().holdings());
    }

    pub(crate) fn outcome(self) -> Outcome {
        let kernel = self.kernel.borrow();
        Outcome {
            requests: kernel.asked,
            succeeded: kernel.succeeded,
            steps: self.steps,
            drivers: ShortResults::ALL.map(|kind| u64::from(kernel.setup.short_results == kind)),
            tally: kernel.tally.clone(),
            counters: self.counters.clone(),
            hash: kernel.trace.hash(),
        }
    }
}

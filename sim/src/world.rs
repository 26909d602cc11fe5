//! A run: the kernel of a seed and the lane on it, step by step.

use std::cell::RefCell;
use std::rc::Rc;

use rand_xoshiro::rand_core::Rng as _;
use ublk_engine::engine::{EngineConfig, QueueIdentity, Recorder};
use ublk_engine::lane::event::Event;
use ublk_engine::lane::fault::Faults;
use ublk_engine::lane::{Lane, PortConfig};
use ublk_engine::units::Qid;
use uring_ext::Errno;
use uring_ext::ring::Cqe;

use crate::check::View;
use crate::draw::Draw as _;
use crate::ending::Outcome;
use crate::fault::Fault;
use crate::hold::HeldTags;
use crate::kernel::{Kernel, Phase, QID, SimIo, SpareHolder};
use crate::mapping::Mapping;
use crate::noise::HandledCompletions;
use crate::setup::{Hostility, Setup};
use crate::trace::Trace;

/// Options of a run.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Steps before requests stop coming.
    pub steps: u32,
    /// Which faults happen.
    pub hostility: Hostility,
    /// Whether every step is printed.
    pub trace: bool,
}

/// A run.
pub struct World {
    pub(crate) kernel: Rc<RefCell<Kernel>>,
    pub(crate) lane: Lane<Mapping>,
    /// The lane's view of the kernel.
    pub(crate) io: SimIo,
    /// Completions that were handled in this incarnation.
    pub(crate) past: HandledCompletions,
    /// Completions of earlier incarnations.
    pub(crate) ghosts: Vec<Cqe>,
    /// Deliveries that the lane has handled in this incarnation.
    pub(crate) delivered: u64,
    /// What the lane holds back.
    pub(crate) held: HeldTags,
    /// Spurious completions that the lane got in this incarnation.
    pub(crate) noise: u64,
    /// The time that the lane was last given.
    lane_time: u64,
    pub(crate) steps: u64,
    /// Requests that earlier incarnations answered.
    pub(crate) answered_before: u64,
    pub(crate) counters: Vec<(&'static str, u64)>,
}

/// A step of a run.
#[derive(Clone, Copy)]
enum Step {
    Deliver,
    Submit,
    Start,
    Finish,
    Handle,
    Turn,
    Noise,
    Unstick,
    CancelAll,
    BreakRing,
    Kill,
    LetTimePass,
    Replace,
    Hold,
    EndHold,
    ReturnSpare,
}

/// Plays a seed.
///
/// # Panics
/// If a check fails.
#[must_use]
pub fn play(seed: u64, options: &Options) -> Outcome {
    play_setup(seed, Setup::of(seed, options.hostility), options)
}

/// Plays a seed with another configuration than its own.
///
/// # Panics
/// If a check fails.
#[must_use]
pub fn play_setup(seed: u64, setup: Setup, options: &Options) -> Outcome {
    let mut world = World::new(seed, setup, options);
    for _ in 0..options.steps {
        world.step();
    }
    world.end();
    world.outcome()
}

fn lane(kernel: &Rc<RefCell<Kernel>>, io: &mut SimIo) -> Lane<Mapping> {
    let model = kernel.borrow();
    let setup = &model.setup;
    let config = EngineConfig {
        queue: QueueIdentity { device: 7, qid: Qid(QID), depth: setup.depth },
        incarnation: model.incarnation,
        lend: setup.lend,
        slots: setup.slots,
        geometry: setup.geometry,
        deadline: setup.deadline,
    };
    let faults =
        setup.port_faults.map(|list| Faults::parse(list).unwrap_or_else(|error| panic!("{error}")));
    let (mapping, measure) = (setup.mapping.clone(), setup.measure);
    let (routes, polled, place) = (setup.routes.as_slice().into(), setup.polled, setup.table_range);
    let port = PortConfig { routes, polled, faults, place };
    drop(model);
    let mut lane = Lane::new(mapping, config, port);
    if measure {
        lane.engine_mut().measure(Some(Box::new(Recorder::new())));
    }
    lane.fetch_all(io);
    lane
}

impl World {
    pub(crate) fn new(seed: u64, setup: Setup, options: &Options) -> Self {
        let trace = Trace::new(options.trace);
        trace.note(|| format!("{setup:#?}"));
        let kernel = Rc::new(RefCell::new(Kernel::new(seed, setup, trace)));
        let mut io = SimIo(Rc::clone(&kernel));
        let lane = lane(&kernel, &mut io);
        Self {
            kernel,
            lane,
            io,
            past: HandledCompletions::default(),
            ghosts: Vec::new(),
            delivered: 0,
            held: HeldTags::new(),
            noise: 0,
            lane_time: 0,
            steps: 0,
            answered_before: 0,
            counters: Vec::new(),
        }
    }

    /// One step, and the checks after it.
    pub(crate) fn step(&mut self) {
        let step = self.choose();
        self.take(step);
        self.look(matches!(step, Step::Turn));
    }

    /// Checks the invariants. Ends a lane that has failed.
    pub(crate) fn look(&mut self, looked: bool) {
        self.steps += 1;
        if let Err(error) = self.lane.check() {
            let mut kernel = self.kernel.borrow_mut();
            kernel.trace.note(|| format!("the lane ends: {error}"));
            match kernel.broken {
                Some(_) => kernel.tally.note(Fault::RingBroken),
                None => assert!(kernel.refused, "the lane ends: {error}"),
            }
            drop(kernel);
            return self.kill();
        }
        assert!(!self.kernel.borrow().breakage_reported, "the lane goes on with a broken ring");
        let backlog = self.lane.backlog();
        self.kernel.borrow_mut().note_backlog(backlog);
        let view = View { engine: self.lane.engine(), lane_time: self.lane_time, looked };
        view.check(&mut self.kernel.borrow_mut());
    }

    /// Draws one of the possible steps.
    fn choose(&mut self) -> Step {
        let mut kernel = self.kernel.borrow_mut();
        let kernel = &mut *kernel;
        let setup = &kernel.setup;
        let hostile = u32::from(setup.hostile);
        let is_holding = self.lane.engine().is_holding();
        let if_any = |any: bool, weight: u32| if any { weight } else { 0 };
        let weights = [
            (Step::Deliver, if_any(!kernel.stopping, 16)),
            (Step::Submit, if_any(kernel.pushed().next().is_some(), setup.submit_weight)),
            (Step::Start, if_any(!kernel.queued.is_empty(), 20)),
            (Step::Finish, if_any(!kernel.running.is_empty(), 28)),
            (Step::Handle, if_any(!kernel.posted.is_empty(), 36)),
            (Step::Turn, if_any(kernel.backlogged, 16) + 2),
            (Step::Noise, 3 * hostile),
            (Step::Unstick, hostile),
            (Step::LetTimePass, if_any(setup.deadline.is_some(), 1)),
            (Step::Replace, if_any(setup.swaps, 1)),
            (Step::Hold, if_any(setup.swaps && !is_holding && !kernel.closing, 1)),
            (Step::EndHold, if_any(setup.swaps && is_holding, 2)),
            (Step::ReturnSpare, if_any(kernel.spare == SpareHolder::Others, 12)),
        ];
        let rare = kernel.rng.next_u64();
        if setup.hostile && !kernel.closing {
            if kernel.rng.chance(kernel.setup.kill_rate) && rare & 1 == 0 {
                return Step::Kill;
            }
            if kernel.rng.chance(kernel.setup.rate(Fault::CancelAll)) && rare & 2 == 0 {
                return Step::CancelAll;
            }
            if kernel.setup.kill_rate > 0 && rare >> 48 & 0x3fff == 0 {
                return Step::BreakRing;
            }
        }
        let total = weights.iter().map(|(_, weight)| weight).sum();
        let mut drawn = kernel.rng.below(total);
        for (step, weight) in weights {
            if drawn < weight {
                return step;
            }
            drawn -= weight;
        }
        Step::Turn
    }

    fn take(&mut self, step: Step) {
        let mut kernel = self.kernel.borrow_mut();
        kernel.now += 500 + (kernel.rng.next_u64() & 0xfff);
        kernel.trace.mix(step as u64);
        match step {
            Step::Deliver => {
                let depth = u32::from(kernel.setup.depth);
                let tag = u16::try_from(kernel.rng.below(depth)).unwrap_or(0);
                if kernel.tags[usize::from(tag)].phase == Phase::Waiting {
                    kernel.deliver(tag);
                }
            }
            Step::Submit => kernel.submit(),
            Step::Start => kernel.start_one(),
            Step::Finish => {
                let running = kernel.running.len();
                let at = kernel.rng.index(running);
                kernel.finish(at);
            }
            Step::Unstick => kernel.free_stuck_slot(),
            Step::BreakRing => {
                let errno = kernel.rng.pick(&[Errno::ENXIO, Errno::EINVAL]);
                kernel.broken.get_or_insert(errno);
            }
            Step::LetTimePass => {
                kernel.now += kernel.setup.deadline.unwrap_or(0) / 2;
            }
            Step::Handle => {
                drop(kernel);
                self.handle();
            }
            Step::Turn => {
                drop(kernel);
                self.turn();
            }
            Step::Noise => {
                drop(kernel);
                self.make_noise();
            }
            Step::CancelAll => {
                kernel.cancel_by_hand();
                let now = kernel.now;
                drop(kernel);
                self.set_time(now);
                self.kernel.borrow_mut().presume_cancelled(true);
                self.lane.cancel_all(&mut self.io);
            }
            Step::Kill => {
                drop(kernel);
                self.kill();
            }
            Step::Replace => {
                drop(kernel);
                self.replace_planner();
            }
            Step::Hold => {
                drop(kernel);
                self.hold();
            }
            Step::EndHold => {
                drop(kernel);
                self.end_hold();
            }
            Step::ReturnSpare => {
                let (is_wanted, now) = (kernel.others_give_spare(), kernel.now);
                drop(kernel);
                if is_wanted {
                    self.set_time(now);
                    self.lane.serve_waiting(&mut self.io);
                }
            }
        }
    }

    /// Gives the lane the time.
    pub(crate) fn set_time(&mut self, now: u64) {
        self.lane_time = now;
        self.kernel.borrow_mut().lane_time = now;
        self.lane.set_now(now);
    }

    /// Runs the lane's turn before it submits.
    pub(crate) fn turn(&mut self) {
        let now = self.kernel.borrow().now;
        self.set_time(now);
        self.kernel.borrow_mut().presume_cancelled(false);
        self.lane.before_submit(&mut self.io);
        self.note_held();
    }

    /// Makes the lane handle a completion, not always the oldest.
    pub(crate) fn handle(&mut self) {
        let mut kernel = self.kernel.borrow_mut();
        let posted = kernel.posted.len();
        let at = if kernel.rng.chance(512) { kernel.rng.index(posted) } else { 0 };
        let at = kernel.not_before_registration(at);
        if at > 0 {
            kernel.tally.note(Fault::Reordered);
        }
        let posted = kernel.posted.remove(at);
        kernel.note_reaped(&posted);
        let cqe = posted.cqe;
        kernel.trace.note(|| format!("handle {cqe:x?}"));
        kernel.trace.mix(cqe.user_data);
        let incarnation = kernel.incarnation;
        let is_holding = self.lane.engine().is_holding();
        if let Some(Event::Fetched(key)) = Event::decode(cqe.user_data, incarnation) {
            let now = kernel.now;
            let model = &mut kernel.tags[key.tag.index()];
            if cqe.res >= 0 {
                model.handled = true;
                self.delivered += 1;
                model.faults_met.since = now;
                if !is_holding {
                    kernel.decide(key.tag.0);
                }
            } else if cqe.res != Errno::ENODEV.negated() {
                kernel.refused = true;
            }
        }
        let now = kernel.now;
        drop(kernel);
        self.set_time(now);
        self.lane.handle(cqe, &mut self.io);
        self.note_held();
        if self.is_counted(cqe) {
            self.past.note(cqe);
        }
    }

    /// Kills the server, and starts the next one.
    pub(crate) fn kill(&mut self) {
        self.settle_accounts();
        let mut kernel = self.kernel.borrow_mut();
        kernel.tally.note(Fault::Kill);
        self.past.end(kernel.end_server(), &mut self.ghosts);
        self.answered_before = kernel.answered;
        drop(kernel);
        (self.noise, self.delivered) = (0, 0);
        self.held.clear();
        self.lane = lane(&self.kernel, &mut self.io);
    }
}

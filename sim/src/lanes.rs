//! The lanes of one device, and a control thread that changes its planner in all of them.
//!
//! Each lane has its own queue of the device: a `World`. Control holds all lanes, waits until they
//! are quiet, changes the planner of each, and lets them go on; or it gives up. Its messages reach the
//! lanes at any later step. At every step, all requests that have begun and not ended must have begun
//! under the same version of the planner, whichever lane they are in. A lane that is quiet must have
//! said so.

use std::cell::Cell;
use std::collections::VecDeque;
use std::rc::Rc;

use rand_xoshiro::SplitMix64;
use rand_xoshiro::rand_core::SeedableRng as _;
use ublk_engine::lane::{Hold, Quiet, Quorum};

use crate::draw::Draw as _;
use crate::setup::Setup;
use crate::world::{Options, World};

/// The result of a run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Lanes of the device.
    pub lanes: usize,
    /// Requests of all lanes.
    pub requests: u64,
    /// How often the planner was changed in all lanes.
    pub changes: u64,
    /// Requests that were held back meanwhile.
    pub held_back: u64,
    /// How often control gave up, because a request did not end.
    pub given_up: u64,
    /// How often the server died.
    pub deaths: u64,
    /// Steps.
    pub steps: u64,
}

/// What the lanes tell.
#[derive(Clone)]
struct Signal(Rc<Quorum>, Rc<Cell<bool>>);

impl Quiet for Signal {
    fn arrive(&self) {
        if self.0.arrive() {
            assert!(!self.1.replace(true), "completed twice");
        }
    }
}

/// A message to a lane.
#[derive(Clone)]
enum Message {
    Hold(Signal),
    /// With or without a change.
    Release(bool),
}

struct Member {
    world: World,
    hold: Hold<Signal>,
    inbox: VecDeque<Message>,
    /// The version of its planner.
    version: u64,
}

/// What control does.
enum Control {
    Idle,
    /// It waits for the lanes.
    Waiting(Signal),
    /// It has released them.
    Released,
}

struct Device {
    rng: SplitMix64,
    members: Vec<Member>,
    control: Control,
    outcome: Outcome,
}

/// Plays a seed.
///
/// # Panics
/// If a check fails.
#[must_use]
pub fn play(seed: u64, options: &Options) -> Outcome {
    let mut rng = SplitMix64::seed_from_u64(seed ^ 0x1a_9e5);
    let lanes = 2 + rng.index(3);
    let member = |lane: u64| {
        // A multiple of 8, so that all lanes meet faults, or none does.
        let seed = seed + lane * 80_000_000;
        let mut setup = Setup::of(seed, options.hostility);
        // Only control changes the planner.
        setup.swaps = false;
        let world = World::new(seed, setup, options);
        Member { world, hold: Hold::default(), inbox: VecDeque::new(), version: 0 }
    };
    let members = (0..).take(lanes).map(member).collect();
    let outcome = Outcome { lanes, ..Outcome::default() };
    let mut device = Device { rng, members, control: Control::Idle, outcome };
    for _ in 0..options.steps {
        device.step();
    }
    device.end()
}

impl Device {
    fn step(&mut self) {
        self.outcome.steps += 1;
        if self.rng.chance(24) {
            self.control();
        }
        let lane = self.rng.index(self.members.len());
        let reads = self.rng.chance(100);
        let member = &mut self.members[lane];
        let incarnation = member.world.kernel.borrow().incarnation;
        let message = if reads { member.inbox.pop_front() } else { None };
        match message {
            Some(message) => member.attend(message, &mut self.outcome),
            None => member.world.step(),
        }
        if member.world.kernel.borrow().incarnation != incarnation {
            return self.die(lane);
        }
        // As the loop does after each batch.
        member.hold.check(&member.world.lane);
        self.check();
    }

    /// The server has died with one of its lanes. The next one has no change in hand.
    fn die(&mut self, first: usize) {
        self.outcome.deaths += 1;
        self.control = Control::Idle;
        for (lane, member) in self.members.iter_mut().enumerate() {
            if lane != first {
                self.outcome.held_back += member.world.lane.engine().stats().held_back;
                member.world.kill();
            }
            member.inbox.clear();
            (member.hold, member.version) = (Hold::default(), 0);
        }
    }

    /// The control thread comes to run.
    fn control(&mut self) {
        match &self.control {
            Control::Idle => {
                let signal = Signal(Rc::new(Quorum::of(self.members.len())), Rc::default());
                self.send(&Message::Hold(signal.clone()));
                self.control = Control::Waiting(signal);
            }
            Control::Waiting(signal) => {
                let is_complete = signal.0.is_complete();
                assert_eq!(is_complete, signal.1.get(), "the last lane wakes control");
                if is_complete {
                    for (lane, member) in self.members.iter().enumerate() {
                        let engine = member.world.lane.engine();
                        assert!(
                            engine.is_holding() && engine.is_quiet(),
                            "lane {lane} is not quiet"
                        );
                    }
                    self.outcome.changes += 1;
                } else if self.rng.chance(60) {
                    self.outcome.given_up += 1;
                } else {
                    return;
                }
                self.send(&Message::Release(is_complete));
                self.control = Control::Released;
            }
            Control::Released => {
                if self.members.iter().all(|member| member.inbox.is_empty()) {
                    self.control = Control::Idle;
                }
            }
        }
    }

    fn send(&mut self, message: &Message) {
        for member in &mut self.members {
            member.inbox.push_back(message.clone());
        }
    }

    fn check(&self) {
        let mut version = None;
        for (lane, member) in self.members.iter().enumerate() {
            let engine = member.world.lane.engine();
            if !engine.is_quiet() {
                let first = *version.get_or_insert(member.version);
                assert_eq!(
                    first, member.version,
                    "lane {lane} has begun what others still wait for"
                );
            }
        }
        if let Control::Waiting(signal) = &self.control {
            let is_held = |member: &Member| {
                let engine = member.world.lane.engine();
                member.inbox.is_empty() && engine.is_holding() && engine.is_quiet()
            };
            let are_quiet = self.members.iter().all(is_held);
            // Each lane checks at its own steps.
            let have_checked = self.members.iter().all(|member| !member.hold.is_waited_for());
            assert!(
                !are_quiet || !have_checked || signal.0.is_complete(),
                "a lane has said nothing"
            );
        }
    }

    fn end(mut self) -> Outcome {
        // Control sends at most one more message to each lane.
        loop {
            for member in &mut self.members {
                while let Some(message) = member.inbox.pop_front() {
                    member.attend(message, &mut self.outcome);
                }
                member.hold.check(&member.world.lane);
            }
            match self.control {
                Control::Waiting(_) => self.control(),
                Control::Idle | Control::Released => break,
            }
        }
        for member in &mut self.members {
            self.outcome.held_back += member.world.lane.engine().stats().held_back;
            member.world.end();
            self.outcome.requests += member.world.kernel.borrow().asked;
        }
        self.outcome
    }
}

impl Member {
    fn attend(&mut self, message: Message, outcome: &mut Outcome) {
        let world = &mut self.world;
        outcome.steps += 1;
        match message {
            Message::Hold(signal) => {
                let now = world.kernel.borrow().now;
                world.set_time(now);
                self.hold.begin(&mut world.lane, signal);
                world.note_held();
            }
            Message::Release(changes) => {
                if changes {
                    world.replace_planner();
                    self.version += 1;
                }
                world.release_with(&mut self.hold);
            }
        }
        world.look(false);
    }
}

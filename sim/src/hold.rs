//! Requests are held back while the planner is replaced.

use std::collections::VecDeque;

use ublk_engine::lane::{Hold, Quiet};
use ublk_engine::target::Decision;

use crate::draw::Draw as _;
use crate::fault::Fault;
use crate::layout;
use crate::world::World;

/// Nobody waits for the lane.
enum Nobody {}

impl Quiet for Nobody {
    fn arrive(&self) {}
}

/// Tags with requests that the lane holds back, in the order of their delivery.
pub(crate) type HeldTags = VecDeque<u16>;

impl World {
    /// Makes the lane hold back what is delivered from now on.
    pub(crate) fn hold(&mut self) {
        self.kernel.borrow_mut().trace.note(|| "hold".to_owned());
        self.lane.engine_mut().hold();
        self.note_held();
    }

    /// Records which requests the lane has held back since the last call: those that were delivered,
    /// and those that it has taken back.
    pub(crate) fn note_held(&mut self) {
        let mut kernel = self.kernel.borrow_mut();
        for tag in self.lane.engine().held_back_tags().skip(self.held.len()) {
            let model = &mut kernel.tags[tag.index()];
            model.held = true;
            model.faults_met.decision = Decision::default();
            self.held.push_back(tag.0);
            kernel.tally.note(Fault::HeldBack);
            kernel.trace.note(|| format!("tag {} is held back", tag.0));
        }
    }

    /// Adds or removes layers. Possible only while no request has begun that has not ended.
    pub(crate) fn replace_planner(&mut self) {
        let mut kernel = self.kernel.borrow_mut();
        let engine = self.lane.engine_mut();
        let (present, holdings) = (engine.planner().clone(), engine.holdings());
        let is_quiet = holdings.requests == self.held.len();
        assert_eq!(engine.is_quiet(), is_quiet, "{holdings:?}, {} held", self.held.len());
        let other = if !present.has_layers() {
            let (hostile, block) = (kernel.setup.hostile, kernel.setup.geometry.block);
            layout::with_layers(&mut kernel.rng, hostile, block, present)
        } else {
            present.core().clone()
        };
        let replaced = engine.exchange_planner(&mut other.clone());
        assert_eq!(replaced.is_ok(), is_quiet, "replaced with {holdings:?}");
        if is_quiet {
            let among_held =
                if self.held.is_empty() { None } else { Some(Fault::ReplacedAmongHeld) };
            [Some(Fault::Replaced), among_held].into_iter().flatten().for_each(|fault| {
                kernel.tally.note(fault);
            });
            kernel.trace.note(|| format!("replace the planner by {other:?}"));
            kernel.setup.mapping = other;
            kernel.begin_shadow();
        }
    }

    /// Lets the lane begin what it holds back. A lane that is not quiet goes on as before.
    pub(crate) fn release(&mut self) {
        self.release_with(&mut Hold::<Nobody>::default());
    }

    /// As [`World::release`], for a lane that somebody may wait for.
    pub(crate) fn release_with(&mut self, hold: &mut Hold<impl Quiet>) {
        let quiet = self.lane.engine().is_quiet();
        if !quiet {
            let (oldest, begun) = (self.lane.engine_mut().oldest_begun(), self.held.len());
            let oldest = oldest.expect("a lane that is not quiet waits for a request");
            assert!(!self.held.contains(&oldest.tag.0), "{oldest:?} is held, of {begun}");
        }
        let mut kernel = self.kernel.borrow_mut();
        if !quiet {
            kernel.tally.note(Fault::HoldGivenUp);
        }
        let now = kernel.now;
        for tag in std::mem::take(&mut self.held) {
            let model = &mut kernel.tags[usize::from(tag)];
            (model.held, model.faults_met.since) = (false, now);
            kernel.decide(tag);
        }
        kernel.trace.note(|| "release".to_owned());
        drop(kernel);
        self.set_time(now);
        hold.end(&mut self.lane, &mut self.io);
        assert_eq!(self.lane.engine().held_back(), 0);
    }

    /// One of the steps of a hold.
    pub(crate) fn end_hold(&mut self) {
        let replaces = self.kernel.borrow_mut().rng.chance(768);
        if replaces {
            self.replace_planner();
        }
        self.release();
    }
}

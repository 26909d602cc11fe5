//! The part of a lane that is held: it tells control once when it is quiet.

use super::{Lane, LaneIo};
use crate::plan::Planner;

/// Hears of a lane that is quiet. It must neither block nor allocate, also when it is dropped. One that
/// is dropped before has to do with a lane that was released or has ended.
pub trait Quiet {
    /// The lane is quiet, and stays so until it is released.
    fn arrive(&self);
}

/// The hold of a lane.
#[derive(Debug)]
pub struct Hold<Q>(Option<Q>);

impl<Q> Default for Hold<Q> {
    fn default() -> Self {
        Self(None)
    }
}

impl<Q: Quiet> Hold<Q> {
    /// Lets the lane begin no more requests. `quiet` hears when all others have ended.
    pub fn begin<P: Planner>(&mut self, lane: &mut Lane<P>, quiet: Q) {
        lane.engine_mut().hold();
        self.0 = Some(quiet);
        self.check(lane);
    }

    /// Call this after completions were handled, while the lane [is held](Hold::is_waited_for): tells
    /// once that the lane is quiet.
    pub fn check<P: Planner>(&mut self, lane: &Lane<P>) {
        if self.0.is_some() && lane.engine().is_quiet() {
            if let Some(quiet) = self.0.take() {
                quiet.arrive();
            }
        }
    }

    /// Whether somebody waits for the lane to become quiet.
    pub fn is_waited_for(&self) -> bool {
        self.0.is_some()
    }

    /// Begins the requests that were held back.
    pub fn end<P: Planner>(&mut self, lane: &mut Lane<P>, io: &mut impl LaneIo) {
        self.0 = None;
        lane.release(io);
    }
}

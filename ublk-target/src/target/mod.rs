//! Targets: pure planners.

mod loop_target;
mod null_target;

pub use loop_target::LoopTarget;
pub use null_target::NullTarget;

use uring_ext::Errno;

use crate::plan::{Plan, Planner};
use crate::request::Request;

/// Any of the targets, told apart without a virtual call.
#[derive(Clone, Copy, Debug)]
pub enum AnyTarget {
    /// See [`NullTarget`].
    Null(NullTarget),
    /// See [`LoopTarget`].
    Loop(LoopTarget),
}

impl Planner for AnyTarget {
    fn plan(&self, request: &Request, from: u64, plan: &mut Plan) -> Result<(), Errno> {
        match self {
            Self::Null(target) => target.plan(request, from, plan),
            Self::Loop(target) => target.plan(request, from, plan),
        }
    }
}

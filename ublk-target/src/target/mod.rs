//! Targets: pure planners.

mod linear;
mod loop_target;
mod null_target;
#[cfg(test)]
mod oracle;
mod stripe;

pub use linear::{BadExtents, LinearTarget};
pub use loop_target::LoopTarget;
pub use null_target::NullTarget;
pub use stripe::{BACKINGS as STRIPE_BACKINGS, BadStripe, MIN_CHUNK, StripeTarget};

use uring_ext::Errno;

use crate::plan::{BackingIndex, Op, OpKind, Plan, Planner};
use crate::request::{Request, RequestKind};

/// Any of the targets, told apart without a virtual call.
#[derive(Clone, Debug)]
pub enum AnyTarget {
    /// See [`NullTarget`].
    Null(NullTarget),
    /// See [`LoopTarget`].
    Loop(LoopTarget),
    /// See [`LinearTarget`].
    Linear(LinearTarget),
    /// See [`StripeTarget`].
    Stripe(StripeTarget),
}

impl Planner for AnyTarget {
    fn plan(&self, request: &Request, from: u64, plan: &mut Plan) -> Result<(), Errno> {
        match self {
            Self::Null(target) => target.plan(request, from, plan),
            Self::Loop(target) => target.plan(request, from, plan),
            Self::Linear(target) => target.plan(request, from, plan),
            Self::Stripe(target) => target.plan(request, from, plan),
        }
    }
}

/// What is asked of a backing that has a part of the request's range.
const fn op_kind(kind: RequestKind) -> OpKind {
    match kind {
        RequestKind::Read => OpKind::Read,
        RequestKind::Write { fua } => OpKind::Write { fua },
        RequestKind::Flush => OpKind::Flush,
        RequestKind::Discard => OpKind::Discard,
        RequestKind::WriteZeroes { may_unmap } => OpKind::WriteZeroes { may_unmap },
    }
}

/// Flushes each of the backings. The cursor counts them.
fn push_flushes(backings: u16, from: u64, plan: &mut Plan) -> Result<(), Errno> {
    let first = u16::try_from(from).map_err(|_| Errno::EINVAL)?;
    for index in first..backings {
        let backing = BackingIndex(index);
        let op = Op { kind: OpKind::Flush, backing, offset: 0, len: 0, buf_offset: 0 };
        if plan.push(op).is_err() {
            plan.continue_at(index.into());
            break;
        }
    }
    Ok(())
}

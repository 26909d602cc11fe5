//! Targets: pure planners.

mod fault;
mod fault_rule;
mod linear;
mod loop_target;
mod null_target;
#[cfg(test)]
mod oracle;
mod stripe;
mod transfer_limit;

pub use fault::{Decision, FaultTarget};
pub use fault_rule::{BadRule, Rule};
pub use linear::{BadExtents, LinearTarget};
pub use loop_target::LoopTarget;
pub use null_target::NullTarget;
pub use stripe::{BACKINGS as STRIPE_BACKINGS, BadStripe, MIN_CHUNK, StripeTarget};
pub use transfer_limit::TransferLimit;

use uring_ext::Errno;

use crate::plan::{BackingIndex, BackingPosition, Op, OpKind, Plan, Planner, Verdict};
use crate::request::Request;
use crate::units::Qid;

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
    /// See [`FaultTarget`].
    Fault(Box<FaultTarget<AnyTarget>>),
}

impl AnyTarget {
    /// Whether it forgets what is written; it has no backings of the user's then.
    #[must_use]
    pub fn is_null(&self) -> bool {
        match self {
            Self::Null(_) => true,
            Self::Loop(_) | Self::Linear(_) | Self::Stripe(_) => false,
            Self::Fault(fault) => fault.inner().is_null(),
        }
    }

    /// Whether every byte of `other` is where it is here, and there may be more behind them. What
    /// wraps a target is not looked at.
    #[must_use]
    pub fn extends(&self, other: &Self) -> bool {
        match (self.innermost(), other.innermost()) {
            (Self::Null(_), Self::Null(_)) => true,
            (Self::Loop(new), Self::Loop(old)) => new.size() >= old.size(),
            (Self::Linear(new), Self::Linear(old)) => new.extends(old),
            (Self::Stripe(new), Self::Stripe(old)) => new.extends(old),
            (_, _) => false,
        }
    }

    /// Puts another target in the place of the one that is not wrapped further.
    pub fn replace_innermost(&mut self, target: &Self) {
        match self {
            Self::Fault(fault) => fault.inner_mut().replace_innermost(target),
            Self::Null(_) | Self::Loop(_) | Self::Linear(_) | Self::Stripe(_) => {
                *self = target.innermost().clone();
            }
        }
    }

    fn innermost(&self) -> &Self {
        match self {
            Self::Fault(fault) => fault.inner().innermost(),
            Self::Null(_) | Self::Loop(_) | Self::Linear(_) | Self::Stripe(_) => self,
        }
    }

    /// The target for a queue: what is random differs from queue to queue, and from a target to
    /// the one that it wraps.
    #[must_use]
    pub fn for_queue(&self, qid: Qid) -> Self {
        let target = self.clone();
        let (mut wrapped, mut stream) = (&target, u64::from(qid.0));
        while let Self::Fault(fault) = wrapped {
            fault.begin_stream(stream);
            (wrapped, stream) = (fault.inner(), stream + (1 << 32));
        }
        target
    }
}

impl AnyTarget {
    #[inline(never)]
    fn single_of_others(&self, request: &Request) -> Option<BackingPosition> {
        match self {
            Self::Loop(target) => target.single(request),
            Self::Linear(target) => target.single(request),
            Self::Stripe(target) => target.single(request),
            Self::Null(_) | Self::Fault(_) => None,
        }
    }
}

impl Planner for AnyTarget {
    fn plan(&self, request: &Request, from: u64, plan: &mut Plan) -> Result<(), Errno> {
        match self {
            Self::Null(target) => target.plan(request, from, plan),
            Self::Loop(target) => target.plan(request, from, plan),
            Self::Linear(target) => target.plan(request, from, plan),
            Self::Stripe(target) => target.plan(request, from, plan),
            Self::Fault(target) => target.plan(request, from, plan),
        }
    }

    #[inline(always)]
    fn single(&self, request: &Request) -> Option<BackingPosition> {
        if let Self::Loop(target) = self {
            return target.single(request);
        }
        self.single_of_others(request)
    }

    fn scratch_bytes(&self) -> u32 {
        match self {
            Self::Null(_) | Self::Loop(_) | Self::Linear(_) | Self::Stripe(_) => 0,
            Self::Fault(target) => target.scratch_bytes(),
        }
    }

    fn failed(&self, request: &Request, op: &Op, errno: Errno) -> Verdict {
        match self {
            Self::Null(_) | Self::Loop(_) | Self::Linear(_) | Self::Stripe(_) => Verdict::Fail,
            Self::Fault(target) => target.failed(request, op, errno),
        }
    }

    #[inline]
    fn settled(&self, request: &Request, result: Result<(), Errno>) {
        match self {
            Self::Null(_) | Self::Loop(_) | Self::Linear(_) | Self::Stripe(_) => {}
            Self::Fault(target) => target.settled(request, result),
        }
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

//! Targets and the layers before them. Both are pure.

mod any;
mod fault;
mod fault_rule;
mod layer;
mod linear;
mod loop_target;
mod null_target;
#[cfg(test)]
mod oracle;
mod stripe;
mod throttle;
mod transfer_limit;

pub use any::{AnyLayer, AnyTarget, BaseTarget};
pub use fault::{Decision, FaultLayer};
pub use fault_rule::{BadRule, Rule};
pub use layer::{Layer, Layered, plan_below};
pub use linear::{BadExtents, LinearTarget};
pub use loop_target::LoopTarget;
pub use null_target::NullTarget;
pub use stripe::{BACKINGS as STRIPE_BACKINGS, BadStripe, MIN_CHUNK, StripeTarget};
pub use throttle::{Rate, Rates, ThrottleLayer};
pub use transfer_limit::TransferLimit;

use uring_ext::Errno;

use crate::plan::{BackingIndex, Op, OpKind, Plan};

/// Flushes each of the backings. The cursor counts the backings.
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

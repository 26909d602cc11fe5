//! Any target of a device, with any layers before it.

use uring_ext::Errno;

use super::{
    FaultLayer, Layer, Layered, LinearTarget, LoopTarget, NullTarget, StripeTarget, ThrottleLayer,
};
use crate::plan::{BackingPosition, Op, Plan, Planner, Verdict};
use crate::request::Request;
use crate::units::Qid;

/// Any of the targets. Dispatch needs no virtual call.
#[derive(Clone, Debug)]
pub enum BaseTarget {
    /// See [`NullTarget`].
    Null(NullTarget),
    /// See [`LoopTarget`].
    Loop(LoopTarget),
    /// See [`LinearTarget`].
    Linear(LinearTarget),
    /// See [`StripeTarget`].
    Stripe(StripeTarget),
}

/// Any of the layers. Dispatch needs no virtual call.
#[derive(Clone, Debug)]
pub enum AnyLayer {
    /// See [`FaultLayer`].
    Fault(FaultLayer),
    /// See [`ThrottleLayer`].
    Throttle(ThrottleLayer),
}

/// Any target with any layers.
#[derive(Clone, Debug)]
pub struct AnyTarget(Shape);

/// A target without layers is a variant of its own, so its requests take no branch for layers. The
/// variant has the same tag as the kind of the target.
#[derive(Clone, Debug)]
enum Shape {
    Bare(BaseTarget),
    Layered(Box<Layered<AnyLayer, BaseTarget>>),
}

impl BaseTarget {
    /// Whether the target discards what is written. It then has no backings of the user's.
    #[must_use]
    pub const fn is_null(&self) -> bool {
        match self {
            Self::Null(_) => true,
            Self::Loop(_) | Self::Linear(_) | Self::Stripe(_) => false,
        }
    }

    /// Whether every byte of `other` is at the same place here. There may be more bytes behind
    /// them.
    #[must_use]
    pub fn extends(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Null(_), Self::Null(_)) => true,
            (Self::Loop(new), Self::Loop(old)) => new.size() >= old.size(),
            (Self::Linear(new), Self::Linear(old)) => new.extends(old),
            (Self::Stripe(new), Self::Stripe(old)) => new.extends(old),
            (_, _) => false,
        }
    }
}

// Every call is forwarded, including those with a default in the trait.
#[deny(clippy::missing_trait_methods)]
impl Planner for BaseTarget {
    #[inline]
    fn plan(&self, request: &Request, from: u64, plan: &mut Plan) -> Result<(), Errno> {
        match self {
            Self::Null(target) => target.plan(request, from, plan),
            Self::Loop(target) => target.plan(request, from, plan),
            Self::Linear(target) => target.plan(request, from, plan),
            Self::Stripe(target) => target.plan(request, from, plan),
        }
    }

    #[inline]
    fn single(&self, request: &Request) -> Option<BackingPosition> {
        match self {
            Self::Null(target) => target.single(request),
            Self::Loop(target) => target.single(request),
            Self::Linear(target) => target.single(request),
            Self::Stripe(target) => target.single(request),
        }
    }

    #[inline]
    fn scratch_bytes(&self) -> u32 {
        match self {
            Self::Null(target) => target.scratch_bytes(),
            Self::Loop(target) => target.scratch_bytes(),
            Self::Linear(target) => target.scratch_bytes(),
            Self::Stripe(target) => target.scratch_bytes(),
        }
    }

    #[inline]
    fn failed(&self, request: &Request, op: &Op, errno: Errno) -> Verdict {
        match self {
            Self::Null(target) => target.failed(request, op, errno),
            Self::Loop(target) => target.failed(request, op, errno),
            Self::Linear(target) => target.failed(request, op, errno),
            Self::Stripe(target) => target.failed(request, op, errno),
        }
    }

    // No target makes a request wait for a time.
    fn withdrawn(&self, _request: &Request, _from: u64) {}

    #[inline]
    fn settled(&self, request: &Request, result: Result<(), Errno>) {
        match self {
            Self::Null(target) => target.settled(request, result),
            Self::Loop(target) => target.settled(request, result),
            Self::Linear(target) => target.settled(request, result),
            Self::Stripe(target) => target.settled(request, result),
        }
    }
}

#[deny(clippy::missing_trait_methods)]
impl Layer for AnyLayer {
    fn plan(
        &self,
        below: &impl Planner,
        request: &Request,
        from: u64,
        plan: &mut Plan,
    ) -> Result<(), Errno> {
        match self {
            Self::Fault(layer) => layer.plan(below, request, from, plan),
            Self::Throttle(layer) => layer.plan(below, request, from, plan),
        }
    }

    fn single(&self, below: &impl Planner, request: &Request) -> Option<BackingPosition> {
        match self {
            Self::Fault(layer) => layer.single(below, request),
            Self::Throttle(layer) => layer.single(below, request),
        }
    }

    fn scratch_bytes(&self, below: &impl Planner) -> u32 {
        match self {
            Self::Fault(layer) => layer.scratch_bytes(below),
            Self::Throttle(layer) => layer.scratch_bytes(below),
        }
    }

    fn failed(&self, below: &impl Planner, request: &Request, op: &Op, errno: Errno) -> Verdict {
        match self {
            Self::Fault(layer) => layer.failed(below, request, op, errno),
            Self::Throttle(layer) => layer.failed(below, request, op, errno),
        }
    }

    fn withdrawn(&self, below: &impl Planner, request: &Request, from: u64) {
        match self {
            Self::Fault(layer) => layer.withdrawn(below, request, from),
            Self::Throttle(layer) => layer.withdrawn(below, request, from),
        }
    }

    fn settled(&self, below: &impl Planner, request: &Request, result: Result<(), Errno>) {
        match self {
            Self::Fault(layer) => layer.settled(below, request, result),
            Self::Throttle(layer) => layer.settled(below, request, result),
        }
    }
}

impl AnyTarget {
    /// Puts layers before a target. The first layer is the outermost.
    #[must_use]
    pub fn new(layers: impl Into<Box<[AnyLayer]>>, base: BaseTarget) -> Self {
        let layers = layers.into();
        if layers.is_empty() {
            return Self(Shape::Bare(base));
        }
        Self(Shape::Layered(Box::new(Layered::new(layers, base))))
    }

    /// The target below all layers.
    #[must_use]
    pub fn base(&self) -> &BaseTarget {
        match &self.0 {
            Shape::Bare(base) => base,
            Shape::Layered(layered) => layered.base(),
        }
    }

    /// The layers, outermost first.
    #[must_use]
    pub fn layers(&self) -> &[AnyLayer] {
        match &self.0 {
            Shape::Bare(_) => &[],
            Shape::Layered(layered) => layered.layers(),
        }
    }

    /// Replaces the target below all layers.
    pub fn replace_base(&mut self, base: &BaseTarget) {
        let present = match &mut self.0 {
            Shape::Bare(present) => present,
            Shape::Layered(layered) => layered.base_mut(),
        };
        present.clone_from(base);
    }

    /// Continues the layers of another target: layer *n* begins in the state that layer `kept[n]` of
    /// the other one has now, if there is one. A layer continues only a layer of its kind.
    pub fn continue_from(&self, other: &Self, kept: &[Option<usize>]) {
        for (layer, kept) in self.layers().iter().zip(kept) {
            let before = kept.and_then(|index| other.layers().get(index));
            match (layer, before) {
                (AnyLayer::Fault(layer), Some(AnyLayer::Fault(before))) => {
                    layer.continue_from(before);
                }
                (AnyLayer::Throttle(layer), Some(AnyLayer::Throttle(before))) => {
                    layer.continue_from(before);
                }
                (AnyLayer::Fault(_) | AnyLayer::Throttle(_), _) => {}
            }
        }
    }

    /// The target for a queue. Each queue, and each layer with random decisions, has its own random
    /// stream.
    #[must_use]
    pub fn for_queue(&self, qid: Qid) -> Self {
        self.for_queue_after(qid, 0)
    }

    /// As [`AnyTarget::for_queue`], after so many changes of the layers: a new layer has another stream
    /// than those that came before it at its place.
    #[must_use]
    pub fn for_queue_after(&self, qid: Qid, changes: u64) -> Self {
        let target = self.clone();
        let mut stream = u64::from(qid.0) | changes << 40;
        for layer in target.layers() {
            match layer {
                AnyLayer::Fault(fault) => {
                    fault.begin_stream(stream);
                    stream += 1 << 32;
                }
                // All queues share its schedules.
                AnyLayer::Throttle(_) => {}
            }
        }
        target
    }

    #[inline(never)]
    fn single_of_others(&self, request: &Request) -> Option<BackingPosition> {
        match &self.0 {
            Shape::Bare(base) => base.single(request),
            Shape::Layered(layered) => layered.single(request),
        }
    }
}

impl From<BaseTarget> for AnyTarget {
    fn from(base: BaseTarget) -> Self {
        Self(Shape::Bare(base))
    }
}

// Not inlined, so that it takes no registers of the engine if a target has no layers.
#[deny(clippy::missing_trait_methods)]
impl Planner for AnyTarget {
    #[inline(never)]
    fn plan(&self, request: &Request, from: u64, plan: &mut Plan) -> Result<(), Errno> {
        match &self.0 {
            Shape::Bare(base) => base.plan(request, from, plan),
            Shape::Layered(layered) => layered.plan(request, from, plan),
        }
    }

    #[inline(always)]
    fn single(&self, request: &Request) -> Option<BackingPosition> {
        if let Shape::Bare(BaseTarget::Loop(target)) = &self.0 {
            return target.single(request);
        }
        self.single_of_others(request)
    }

    fn scratch_bytes(&self) -> u32 {
        match &self.0 {
            Shape::Bare(base) => base.scratch_bytes(),
            Shape::Layered(layered) => layered.scratch_bytes(),
        }
    }

    #[inline(never)]
    fn failed(&self, request: &Request, op: &Op, errno: Errno) -> Verdict {
        match &self.0 {
            Shape::Bare(base) => base.failed(request, op, errno),
            Shape::Layered(layered) => layered.failed(request, op, errno),
        }
    }

    fn withdrawn(&self, request: &Request, from: u64) {
        match &self.0 {
            Shape::Bare(base) => base.withdrawn(request, from),
            Shape::Layered(layered) => layered.withdrawn(request, from),
        }
    }

    #[inline]
    fn settled(&self, request: &Request, result: Result<(), Errno>) {
        match &self.0 {
            Shape::Bare(base) => base.settled(request, result),
            Shape::Layered(layered) => layered.settled(request, result),
        }
    }
}

#[cfg(test)]
mod tests;

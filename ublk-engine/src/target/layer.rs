//! Layers: planners between the client and a target.

use uring_ext::Errno;

use crate::plan::{BackingPosition, Op, Plan, Planner, Verdict};
use crate::request::Request;

/// Sees the requests of a device before its target does. It may delay, refuse, change or count
/// them.
///
/// A layer does not own what is below it. Each call passes that in, be it another layer or the
/// target. So one layer works with all targets, and a stack is a list ([`Layered`]) without virtual
/// calls.
///
/// Like a [`Planner`], a layer does no I/O and reads no clock. Each queue has its own layers, and
/// one thread calls them.
pub trait Layer {
    /// Plans the window of `request` that begins at the cursor `from`; see [`Planner::plan`]. What
    /// is below has its own cursor. [`plan_below`] converts it for a layer that must know which
    /// window is the first.
    ///
    /// # Errors
    /// The error to answer the request with. Once what is below has accepted a request, the layer
    /// must accept it, too. Otherwise [`Planner::settled`] is not called for it.
    fn plan(
        &self,
        below: &impl Planner,
        request: &Request,
        from: u64,
        plan: &mut Plan,
    ) -> Result<(), Errno>;

    /// The shortcut for a request that needs one operation only; see [`Planner::single`]. It must
    /// agree with [`Layer::plan`]. A layer that does not change such requests returns
    /// `below.single(request)`.
    #[inline]
    fn single(&self, _below: &impl Planner, _request: &Request) -> Option<BackingPosition> {
        None
    }

    /// Bytes of scratch buffer that a request may need; see [`Planner::scratch_bytes`]. A layer
    /// that needs some shares them with what is below.
    #[inline]
    fn scratch_bytes(&self, below: &impl Planner) -> u32 {
        below.scratch_bytes()
    }

    /// An operation has failed for good; see [`Planner::failed`].
    #[inline]
    fn failed(&self, below: &impl Planner, request: &Request, op: &Op, errno: Errno) -> Verdict {
        below.failed(request, op, errno)
    }

    /// A request that waited for a time has been taken back; see [`Planner::withdrawn`]. A layer that
    /// does not plan with [`plan_below`] must convert the cursor itself.
    #[inline]
    fn withdrawn(&self, below: &impl Planner, request: &Request, from: u64) {
        below.withdrawn(request, from.saturating_sub(1));
    }

    /// A request is about to be answered; see [`Planner::settled`].
    #[inline]
    fn settled(&self, below: &impl Planner, request: &Request, result: Result<(), Errno>) {
        below.settled(request, result);
    }
}

/// Plans a window below a layer. The layer's cursor is 0 for a new request, and afterwards one more
/// than the cursor below. So the layer need not remember its decision about a request.
///
/// # Errors
/// Those of what is below.
pub fn plan_below(
    below: &impl Planner,
    request: &Request,
    from: u64,
    plan: &mut Plan,
) -> Result<(), Errno> {
    below.plan(request, from.saturating_sub(1), plan)?;
    plan.advance_cursors(1);
    Ok(())
}

/// A target with a stack of layers. The first layer is the outermost, which sees a request first.
#[derive(Clone, Debug)]
pub struct Layered<L, B> {
    layers: Box<[L]>,
    base: B,
}

impl<L, B> Layered<L, B> {
    /// Puts layers before a target. The first layer is the outermost.
    #[must_use]
    pub fn new(layers: impl Into<Box<[L]>>, base: B) -> Self {
        Self { layers: layers.into(), base }
    }

    /// The layers, outermost first.
    pub const fn layers(&self) -> &[L] {
        &self.layers
    }

    /// The target.
    pub const fn base(&self) -> &B {
        &self.base
    }

    /// The target, mutable. A replacement must have the same bytes.
    pub const fn base_mut(&mut self) -> &mut B {
        &mut self.base
    }

    fn stack(&self) -> Stack<'_, L, B> {
        Stack { layers: &self.layers, base: &self.base }
    }
}

// Not inlined, so that it takes no registers of a caller with a target without layers.
#[deny(clippy::missing_trait_methods)]
impl<L: Layer, B: Planner> Planner for Layered<L, B> {
    #[inline(never)]
    fn plan(&self, request: &Request, from: u64, plan: &mut Plan) -> Result<(), Errno> {
        self.stack().plan(request, from, plan)
    }

    fn single(&self, request: &Request) -> Option<BackingPosition> {
        self.stack().single(request)
    }

    fn scratch_bytes(&self) -> u32 {
        self.stack().scratch_bytes()
    }

    fn failed(&self, request: &Request, op: &Op, errno: Errno) -> Verdict {
        self.stack().failed(request, op, errno)
    }

    fn withdrawn(&self, request: &Request, from: u64) {
        self.stack().withdrawn(request, from);
    }

    #[inline(never)]
    fn settled(&self, request: &Request, result: Result<(), Errno>) {
        self.stack().settled(request, result);
    }
}

/// The rest of a stack, from some layer on.
struct Stack<'a, L, B> {
    layers: &'a [L],
    base: &'a B,
}

impl<'a, L, B> Stack<'a, L, B> {
    /// The outermost layer and what is below it.
    fn split(&self) -> Option<(&'a L, Self)> {
        let (layer, layers) = self.layers.split_first()?;
        Some((layer, Self { layers, base: self.base }))
    }
}

#[deny(clippy::missing_trait_methods)]
impl<L: Layer, B: Planner> Planner for Stack<'_, L, B> {
    fn plan(&self, request: &Request, from: u64, plan: &mut Plan) -> Result<(), Errno> {
        match self.split() {
            Some((layer, below)) => layer.plan(&below, request, from, plan),
            None => self.base.plan(request, from, plan),
        }
    }

    fn single(&self, request: &Request) -> Option<BackingPosition> {
        match self.split() {
            Some((layer, below)) => layer.single(&below, request),
            None => self.base.single(request),
        }
    }

    fn scratch_bytes(&self) -> u32 {
        match self.split() {
            Some((layer, below)) => layer.scratch_bytes(&below),
            None => self.base.scratch_bytes(),
        }
    }

    fn failed(&self, request: &Request, op: &Op, errno: Errno) -> Verdict {
        match self.split() {
            Some((layer, below)) => layer.failed(&below, request, op, errno),
            None => self.base.failed(request, op, errno),
        }
    }

    fn withdrawn(&self, request: &Request, from: u64) {
        match self.split() {
            Some((layer, below)) => layer.withdrawn(&below, request, from),
            None => self.base.withdrawn(request, from),
        }
    }

    fn settled(&self, request: &Request, result: Result<(), Errno>) {
        match self.split() {
            Some((layer, below)) => layer.settled(&below, request, result),
            None => self.base.settled(request, result),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;
    use crate::plan::{BackingIndex, OpKind};
    use crate::request::RequestKind;

    /// Records its calls.
    struct Noting<'a>(u32, &'a RefCell<Vec<(u32, &'static str, u64)>>);

    impl Noting<'_> {
        fn note(&self, call: &'static str, number: u64) {
            self.1.borrow_mut().push((self.0, call, number));
        }
    }

    impl Layer for Noting<'_> {
        fn plan(
            &self,
            below: &impl Planner,
            request: &Request,
            from: u64,
            plan: &mut Plan,
        ) -> Result<(), Errno> {
            self.note("plan", from);
            plan_below(below, request, from, plan)
        }

        fn single(&self, below: &impl Planner, request: &Request) -> Option<BackingPosition> {
            self.note("single", request.offset);
            below.single(request)
        }

        fn scratch_bytes(&self, below: &impl Planner) -> u32 {
            self.0 + below.scratch_bytes()
        }

        fn failed(
            &self,
            below: &impl Planner,
            request: &Request,
            op: &Op,
            errno: Errno,
        ) -> Verdict {
            self.note("failed", op.offset);
            below.failed(request, op, errno)
        }

        fn settled(&self, below: &impl Planner, request: &Request, result: Result<(), Errno>) {
            self.note("settled", request.offset);
            below.settled(request, result);
        }
    }

    /// Makes requests wait at first, then plans windows of one operation of 512 bytes.
    struct Base<'a>(&'a RefCell<Vec<u64>>);

    impl Planner for Base<'_> {
        fn plan(&self, request: &Request, from: u64, plan: &mut Plan) -> Result<(), Errno> {
            self.0.borrow_mut().push(from);
            if from == 0 {
                plan.wait_at(1);
                return Ok(());
            }
            let done = (from - 1) * 512;
            let (backing, offset, buf_offset) = (BackingIndex(0), request.offset + done, 0);
            let op = Op { kind: OpKind::Read, backing, offset, len: 512, buf_offset };
            plan.push(op).map_err(|_| Errno::EIO)?;
            if done + 512 < request.len {
                plan.continue_at(from + 1);
            }
            Ok(())
        }

        fn single(&self, request: &Request) -> Option<BackingPosition> {
            Some(BackingPosition { backing: BackingIndex(3), offset: request.offset })
        }

        fn scratch_bytes(&self) -> u32 {
            100
        }

        fn failed(&self, _request: &Request, _op: &Op, _errno: Errno) -> Verdict {
            Verdict::Ignore
        }
    }

    const READ: Request = Request { kind: RequestKind::Read, offset: 7 << 9, len: 4 << 9 };

    #[test]
    fn all_calls_go_from_the_outermost_layer_to_the_target() {
        let (noted, asked) = (RefCell::default(), RefCell::default());
        let layered = Layered::new([1, 2, 3].map(|it| Noting(it, &noted)), Base(&asked));
        assert_eq!(layered.scratch_bytes(), 106);
        let place = BackingPosition { backing: BackingIndex(3), offset: READ.offset };
        assert_eq!(layered.single(&READ), Some(place));
        let op = Op::all_of(&READ, place);
        assert_eq!(layered.failed(&READ, &op, Errno::EIO), Verdict::Ignore);
        layered.settled(&READ, Ok(()));
        layered.plan(&READ, 9, &mut Plan::default()).unwrap();
        let call = |call, number| [(1, call, number), (2, call, number), (3, call, number)];
        let calls = ["single", "failed", "settled"].map(|name| call(name, READ.offset)).concat();
        let plans = [(1, "plan", 9), (2, "plan", 8), (3, "plan", 7)];
        assert_eq!(*noted.borrow(), [&calls[..], &plans].concat());
        assert_eq!(*asked.borrow(), [6]);
    }

    #[test]
    fn cursors_pass_through_any_number_of_layers() {
        for count in 0..4_u32 {
            let (noted, asked) = (RefCell::default(), RefCell::default());
            let layers: Vec<_> = (0..count).map(|it| Noting(it, &noted)).collect();
            let layered = Layered::new(layers, Base(&asked));
            let mut plan = Plan::default();
            layered.plan(&READ, 0, &mut plan).unwrap();
            assert_eq!(plan.waits_at(), Some(1 + u64::from(count)), "{count} layers");
            let (mut from, mut offsets) = (plan.waits_at(), Vec::new());
            while let Some(cursor) = from {
                plan.clear();
                layered.plan(&READ, cursor, &mut plan).unwrap();
                offsets.extend(plan.ops().map(|op| op.offset >> 9));
                assert_eq!(plan.waits_at(), None);
                from = plan.next();
                assert!(from.is_none_or(|next| next > cursor), "cursors grow");
            }
            assert_eq!(offsets, [7, 8, 9, 10], "{count} layers");
            assert_eq!(*asked.borrow(), [0, 1, 2, 3, 4], "as without layers");
        }
    }
}

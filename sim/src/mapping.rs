//! Planners of the simulation: the real targets, and some that need many operations, several stages
//! and several windows.

use ublk_engine::plan::{
    BackingIndex, BackingPosition, Op, OpKind, Plan, Planner, Verdict, WINDOW_OPS,
};
use ublk_engine::request::{Request, RequestKind};
use ublk_engine::target::{AnyLayer, AnyTarget, BaseTarget, FaultLayer, Layered, TransferLimit};
use uring_ext::Errno;

use crate::SECTOR;
use crate::cow::Cow;
use crate::mirror::Mirror;

/// Where a request's bytes go.
#[derive(Clone, Debug)]
pub enum Mapping {
    /// A target of the program.
    Target(AnyTarget),
    /// Chunks alternate between several backings.
    Stripe(Spread),
    /// The same data on several backings, piece by piece.
    Mirror(Mirror),
    /// A device with a snapshot.
    Cow(Cow),
    /// Another planner with layers. A throttle is the innermost.
    Layered(Box<Layered<AnyLayer, Mapping>>),
}

/// A layout over several backings.
#[derive(Clone, Copy, Debug)]
pub struct Spread {
    /// Number of backings, at most 4.
    pub backings: u16,
    /// Bytes of a chunk or piece.
    pub chunk: u64,
    /// The maximum number of pieces of a window.
    pub pieces: usize,
    /// Implements FUA by a stage of flushes after the writes, instead of by FUA writes.
    pub flush_stage: bool,
    /// A byte of the device, and what the planner does instead of planning the window with that
    /// byte.
    pub trap: Option<(u64, Trap)>,
}

/// What a planner does instead of planning a window.
#[derive(Clone, Copy, Debug)]
pub enum Trap {
    /// It refuses, with `ENOSPC`.
    Refuse,
    /// It makes no progress.
    Idle,
}

impl Mapping {
    /// The error with which the planner may refuse a request.
    #[must_use]
    pub fn refusal(&self, request: &Request) -> Option<Errno> {
        match self {
            Self::Target(_) | Self::Cow(_) => None,
            Self::Stripe(Spread { trap, .. })
            | Self::Mirror(Mirror { spread: Spread { trap, .. }, .. }) => {
                let (byte, trap) = (*trap)?;
                let inside = (request.offset..request.offset + request.len).contains(&byte);
                inside.then_some(match trap {
                    Trap::Refuse => Errno::ENOSPC,
                    Trap::Idle => Errno::EIO,
                })
            }
            Self::Layered(layered) => layered.base().refusal(request),
        }
    }

    /// The fault layers, the outermost first.
    #[must_use]
    pub fn faults(&self) -> Vec<FaultLayer> {
        let layers = match self {
            Self::Layered(layered) => layered.layers(),
            Self::Target(_) | Self::Stripe(_) | Self::Mirror(_) | Self::Cow(_) => &[],
        };
        let fault = |layer: &AnyLayer| match layer {
            AnyLayer::Fault(fault) => Some(fault.clone()),
            AnyLayer::Throttle(_) => None,
        };
        layers.iter().filter_map(fault).collect()
    }

    /// Whether there are layers.
    #[must_use]
    pub const fn has_layers(&self) -> bool {
        matches!(self, Self::Layered(_))
    }

    /// The planner below the layers, or this one.
    #[must_use]
    pub fn core(&self) -> &Self {
        match self {
            Self::Layered(layered) => layered.base().core(),
            Self::Target(_) | Self::Stripe(_) | Self::Mirror(_) | Self::Cow(_) => self,
        }
    }

    /// The snapshot, if there is one.
    #[must_use]
    pub fn snapshot(&self) -> Option<&Cow> {
        match self.core() {
            Self::Cow(cow) => Some(cow),
            Self::Target(_) | Self::Stripe(_) | Self::Mirror(_) | Self::Layered(_) => None,
        }
    }

    /// The mirror, if there is one. It may succeed although operations have failed.
    #[must_use]
    pub fn mirror(&self) -> Option<&Mirror> {
        match self.core() {
            Self::Mirror(mirror) => Some(mirror),
            Self::Target(_) | Self::Stripe(_) | Self::Cow(_) | Self::Layered(_) => None,
        }
    }

    /// Whether writes have no effect, and everything reads as zeros.
    #[must_use]
    pub fn is_null(&self) -> bool {
        matches!(self.core(), Self::Target(target) if target.base().is_null())
    }

    /// How many operations of a request may be in flight, times the number of backings that each is
    /// tried on.
    #[must_use]
    pub fn at_once(&self) -> usize {
        match self {
            Self::Target(target) => match target.base() {
                BaseTarget::Null(_) => 1,
                BaseTarget::Loop(target) if target.transfer_limit() == TransferLimit::UNLIMITED => {
                    1
                }
                BaseTarget::Loop(_) | BaseTarget::Linear(_) | BaseTarget::Stripe(_) => WINDOW_OPS,
            },
            Self::Stripe(_) | Self::Cow(_) => WINDOW_OPS,
            Self::Mirror(mirror) => WINDOW_OPS * usize::from(mirror.spread.backings),
            Self::Layered(layered) => layered.base().at_once(),
        }
    }
}

impl Planner for Mapping {
    fn plan(&self, request: &Request, from: u64, plan: &mut Plan) -> Result<(), Errno> {
        match self {
            Self::Target(target) => target.plan(request, from, plan),
            Self::Stripe(spread) => spread.plan(request, from, plan, |plan, op| {
                let chunk = op.offset / spread.chunk;
                let backings = u64::from(spread.backings);
                let backing = BackingIndex(u16::try_from(chunk % backings).unwrap_or(0));
                let offset = chunk / backings * spread.chunk + op.offset % spread.chunk;
                plan.push(Op { backing, offset, ..op }).is_ok()
            }),
            Self::Mirror(mirror) => mirror.plan(request, from, plan),
            Self::Cow(cow) => cow.plan(request, from, plan),
            Self::Layered(layered) => layered.plan(request, from, plan),
        }
    }

    fn single(&self, request: &Request) -> Option<BackingPosition> {
        match self {
            Self::Target(target) => target.single(request),
            Self::Stripe(_) | Self::Mirror(_) | Self::Cow(_) | Self::Layered(_) => None,
        }
    }

    fn scratch_bytes(&self) -> u32 {
        match self {
            Self::Target(target) => target.scratch_bytes(),
            Self::Stripe(_) | Self::Mirror(_) => 0,
            Self::Cow(cow) => cow.scratch_bytes(),
            Self::Layered(layered) => layered.scratch_bytes(),
        }
    }

    fn failed(&self, request: &Request, op: &Op, errno: Errno) -> Verdict {
        match self {
            Self::Target(target) => target.failed(request, op, errno),
            Self::Stripe(_) | Self::Cow(_) => Verdict::Fail,
            Self::Mirror(mirror) => mirror.failed(request, op, errno),
            Self::Layered(layered) => layered.failed(request, op, errno),
        }
    }

    fn withdrawn(&self, request: &Request, from: u64) {
        match self {
            Self::Layered(layered) => layered.withdrawn(request, from),
            Self::Target(_) | Self::Stripe(_) | Self::Mirror(_) | Self::Cow(_) => {}
        }
    }

    fn settled(&self, request: &Request, result: Result<(), Errno>) {
        match self {
            Self::Target(target) => target.settled(request, result),
            Self::Stripe(_) | Self::Mirror(_) => {}
            Self::Cow(cow) => cow.settled(request, result),
            Self::Layered(layered) => layered.settled(request, result),
        }
    }
}

impl Spread {
    /// Splits the rest of the request at chunk boundaries, and places each piece, as many as fit
    /// the window.
    pub(crate) fn plan(
        &self,
        request: &Request,
        from: u64,
        plan: &mut Plan,
        mut place: impl FnMut(&mut Plan, Op) -> bool,
    ) -> Result<(), Errno> {
        let fua = request.kind == RequestKind::Write { fua: true };
        let kind = match request.kind {
            RequestKind::Read => OpKind::Read,
            RequestKind::Write { fua } => OpKind::Write { fua: fua && !self.flush_stage },
            RequestKind::Discard => OpKind::Discard,
            RequestKind::WriteZeroes { may_unmap } => OpKind::WriteZeroes { may_unmap },
            RequestKind::Flush => return self.flush(plan),
        };
        let has_data = request.has_data();
        let (mut done, mut pieces) = (from, 0);
        while done < request.len && pieces < self.pieces {
            let offset = request.offset + done;
            let len = (self.chunk - offset % self.chunk).min(request.len - done);
            let buf_offset = if has_data { u32::try_from(done).unwrap_or(u32::MAX) } else { 0 };
            let op = Op { kind, backing: BackingIndex(0), offset, len, buf_offset };
            if !place(plan, op) {
                break;
            }
            done += len;
            pieces += 1;
        }
        let start = request.offset + from;
        match self.trap.filter(|(byte, _)| (start..request.offset + done).contains(byte)) {
            Some((_, Trap::Refuse)) => return Err(Errno::ENOSPC),
            Some((_, Trap::Idle)) => {
                plan.clear();
                plan.continue_at(from);
                return Ok(());
            }
            None => {}
        }
        if done < request.len {
            plan.continue_at(done);
        }
        if fua && self.flush_stage {
            plan.next_stage();
            // If the flushes do not fit the window, they are left to a following window.
            let fits = plan.len() + usize::from(self.backings) <= WINDOW_OPS;
            if fits {
                return self.flush(plan);
            }
            // Half of it now, and the rest in a window with the flushes.
            let half = (done - from) / 2 / SECTOR * SECTOR;
            plan.clear();
            let first = Request { len: from + half, ..*request };
            self.plan(&first, from, plan, place)?;
            if plan.next().is_none() {
                plan.continue_at(from + half);
            }
        }
        Ok(())
    }

    fn flush(&self, plan: &mut Plan) -> Result<(), Errno> {
        for backing in (0..self.backings).map(BackingIndex) {
            let op = Op { kind: OpKind::Flush, backing, offset: 0, len: 0, buf_offset: 0 };
            plan.push(op).map_err(|_full| Errno::EIO)?;
        }
        Ok(())
    }
}

//! Planners of the simulation: the real targets, and some that need many operations, several stages
//! and several windows.

use ublk_target::plan::{BackingIndex, Op, OpKind, Plan, Planner, WINDOW_OPS};
use ublk_target::request::{Request, RequestKind};
use ublk_target::target::AnyTarget;
use uring_ext::Errno;

use crate::SECTOR;

/// Where a request's bytes go.
#[derive(Clone, Debug)]
pub enum Mapping {
    /// A target of the program.
    Target(AnyTarget),
    /// Chunks in turn on several backings.
    Stripe(Spread),
    /// The same on several backings, piece by piece.
    Mirror(Spread),
}

/// A layout over several backings.
#[derive(Clone, Copy, Debug)]
pub struct Spread {
    /// Number of backings, at most 4.
    pub backings: u16,
    /// Bytes of a chunk or piece.
    pub chunk: u64,
    /// Pieces of a window, at most.
    pub pieces: usize,
    /// FUA by a stage of flushes behind the writes, instead of by FUA writes.
    pub flush_stage: bool,
    /// A byte of the device whose window the planner does not plan, and what it does instead.
    pub trap: Option<(u64, Trap)>,
}

/// What a planner does that does not plan.
#[derive(Clone, Copy, Debug)]
pub enum Trap {
    /// It refuses, with `ENOSPC`.
    Refuse,
    /// It makes no progress.
    Idle,
}

impl Mapping {
    /// The error that the planner may answer a request with.
    #[must_use]
    pub fn refusal(&self, request: &Request) -> Option<Errno> {
        match self {
            Self::Target(_) => None,
            Self::Stripe(spread) | Self::Mirror(spread) => {
                let (byte, trap) = spread.trap?;
                let inside = (request.offset..request.offset + request.len).contains(&byte);
                inside.then_some(match trap {
                    Trap::Refuse => Errno::ENOSPC,
                    Trap::Idle => Errno::EIO,
                })
            }
        }
    }

    /// Whether writes are forgotten, and all reads as zeros.
    #[must_use]
    pub const fn is_null(&self) -> bool {
        matches!(self, Self::Target(AnyTarget::Null(_)))
    }

    /// How many operations of a request may be in flight.
    #[must_use]
    pub const fn at_once(&self) -> usize {
        match self {
            Self::Target(AnyTarget::Loop(_) | AnyTarget::Null(_)) => 1,
            Self::Target(AnyTarget::Linear(_) | AnyTarget::Stripe(_))
            | Self::Stripe(_)
            | Self::Mirror(_) => WINDOW_OPS,
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
            Self::Mirror(spread) => spread.plan(request, from, plan, |plan, op| {
                if op.kind == OpKind::Read {
                    let leg = op.offset / SECTOR % u64::from(spread.backings);
                    let backing = BackingIndex(u16::try_from(leg).unwrap_or(0));
                    return plan.push(Op { backing, ..op }).is_ok();
                }
                if plan.len() + usize::from(spread.backings) > WINDOW_OPS {
                    return false;
                }
                let mut legs = (0..spread.backings).map(BackingIndex);
                legs.all(|backing| plan.push(Op { backing, ..op }).is_ok())
            }),
        }
    }
}

impl Spread {
    /// Cuts the rest of the request at the chunks' borders and has each piece placed, as many as
    /// the window takes.
    fn plan(
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
            // A window whose flushes do not fit leaves them out if another follows.
            let fits = plan.len() + usize::from(self.backings) <= WINDOW_OPS;
            if fits {
                return self.flush(plan);
            }
            // Half of it now, the rest with room for the flushes.
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

//! Plans: the operations of a request.
//!
//! A planner turns a request into operations on backings and does no I/O. The engine carries the
//! operations out, stage after stage, one window at a time.

use smallvec::SmallVec;
use uring_ext::Errno;

use crate::request::{Request, RequestKind};

/// The maximum number of operations of a window. A request that needs more has several windows, one
/// after the other. So each request needs only a bounded number of table entries.
pub const WINDOW_OPS: usize = 8;

/// The index of a backing, in the target's order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BackingIndex(pub u16);

/// A position on a backing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BackingPosition {
    /// The backing.
    pub backing: BackingIndex,
    /// First byte on it.
    pub offset: u64,
}

/// What an operation does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpKind {
    /// Read from the backing into the request's buffer.
    Read,
    /// Write from the request's buffer to the backing.
    Write {
        /// Complete only when the data is on stable storage.
        fua: bool,
    },
    /// Write the backing's completed writes to stable storage.
    Flush,
    /// Discard a range of the backing.
    Discard,
    /// Make a range of the backing read as zeros.
    WriteZeroes {
        /// The space may be deallocated.
        may_unmap: bool,
    },
    /// Read from the backing into the scratch buffer of the request's tag.
    ReadScratch,
    /// Write from the scratch buffer of the request's tag to the backing.
    WriteScratch {
        /// Complete only when the data is on stable storage.
        fua: bool,
    },
    /// Wait. Uses no backing.
    Delay,
}

/// A buffer that operations move bytes to or from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Buffer {
    /// The buffer of the request.
    Request,
    /// The scratch buffer of the request's tag.
    Scratch,
}

/// One operation on a backing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Op {
    /// What it does.
    pub kind: OpKind,
    /// The backing.
    pub backing: BackingIndex,
    /// First byte on the backing.
    pub offset: u64,
    /// Length in bytes. For a delay: its duration in nanoseconds.
    pub len: u64,
    /// For reads and writes: the offset in the buffer.
    pub buf_offset: u32,
}

impl OpKind {
    /// The kind of the operations that carry out a request of this kind.
    #[must_use]
    #[inline]
    pub const fn of_request(kind: RequestKind) -> Self {
        match kind {
            RequestKind::Read => Self::Read,
            RequestKind::Write { fua } => Self::Write { fua },
            RequestKind::Flush => Self::Flush,
            RequestKind::Discard => Self::Discard,
            RequestKind::WriteZeroes { may_unmap } => Self::WriteZeroes { may_unmap },
        }
    }
}

impl Op {
    /// An operation for a whole request at one position.
    #[must_use]
    #[inline]
    pub const fn all_of(request: &Request, position: BackingPosition) -> Self {
        let BackingPosition { backing, offset } = position;
        let kind = OpKind::of_request(request.kind);
        Self { kind, backing, offset, len: request.len, buf_offset: 0 }
    }

    /// The buffer that it borrows.
    #[must_use]
    pub const fn buffer(&self) -> Option<Buffer> {
        match self.kind {
            OpKind::Read | OpKind::Write { .. } => Some(Buffer::Request),
            OpKind::ReadScratch | OpKind::WriteScratch { .. } => Some(Buffer::Scratch),
            OpKind::Flush | OpKind::Discard | OpKind::WriteZeroes { .. } | OpKind::Delay => None,
        }
    }

    /// Whether it moves bytes to or from a buffer.
    #[must_use]
    pub const fn has_data(&self) -> bool {
        self.buffer().is_some()
    }

    /// Whether it fills a buffer.
    #[must_use]
    pub const fn is_read(&self) -> bool {
        matches!(self.kind, OpKind::Read | OpKind::ReadScratch)
    }
}

/// The window is full. The planner returns, and plans the rest in the next window.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the window of {WINDOW_OPS} operations is full")]
pub struct WindowFull;

/// One window of a request's operations.
#[derive(Debug, Default)]
pub struct Plan {
    ops: SmallVec<[(u8, Op); WINDOW_OPS]>,
    stage: u8,
    /// Whether `directives` differ from the default.
    has_directives: bool,
    next: Option<u64>,
    directives: Directives,
    now: u64,
}

/// Directives of a planner in addition to a window's operations. Most windows have none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Directives {
    /// The delay before the operations are issued, in nanoseconds.
    pub delay_ns: u64,
    /// The maximum length with which reads and writes are first issued, in bytes.
    pub at_first: Option<u64>,
    /// The request waits, and this is the cursor for planning it again.
    pub wait_at: Option<u64>,
    /// When it is planned again. Without it: when another request has settled.
    pub until: Option<u64>,
    /// The request fails with this error after the delay.
    pub failure: Option<Errno>,
    /// The delay is over.
    pub delayed: bool,
}

impl Plan {
    /// Empties the plan for the next window.
    pub fn clear(&mut self) {
        self.ops.clear();
        self.stage = 0;
        self.next = None;
        if std::mem::take(&mut self.has_directives) {
            self.directives = Directives::default();
        }
    }

    /// Adds an operation to the current stage. Operations of one stage may run concurrently.
    ///
    /// # Errors
    /// [`WindowFull`] if the window holds [`WINDOW_OPS`] operations.
    pub fn push(&mut self, op: Op) -> Result<(), WindowFull> {
        if self.ops.len() == WINDOW_OPS {
            return Err(WindowFull);
        }
        self.ops.push((self.stage, op));
        Ok(())
    }

    /// Sets a plan with one operation.
    #[inline]
    pub(crate) fn set_single(&mut self, op: Op) {
        self.clear();
        // It fits the inline storage, so this does not allocate.
        self.ops.push((0, op));
    }

    /// Begins the next stage, which starts when all operations of this one have succeeded.
    pub fn next_stage(&mut self) {
        self.stage += 1;
    }

    /// Announces another window after this one, which begins at `cursor`. The cursor must be
    /// greater than that of this window. Only the planner interprets it.
    pub fn continue_at(&mut self, cursor: u64) {
        self.next = Some(cursor);
    }

    /// Adds `ns` nanoseconds to the delay of the window. If planning it fails, the error is
    /// delayed.
    pub fn delay(&mut self, ns: u64) {
        self.directives.delay_ns = self.directives.delay_ns.saturating_add(ns);
        self.has_directives |= ns > 0;
    }

    /// The delay of the window, in nanoseconds.
    #[must_use]
    pub const fn delay_ns(&self) -> u64 {
        self.directives.delay_ns
    }

    /// Makes reads and writes short, for tests: from this window on, each that is longer than
    /// `bytes` is first issued for only `bytes`, and the engine continues with the rest, as after a
    /// short transfer. The request is still served as a whole. `bytes` is a multiple of the block
    /// size, and not 0.
    pub fn transfer_at_first(&mut self, bytes: u64) {
        self.directives.at_first =
            Some(self.directives.at_first.map_or(bytes, |least| least.min(bytes)));
        self.has_directives = true;
    }

    /// The maximum length with which reads and writes are first issued, in bytes, if there is one.
    #[must_use]
    pub const fn at_first(&self) -> Option<u64> {
        self.directives.at_first
    }

    /// Defers the request until another one has settled. The planner then plans it again from
    /// `cursor` on. Allowed only in the first window, and only while an accepted request has not
    /// settled. Operations of the window are not issued.
    pub fn wait_at(&mut self, cursor: u64) {
        self.directives.wait_at = Some(cursor);
        self.has_directives = true;
    }

    /// Makes the request wait until `ns` nanoseconds of the clock of [`Plan::now_ns`]. The planner
    /// then plans it again from `cursor` on, which must be greater than that of this window. Allowed
    /// only in the first window. Operations of the window are not issued.
    ///
    /// The planner has not accepted the request yet. If the planner is to be replaced meanwhile, the
    /// wait ends with [`Planner::withdrawn`].
    pub fn wait_until(&mut self, ns: u64, cursor: u64) {
        self.directives.until = Some(ns);
        self.wait_at(cursor);
    }

    /// When the request is planned again, if it waits for a time, in nanoseconds.
    #[must_use]
    pub const fn waits_until(&self) -> Option<u64> {
        self.directives.until
    }

    /// The time at which the window is planned, in nanoseconds of a monotonic clock.
    #[must_use]
    pub const fn now_ns(&self) -> u64 {
        self.now
    }

    /// Sets the time at which the window is planned.
    pub fn set_now(&mut self, now: u64) {
        self.now = now;
    }

    /// Adds to the cursors of the window, for the planner around the one that has planned it.
    pub fn advance_cursors(&mut self, by: u64) {
        if let Some(next) = &mut self.next {
            *next += by;
        }
        if let Some(cursor) = &mut self.directives.wait_at {
            *cursor += by;
        }
    }

    /// The cursor for planning again, if the request waits.
    #[must_use]
    pub const fn waits_at(&self) -> Option<u64> {
        self.directives.wait_at
    }

    pub(crate) const fn has_directives(&self) -> bool {
        self.has_directives
    }

    /// The directives.
    pub(crate) const fn directives_mut(&mut self) -> &mut Directives {
        &mut self.directives
    }

    /// Removes the directives after they were applied.
    pub(crate) fn clear_directives(&mut self) {
        self.has_directives = false;
        self.directives = Directives::default();
    }

    /// Whether the request neither waits nor fails.
    pub(crate) const fn is_accepting(&self) -> bool {
        !self.has_directives
            || self.directives.wait_at.is_none() && self.directives.failure.is_none()
    }

    /// Removes the operations and keeps the directives.
    pub(crate) fn drop_ops(&mut self) {
        self.ops.clear();
        self.next = None;
    }

    /// Where the next window begins; `None` if this one is the last.
    #[must_use]
    pub const fn next(&self) -> Option<u64> {
        self.next
    }

    /// How many operations the window has.
    #[must_use]
    pub fn len(&self) -> usize {
        self.ops.len()
    }

    /// Whether the window has no operation.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ops.is_empty()
    }

    /// The stage and the operation at an index of the window.
    #[must_use]
    pub fn op(&self, index: usize) -> Option<(u8, Op)> {
        self.ops.get(index).copied()
    }

    /// The operation of a request that needs only one.
    #[must_use]
    pub fn single(&self) -> Option<Op> {
        match self.ops.as_slice() {
            [(_, op)] if self.next.is_none() && !self.has_directives => Some(*op),
            _ => None,
        }
    }

    /// Replaces the only operation.
    pub(crate) fn replace_single(&mut self, op: Op) {
        if let [(_, single)] = self.ops.as_mut_slice() {
            *single = op;
        }
    }

    /// All operations, in order.
    pub fn ops(&self) -> impl Iterator<Item = &Op> + '_ {
        self.ops.iter().map(|(_, op)| op)
    }
}

/// What to do about a failed operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The request fails with the operation's error.
    Fail,
    /// The request continues without it. Not for reads: their buffer would not be filled.
    Ignore,
    /// The rest of the operation is issued elsewhere.
    Instead {
        /// The other backing.
        backing: BackingIndex,
        /// First byte there.
        offset: u64,
    },
}

/// The mapping policy of a device.
///
/// A planner does no I/O and reads no clock: a plan has [the time](Plan::now_ns). Its state changes
/// only in calls of these functions. Each queue has its own planner, which one thread calls.
pub trait Planner {
    /// Plans the window of `request` that begins at the cursor `from`: 0 for the first window,
    /// later the value that the previous window passed to [`Plan::continue_at`], after all its
    /// operations have succeeded. The plan is empty on entry.
    ///
    /// # Errors
    /// The errno to answer the request with. Nothing of the window is issued then.
    fn plan(&self, request: &Request, from: u64, plan: &mut Plan) -> Result<(), Errno>;

    /// The position of a whole read or write, if it needs only one operation. A faster alternative
    /// to [`Planner::plan`], with the same result. With `None` the engine calls `plan`.
    #[inline]
    fn single(&self, _request: &Request) -> Option<BackingPosition> {
        None
    }

    /// The size of the scratch buffer that a request may need, in bytes; 0 for none. Each tag has
    /// its own.
    #[inline]
    fn scratch_bytes(&self) -> u32 {
        0
    }

    /// The rest of an operation of `request` has failed after all retries, or was cancelled. Called
    /// for every such operation, even if the request has already failed and the verdict has no
    /// effect. The engine limits how often an operation is issued elsewhere
    /// ([`MAX_SUBSTITUTES`](crate::engine::MAX_SUBSTITUTES)).
    #[inline]
    fn failed(&self, _request: &Request, _op: &Op, _errno: Errno) -> Verdict {
        Verdict::Fail
    }

    /// A request that [waits for a time](Plan::wait_until) has been taken back before its time. `from`
    /// is the cursor that it would have been planned from. It will be planned anew from 0 on, maybe by
    /// another planner.
    #[inline]
    fn withdrawn(&self, _request: &Request, _from: u64) {}

    /// A request is about to be answered. Called exactly once for each request that was accepted:
    /// its first window was planned without an error and without [`Plan::wait_at`] or
    /// [`Plan::wait_until`].
    #[inline]
    fn settled(&self, _request: &Request, _result: Result<(), Errno>) {}
}

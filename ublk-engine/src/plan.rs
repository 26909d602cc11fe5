//! Plans: what a request becomes.
//!
//! A planner is pure: it turns a request into operations on backings and does no I/O. The engine
//! carries the operations out, stage after stage, a window at a time.

use smallvec::SmallVec;
use uring_ext::Errno;

use crate::request::{Request, RequestKind};

/// How many operations a window holds. A request that needs more gets more windows, one after
/// the other, so that no request takes more than this from the bounded tables.
pub const WINDOW_OPS: usize = 8;

/// Which backing of a device an operation goes to, in the order that the target lists them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BackingIndex(pub u16);

/// A place on a backing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
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
    /// Bring the backing's completed writes to stable storage.
    Flush,
    /// Discard a range of the backing.
    Discard,
    /// Make a range of the backing read as zeros.
    WriteZeroes {
        /// Space may be given back.
        may_unmap: bool,
    },
    /// Read from the backing into the scratch buffer of the request's tag.
    ReadScratch,
    /// Write from the scratch buffer of the request's tag to the backing.
    WriteScratch {
        /// Complete only when the data is on stable storage.
        fua: bool,
    },
    /// Let time pass; no backing is concerned.
    Delay,
}

/// A buffer that operations move bytes to or from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Buffer {
    /// That of the request.
    Request,
    /// The scratch buffer of its tag.
    Scratch,
}

/// One operation on a backing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Op {
    /// What it does.
    pub kind: OpKind,
    /// Where.
    pub backing: BackingIndex,
    /// First byte on the backing.
    pub offset: u64,
    /// Length in bytes; of a delay, in nanoseconds.
    pub len: u64,
    /// For reads and writes: its first byte in the buffer.
    pub buf_offset: u32,
}

impl OpKind {
    /// What is asked of a backing that has a part of a request's range.
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
    /// The whole of a request, at one place.
    #[must_use]
    #[inline]
    pub const fn all_of(request: &Request, place: Place) -> Self {
        let Place { backing, offset } = place;
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

/// The window is full; the planner returns and is asked again for the rest.
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
}

/// What a planner asks for in addition to a window's operations. Most windows have none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Directives {
    /// Nanoseconds before anything is issued.
    pub delay_ns: u64,
    /// Reads and writes ask for no more than so many bytes at first.
    pub at_first: Option<u64>,
    /// The request is to wait for another one, and the planner asked again from here.
    pub wait_at: Option<u64>,
    /// What the request is answered with after the delay.
    pub failure: Option<Errno>,
    /// There was a delay, and it is over.
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

    /// Adds an operation to the current stage. Operations of one stage may run side by side.
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

    /// Makes the plan that of a request with one operation.
    #[inline]
    pub(crate) fn set_single(&mut self, op: Op) {
        self.clear();
        // Within its own room, so nothing is allocated.
        self.ops.push((0, op));
    }

    /// Begins the next stage, which starts when all operations of this one have succeeded.
    pub fn next_stage(&mut self) {
        self.stage += 1;
    }

    /// Says that this window is not the last: the next one begins at `cursor`, which is greater
    /// than this one's and whose meaning is the planner's own.
    pub fn continue_at(&mut self, cursor: u64) {
        self.next = Some(cursor);
    }

    /// Holds the window back for so many nanoseconds more, and the error too if planning it fails.
    pub fn delay(&mut self, ns: u64) {
        self.directives.delay_ns = self.directives.delay_ns.saturating_add(ns);
        self.has_directives |= ns > 0;
    }

    /// How long the window is held back, in nanoseconds.
    #[must_use]
    pub const fn delay_ns(&self) -> u64 {
        self.directives.delay_ns
    }

    /// Says that reads and writes come short: from this window on, each that is longer than `bytes`
    /// asks for no more than that at first, and the engine goes on with the rest, as with a backing
    /// that moves fewer bytes than it was asked for. Whole blocks, not 0. For tests of whatever has
    /// to do with that; the request is served as a whole all the same.
    pub fn transfer_at_first(&mut self, bytes: u64) {
        self.directives.at_first =
            Some(self.directives.at_first.map_or(bytes, |least| least.min(bytes)));
        self.has_directives = true;
    }

    /// For how many bytes reads and writes ask at first, if not for all.
    #[must_use]
    pub const fn at_first(&self) -> Option<u64> {
        self.directives.at_first
    }

    /// Says that the request has to wait until another one has settled. The planner is then asked
    /// again, from `cursor` on. For the first window, and only while the planner has accepted a
    /// request that has not settled; operations of the window are not issued.
    pub fn wait_at(&mut self, cursor: u64) {
        self.directives.wait_at = Some(cursor);
        self.has_directives = true;
    }

    /// From where the planner is asked again when another request has settled.
    #[must_use]
    pub const fn waits_at(&self) -> Option<u64> {
        self.directives.wait_at
    }

    pub(crate) const fn has_directives(&self) -> bool {
        self.has_directives
    }

    /// What is said beside the operations.
    pub(crate) const fn directives_mut(&mut self) -> &mut Directives {
        &mut self.directives
    }

    /// All that is said beside the operations has been heeded.
    pub(crate) fn clear_directives(&mut self) {
        self.has_directives = false;
        self.directives = Directives::default();
    }

    /// Whether the request is neither to wait nor to fail.
    pub(crate) const fn is_accepting(&self) -> bool {
        !self.has_directives
            || self.directives.wait_at.is_none() && self.directives.failure.is_none()
    }

    /// Forgets the operations, not what is said beside them.
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

    /// The operation at a place of the window and its stage.
    #[must_use]
    pub fn op(&self, index: usize) -> Option<(u8, Op)> {
        self.ops.get(index).copied()
    }

    /// The operation of a request that needs no other.
    #[must_use]
    pub fn single(&self) -> Option<Op> {
        match self.ops.as_slice() {
            [(_, op)] if self.next.is_none() && !self.has_directives => Some(*op),
            _ => None,
        }
    }

    /// Puts an operation in the place of the only one.
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

/// What is to be done about an operation that has failed for good.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The request fails with the operation's error.
    Fail,
    /// The request goes on without it. Not for reads: their buffer is not filled.
    Ignore,
    /// The same, elsewhere: what is left of the operation is issued there.
    Instead {
        /// The other backing.
        backing: BackingIndex,
        /// First byte there.
        offset: u64,
    },
}

/// The mapping policy of a device.
///
/// A planner does no I/O and reads no clock. What it remembers, it changes only when it is asked
/// or told something. A queue has a planner of its own, which one thread calls.
pub trait Planner {
    /// Plans the window of `request` that begins at the cursor `from`: 0 for the first one, then
    /// what the window before has passed to [`Plan::continue_at`], once all operations of that
    /// have succeeded. The plan is empty on entry.
    ///
    /// # Errors
    /// What the request is to be answered with; nothing of the window is then issued.
    fn plan(&self, request: &Request, from: u64, plan: &mut Plan) -> Result<(), Errno>;

    /// Where the whole of a read or write is, if it is at one place and needs no more than one
    /// operation there: what [`Planner::plan`] would say, sooner. `None` sends the request there.
    #[inline]
    fn single(&self, _request: &Request) -> Option<Place> {
        None
    }

    /// Bytes of scratch buffer that a request may need, 0 for none. Each tag has its own.
    #[inline]
    fn scratch_bytes(&self) -> u32 {
        0
    }

    /// What is left of an operation of `request` has failed for good, or was cancelled. Told of
    /// every such operation, also when the request has failed already and the verdict is not
    /// heeded. An operation is issued elsewhere so often at most as the engine allows
    /// ([`MAX_SUBSTITUTES`](crate::engine::MAX_SUBSTITUTES)).
    #[inline]
    fn failed(&self, _request: &Request, _op: &Op, _errno: Errno) -> Verdict {
        Verdict::Fail
    }

    /// A request is about to be answered. Told exactly once of each request whose first window
    /// was planned without an error and without [`Plan::wait_at`].
    #[inline]
    fn settled(&self, _request: &Request, _result: Result<(), Errno>) {}
}

//! Plans: what a request becomes.
//!
//! A planner is pure: it turns a request into operations on backings and does no I/O. The engine
//! carries the operations out, stage after stage, a window at a time.

use smallvec::SmallVec;
use uring_ext::Errno;

use crate::request::Request;

/// How many operations a window holds. A request that needs more gets more windows, one after
/// the other, so that no request takes more than this from the bounded tables.
pub const WINDOW_OPS: usize = 8;

/// Which backing of a device an operation goes to, in the order that the target lists them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BackingIndex(pub u16);

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
    /// Length in bytes.
    pub len: u64,
    /// For reads and writes: its first byte in the request's buffer.
    pub buf_offset: u32,
}

impl Op {
    /// Whether it borrows the request's buffer.
    #[must_use]
    pub const fn has_data(&self) -> bool {
        matches!(self.kind, OpKind::Read | OpKind::Write { .. })
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
    next: Option<u64>,
}

impl Plan {
    /// Empties the plan for the next window.
    pub fn clear(&mut self) {
        self.ops.clear();
        self.stage = 0;
        self.next = None;
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

    /// Begins the next stage, which starts when all operations of this one have succeeded.
    pub fn next_stage(&mut self) {
        self.stage += 1;
    }

    /// Says that this window is not the last: the next one begins at `cursor`, which is greater
    /// than this one's and whose meaning is the planner's own.
    pub fn continue_at(&mut self, cursor: u64) {
        self.next = Some(cursor);
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
            [(_, op)] if self.next.is_none() => Some(*op),
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

/// The mapping policy of a device.
pub trait Planner {
    /// Plans the window of `request` that begins at the cursor `from`: 0 for the first one, then
    /// what the window before has passed to [`Plan::continue_at`]. The plan is empty on entry.
    ///
    /// # Errors
    /// What the request is to be answered with; nothing of the window is then issued.
    fn plan(&self, request: &Request, from: u64, plan: &mut Plan) -> Result<(), Errno>;
}

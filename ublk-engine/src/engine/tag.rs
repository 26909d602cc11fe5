//! The state of a tag.

use bufreg::{Active, Lease, LeaseKey, Quarantined, Reserved, Retiring, Sole};
use uring_ext::Errno;

use super::answer::Answer;
use super::inflight::{InFlight, Progress};
use super::latency::Stamps;
use crate::plan::{BackingIndex, BackingPosition, Plan};
use crate::request::{Request, RequestKind};

/// The owner and state of a tag.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// The driver has it, and may deliver a request.
    WithDriver,
    /// The request was delivered while the engine holds, and has not begun.
    HeldBack,
    /// The request waits for its time, and holds nothing but a buffer that the driver has delivered.
    Throttled,
    /// The request waits for a buffer of the pool, and holds nothing.
    Waiting,
    /// The request waits until another one has settled, and holds nothing but a buffer that the
    /// driver has delivered.
    Deferred,
    /// The request's buffer is being registered.
    Registering,
    /// The request is being carried out.
    Running,
    /// The request is being carried out by one operation. Its state is in [`TagState::fast_path`].
    FastPath,
    /// The request's buffer is being unregistered; then the result is committed.
    Unregistering,
    /// No one has it: the device is stopped.
    Ended,
}

/// The state of a request on the fast path. Together with the fields before it, it takes one or two
/// cache lines.
#[derive(Debug)]
pub(super) struct FastPath {
    /// Also represents the operation's borrow.
    pub lease: Option<Lease<Sole>>,
    /// The serial of the operation, which uses the tag's first entry.
    pub serial: u32,
    pub request: Request,
    pub position: BackingPosition,
}

/// The state of a tag. Allocated at construction.
#[derive(Debug)]
#[repr(C, align(64))]
pub(super) struct TagState {
    pub phase: Phase,
    /// The sequence number of the tag's last command.
    pub seq: u32,
    /// The request that takes the fast path, or the last one that did.
    pub fast_path: FastPath,
    /// The request, or the last one.
    pub run: Run,
    /// The request's window of operations.
    pub plan: Plan,
    /// The slot that could not be unregistered after the last request.
    pub quarantined: Option<Lease<Quarantined>>,
}

impl TagState {
    pub fn new() -> Self {
        let nothing = Request { kind: RequestKind::Flush, offset: 0, len: 0 };
        let position = BackingPosition { backing: BackingIndex(0), offset: 0 };
        Self {
            phase: Phase::WithDriver,
            seq: 0,
            fast_path: FastPath { lease: None, serial: 0, request: nothing, position },
            run: Run::new(nothing, false, Stamps::default()),
            plan: Plan::default(),
            quarantined: None,
        }
    }

    /// Whether the engine has a request of this tag.
    pub fn is_open(&self) -> bool {
        match self.phase {
            Phase::WithDriver | Phase::Ended => false,
            Phase::HeldBack
            | Phase::Throttled
            | Phase::Waiting
            | Phase::Deferred
            | Phase::Registering
            | Phase::Running
            | Phase::FastPath
            | Phase::Unregistering => true,
        }
    }

    /// The leases that the tag holds.
    pub fn lease_keys(&self) -> impl Iterator<Item = LeaseKey> {
        let fast_path = self.fast_path.lease.as_ref().map(Lease::key);
        let held = self.run.held.key().into_iter().chain(self.run.scratch.key());
        held.chain(fast_path).chain(self.quarantined.as_ref().map(Lease::key))
    }

    /// The chain in flight.
    pub fn chain(&mut self) -> Option<&mut Chain> {
        self.run.chain.as_mut().filter(|_| self.phase == Phase::Running)
    }
}

/// How a request's bytes get into and out of a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum BufferPath {
    /// The driver registers the buffer before delivery and unregisters it at commit.
    Delivered,
    /// The server registers and unregisters the buffer.
    Registered,
    /// The bytes are copied through a buffer of the pool.
    Copied,
}

/// The slot that a request holds.
#[derive(Debug)]
pub(super) enum Held {
    /// No slot.
    Nothing,
    /// A slot in which the buffer is being registered.
    Reserved(Lease<Reserved>),
    /// A slot with the request's bytes.
    Active(Lease<Active>),
    /// A slot from which the buffer is being unregistered.
    Retiring(Lease<Retiring>),
    /// A slot that a lost operation may still use.
    Quarantined(Lease<Quarantined>),
}

impl Held {
    /// The key of its lease.
    fn key(&self) -> Option<LeaseKey> {
        match self {
            Self::Nothing => None,
            Self::Reserved(lease) => Some(lease.key()),
            Self::Active(lease) => Some(lease.key()),
            Self::Retiring(lease) => Some(lease.key()),
            Self::Quarantined(lease) => Some(lease.key()),
        }
    }

    /// Takes what is held, and leaves nothing.
    pub fn take(&mut self) -> Self {
        std::mem::replace(self, Self::Nothing)
    }
}

/// The state of a chain: register, operation and unregister, submitted as one hard-linked chain.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Chain {
    /// The error of the registration. Its success has no completion.
    pub registration: Option<Errno>,
    /// How the operation ended, and the rest of it.
    pub operation: Option<(Progress, InFlight)>,
    /// The result of the unregistration.
    pub unregistration: Option<i32>,
}

/// The state of a request that is being carried out.
#[derive(Debug)]
pub(super) struct Run {
    /// The request as delivered. Never changes.
    request: Request,
    pub buffer_path: BufferPath,
    /// The slot with the request's bytes.
    pub held: Held,
    /// The slot of the tag's scratch buffer, from the first operation that uses it on.
    pub scratch: Held,
    pub chain: Option<Chain>,
    /// The planner has accepted the request, and is notified when it settles.
    pub accepted: bool,
    /// When it was delivered, in nanoseconds.
    pub delivered_at: u64,
    /// The driver could not register the buffer.
    pub need_reg_buf: bool,
    /// Failed registrations or unregistrations.
    pub tries: u8,
    /// How often the operation of a chain was tried without progress.
    pub retries: u8,
    /// How many bytes the operation of a chain has moved since it began at a block boundary.
    pub moved: u32,
    /// How often the operation of a chain was issued elsewhere.
    pub substitutes: u8,
    /// The maximum length with which a transfer is first issued, in bytes.
    pub at_first: u64,
    /// A transfer was first issued for only a part.
    pub is_short: bool,
    /// How many bytes at the start of the request were moved before copying began.
    pub copied_from: u32,
    /// The cursor of the window.
    pub cursor: u64,
    /// Its turn among the requests that have had to wait for a time.
    pub turn: Option<u64>,
    /// The next operation of the window to issue.
    pub next_op: usize,
    /// Operations in flight.
    pub pending: u16,
    pub error: Option<Errno>,
    pub stamps: Stamps,
}

impl Run {
    pub fn new(request: Request, need_reg_buf: bool, stamps: Stamps) -> Self {
        Self {
            request,
            buffer_path: BufferPath::Delivered,
            held: Held::Nothing,
            scratch: Held::Nothing,
            chain: None,
            accepted: false,
            delivered_at: 0,
            need_reg_buf,
            tries: 0,
            retries: 0,
            moved: 0,
            substitutes: 0,
            at_first: u64::MAX,
            is_short: false,
            copied_from: 0,
            cursor: 0,
            turn: None,
            next_op: 0,
            pending: 0,
            error: None,
            stamps,
        }
    }

    /// Resets it for another request.
    #[inline]
    pub fn renew(
        &mut self,
        request: Request,
        need_reg_buf: bool,
        delivered_at: u64,
        stamps: Stamps,
    ) {
        self.request = request;
        self.buffer_path = BufferPath::Delivered;
        self.held = Held::Nothing;
        self.scratch = Held::Nothing;
        self.chain = None;
        self.accepted = false;
        self.delivered_at = delivered_at;
        self.need_reg_buf = need_reg_buf;
        self.tries = 0;
        self.retries = 0;
        self.moved = 0;
        self.substitutes = 0;
        self.at_first = u64::MAX;
        self.is_short = false;
        self.copied_from = 0;
        self.cursor = 0;
        self.turn = None;
        self.next_op = 0;
        self.pending = 0;
        self.error = None;
        self.stamps = stamps;
    }

    /// The request as delivered.
    #[inline]
    pub const fn request(&self) -> &Request {
        &self.request
    }

    /// Records the first error.
    pub fn fail(&mut self, errno: Errno) {
        self.error.get_or_insert(errno);
    }

    pub fn failed(&self) -> bool {
        self.error.is_some()
    }

    /// Whether all operations of the window have been issued.
    pub fn window_done(&self, plan: &Plan) -> bool {
        self.next_op >= plan.len()
    }

    /// Whether the window was the last.
    pub fn is_complete(&self, plan: &Plan) -> bool {
        self.window_done(plan) && plan.next().is_none()
    }

    /// Replaces the window's only operation by the rest of it.
    pub fn replan(&mut self, plan: &mut Plan, rest: InFlight) {
        plan.replace_single(rest.op);
        self.next_op = 0;
        self.retries = rest.retries;
        self.substitutes = rest.substitutes;
        self.moved = rest.moved;
        self.copied_from = rest.op.buf_offset;
    }

    /// Clears the plan for the next window.
    pub fn next_window(&mut self, plan: &mut Plan) {
        self.cursor = plan.next().unwrap_or(self.cursor);
        self.next_op = 0;
        plan.clear();
    }

    /// The answer to the request, once everything is done.
    pub fn result(&self) -> Result<Answer, Errno> {
        match self.error {
            // A client's io_uring would reissue such a read or write for ever
            // (`io_rw_should_reissue`).
            Some(Errno::EOPNOTSUPP) if self.request.has_data() => Err(Errno::EIO),
            Some(errno) => Err(errno),
            None => Ok(Answer::whole(&self.request)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_answer_makes_a_client_ask_for_ever() {
        let read = RequestKind::Read;
        let table = [
            (read, Errno::EOPNOTSUPP, Errno::EIO),
            (RequestKind::Write { fua: true }, Errno::EOPNOTSUPP, Errno::EIO),
            (RequestKind::Discard, Errno::EOPNOTSUPP, Errno::EOPNOTSUPP),
            (read, Errno::ENODATA, Errno::ENODATA),
        ];
        for (kind, error, answer) in table {
            let request = Request { kind, offset: 0, len: 512 };
            let mut run = Run::new(request, false, Stamps::default());
            run.fail(error);
            assert_eq!(run.result(), Err(answer), "{kind:?}");
        }
    }
}

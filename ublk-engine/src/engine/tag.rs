//! The state of a tag.

use bufreg::{Active, Lease, LeaseKey, Quarantined, Reserved, Retiring, Sole};
use uring_ext::Errno;

use super::answer::Answer;
use super::inflight::{InFlight, Progress};
use super::latency::Stamps;
use crate::plan::{BackingIndex, Place, Plan};
use crate::request::{Request, RequestKind};

/// Who has a tag, and what for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// The driver; it may deliver a request.
    WithDriver,
    /// The engine; the request waits for a buffer of the pool and holds nothing meanwhile.
    Waiting,
    /// The engine; the request waits until another one has settled and holds nothing meanwhile
    /// but what the driver has delivered.
    Deferred,
    /// The engine; the buffer is being registered.
    Registering,
    /// The engine; the request is being carried out.
    Running,
    /// The engine; the request is being carried out by one operation, of which nothing is known but
    /// what is in [`TagState::fast_path`].
    FastPath,
    /// The engine; the buffer is being unregistered, then the result is committed.
    Unregistering,
    /// Nobody: the device is stopped.
    Ended,
}

/// All that most requests need, in one or two cache lines with what comes before it.
#[derive(Debug)]
pub(super) struct FastPath {
    /// Stands for the operation's borrow too.
    pub lease: Option<Lease<Sole>>,
    /// Serial of the operation, which has the first of the tag's places.
    pub serial: u32,
    pub request: Request,
    pub place: Place,
}

/// Everything about a tag, in one place that it has from the start.
#[derive(Debug)]
#[repr(C, align(64))]
pub(super) struct TagState {
    pub phase: Phase,
    /// Which of the tag's commands is the last.
    pub seq: u32,
    /// The request that takes the fast path, or the last one that did.
    pub fast_path: FastPath,
    /// The request, or the last one.
    pub run: Run,
    /// The request's window of operations.
    pub plan: Plan,
    /// The slot whose unregistration failed after the last request.
    pub quarantined: Option<Lease<Quarantined>>,
}

impl TagState {
    pub fn new() -> Self {
        let nothing = Request { kind: RequestKind::Flush, offset: 0, len: 0 };
        let place = Place { backing: BackingIndex(0), offset: 0 };
        Self {
            phase: Phase::WithDriver,
            seq: 0,
            fast_path: FastPath { lease: None, serial: 0, request: nothing, place },
            run: Run::new(nothing, false, Stamps::default()),
            plan: Plan::default(),
            quarantined: None,
        }
    }

    /// Whether the engine has a request of this tag.
    pub fn is_open(&self) -> bool {
        match self.phase {
            Phase::WithDriver | Phase::Ended => false,
            Phase::Waiting
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

    /// The chain that is under way.
    pub fn chain(&mut self) -> Option<&mut Chain> {
        self.run.chain.as_mut().filter(|_| self.phase == Phase::Running)
    }
}

/// How a request's bytes get into a slot, and out again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum BufferPath {
    /// The driver puts them there before delivery and takes them back at commit.
    Delivered,
    /// The request's buffer is registered and unregistered by commands of ours.
    Registered,
    /// They are copied through a buffer of the pool.
    Copied,
}

/// What a request holds.
#[derive(Debug)]
pub(super) enum Held {
    /// No slot.
    Nothing,
    /// A slot whose registration is under way.
    Reserved(Lease<Reserved>),
    /// A slot with its bytes.
    Active(Lease<Active>),
    /// A slot whose unregistration is under way.
    Retiring(Lease<Retiring>),
    /// A slot that an operation of unknown fate may still use.
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

    /// What was held; nothing is from now on.
    pub fn take(&mut self) -> Self {
        std::mem::replace(self, Self::Nothing)
    }
}

/// Register, operation and unregister, submitted as one hard-linked chain: what is known of it.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Chain {
    /// Why the registration failed; its success is silent.
    pub registration: Option<Errno>,
    /// How the operation ended, and what is left of it.
    pub operation: Option<(Progress, InFlight)>,
    /// The result of the unregistration.
    pub unregistration: Option<i32>,
}

/// A request being carried out.
#[derive(Debug)]
pub(super) struct Run {
    /// As it was delivered; nothing changes it.
    request: Request,
    pub buffer_path: BufferPath,
    /// The slot with the request's bytes.
    pub held: Held,
    /// The slot of the tag's scratch buffer, from the first operation that uses it on.
    pub scratch: Held,
    pub chain: Option<Chain>,
    /// The planner has accepted the request, and will be told when it settles.
    pub accepted: bool,
    /// The driver could not register the buffer.
    pub need_reg_buf: bool,
    /// Registrations or unregistrations tried without success.
    pub tries: u8,
    /// How often the operation of a chain has been tried without progress.
    pub retries: u8,
    /// How many bytes the operation of a chain has moved since it began at a block.
    pub moved: u32,
    /// How often it has been issued elsewhere.
    pub substitutes: u8,
    /// How many bytes a transfer asks for at first, at most.
    pub at_first: u64,
    /// One has asked for less than all.
    pub is_short: bool,
    /// Bytes of the request's start that went another way before copying began.
    pub copied_from: u32,
    /// Where the window begins, in the planner's terms.
    pub cursor: u64,
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
            need_reg_buf,
            tries: 0,
            retries: 0,
            moved: 0,
            substitutes: 0,
            at_first: u64::MAX,
            is_short: false,
            copied_from: 0,
            cursor: 0,
            next_op: 0,
            pending: 0,
            error: None,
            stamps,
        }
    }

    /// Makes it that of another request, in its place.
    #[inline]
    pub fn renew(&mut self, request: Request, need_reg_buf: bool, stamps: Stamps) {
        self.request = request;
        self.buffer_path = BufferPath::Delivered;
        self.held = Held::Nothing;
        self.scratch = Held::Nothing;
        self.chain = None;
        self.accepted = false;
        self.need_reg_buf = need_reg_buf;
        self.tries = 0;
        self.retries = 0;
        self.moved = 0;
        self.substitutes = 0;
        self.at_first = u64::MAX;
        self.is_short = false;
        self.copied_from = 0;
        self.cursor = 0;
        self.next_op = 0;
        self.pending = 0;
        self.error = None;
        self.stamps = stamps;
    }

    /// As it was delivered.
    #[inline]
    pub const fn request(&self) -> &Request {
        &self.request
    }

    /// Remembers the first error.
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

    /// Puts what is left of the window's only operation in its place.
    pub fn replan(&mut self, plan: &mut Plan, rest: InFlight) {
        plan.replace_single(rest.op);
        self.next_op = 0;
        self.retries = rest.retries;
        self.substitutes = rest.substitutes;
        self.moved = rest.moved;
        self.copied_from = rest.op.buf_offset;
    }

    /// Makes room for the next window.
    pub fn next_window(&mut self, plan: &mut Plan) {
        self.cursor = plan.next().unwrap_or(self.cursor);
        self.next_op = 0;
        plan.clear();
    }

    /// What the request is answered with, once nothing of it is left to be done.
    pub fn result(&self) -> Result<Answer, Errno> {
        match self.error {
            // A client's io_uring would issue such a read or write again and again
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

//! The state of a tag.

use bufreg::{Active, Lease, LeaseKey, Quarantined, Reserved, Retiring};
use uring_ext::Errno;

use super::inflight::{InFlight, Progress};
use super::latency::Stamps;
use crate::plan::Plan;
use crate::request::Request;

/// Who has a tag, and what for.
#[derive(Debug)]
pub(super) enum TagState {
    /// The driver; it may deliver a request.
    WithDriver,
    /// The engine; the request waits for a buffer of the pool and holds nothing meanwhile.
    Waiting(Run),
    /// The engine; the buffer is being registered.
    Registering { run: Run, lease: Lease<Reserved> },
    /// The engine; the request is being carried out.
    Running(Run),
    /// The engine; the buffer is being unregistered, then the result is committed.
    Unregistering { run: Run, lease: Lease<Retiring> },
    /// Nobody: the device is stopped.
    Ended,
}

impl TagState {
    /// Takes the state if `wanted` says so, leaving `WithDriver`; changes nothing otherwise.
    pub fn take_if(&mut self, wanted: impl FnOnce(&Self) -> bool) -> Option<Self> {
        wanted(self).then(|| std::mem::replace(self, Self::WithDriver))
    }

    /// Whether the engine has a request of this tag.
    pub fn is_open(&self) -> bool {
        match self {
            Self::WithDriver | Self::Ended => false,
            Self::Waiting(_)
            | Self::Registering { .. }
            | Self::Running(_)
            | Self::Unregistering { .. } => true,
        }
    }

    /// The lease that the tag holds.
    pub fn lease_key(&self) -> Option<LeaseKey> {
        match self {
            Self::WithDriver | Self::Waiting(_) | Self::Ended => None,
            Self::Registering { lease, .. } => Some(lease.key()),
            Self::Unregistering { lease, .. } => Some(lease.key()),
            Self::Running(run) => match &run.held {
                Held::Nothing => None,
                Held::Active(lease) => Some(lease.key()),
                Held::Quarantined(lease) => Some(lease.key()),
            },
        }
    }
}

/// How a request's bytes get into a slot, and out again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
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
    /// A slot with its bytes.
    Active(Lease<Active>),
    /// A slot that an operation of unknown fate may still use.
    Quarantined(Lease<Quarantined>),
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
    pub request: Request,
    pub way: Way,
    pub held: Held,
    pub chain: Option<Chain>,
    /// Registrations or unregistrations tried without success.
    pub tries: u8,
    /// How often the operation of a chain has been tried without progress.
    pub retries: u8,
    /// Bytes of the request's start that went another way before copying began.
    pub copied_from: u32,
    /// Bytes of the request that earlier windows have done.
    pub covered: u64,
    /// The next operation of the window to issue.
    pub next_op: usize,
    /// Operations in flight.
    pub pending: u16,
    pub error: Option<Errno>,
    pub stamps: Stamps,
}

impl Run {
    pub fn new(request: Request, stamps: Stamps) -> Self {
        Self {
            request,
            way: Way::Delivered,
            held: Held::Nothing,
            chain: None,
            tries: 0,
            retries: 0,
            copied_from: 0,
            covered: 0,
            next_op: 0,
            pending: 0,
            error: None,
            stamps,
        }
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
        plan.op(self.next_op).is_none()
    }

    /// Whether the window was the last.
    pub fn is_complete(&self, plan: &Plan) -> bool {
        self.window_done(plan) && self.covered + plan.covered() >= self.request.len
    }

    /// Puts what is left of the window's only operation in its place.
    pub fn replan(&mut self, plan: &mut Plan, rest: InFlight) {
        plan.replace_single(rest.op);
        self.next_op = 0;
        self.retries = rest.retries;
        self.copied_from = rest.op.buf_offset;
    }

    /// Makes room for the next window.
    pub fn next_window(&mut self, plan: &mut Plan) {
        self.covered += plan.covered();
        self.next_op = 0;
        plan.clear();
    }

    /// What the request is answered with.
    pub fn result(&self) -> Result<i32, Errno> {
        match self.error {
            Some(errno) => Err(errno),
            // The driver takes any result of zero or more as full success of the other kinds.
            None if !self.request.has_data() => Ok(0),
            None => i32::try_from(self.request.len).map_err(|_| Errno::EINVAL),
        }
    }
}

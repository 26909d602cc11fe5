//! The state of a tag.

use bufreg::{Active, Lease, Reserved, Retiring};
use uring_ext::Errno;

use crate::plan::Plan;
use crate::request::Request;

/// Who has a tag, and what for.
#[derive(Debug)]
pub(super) enum TagState {
    /// The driver; it may deliver a request.
    WithDriver,
    /// The engine; the buffer is being registered.
    Registering { lease: Lease<Reserved>, request: Request, tries: u8 },
    /// The engine; the request is being carried out.
    Running(Run),
    /// The engine; the buffer is being unregistered, then `result` is committed.
    Unregistering { lease: Lease<Retiring>, result: Result<i32, Errno> },
    /// Nobody: the device is stopped.
    Ended,
}

impl TagState {
    /// Takes the state if `wanted` says so, leaving `WithDriver`; changes nothing otherwise.
    pub fn take_if(&mut self, wanted: impl FnOnce(&Self) -> bool) -> Option<Self> {
        wanted(self).then(|| std::mem::replace(self, Self::WithDriver))
    }
}

/// A request being carried out.
#[derive(Debug)]
pub(super) struct Run {
    pub request: Request,
    pub lease: Option<Lease<Active>>,
    /// The buffer was registered by a command of ours and must be unregistered by one.
    pub explicitly_registered: bool,
    /// Bytes of the request that earlier windows have done.
    pub covered: u64,
    /// The next operation of the window to issue.
    pub next_op: usize,
    /// Operations in flight.
    pub pending: u16,
    /// Windows planned; the first is planned even for a request without bytes.
    pub windows: u32,
    pub error: Option<Errno>,
}

impl Run {
    pub fn new(request: Request, lease: Option<Lease<Active>>) -> Self {
        Self {
            request,
            lease,
            explicitly_registered: false,
            covered: 0,
            next_op: 0,
            pending: 0,
            windows: 0,
            error: None,
        }
    }

    pub fn registered(request: Request, lease: Lease<Active>) -> Self {
        Self { explicitly_registered: true, ..Self::new(request, Some(lease)) }
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
        self.window_done(plan)
            && self.windows > 0
            && self.covered + plan.covered() >= self.request.len
    }

    /// Makes room for the next window.
    pub fn next_window(&mut self, plan: &mut Plan) {
        self.covered += plan.covered();
        self.next_op = 0;
        self.windows = self.windows.saturating_add(1);
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

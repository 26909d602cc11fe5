//! Holding requests back, so that the planner can be replaced while the device is used.
//!
//! While an engine holds, it keeps new requests and begins none of them. It takes back those that wait
//! for their time. Requests that it has begun go on to their end, with all their windows, retries and
//! waits for others. When the last one has been
//! answered, the engine is *quiet*: its planner has no request, and no operation is in flight. Then
//! [`Engine::exchange_planner`] can be called. After [`Engine::release`], the held requests begin in
//! the order of their delivery.

use super::tag::{Phase, TagState};
use super::{Engine, Port};
use crate::plan::{Op, Planner};
use crate::request::Request;
use crate::units::Tag;

/// A request that an engine has begun and not answered yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BegunRequest {
    /// Its tag.
    pub tag: Tag,
    /// The request.
    pub request: Request,
    /// Time since its delivery, in nanoseconds.
    pub age_ns: u64,
    /// The first of its operations in flight. `None` if it has none, as while its buffer is
    /// registered.
    pub op: Option<Op>,
}

impl<P: Planner> Engine<P> {
    /// Begins no more requests, until [`Engine::release`].
    pub fn hold(&mut self) {
        self.leave_all_fast_paths();
        self.is_holding = true;
        self.choose_path();
        self.withdraw_throttled();
    }

    /// Whether requests are held back.
    pub fn is_holding(&self) -> bool {
        self.is_holding
    }

    /// Whether no request has begun that has not ended, and no operation is in flight.
    pub fn is_quiet(&self) -> bool {
        let has_begun = |state: &TagState| state.is_open() && state.phase != Phase::HeldBack;
        self.inflight.is_empty() && !self.tags.iter().any(has_begun)
    }

    /// Begins the requests that were held back, in the order of their delivery.
    pub fn release(&mut self, port: &mut impl Port) {
        self.is_holding = false;
        self.choose_path();
        while let Some(tag) = self.held_back.pop_front() {
            self.begin(tag, port);
        }
        self.serve_deferred(port);
    }

    /// How many requests are held back.
    pub fn held_back(&self) -> usize {
        self.held_back.len()
    }

    /// The tags whose requests are held back, in the order in which they will begin.
    pub fn held_back_tags(&self) -> impl Iterator<Item = Tag> + '_ {
        self.held_back.iter().copied()
    }

    /// The request that was delivered first of those that have begun and not ended. Scans every
    /// tag, so it is not for the data path.
    pub fn oldest_begun(&mut self) -> Option<BegunRequest> {
        // Only the general path knows when a request was delivered.
        self.leave_all_fast_paths();
        let begun = |state: &TagState| state.is_open() && state.phase != Phase::HeldBack;
        let tags = self.tags.iter().zip(0..).filter(|(state, _)| begun(state));
        let (state, tag) = tags.min_by_key(|(state, _)| state.run.delivered_at)?;
        let (request, delivered_at) = (*state.run.request(), state.run.delivered_at);
        let age_ns = self.now.saturating_sub(delivered_at);
        let mut ops = self.inflight.iter_mut().filter(|(_, inflight)| inflight.tag == Tag(tag));
        let op = ops.next().map(|(_, inflight)| inflight.op);
        Some(BegunRequest { tag: Tag(tag), request, age_ns, op })
    }

    /// Keeps a request that was delivered while the engine holds.
    #[cold]
    pub(super) fn hold_back(&mut self, tag: Tag) {
        self.tags[tag.index()].phase = Phase::HeldBack;
        self.stats.held_back += 1;
        self.held_back.push_back(tag);
    }

    /// Requests may take the fast path if none are held back and latencies are not measured.
    pub(super) fn choose_path(&mut self) {
        let may_be_fast = !self.is_holding && self.recorder.is_none();
        self.fast_path_slots = self.config.fast_path_slots().filter(|_| may_be_fast);
    }
}

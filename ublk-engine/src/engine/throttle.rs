//! Requests that wait for their time. The planner has chosen it, and has not accepted them yet.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use super::tag::{Held, Phase};
use super::{Engine, Port};
use crate::plan::Planner;
use crate::units::Tag;

/// Requests by their time. Those with the same time keep the order in which they first had to wait,
/// which is that of their delivery.
#[derive(Debug)]
pub(super) struct Throttled {
    /// Time in nanoseconds, turn, tag.
    waiting: BinaryHeap<Reverse<(u64, u64, Tag)>>,
    next_turn: u64,
    /// No request waits any more.
    is_over: bool,
}

impl Throttled {
    /// With room for a request of each tag.
    pub fn with_capacity(depth: usize) -> Self {
        Self { waiting: BinaryHeap::with_capacity(depth), next_turn: 0, is_over: false }
    }

    fn next_turn(&mut self) -> u64 {
        self.next_turn += 1;
        self.next_turn
    }

    /// The next request whose time has come.
    fn pop_due(&mut self, now: u64) -> Option<Tag> {
        let Reverse((until, ..)) = self.waiting.peek()?;
        if *until > now && !self.is_over {
            return None;
        }
        self.waiting.pop().map(|Reverse((.., tag))| tag)
    }
}

/// The longest time to the next request that is told, in nanoseconds. The kernel does not take all
/// longer ones.
const LONGEST_WAIT: u64 = 3_600_000_000_000;

impl<P: Planner> Engine<P> {
    /// Begins the requests whose time has come.
    #[inline]
    pub fn begin_throttled(&mut self, port: &mut impl Port) {
        if self.has_throttled() {
            self.begin_due(port);
        }
    }

    /// Whether requests wait for their time.
    #[inline]
    pub fn has_throttled(&self) -> bool {
        !self.throttled.waiting.is_empty()
    }

    /// Whether requests may wait for a time. If not, those that wait begin.
    pub fn set_throttling(&mut self, is_on: bool, port: &mut impl Port) {
        self.throttled.is_over = !is_on;
        self.begin_throttled(port);
    }

    #[cold]
    fn begin_due(&mut self, port: &mut impl Port) {
        while let Some(tag) = self.throttled.pop_due(self.now) {
            self.begin_again(tag, port);
        }
        self.serve_deferred(port);
    }

    /// Nanoseconds until the time of the next request has come.
    pub(super) fn until_next_throttled(&self) -> Option<u64> {
        let Reverse((until, ..)) = self.throttled.waiting.peek()?;
        Some(until.saturating_sub(self.now).min(LONGEST_WAIT))
    }

    /// Lets a request wait for a time, and for its turn among those that wait.
    pub(super) fn throttle(&mut self, tag: Tag, until: u64, port: &mut impl Port) {
        if until <= self.now || self.throttled.is_over {
            return self.begin_again(tag, port);
        }
        self.stats.throttled += 1;
        let state = &mut self.tags[tag.index()];
        state.phase = Phase::Throttled;
        let turn = *state.run.turn.get_or_insert_with(|| self.throttled.next_turn());
        if self.is_holding {
            return self.withdraw(tag);
        }
        self.throttled.waiting.push(Reverse((until, turn, tag)));
    }

    /// Takes back all requests that wait for their time.
    pub(super) fn withdraw_throttled(&mut self) {
        if !self.has_throttled() {
            return;
        }
        // The engine has just begun to hold: none waits while it does.
        debug_assert!(self.held_back.is_empty());
        self.held_back.extend(self.throttled.waiting.drain().map(|Reverse((.., tag))| tag));
        let tags = &self.tags;
        self.held_back.make_contiguous().sort_unstable_by_key(|tag| tags[tag.index()].run.turn);
        for _ in 0..self.held_back.len() {
            let Some(tag) = self.held_back.pop_front() else { return };
            self.withdraw(tag);
        }
    }

    /// Takes back a request that waits for its time: it is held back as if it had not been planned.
    fn withdraw(&mut self, tag: Tag) {
        // The driver's delivery stays, and is lent again.
        if let Ok(Some(lease)) = self.retire_held(tag) {
            self.registry.release(lease);
        }
        let run = &mut self.tags[tag.index()].run;
        debug_assert!(matches!(run.held, Held::Nothing));
        self.planner.withdrawn(run.request(), run.cursor);
        let (request, delivered_at) = (*run.request(), run.delivered_at);
        run.renew(request, run.need_reg_buf, delivered_at, run.stamps);
        self.hold_back(tag);
    }
}

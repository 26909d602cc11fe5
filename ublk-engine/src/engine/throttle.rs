//! Requests that wait for their time. The planner has chosen it, and has not accepted them yet.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use super::tag::{Held, Phase};
use super::{Engine, Port};
use crate::plan::Planner;
use crate::units::Tag;

/// Requests by their time. Those with the same time keep the order in which they began to wait.
#[derive(Debug)]
pub(super) struct Throttled {
    /// Time in nanoseconds, serial number, tag.
    waiting: BinaryHeap<Reverse<(u64, u64, Tag)>>,
    next_serial: u64,
    /// No request waits any more.
    is_over: bool,
}

impl Throttled {
    /// With room for a request of each tag.
    pub fn with_capacity(depth: usize) -> Self {
        Self { waiting: BinaryHeap::with_capacity(depth), next_serial: 0, is_over: false }
    }

    fn push(&mut self, until: u64, tag: Tag) {
        self.waiting.push(Reverse((until, self.next_serial, tag)));
        self.next_serial += 1;
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

    /// Begins the requests that wait for their time, and lets no request wait for one from now on.
    pub fn stop_throttling(&mut self, port: &mut impl Port) {
        self.throttled.is_over = true;
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
        Some(until.saturating_sub(self.now))
    }

    /// Lets a request wait for a time, and for its turn among those that wait.
    pub(super) fn throttle(&mut self, tag: Tag, until: u64, port: &mut impl Port) {
        if until <= self.now || self.throttled.is_over {
            return self.begin_again(tag, port);
        }
        self.stats.throttled += 1;
        self.tags[tag.index()].phase = Phase::Throttled;
        if self.is_holding {
            return self.withdraw(tag);
        }
        self.throttled.push(until, tag);
    }

    /// Takes back all requests that wait for their time.
    pub(super) fn withdraw_throttled(&mut self) {
        while let Some(Reverse((.., tag))) = self.throttled.waiting.pop() {
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

//! Deadlines and cancellation of operations.

use std::time::Duration;

use super::inflight::Cancel;
use super::tag::Held;
use super::{Engine, Port, deadline_of};
use crate::plan::{Buffer, Planner};

impl<P: Planner> Engine<P> {
    /// How long to wait for completions before the next [`Engine::check_deadlines`] and
    /// [`Engine::begin_throttled`]. `None` for no limit.
    pub fn patience(&self) -> Option<Duration> {
        let limit = self.config.deadline.filter(|_| !self.inflight.is_empty());
        // Often enough to be at most a quarter late.
        let limit =
            limit.map(|limit| Duration::from_nanos(limit / 4).max(Duration::from_millis(1)));
        let throttled = self.until_next_throttled().map(Duration::from_nanos);
        limit.into_iter().chain(throttled).min()
    }

    /// Cancels operations past their deadline. An operation that has neither completed nor been
    /// cancelled after another such time is lost: its slot is in quarantine until it completes.
    pub fn check_deadlines(&mut self, port: &mut impl Port) {
        for (key, inflight) in self.inflight.iter_mut().filter(|(_, op)| op.deadline <= self.now) {
            match inflight.cancel {
                Cancel::No => {
                    self.stats.timed_out += 1;
                    self.stats.cancelled += 1;
                    inflight.cancel = Cancel::Asked;
                    inflight.deadline = deadline_of(self.config.deadline, self.now);
                    port.cancel(key, &inflight.issued());
                }
                Cancel::Asked => {
                    inflight.cancel = Cancel::Lost;
                    inflight.deadline = u64::MAX;
                    self.stats.lost_ops += 1;
                    let run = &mut self.tags[inflight.tag.index()].run;
                    let held = match inflight.op.buffer() {
                        Some(Buffer::Scratch) => &mut run.scratch,
                        Some(Buffer::Request) | None => &mut run.held,
                    };
                    *held = match held.take() {
                        Held::Active(lease) => Held::Quarantined(self.registry.quarantine(lease)),
                        // It has no buffer, or another operation has already quarantined it.
                        held @ (Held::Nothing
                        | Held::Reserved(_)
                        | Held::Retiring(_)
                        | Held::Quarantined(_)) => held,
                    };
                }
                Cancel::Lost => {}
            }
        }
    }

    /// Cancels all operations in flight; their requests are answered with `ETIMEDOUT`.
    pub fn cancel_all(&mut self, port: &mut impl Port) {
        self.leave_all_fast_paths();
        for (key, inflight) in self.inflight.iter_mut().filter(|(_, op)| op.cancel == Cancel::No) {
            self.stats.cancelled += 1;
            inflight.cancel = Cancel::Asked;
            inflight.deadline = deadline_of(self.config.deadline, self.now);
            port.cancel(key, &inflight.issued());
        }
    }
}

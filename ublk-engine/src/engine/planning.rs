//! The interaction of engine and planner: windows, delays, waits, verdicts.

use uring_ext::Errno;

use super::inflight::InFlight;
use super::tag::{Phase, Run, TagState};
use super::{Engine, Port};
use crate::plan::{BackingIndex, Buffer, Directives, Op, OpKind, Plan, Planner, Verdict};
use crate::units::Tag;

/// How often a failed operation is issued elsewhere. The limit ends requests of planners that
/// always return an alternative.
pub const MAX_SUBSTITUTES: u8 = 64;

/// A planner without progress would loop for ever.
#[inline]
fn check_progress(run: &Run, plan: &Plan) -> Result<(), Errno> {
    if plan.next().is_some_and(|next| next <= run.cursor) { Err(Errno::EIO) } else { Ok(()) }
}

/// Checks the directives of a window.
#[cold]
fn check_directives(
    planned: Result<(), Errno>,
    block: u32,
    run: &mut Run,
    plan: &mut Plan,
) -> Result<(), Errno> {
    if let Err(errno) = planned {
        plan.drop_ops();
        if plan.delay_ns() == 0 {
            return Err(errno);
        }
        plan.directives_mut().failure = Some(errno);
        return Ok(());
    }
    let is_first = !run.accepted;
    // The planner assumes so, and is notified when the request settles even if its directives are
    // invalid.
    run.accepted |= plan.waits_at().is_none();
    if let Some(bytes) = plan.at_first() {
        // A drive may take only whole blocks.
        if bytes == 0 || bytes % u64::from(block) != 0 {
            return Err(Errno::EIO);
        }
        run.at_first = run.at_first.min(bytes);
    }
    // A waiting request must not hold what others wait for.
    if plan.waits_at().is_some_and(|at| !is_first || at < run.cursor) {
        return Err(Errno::EIO);
    }
    // One that waits for times for ever would never begin.
    if plan.waits_until().is_some() && plan.waits_at() == Some(run.cursor) {
        return Err(Errno::EIO);
    }
    check_progress(run, plan)?;
    if plan.waits_at().is_some() {
        plan.drop_ops();
    } else if plan.delay_ns() == 0 {
        plan.clear_directives();
    }
    Ok(())
}

impl<P: Planner> Engine<P> {
    /// The planner.
    pub fn planner(&self) -> &P {
        &self.planner
    }

    /// Exchanges the planner for `other`.
    ///
    /// # Errors
    /// `EBUSY` if the engine is not [quiet](Engine::is_quiet), `EINVAL` if the new planner needs
    /// scratch buffers that the slot table does not have. Both stay where they are then.
    pub fn exchange_planner(&mut self, other: &mut P) -> Result<(), Errno> {
        if !self.is_quiet() {
            return Err(Errno::EBUSY);
        }
        if other.scratch_bytes() > 0 && self.config.slots.scratch == 0 {
            return Err(Errno::EINVAL);
        }
        std::mem::swap(&mut self.planner, other);
        Ok(())
    }

    /// Accepts requests for a device of `size` bytes from now on, after `change` has resized the
    /// planner. Existing bytes must stay at their positions, since requests may be open.
    pub fn grow(&mut self, size: u64, change: impl FnOnce(&mut P)) {
        change(&mut self.planner);
        self.config.geometry.size = size;
    }

    /// Plans the first window of a request, and gets the buffer that its operations need.
    #[inline(always)]
    pub(super) fn begin(&mut self, tag: Tag, port: &mut impl Port) {
        let state = &mut self.tags[tag.index()];
        state.phase = Phase::Running;
        state.plan.clear();
        self.plan_next(tag);
        let TagState { run, plan, .. } = &self.tags[tag.index()];
        let of_request = |op: &Op| op.buffer() == Some(Buffer::Request);
        let needs_buffer =
            plan.next().is_some() || plan.ops().any(of_request) || plan.has_directives();
        if run.failed() || !run.request().has_data() || !needs_buffer {
            return self.proceed(tag, port);
        }
        self.lend(tag, port);
    }

    /// As [`Engine::begin`], for a request that has waited.
    #[cold]
    pub(super) fn begin_again(&mut self, tag: Tag, port: &mut impl Port) {
        self.begin(tag, port);
    }

    /// Plans the window at the request's cursor.
    #[inline]
    pub(super) fn plan_next(&mut self, tag: Tag) {
        let TagState { run, plan, .. } = &mut self.tags[tag.index()];
        plan.set_now(self.now);
        let planned = self.planner.plan(run.request(), run.cursor, plan);
        let checked = if plan.has_directives() {
            check_directives(planned, self.config.geometry.block, run, plan)
        } else {
            run.accepted |= planned.is_ok();
            planned.and_then(|()| check_progress(run, plan))
        };
        if let Err(errno) = checked {
            self.stats.planned_errors += 1;
            run.fail(errno);
        }
    }

    /// Applies the window's directives: delays the window, or defers the request.
    #[cold]
    pub(super) fn apply_directives(&mut self, tag: Tag, port: &mut impl Port) {
        let TagState { run, plan, .. } = &mut self.tags[tag.index()];
        let directives = plan.directives_mut();
        let delay_ns = std::mem::take(&mut directives.delay_ns);
        if delay_ns > 0 {
            directives.delayed = true;
            return self.delay(tag, delay_ns, port);
        }
        let Directives { failure, wait_at, until, delayed, .. } = *directives;
        plan.clear_directives();
        if let Some(errno) = failure {
            self.stats.planned_errors += 1;
            return run.fail(errno);
        }
        let Some(cursor) = wait_at else { return };
        run.cursor = cursor;
        if let Some(until) = until {
            return self.throttle(tag, until, port);
        }
        if delayed {
            // The request that it waits for may have settled meanwhile.
            return self.begin_again(tag, port);
        }
        let is_awaited = |state: &TagState| state.run.accepted || state.phase == Phase::FastPath;
        let is_awaited = self.tags.iter().any(is_awaited);
        let TagState { phase, run, .. } = &mut self.tags[tag.index()];
        if !is_awaited {
            // There is no request to wait for.
            return run.fail(Errno::EIO);
        }
        *phase = Phase::Deferred;
        self.stats.deferred += 1;
        self.deferred.push_back(tag);
    }

    fn delay(&mut self, tag: Tag, ns: u64, port: &mut impl Port) {
        let backing = BackingIndex(0);
        let op = Op { kind: OpKind::Delay, backing, offset: 0, len: ns, buf_offset: 0 };
        self.stamp_issue(tag, port);
        self.stats.delays += 1;
        if let Err(errno) = self.issue_another(tag, op, 0, port) {
            self.tags[tag.index()].run.fail(errno);
        }
    }

    /// Asks the planner again about deferred requests, if a request has settled since.
    #[inline]
    pub(super) fn serve_deferred(&mut self, port: &mut impl Port) {
        if self.settled {
            self.settled = false;
            if !self.deferred.is_empty() {
                self.ask_again(port);
            }
        }
    }

    #[cold]
    fn ask_again(&mut self, port: &mut impl Port) {
        loop {
            // In order. A request that is deferred again goes to the end of the queue.
            for _ in 0..self.deferred.len() {
                let Some(tag) = self.deferred.pop_front() else { return };
                self.begin_again(tag, port);
            }
            // Some may have settled at once.
            if !std::mem::take(&mut self.settled) {
                return;
            }
        }
    }

    /// The planner's verdict on a failed operation.
    pub(super) fn verdict(&mut self, tag: Tag, ended: &InFlight, errno: Errno) -> Verdict {
        let run = &self.tags[tag.index()].run;
        if ended.op.kind == OpKind::Delay {
            return Verdict::Fail;
        }
        let verdict = self.planner.failed(run.request(), &ended.op, errno);
        match verdict {
            _ if run.failed() => Verdict::Fail,
            Verdict::Ignore if ended.op.is_read() => Verdict::Fail,
            Verdict::Instead { .. } if ended.substitutes >= MAX_SUBSTITUTES => Verdict::Fail,
            Verdict::Ignore => {
                self.stats.ignored += 1;
                verdict
            }
            Verdict::Instead { .. } => {
                self.stats.substituted += 1;
                verdict
            }
            Verdict::Fail => verdict,
        }
    }

    /// Handles the failure of an operation that is not part of a chain.
    #[cold]
    pub(super) fn op_failed(
        &mut self,
        tag: Tag,
        ended: &InFlight,
        errno: Errno,
        port: &mut impl Port,
    ) {
        let mut ended = *ended;
        ended.rewind(self.config.geometry.block);
        let issued = match self.verdict(tag, &ended, errno) {
            Verdict::Fail => Err(errno),
            Verdict::Ignore => Ok(()),
            Verdict::Instead { backing, offset } => {
                let op = Op { backing, offset, ..ended.op };
                self.issue_another(tag, op, ended.substitutes + 1, port)
            }
        };
        if let Err(errno) = issued {
            self.tags[tag.index()].run.fail(errno);
        }
    }
}

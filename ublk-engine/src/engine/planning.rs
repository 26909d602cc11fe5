//! What the engine and a planner say to each other: windows, delays, waits, verdicts.

use uring_ext::Errno;

use super::inflight::InFlight;
use super::tag::{Phase, Run, TagState};
use super::{Engine, Port};
use crate::plan::{BackingIndex, Buffer, Directives, Op, OpKind, Plan, Planner, Verdict};
use crate::units::Tag;

/// How often an operation that has failed is issued elsewhere, so that even a planner which
/// always knows another place comes to an end.
pub const MAX_SUBSTITUTES: u8 = 64;

/// A planner that makes no progress would go round for ever.
#[inline]
fn check_progress(run: &Run, plan: &Plan) -> Result<(), Errno> {
    if plan.next().is_some_and(|next| next <= run.cursor) { Err(Errno::EIO) } else { Ok(()) }
}

/// What becomes of a window of which the planner has said something beside its operations.
#[cold]
fn check_marks(
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
    // So the planner believes, and is told of the end even if it has said what cannot be.
    run.accepted |= plan.waits_at().is_none();
    if let Some(bytes) = plan.at_first() {
        // A drive may take whole blocks only.
        if bytes == 0 || bytes % u64::from(block) != 0 {
            return Err(Errno::EIO);
        }
        run.at_first = run.at_first.min(bytes);
    }
    // Whoever waits must not hold what others wait for.
    if plan.waits_at().is_some_and(|at| !is_first || at < run.cursor) {
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

    /// Puts another planner in the place of the present one, which is returned.
    ///
    /// # Errors
    /// The new planner comes back if a request is in hand, or if it wants scratch buffers that
    /// the slot table does not have.
    pub fn replace_planner(&mut self, planner: P) -> Result<P, P> {
        let busy = self.tags.iter().any(TagState::is_open);
        if busy || planner.scratch_bytes() > 0 && self.config.slots.scratch == 0 {
            return Err(planner);
        }
        Ok(std::mem::replace(&mut self.planner, planner))
    }

    /// Takes requests of a device of `size` bytes from now on, after `change` has made the planner
    /// one of that size. Where bytes were they have to stay, since requests may be in hand.
    pub fn grow(&mut self, size: u64, change: impl FnOnce(&mut P)) {
        change(&mut self.planner);
        self.config.geometry.size = size;
    }

    /// Plans the first window of a request, and gets it the buffer that its operations need.
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

    /// As [`Engine::begin`], for requests that had to wait.
    #[cold]
    fn begin_again(&mut self, tag: Tag, port: &mut impl Port) {
        self.begin(tag, port);
    }

    /// Plans the window at the request's cursor.
    #[inline]
    pub(super) fn plan_next(&mut self, tag: Tag) {
        let TagState { run, plan, .. } = &mut self.tags[tag.index()];
        let planned = self.planner.plan(run.request(), run.cursor, plan);
        let checked = if plan.has_directives() {
            check_marks(planned, self.config.geometry.block, run, plan)
        } else {
            run.accepted |= planned.is_ok();
            planned.and_then(|()| check_progress(run, plan))
        };
        if let Err(errno) = checked {
            self.stats.planned_errors += 1;
            run.fail(errno);
        }
    }

    /// Does what the planner has said beside the operations: holds the window back, or lets the
    /// request wait.
    #[cold]
    pub(super) fn apply_directives(&mut self, tag: Tag, port: &mut impl Port) {
        let TagState { run, plan, .. } = &mut self.tags[tag.index()];
        let directives = plan.directives_mut();
        let delay_ns = std::mem::take(&mut directives.delay_ns);
        if delay_ns > 0 {
            directives.delayed = true;
            return self.delay(tag, delay_ns, port);
        }
        let Directives { failure, wait_at, delayed, .. } = *directives;
        plan.clear_directives();
        if let Some(errno) = failure {
            self.stats.planned_errors += 1;
            return run.fail(errno);
        }
        let Some(cursor) = wait_at else { return };
        run.cursor = cursor;
        if delayed {
            // What it was to wait for may have settled meanwhile.
            return self.begin_again(tag, port);
        }
        let is_awaited = |state: &TagState| state.run.accepted || state.phase == Phase::FastPath;
        let is_awaited = self.tags.iter().any(is_awaited);
        let TagState { phase, run, .. } = &mut self.tags[tag.index()];
        if !is_awaited {
            // It would wait for ever.
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

    /// Asks the planner again for the requests that it makes wait, if one has settled since.
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
            // In order; whoever has to go on waiting goes to the end, behind those before it.
            for _ in 0..self.deferred.len() {
                let Some(tag) = self.deferred.pop_front() else { return };
                self.begin_again(tag, port);
            }
            // Some may have been answered at once.
            if !std::mem::take(&mut self.settled) {
                return;
            }
        }
    }

    /// What the planner wants done about an operation that has failed for good.
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

    /// An operation that is part of no chain has failed for good.
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

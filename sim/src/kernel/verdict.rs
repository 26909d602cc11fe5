//! Checks the answers: records the faults of each request, which determine the allowed answers.

use ublk_engine::engine::MAX_RETRIES;
use ublk_engine::request::{Request, RequestKind};
use ublk_engine::target::Decision;
use uring_ext::Errno;

use super::backing::MAX_BACKINGS;
use super::operation::HARD;
use super::{Ask, Kernel, Phase, Posted, TagModel};
use crate::command::INTERNAL_ERROR;
use crate::draw::Draw as _;
use crate::fault::Fault;

/// The faults that a request has met. They determine which answers are right.
#[derive(Clone, Copy, Debug, Default)]
pub struct RequestFaults {
    /// The errors that it may be answered with: a bit for each errno.
    allowed: u128,
    /// One of its operations has failed with a permanent error.
    pub must_fail: bool,
    /// One of its operations has completed long after its cancellation.
    pub overdue: bool,
    /// The first permanent error of an operation that the engine has seen, and when.
    pub first: Option<(Errno, u64)>,
    /// When the engine started it.
    pub since: u64,
    /// All operations of the engine were cancelled since then.
    pub cancelled_by_hand: bool,
    /// Transient errors of operations since the last progress.
    pub transients_in_a_row: u32,
    /// Transient failures of its operations. None of them has had more.
    pub transients: u32,
    /// Failed registrations since the last success.
    pub registrations_in_a_row: u32,
    /// Failed unregistrations since the last success.
    pub unregistrations_in_a_row: u32,
    /// Failed copies since the last success.
    pub copies_in_a_row: u32,
    /// Bytes were copied.
    pub copied: bool,
    /// Failed copies.
    pub copies: u32,
    /// The last unregistration has failed with a transient error.
    pub may_pass: bool,
    /// A bit for each slot for which the last unregistration has failed.
    pub stuck: u32,
    /// All operations of the request fail with a transient error.
    pub storm_ops: bool,
    /// All its registrations fail with a transient error.
    pub storm_register: bool,
    /// All its unregistrations fail with a transient error.
    pub storm_unregister: bool,
    /// All its copies fail with a transient error.
    pub storm_copy: bool,
    /// The decision of the layers.
    pub decision: Decision,
    /// Its newest write to each backing that needs a flush to be on stable storage.
    pub writes: [u64; MAX_BACKINGS],
}

impl RequestFaults {
    /// Allows this error as the answer.
    pub fn allow(&mut self, errno: Errno) {
        self.allowed |= 1 << (errno.number() & 127);
    }

    fn allows(&self, errno: Errno) -> bool {
        self.allowed & (1 << (errno.number() & 127)) != 0
    }

    /// Records a failed registration. With a `last_resort` the request need not fail.
    pub fn failed_registration(&mut self, errno: Errno, last_resort: bool) {
        self.registrations_in_a_row += 1;
        let row = self.registrations_in_a_row;
        assert!(row <= u32::from(MAX_RETRIES) + 1, "registered again and again");
        let transient = matches!(errno, Errno::EAGAIN | Errno::ENOMEM);
        if !last_resort && (!transient || row > u32::from(MAX_RETRIES)) {
            self.allow(if errno == Errno::EAGAIN { Errno::EIO } else { errno });
        }
    }

    /// Records a failed unregistration. Without a `last_resort` there is no slot for the rest of
    /// the request.
    pub fn failed_unregistration(&mut self, errno: Errno, last_resort: bool) {
        self.unregistrations_in_a_row += 1;
        let row = self.unregistrations_in_a_row;
        // Two more: the one in the chain, and the first one on its own.
        assert!(row <= u32::from(MAX_RETRIES) + 2, "unregistered again and again");
        let transient = matches!(errno, Errno::EAGAIN | Errno::EINTR | Errno::ENOMEM);
        self.may_pass = transient && row <= u32::from(MAX_RETRIES);
        if !last_resort {
            let again = matches!(errno, Errno::EAGAIN | Errno::EINTR);
            self.allow(if again { Errno::EIO } else { errno });
        }
    }
}

impl Kernel {
    /// Draws the faults that will apply to all commands of a request.
    pub(super) fn draw_request_faults(&mut self, is_sound: bool) -> RequestFaults {
        let mut faults_met = RequestFaults { since: u64::MAX, ..RequestFaults::default() };
        if is_sound && self.setup.hostile {
            // They are counted when they happen.
            faults_met.storm_ops = self.rng.chance(self.setup.rate(Fault::OpStorm));
            faults_met.storm_register = self.rng.chance(self.setup.rate(Fault::RegisterStorm));
            faults_met.storm_unregister = self.rng.chance(self.setup.rate(Fault::UnregisterStorm));
            faults_met.storm_copy = self.rng.chance(self.setup.rate(Fault::CopyStorm));
        }
        faults_met
    }

    /// The newest acknowledged write to each backing.
    pub(super) const fn acknowledged(&self) -> &[u64; MAX_BACKINGS] {
        &self.oracle.acknowledged
    }

    /// Checks the server's answer, as far as possible before the request ends.
    pub(super) fn answer(&mut self, tag: u16, result: i32) {
        let model = &self.tags[usize::from(tag)];
        let Some(ask) = &model.ask else { panic!("tag {tag} is answered without a request") };
        self.answered += 1;
        if let Err(errno) = Errno::from_result(result) {
            return self.judge_error(tag, errno);
        }
        self.succeeded += 1;
        assert_eq!(ask.refusal, None, "{:?} was not refused", ask.iod);
        let Some(request) = ask.request else { return };
        assert!(!model.faults_met.must_fail, "{request:?} succeeded in spite of an error");
        let Decision { delay_ns, error, short: _ } = model.faults_met.decision;
        assert_eq!(error, None, "{request:?} was to fail");
        let early = delay_ns > 0 && self.now < model.faults_met.since.saturating_add(delay_ns);
        assert!(!early, "{request:?} was to be held back");
        assert_eq!(self.setup.mapping.refusal(&request), None, "{request:?} was planned");
        self.check_result(tag, &request, result);
        let is_durable = |writes: &[u64; MAX_BACKINGS]| {
            let mut legs = (0..).zip(self.backings.iter().zip(writes));
            let is_out = |leg| self.setup.mapping.mirror().is_some_and(|it| it.is_out(leg));
            legs.all(|(leg, (backing, write))| backing.is_durable(*write) || is_out(leg))
        };
        match request.kind {
            RequestKind::Write { fua: true } => {
                let durable = is_durable(&model.faults_met.writes);
                assert!(durable, "{request:?} is not on stable storage");
            }
            RequestKind::Flush => {
                let durable = is_durable(&ask.flush_to);
                assert!(durable || self.oracle.null, "a flush has not reached all writes");
            }
            RequestKind::Read
            | RequestKind::Write { fua: false }
            | RequestKind::Discard
            | RequestKind::WriteZeroes { .. } => {}
        }
    }

    /// Checks that a success covers the whole request, whatever the driver does with short results.
    fn check_result(&self, tag: u16, request: &Request, result: i32) {
        let whole = if request.has_data() { request.len } else { 0 };
        let moved = u64::try_from(result).unwrap_or(0);
        assert!(moved <= whole, "tag {tag} committed {moved} bytes of {request:?}");
        let is_short = moved < whole && !self.allows_short;
        assert!(!is_short, "tag {tag} committed short: {moved} bytes of {request:?}");
    }

    fn judge_error(&mut self, tag: u16, errno: Errno) {
        let model = &self.tags[usize::from(tag)];
        let Some(ask) = &model.ask else { return };
        if let Some(refusal) = ask.refusal {
            assert_eq!(errno, refusal, "{:?}", ask.iod);
            return;
        }
        let Decision { delay_ns, error, short: _ } = model.faults_met.decision;
        if error == Some(errno) {
            assert!(
                model.faults_met.since + delay_ns <= self.now,
                "{:?} failed early",
                ask.request
            );
            self.tally.note(Fault::ErrorAnswer);
            return;
        }
        let planned = ask.request.and_then(|it| self.setup.mapping.refusal(&it));
        if planned == Some(errno) {
            let idle = errno == Errno::EIO;
            self.tally.note(if idle { Fault::PlannerIdles } else { Fault::PlannerRefuses });
            return;
        }
        let faults_met = &model.faults_met;
        // Only errors with a single possible cause are compared.
        let has_one_cause = |errno: Errno| matches!(errno, Errno::ENXIO | Errno::EROFS);
        if let Some((first, _)) = faults_met.first.filter(|(first, _)| has_one_cause(*first)) {
            assert!(errno == first || !has_one_cause(errno), "{first} came before {errno}");
        }
        let age = self.now.saturating_sub(faults_met.since);
        let late = self.setup.deadline.is_some_and(|limit| age >= limit);
        let cancelled = errno == Errno::ETIMEDOUT && (late || faults_met.cancelled_by_hand);
        assert!(
            faults_met.allows(errno) || cancelled,
            "{:?} failed with {errno} though nothing went wrong: {faults_met:?}",
            ask.request
        );
    }

    /// Ends a request: the client sees its data, and may send another one.
    pub(super) fn end(&mut self, tag: u16) {
        let model = &mut self.tags[usize::from(tag)];
        let Some(ask) = model.ask.take() else { return };
        let Some(request) = ask.request else { return };
        self.report_above(tag, &request);
        let model = &self.tags[usize::from(tag)];
        let sectors = ask.sectors();
        if model.result < 0 {
            if request.kind != RequestKind::Read {
                self.oracle.forget(sectors);
            }
            return;
        }
        let result = model.result;
        let done = self.believed(&request, result);
        let model = &self.tags[usize::from(tag)];
        let len = usize::try_from(done).unwrap_or(usize::MAX);
        let sectors = Ask::sound(Request { len: done, ..request }).sectors();
        match request.kind {
            RequestKind::Read => self.oracle.check(sectors, &model.data[..len]),
            RequestKind::Write { .. } => self.oracle.learn(sectors, Some(&model.data[..len])),
            RequestKind::Discard => return self.oracle.forget(sectors),
            RequestKind::WriteZeroes { .. } => self.oracle.learn(sectors, None),
            RequestKind::Flush => return,
        }
        if done < request.len {
            self.requeue_rest(tag, &request, done);
        }
        let writes = self.tags[usize::from(tag)].faults_met.writes;
        for (newest, write) in self.oracle.acknowledged.iter_mut().zip(writes) {
            *newest = (*newest).max(write);
        }
    }

    /// Ends a request with an error because its server has died.
    pub(super) fn fail_at_death(&mut self, tag: u16) {
        let model = &mut self.tags[usize::from(tag)];
        model.result = Errno::EIO.negated();
        self.end(tag);
    }

    /// Records a completion that the engine is about to see.
    pub fn note_reaped(&mut self, posted: &Posted) {
        let Some(tag) = posted.of.and_then(|entry| entry.tag) else { return };
        let faults_met = &mut self.tags[usize::from(tag)].faults_met;
        let command = posted.of.is_some_and(|entry| entry.command);
        let lasting = match Errno::from_result(posted.cqe.res) {
            Ok(_) if command => (posted.cqe.res == INTERNAL_ERROR).then_some(Errno::EIO),
            Ok(0) if posted.of.is_some_and(|entry| entry.is_transfer()) => Some(Errno::EIO),
            Ok(_) => None,
            Err(errno) => HARD.contains(&errno).then_some(errno),
        };
        // A mirror may continue after it.
        let lasting = lasting.filter(|_| self.setup.mapping.mirror().is_none());
        faults_met.first = faults_met.first.or(lasting.map(|errno| (errno, self.now)));
        let limit = self.setup.deadline.unwrap_or(u64::MAX);
        let cancelled_at = posted.of.and_then(|entry| entry.cancelled_at);
        // An operation that waited in the lane's backlog was cancelled earlier than the kernel
        // knows.
        let backlogged = self.now.saturating_sub(self.busy_at) <= limit.saturating_mul(2);
        let overdue = cancelled_at.is_some_and(|at| at.saturating_add(limit) <= self.now);
        faults_met.overdue |= backlogged || overdue;
    }

    /// Whether an unregistration of the tag's request has failed.
    #[must_use]
    pub fn is_stuck(&self, tag: u16) -> bool {
        self.tags[usize::from(tag)].faults_met.stuck != 0
    }

    /// How many requests are with the server.
    #[must_use]
    pub fn serving(&self) -> usize {
        let with_server = |model: &&TagModel| model.phase == Phase::Serving && model.handled;
        self.tags.iter().filter(with_server).filter(|model| !model.refused).count()
    }
}

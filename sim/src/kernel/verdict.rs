//! Whether the answers are right: what has gone wrong for each request, and what it may therefore
//! be answered with.

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

/// What has gone wrong for a request, so that its answer can be judged.
#[derive(Clone, Copy, Debug, Default)]
pub struct Blame {
    /// Errors that it may be answered with, by number.
    allowed: u128,
    /// One of its operations has failed for good.
    pub must_fail: bool,
    /// One of its operations has completed long after it was to be cancelled.
    pub overdue: bool,
    /// The first lasting error of an operation that the engine was told, and when.
    pub first: Option<(Errno, u64)>,
    /// When the engine took it up.
    pub since: u64,
    /// All operations of the engine were cancelled since.
    pub cancelled_by_hand: bool,
    /// Transient errors of operations since one made progress.
    pub transients_in_a_row: u32,
    /// Failed registrations since one succeeded.
    pub registrations_in_a_row: u32,
    /// Failed unregistrations since one succeeded.
    pub unregistrations_in_a_row: u32,
    /// Failed copies since one succeeded.
    pub copies_in_a_row: u32,
    /// Bytes were copied.
    pub copied: bool,
    /// Failed copies.
    pub copies: u32,
    /// The last unregistration has failed with an error that may pass.
    pub may_pass: bool,
    /// Slots, as bits, whose last unregistration has failed.
    pub stuck: u32,
    /// All of these fail with a transient error.
    pub storm_ops: bool,
    /// Registrations do.
    pub storm_register: bool,
    /// Unregistrations do.
    pub storm_unregister: bool,
    /// Copies do.
    pub storm_copy: bool,
    /// What the fault target has decided.
    pub decision: Decision,
    /// Its newest write to each backing that is not on stable storage by itself.
    pub writes: [u64; MAX_BACKINGS],
}

impl Blame {
    /// The request may be answered with this error.
    pub fn allow(&mut self, errno: Errno) {
        self.allowed |= 1 << (errno.number() & 127);
    }

    fn allows(&self, errno: Errno) -> bool {
        self.allowed & (1 << (errno.number() & 127)) != 0
    }

    /// A registration has failed. With a `last_resort` that is no reason to fail.
    pub fn failed_registration(&mut self, errno: Errno, last_resort: bool) {
        self.registrations_in_a_row += 1;
        let row = self.registrations_in_a_row;
        assert!(row <= u32::from(MAX_RETRIES) + 1, "registered again and again");
        let transient = matches!(errno, Errno::EAGAIN | Errno::ENOMEM);
        if !last_resort && (!transient || row > u32::from(MAX_RETRIES)) {
            self.allow(if errno == Errno::EAGAIN { Errno::EIO } else { errno });
        }
    }

    /// An unregistration has failed. Without a `last_resort` there is no slot for the rest of the
    /// request.
    pub fn failed_unregistration(&mut self, errno: Errno, last_resort: bool) {
        self.unregistrations_in_a_row += 1;
        let row = self.unregistrations_in_a_row;
        // Two are the chain's and the first one alone.
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
    /// What will go wrong for a request in any case.
    pub(super) fn draw_blame(&mut self, is_sound: bool) -> Blame {
        let mut blame = Blame { since: u64::MAX, ..Blame::default() };
        if is_sound && self.setup.hostile {
            // They are counted when they strike.
            blame.storm_ops = self.rng.chance(self.setup.rate(Fault::OpStorm));
            blame.storm_register = self.rng.chance(self.setup.rate(Fault::RegisterStorm));
            blame.storm_unregister = self.rng.chance(self.setup.rate(Fault::UnregisterStorm));
            blame.storm_copy = self.rng.chance(self.setup.rate(Fault::CopyStorm));
        }
        blame
    }

    /// What the oracle knows to be acknowledged.
    pub(super) const fn acknowledged(&self) -> &[u64; MAX_BACKINGS] {
        &self.oracle.acknowledged
    }

    /// The server has answered: is that right, as far as can be said before the request ends?
    pub(super) fn answer(&mut self, tag: u16, result: i32) {
        let model = &self.tags[usize::from(tag)];
        let Some(ask) = &model.ask else { panic!("tag {tag} is answered and nobody has asked") };
        self.answered += 1;
        if let Err(errno) = Errno::from_result(result) {
            return self.judge_error(tag, errno);
        }
        self.succeeded += 1;
        assert_eq!(ask.refusal, None, "{:?} was not refused", ask.iod);
        let Some(request) = ask.request else { return };
        assert!(!model.blame.must_fail, "{request:?} succeeded in spite of an error");
        let Decision { delay_ns, error, short: _ } = model.blame.decision;
        assert_eq!(error, None, "{request:?} was to fail");
        let early = delay_ns > 0 && self.now < model.blame.since.saturating_add(delay_ns);
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
                let durable = is_durable(&model.blame.writes);
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

    /// A success is the whole request, whatever this driver would make of less.
    fn check_result(&self, tag: u16, request: &Request, result: i32) {
        let whole = if request.has_data() { request.len } else { 0 };
        let moved = u64::try_from(result).unwrap_or(0);
        assert!(moved <= whole, "tag {tag} committed {moved} bytes of {request:?}");
        let is_short = moved < whole && !self.bears_short;
        assert!(!is_short, "tag {tag} committed short: {moved} bytes of {request:?}");
    }

    fn judge_error(&mut self, tag: u16, errno: Errno) {
        let model = &self.tags[usize::from(tag)];
        let Some(ask) = &model.ask else { return };
        if let Some(refusal) = ask.refusal {
            assert_eq!(errno, refusal, "{:?}", ask.iod);
            return;
        }
        let Decision { delay_ns, error, short: _ } = model.blame.decision;
        if error == Some(errno) {
            assert!(model.blame.since + delay_ns <= self.now, "{:?} failed early", ask.request);
            self.tally.note(Fault::ErrorAnswer);
            return;
        }
        let planned = ask.request.and_then(|it| self.setup.mapping.refusal(&it));
        if planned == Some(errno) {
            let idle = errno == Errno::EIO;
            self.tally.note(if idle { Fault::PlannerIdles } else { Fault::PlannerRefuses });
            return;
        }
        let blame = &model.blame;
        // Among those that are given for one reason only.
        let told_apart = |errno: Errno| matches!(errno, Errno::ENXIO | Errno::EROFS);
        if let Some((first, _)) = blame.first.filter(|(first, _)| told_apart(*first)) {
            assert!(errno == first || !told_apart(errno), "{first} came before {errno}");
        }
        let age = self.now.saturating_sub(blame.since);
        let late = self.setup.deadline.is_some_and(|limit| age >= limit);
        let cancelled = errno == Errno::ETIMEDOUT && (late || blame.cancelled_by_hand);
        assert!(
            blame.allows(errno) || cancelled,
            "{:?} failed with {errno} though nothing went wrong: {blame:?}",
            ask.request
        );
    }

    /// A request has ended: the client sees its data and may ask for something else.
    pub(super) fn end(&mut self, tag: u16) {
        let model = &mut self.tags[usize::from(tag)];
        let Some(ask) = model.ask.take() else { return };
        let Some(request) = ask.request else { return };
        self.tell_above(tag, &request);
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
        let writes = self.tags[usize::from(tag)].blame.writes;
        for (newest, write) in self.oracle.acknowledged.iter_mut().zip(writes) {
            *newest = (*newest).max(write);
        }
    }

    /// A request has ended with an error since its server has died.
    pub(super) fn fail_at_death(&mut self, tag: u16) {
        let model = &mut self.tags[usize::from(tag)];
        model.result = Errno::EIO.negated();
        self.end(tag);
    }

    /// The engine is about to be told how an operation ended.
    pub fn note_told(&mut self, posted: &Posted) {
        let Some(tag) = posted.of.and_then(|entry| entry.tag) else { return };
        let blame = &mut self.tags[usize::from(tag)].blame;
        let command = posted.of.is_some_and(|entry| entry.command);
        let lasting = match Errno::from_result(posted.cqe.res) {
            Ok(_) if command => (posted.cqe.res == INTERNAL_ERROR).then_some(Errno::EIO),
            Ok(0) if posted.of.is_some_and(|entry| entry.is_transfer()) => Some(Errno::EIO),
            Ok(_) => None,
            Err(errno) => HARD.contains(&errno).then_some(errno),
        };
        // A mirror may go on after it.
        let lasting = lasting.filter(|_| self.setup.mapping.mirror().is_none());
        blame.first = blame.first.or(lasting.map(|errno| (errno, self.now)));
        let limit = self.setup.deadline.unwrap_or(u64::MAX);
        let cancelled_at = posted.of.and_then(|entry| entry.cancelled_at);
        // What waited in the lane's backlog was cancelled earlier than the kernel knows.
        let backlogged = self.now.saturating_sub(self.busy_at) <= limit.saturating_mul(2);
        let overdue = cancelled_at.is_some_and(|at| at.saturating_add(limit) <= self.now);
        blame.overdue |= backlogged || overdue;
    }

    /// Whether an unregistration of the tag's request has failed.
    #[must_use]
    pub fn is_stuck(&self, tag: u16) -> bool {
        self.tags[usize::from(tag)].blame.stuck != 0
    }

    /// How many requests are with the server.
    #[must_use]
    pub fn serving(&self) -> usize {
        let with_server = |model: &&TagModel| model.phase == Phase::Serving && model.handled;
        self.tags.iter().filter(with_server).filter(|model| !model.refused).count()
    }
}

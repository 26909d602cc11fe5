//! The ring: pushing, submitting, cancelling.

use ublk_engine::lane::RingRole;
use ublk_engine::lane::event::Event;
use ublk_engine::plan::WINDOW_OPS;
use ublk_engine::route::Route;
use uring_ext::Errno;
use uring_ext::sqe::Sqe;

use super::{Flight, Kernel, Posted, QID};
use crate::draw::Draw as _;
use crate::entry::{Entry, Work};
use crate::fault::Fault;
use crate::table_range::rebased;

/// The maximum length of a chain.
const MAX_CHAIN: usize = 3;

impl Kernel {
    /// The ring that operations go to.
    #[must_use]
    pub fn io_ring(&self) -> usize {
        usize::from(self.setup.io_lane)
    }

    /// `LaneIo::push`.
    pub(super) fn push(&mut self, role: RingRole, sqes: &[Sqe]) -> Result<(), Errno> {
        if let Some(errno) = self.broken {
            self.breakage_reported = true;
            return Err(errno);
        }
        let ring = match role {
            RingRole::Fetch => 0,
            RingRole::Io => self.io_ring(),
            RingRole::Side => usize::from(self.setup.polled),
        };
        let full = self.queues[ring].len() + sqes.len() > self.setup.queue_entries;
        if full {
            self.tally.note(Fault::QueueFull);
        }
        if full || self.strikes(Fault::QueueFull) {
            return Err(Errno::EBUSY);
        }
        let mut rest = sqes;
        while let Some((sqe, others)) = rest.split_first() {
            rest = &others[sqe.width() - 1..];
            let first = rebased(sqe.as_bytes(), self.setup.table_range, &self.setup.slots);
            let decoded = match sqe.width() {
                1 => Entry::decode(&first, QID),
                _ => Entry::decode_double(&first, others[0].as_bytes(), &self.ranges),
            };
            let entry = Entry { pushed_at: self.lane_time, ..decoded };
            assert_eq!(entry.linked, !rest.is_empty(), "a chain is pushed whole");
            let polled = self.setup.polled && role != RingRole::Side;
            assert!(!polled || entry.may_be_polled(), "{entry:?} on a polling ring");
            let fetches = matches!(entry.work, Work::Fetch(_) | Work::Commit { .. });
            assert_eq!(fetches, role == RingRole::Fetch, "{entry:?} for ring {role:?}");
            self.trace.note(|| format!("push {:#x} {:?}", entry.user_data, entry.work));
            self.trace.mix(entry.user_data);
            if let Work::Cancel { user_data } = entry.work {
                self.note_cancelling(user_data);
            }
            self.queues[ring].push_back(entry);
        }
        Ok(())
    }

    fn note_cancelling(&mut self, user_data: u64) {
        let now = self.now;
        // A fault of the port replaced the operation by another kind of entry.
        let is_wanted = |entry: &&mut Entry| {
            let is_op = entry.is_operation() || entry.work == Work::Nop;
            is_op && (entry.user_data ^ user_data) << 4 == 0
        };
        let note = |entry: &mut Entry| {
            let is_named = entry.user_data == user_data || entry.work == Work::Nop;
            assert!(is_named, "{user_data:#x} is cancelled instead of {:#x}", entry.user_data);
            entry.cancelled_at.get_or_insert(now);
        };
        let posted = self.posted.iter_mut().filter_map(|posted| posted.of.as_mut()).find(is_wanted);
        if let Some(entry) = posted {
            note(entry);
        } else if let Some(entry) = self.entries_mut().find(is_wanted) {
            note(entry);
        }
    }

    /// Marks transfers past their deadline, or all, as cancelled. A polling ring has no cancel
    /// commands, so only the engine knows.
    pub fn presume_cancelled(&mut self, all: bool) {
        if !self.setup.polled {
            return;
        }
        let (lane_time, limit) = (self.lane_time, self.setup.deadline);
        let is_late = |at: u64| all || limit.is_some_and(|limit| at + limit <= lane_time);
        let presume = |entry: &mut Entry| {
            let is_op = entry.is_transfer() || entry.work == Work::Nop;
            if is_op && is_late(entry.pushed_at) {
                entry.cancelled_at.get_or_insert(lane_time);
            }
        };
        let completed = self.posted.iter_mut().filter_map(|posted| posted.of.as_mut());
        completed.for_each(presume);
        self.entries_mut().for_each(presume);
    }

    /// Records how many entries wait in the lane's backlog.
    ///
    /// # Panics
    /// If they exceed the lane's reserved memory.
    pub fn note_backlog(&mut self, entries: usize) {
        let doubles = self.setup.routes.iter().any(Route::is_namespace);
        let room = usize::from(self.setup.depth) * WINDOW_OPS * (3 + usize::from(doubles)) + 8;
        assert!(entries <= room, "{entries} entries wait for room");
        if self.backlogged || entries > 0 {
            self.busy_at = self.now;
        }
        self.backlogged = entries > 0;
    }

    /// `io_uring_enter`: takes entries off the submission queue. Takes chains as a whole.
    pub fn submit(&mut self) {
        let ring = self.rng.index(self.queues.len());
        let ring = if self.queues[ring].is_empty() { 1 - ring } else { ring };
        let mut left = self.queues[ring].len();
        if left > 1 && self.strikes(Fault::PartialSubmit) {
            left = 1 + self.rng.index(left - 1);
        }
        while left > 0 {
            let mut chain = [None; MAX_CHAIN];
            let mut count = 0;
            while let Some(entry) = self.queues[ring].pop_front() {
                chain[count] = Some(entry);
                count += 1;
                if !entry.linked {
                    break;
                }
            }
            left = left.saturating_sub(count);
            let [Some(first), second, third] = chain else { return };
            let flight = Flight::new(first, [second, third]);
            // Some go to a worker, which starts them later.
            if first.is_operation() && self.rng.chance(200) {
                self.queued.push(flight);
            } else {
                self.start(flight);
            }
        }
    }

    /// Which completion to reap instead of that at `at`. The completion of a failed registration is
    /// in the queue before the rest of its chain starts, so nothing of the chain may overtake it.
    #[must_use]
    pub fn not_before_registration(&self, at: usize) -> usize {
        let tag_of = |posted: &Posted| match Event::decode(posted.cqe.user_data, self.incarnation) {
            Some(Event::Unregistered(key)) => Some(key.tag.0),
            Some(Event::Op(_) | Event::Command(_) | Event::Injected(_)) => {
                posted.of.and_then(|entry| entry.tag)
            }
            _ => None,
        };
        let Some(tag) = tag_of(&self.posted[at]) else { return at };
        let is_failure = |posted: &Posted| {
            let event = Event::decode(posted.cqe.user_data, self.incarnation);
            matches!(event, Some(Event::Registered(key)) if key.tag.0 == tag)
        };
        self.posted[..at].iter().position(is_failure).unwrap_or(at)
    }

    /// `IORING_OP_ASYNC_CANCEL`.
    pub(super) fn cancel(&mut self, user_data: u64) -> i32 {
        if let Some(at) = self.queued.iter().position(|it| it.entry.user_data == user_data) {
            // An entry that waits for the previous one of its chain is not found.
            if self.queued[at].entry.is_operation() {
                let flight = self.queued.swap_remove(at);
                self.cancelled(flight);
                return 0;
            }
            self.tally.note(Fault::CancelMisses);
            return Errno::ENOENT.negated();
        }
        let running = self.running.iter().position(|it| it.entry.user_data == user_data);
        let Some(at) = running else {
            self.tally.note(Fault::CancelMisses);
            return Errno::ENOENT.negated();
        };
        let choice = if self.running[at].lost { 1 + self.rng.below(2) } else { self.rng.below(3) };
        match choice {
            0 => {
                let flight = self.running.swap_remove(at);
                self.cancelled(flight);
                0
            }
            1 => {
                self.tally.note(Fault::CancelRuns);
                Errno::EALREADY.negated()
            }
            // The drive has it, and it is not found.
            _ => {
                self.tally.note(Fault::CancelMisses);
                Errno::ENOENT.negated()
            }
        }
    }

    fn cancelled(&mut self, flight: Flight) {
        self.tally.note(Fault::Cancelled);
        // Without its registration it will be issued again.
        let forgiven = self.setup.mapping.mirror().is_some() && !flight.entry.is_delay();
        if let Some(tag) = flight.entry.tag.filter(|_| !flight.unregistered && !forgiven) {
            self.tags[usize::from(tag)].faults_met.must_fail = true;
        }
        self.move_part(&flight);
        self.complete(flight, Errno::ECANCELED.negated());
    }
}

//! Entries that were submitted and have not completed.

use super::verdict::RequestFaults;
use super::{Buffer, Kernel, Posted};
use crate::command::{INTERNAL_ERROR, NOT_READY};
use crate::draw::Draw as _;
use crate::entry::{Entry, Work};
use uring_ext::Errno;
use uring_ext::nvme::MAX_RETRIES;
use uring_ext::ring::Cqe;

/// How many entries may be linked to one.
const MAX_LINKED: usize = 2;

/// An entry that was submitted, with the entries linked to it.
#[derive(Clone, Copy, Debug)]
pub struct Flight {
    /// The current entry.
    pub entry: Entry,
    /// The entries that follow.
    pub rest: [Option<Entry>; MAX_LINKED],
    /// The buffer that it uses, from its start on.
    pub buffer: Option<Buffer>,
    /// When it may complete.
    pub held_until: u64,
    /// It neither completes nor can be cancelled before that.
    pub lost: bool,
    /// The registration before it in its chain has failed.
    pub unregistered: bool,
    /// For a flush: how many writes it covers.
    pub covers: u64,
    /// In a stack: a worker of the thread runs it.
    pub has_worker: bool,
    /// In a stack: its number at the device below; 0 for none.
    pub ticket: u64,
}

impl Flight {
    /// A chain that has not started.
    #[must_use]
    pub const fn new(entry: Entry, rest: [Option<Entry>; MAX_LINKED]) -> Self {
        Self {
            entry,
            rest,
            buffer: None,
            held_until: 0,
            lost: false,
            unregistered: false,
            covers: 0,
            has_worker: false,
            ticket: 0,
        }
    }

    /// Its entries that have not completed.
    pub fn entries(&self) -> impl Iterator<Item = &Entry> {
        std::iter::once(&self.entry).chain(self.rest.iter().flatten())
    }

    /// As [`Flight::entries`].
    pub fn entries_mut(&mut self) -> impl Iterator<Item = &mut Entry> {
        std::iter::once(&mut self.entry).chain(self.rest.iter_mut().flatten())
    }
}

impl Kernel {
    /// All entries that were pushed and not submitted.
    pub fn pushed(&self) -> impl Iterator<Item = &Entry> + Clone {
        self.queues.iter().flatten()
    }

    /// All entries that were pushed and have not completed.
    pub fn entries_mut(&mut self) -> impl Iterator<Item = &mut Entry> {
        let flights = self.queued.iter_mut().chain(&mut self.running);
        self.queues.iter_mut().flatten().chain(flights.flat_map(Flight::entries_mut))
    }

    /// Completes the current entry: drops its reference, posts its completion, and starts the next
    /// entry of its chain, whatever the result.
    pub(super) fn complete(&mut self, mut flight: Flight, res: i32) {
        self.release_worker(&mut flight);
        let entry = flight.entry;
        let res = if entry.command { self.status(entry.tag, res) } else { res };
        self.trace.note(|| format!("complete {:#x} with {res}", entry.user_data));
        self.trace.mix(entry.user_data ^ u64::from(res.unsigned_abs()));
        if let Some(Buffer::Lent { tag }) = flight.buffer.take() {
            self.put(tag);
        }
        if !(entry.skip_success && res >= 0) {
            let is_op = !matches!(
                entry.work,
                Work::Register { .. } | Work::Unregister { .. } | Work::Cancel { .. }
            );
            let cqe = Cqe { user_data: entry.user_data, res };
            self.posted.push(Posted { cqe, of: is_op.then_some(entry) });
        }
        let Some(next) = flight.rest[0].take() else { return };
        if matches!(entry.work, Work::Register { .. }) && res < 0 {
            flight.unregistered = true;
        }
        flight.rest.rotate_left(1);
        flight = Flight { entry: next, held_until: 0, lost: false, covers: 0, ticket: 0, ..flight };
        if self.rng.chance(512) {
            self.queued.push(flight);
        } else {
            self.start(flight);
        }
    }

    /// The result of a command: 0, a status of the drive, or an error of the kernel.
    fn status(&mut self, tag: Option<u16>, res: i32) -> i32 {
        let by_drive = self.rng.chance(512);
        match Errno::from_result(res) {
            Ok(_) => 0,
            Err(Errno::EIO) if by_drive => INTERNAL_ERROR,
            Err(Errno::EAGAIN) if by_drive => {
                let tag = tag.and_then(|tag| self.tags.get_mut(usize::from(tag)));
                let faults_met = tag.map(|tag| &mut tag.faults_met);
                let used_up =
                    |faults_met: &&mut RequestFaults| faults_met.transients > MAX_RETRIES.into();
                if let Some(faults_met) = faults_met.filter(used_up) {
                    faults_met.allow(Errno::EREMOTEIO);
                }
                NOT_READY
            }
            Err(_) => res,
        }
    }

    /// Starts one of the waiting entries.
    pub fn start_one(&mut self) {
        if let Some(at) = self.pick_startable() {
            let flight = self.queued.swap_remove(at);
            self.start(flight);
        }
    }

    /// Starts an entry. Commands are carried out at once; operations take a reference to their
    /// buffer and run.
    pub(super) fn start(&mut self, flight: Flight) {
        let entry = flight.entry;
        match entry.work {
            Work::Nop => {
                // The port uses it to fail operations.
                self.record_transient_error(entry.tag, Errno::EAGAIN);
                self.complete(flight, 0);
            }
            Work::Fetch(fetch) => self.fetch(fetch, entry.user_data),
            Work::Commit { result, fetch } => self.commit(result, fetch, entry.user_data),
            Work::Register { tag, slot } => {
                let res = self.register(tag, slot);
                self.complete(flight, res);
            }
            Work::Unregister { tag, slot } => {
                let res = self.unregister(tag, slot, flight.unregistered);
                self.complete(flight, res);
            }
            Work::Cancel { user_data } => {
                let res = self.cancel(user_data);
                self.complete(flight, res);
            }
            Work::Transfer(_) | Work::Flush { .. } | Work::Zero { .. } => self.run(flight),
            Work::Timeout { ns } => {
                let held_until = self.now + ns;
                self.running.push(Flight { held_until, ..flight });
            }
        }
    }
}

//! Operations on backings: their start, their result and their effect.

use ublk_engine::engine::MAX_RETRIES;
use uring_ext::Errno;

use super::{Buffer, Flight, Kernel};
use crate::draw::Draw as _;
use crate::entry::{Transfer, Work};
use crate::fault::Fault;

/// Permanent errors of operations.
pub(super) const HARD: [Errno; 3] = [Errno::EIO, Errno::ENXIO, Errno::EROFS];

impl Kernel {
    /// Starts an operation: it takes a reference to its buffer. If it needs a worker and none is
    /// free, it waits.
    pub(super) fn run(&mut self, flight: Flight) {
        let Some(mut flight) = self.assign_worker(flight) else { return };
        if let Work::Transfer(transfer) = flight.entry.work {
            let Some(buffer) = self.table[usize::from(transfer.slot)] else {
                assert!(flight.unregistered, "an operation on an empty slot");
                return self.complete(flight, Errno::EFAULT.negated());
            };
            self.check_range(&transfer, buffer, flight.entry.tag);
            flight.buffer = Some(buffer);
            if let Buffer::Lent { tag } = buffer {
                self.tags[usize::from(tag)].refs += 1;
            }
        } else if let Work::Flush { backing } = flight.entry.work {
            flight.covers = self.backings[backing].flush_covers();
        }
        let patience = self.setup.deadline.unwrap_or(200_000);
        if self.strikes(Fault::Lost) {
            flight.lost = true;
            flight.held_until = self.now + patience * u64::from(2 + self.rng.below(5));
        } else if self.strikes(Fault::Delayed) {
            flight.held_until = self.now + patience * u64::from(1 + self.rng.below(2));
        }
        self.pass_down(&mut flight);
        self.running.push(flight);
    }

    fn check_range(&self, transfer: &Transfer, buffer: Buffer, tag: Option<u16>) {
        let end = |start: usize| start + transfer.len as usize;
        match buffer {
            Buffer::Lent { tag: lent } => {
                assert!(tag.is_none_or(|tag| tag == lent), "a foreign buffer");
                let start = usize::try_from(transfer.addr).unwrap_or(usize::MAX);
                let len = self.tags[usize::from(lent)].len;
                assert!(end(start) <= len, "bytes {start}..{} of {len}", end(start));
            }
            Buffer::Pool { index } => {
                let (found, offset) = self.addresses.find(transfer.addr);
                assert_eq!(found, index, "an address in another buffer of the pool");
                let whole = self.pool[usize::from(index)].len();
                let tag = tag.filter(|_| index < self.setup.slots.pool);
                let len = tag.map_or(whole, |tag| self.tags[usize::from(tag)].len);
                assert!(end(offset) <= len, "bytes {offset}..{} of {len}", end(offset));
            }
        }
    }

    /// Ends the running operation with index `at`.
    pub fn finish(&mut self, at: usize) {
        if self.running[at].held_until > self.now {
            return;
        }
        let flight = self.running.swap_remove(at);
        let res = self.outcome(&flight);
        if flight.lost {
            self.tally.note(Fault::LostCompletes);
        }
        self.complete(flight, res);
    }

    /// Carries out an operation's effect and returns its result.
    fn outcome(&mut self, flight: &Flight) -> i32 {
        if flight.entry.is_delay() {
            return Errno::ETIME.negated();
        }
        if let Some(errno) = self.failure(flight) {
            self.move_part(flight);
            return errno.negated();
        }
        let tag = flight.entry.tag.map(usize::from);
        match flight.entry.work {
            Work::Transfer(transfer) => {
                // Commands are carried out as a whole or not at all.
                let command = flight.entry.command;
                if !command && self.strikes(Fault::OpZero) {
                    self.record_permanent_error(flight, Errno::EIO);
                    return 0;
                }
                let moved = if command { transfer.len } else { self.shorten(transfer.len) };
                self.transfer(flight, &transfer, moved);
                if let Some(tag) = tag {
                    self.tags[tag].faults_met.transients_in_a_row = 0;
                }
                i32::try_from(moved).unwrap_or(i32::MAX)
            }
            Work::Flush { backing } => {
                self.backings[backing].flushed(flight.covers);
                0
            }
            Work::Zero { backing, at, len, how } => {
                let stamp = self.backings[backing].zero(at, len, how, &mut self.rng);
                self.stamp(flight, backing, stamp);
                0
            }
            Work::Nop
            | Work::Fetch(_)
            | Work::Commit { .. }
            | Work::Register { .. }
            | Work::Unregister { .. }
            | Work::Timeout { .. }
            | Work::Cancel { .. } => unreachable!("it does not run"),
        }
    }

    /// The error of an operation, if it fails.
    fn failure(&mut self, flight: &Flight) -> Option<Errno> {
        let on_dead_leg =
            self.setup.dead_leg.is_some() && self.setup.dead_leg == flight.entry.backing();
        if on_dead_leg {
            self.tally.note(Fault::OpError);
            self.record_permanent_error(flight, Errno::EIO);
            return Some(Errno::EIO);
        }
        if !self.setup.hostile {
            return None;
        }
        let storm =
            flight.entry.tag.is_some_and(|tag| self.tags[usize::from(tag)].faults_met.storm_ops);
        let transient = if storm {
            self.tally.note(Fault::OpStorm);
            Some(self.rng.pick(&[Errno::EAGAIN, Errno::EINTR]))
        } else if self.strikes(Fault::OpAgain) {
            Some(Errno::EAGAIN)
        } else if self.strikes(Fault::OpIntr) {
            Some(Errno::EINTR)
        } else if self.strikes(Fault::OpNoMem) {
            Some(Errno::ENOMEM)
        } else {
            None
        };
        if let Some(errno) = transient {
            self.record_transient_error(flight.entry.tag, errno);
            return Some(errno);
        }
        if self.strikes(Fault::OpError) {
            let errno = self.rng.pick(&HARD);
            self.record_permanent_error(flight, errno);
            return Some(errno);
        }
        None
    }

    fn record_permanent_error(&mut self, flight: &Flight, errno: Errno) {
        if let Some(tag) = flight.entry.tag {
            let faults_met = &mut self.tags[usize::from(tag)].faults_met;
            faults_met.allow(errno);
            // A mirror may continue without it. Later reads show whether that was right.
            faults_met.must_fail |= self.setup.mapping.mirror().is_none();
        }
    }

    pub(super) fn record_transient_error(&mut self, tag: Option<u16>, errno: Errno) {
        let Some(tag) = tag else { return };
        let faults_met = &mut self.tags[usize::from(tag)].faults_met;
        faults_met.transients_in_a_row += 1;
        faults_met.transients += 1;
        // The maximum number of failures without progress before one operation of the request has
        // used up its retries. An operation gets new retries once its data is copied.
        let at_once = self.setup.mapping.at_once();
        let most = (usize::from(MAX_RETRIES) + 1) * (at_once + 1);
        assert!(faults_met.transients_in_a_row as usize <= most, "tried again and again");
        // Other operations of the request may have made progress in between.
        if faults_met.transients > u32::from(MAX_RETRIES) {
            faults_met.allow(if errno == Errno::ENOMEM { errno } else { Errno::EIO });
        }
    }

    fn shorten(&mut self, len: u32) -> u32 {
        if len > 512 && self.strikes(Fault::Short) {
            return 512 * (1 + self.rng.below((len - 1) / 512));
        }
        if self.strikes(Fault::ShortOdd) {
            return 1 + self.rng.below(len - 1);
        }
        len
    }

    /// Lets a failed transfer move some bytes.
    pub(super) fn move_part(&mut self, flight: &Flight) {
        let Work::Transfer(transfer) = flight.entry.work else { return };
        if flight.buffer.is_some() && self.strikes(Fault::PartialEffect) {
            let moved = self.rng.below(transfer.len);
            self.transfer(flight, &transfer, moved);
        }
    }

    /// Carries out an operation of a dead server.
    pub(super) fn complete_after_death(&mut self, flight: &Flight) {
        if let Work::Transfer(transfer) = flight.entry.work {
            let whole = self.rng.chance(512);
            let moved = if whole { transfer.len } else { self.rng.below(transfer.len) };
            self.transfer(flight, &transfer, moved);
        } else if let Work::Zero { backing, at, len, how } = flight.entry.work {
            self.backings[backing].zero(at, len, how, &mut self.rng);
        } else {
            return;
        }
        self.tally.note(Fault::EffectAfterDeath);
    }

    /// Moves the first `moved` bytes of a transfer.
    fn transfer(&mut self, flight: &Flight, transfer: &Transfer, moved: u32) {
        let len = moved as usize;
        let (buffer, start) = match flight.buffer {
            Some(Buffer::Lent { tag }) => {
                let start = usize::try_from(transfer.addr).unwrap_or(usize::MAX);
                (&mut self.tags[usize::from(tag)].data[..], start)
            }
            Some(Buffer::Pool { index }) => {
                (&mut self.pool[usize::from(index)][..], self.addresses.find(transfer.addr).1)
            }
            None => unreachable!("a running transfer has its buffer"),
        };
        let bytes = &mut buffer[start..start + len];
        let backing = &mut self.backings[transfer.backing];
        if transfer.write {
            let stamp = backing.write(transfer.at, bytes, transfer.dsync);
            self.stamp(flight, transfer.backing, stamp);
        } else {
            backing.read(transfer.at, bytes);
        }
    }

    fn stamp(&mut self, flight: &Flight, backing: usize, stamp: u64) {
        if let Some(tag) = flight.entry.tag {
            let newest = &mut self.tags[usize::from(tag)].faults_met.writes[backing];
            *newest = (*newest).max(stamp);
        }
    }
}

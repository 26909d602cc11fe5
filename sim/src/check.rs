//! Invariants that are checked after every step.

use std::time::Duration;

use bufreg::{Borrower, SlotState};
use ublk_engine::engine::Engine;
use ublk_engine::plan::WINDOW_OPS;
use ublk_engine::units::Tag;

use crate::entry::{Entry, Work};
use crate::kernel::{Buffer, Kernel, Phase, Posted};
use crate::mapping::Mapping;
use crate::setup::MAX_SLOTS;

/// A slot as the registry sees it.
#[derive(Clone, Copy)]
struct Held {
    tag: u16,
    state: SlotState,
    /// Its borrows in the registry, minus the operations found in the kernel.
    unaccounted: u32,
}

/// The engine, and the time that it was last given.
pub struct View<'engine> {
    /// The engine.
    pub engine: &'engine Engine<Mapping>,
    /// The time that it was last given.
    pub lane_time: u64,
    /// It has just checked its deadlines.
    pub looked: bool,
}

/// The registry's identifier of the operation with this `user_data`.
fn label(user_data: u64) -> Borrower {
    Borrower(user_data & 0xffff_ffff_ffff)
}

impl View<'_> {
    /// Compares the state of engine and registry with the kernel's.
    ///
    /// # Panics
    /// If they differ.
    pub fn check(&self, kernel: &mut Kernel) {
        let mut held = self.held();
        let backlogged = kernel.backlogged;
        let mut operations = 0;
        self.check_pushed(kernel);
        for entry in kernel.entries_mut() {
            operations += u32::from(self.check_entry(entry, &mut held));
        }
        for posted in &mut kernel.posted {
            if let Some(entry) = &mut posted.of {
                operations += u32::from(self.check_entry(entry, &mut held));
            }
        }
        let most = usize::from(kernel.setup.depth) * WINDOW_OPS;
        assert!(operations as usize <= most, "{operations} operations in flight");
        for (slot, held) in held.iter().enumerate() {
            if let Some(held) = held {
                self.check_slot(slot, held, backlogged, kernel);
            }
        }
        let borrows = self.engine.registry().counts().borrows;
        let transfers = self.engine.transfers_in_flight();
        assert_eq!(
            transfers, borrows as usize,
            "every transfer in flight borrows, and nothing else"
        );
        self.check_table(&held, kernel);
        self.check_totals(kernel);
        self.check_cancels(kernel);
        let patience = self.engine.patience();
        if self.looked {
            self.check_deadlines(kernel, &held);
            assert_ne!(patience, Some(Duration::ZERO), "a request whose time has come");
        }
        let waits = patience.is_some();
        assert!(waits || !self.engine.has_throttled(), "nobody looks after those that wait");
        let in_time = kernel.setup.deadline.is_some() && operations > 0;
        let throttles = self.engine.has_throttled();
        assert!(
            waits == in_time || throttles || backlogged,
            "patience with {operations} operations"
        );
    }

    /// The registry's slots.
    fn held(&self) -> [Option<Held>; MAX_SLOTS] {
        let mut held = [None; MAX_SLOTS];
        for lent in self.engine.registry().lent() {
            let (tag, state, unaccounted) = (lent.owner.tag, lent.state, lent.borrows);
            held[usize::from(lent.slot.0)] = Some(Held { tag, state, unaccounted });
        }
        held
    }

    /// No operation is issued for a request that has failed, and each operation serves its request.
    fn check_pushed(&self, kernel: &Kernel) {
        for entry in kernel.pushed().filter(|entry| entry.tag.is_none()) {
            let operation = self.engine.borrower(label(entry.user_data));
            let Some((tag, _)) = operation.filter(|_| entry.is_operation()) else { continue };
            let model = &kernel.tags[tag.index()];
            assert!(!model.held, "tag {} is held back and becomes {:?}", tag.0, entry.work);
            let request = model.ask.as_ref().and_then(|ask| ask.request);
            let serves = request.is_some_and(|request| entry.serves(request.kind));
            let copies = matches!(entry.work, Work::Transfer(it) if kernel.is_scratch(it.slot));
            assert!(serves || copies, "{request:?} became {:?}", entry.work);
            let begin = model.faults_met.since.saturating_add(model.faults_met.decision.delay_ns);
            let early = entry.pushed_at < begin && !entry.is_delay();
            assert!(!early, "{:?} is issued before {begin}", entry.work);
            let first = model.faults_met.first;
            // Operations that waited in the backlog are exempt.
            let failed = first.filter(|(_, since)| kernel.busy_at < *since);
            assert!(failed.is_none(), "tag {} goes on after {first:?}", tag.0);
        }
    }

    /// The engine knows every operation in flight and has its request, and the operation borrows
    /// the slot that it uses. Returns whether the entry is an operation.
    fn check_entry(&self, entry: &mut Entry, held: &mut [Option<Held>; MAX_SLOTS]) -> bool {
        let slot = match entry.work {
            Work::Transfer(transfer) => Some(transfer.slot),
            Work::Nop | Work::Flush { .. } | Work::Zero { .. } | Work::Timeout { .. } => None,
            Work::Fetch(_)
            | Work::Commit { .. }
            | Work::Register { .. }
            | Work::Unregister { .. }
            | Work::Cancel { .. } => return false,
        };
        let label = label(entry.user_data);
        let Some((tag, op)) = self.engine.borrower(label) else {
            panic!("operation {:#x} is in flight and the engine does not know it", entry.user_data)
        };
        assert!(self.engine.has_request(tag), "tag {} was committed with work in flight", tag.0);
        match entry.tag {
            Some(known) => assert_eq!(known, tag.0, "operation {:#x}", entry.user_data),
            None => {
                entry.tag = Some(tag.0);
                assert!(entry.says(&op), "{op:?} became {:?}", entry.work);
            }
        }
        let Some(slot) = slot else {
            // A transfer that the port replaced still borrows.
            if op.has_data() {
                self.account(label, tag.0, held);
            }
            return true;
        };
        let Some(held) = &mut held[usize::from(slot)] else {
            panic!("operation {:#x} uses slot {slot}, which is free", entry.user_data)
        };
        assert_eq!(held.tag, tag.0, "operation {:#x} uses a foreign slot", entry.user_data);
        let mut borrowers = self.engine.registry().borrowers(bufreg::SlotIndex(slot));
        assert!(borrowers.any(|it| it == label), "{:#x} does not borrow its slot", entry.user_data);
        held.unaccounted = held.unaccounted.checked_sub(1).expect("borrows are counted");
        true
    }

    fn account(&self, label: Borrower, tag: u16, held: &mut [Option<Held>; MAX_SLOTS]) {
        let borrows = |slot: usize| {
            let slot = bufreg::SlotIndex(u16::try_from(slot).unwrap_or(u16::MAX));
            self.engine.registry().borrowers(slot).any(|it| it == label)
        };
        let found =
            held.iter_mut().enumerate().find(|(slot, held)| held.is_some() && borrows(*slot));
        let Some((_, Some(held))) = found else { panic!("{label} borrows nothing") };
        assert_eq!(held.tag, tag, "{label} borrows a foreign slot");
        held.unaccounted = held.unaccounted.checked_sub(1).expect("borrows are counted");
    }

    /// The engine has the request of every lent slot, unless the slot is in quarantine. Every
    /// operation that borrows the slot is in flight.
    fn check_slot(&self, slot: usize, held: &Held, backlogged: bool, kernel: &Kernel) {
        let is_open = self.engine.has_request(Tag(held.tag));
        let model = &kernel.tags[usize::from(held.tag)];
        let is_at_rest = held.state == SlotState::Quarantined || !model.held;
        assert!(is_at_rest, "slot {slot} is lent for tag {}, which is held back", held.tag);
        let quarantined = held.state == SlotState::Quarantined;
        assert!(
            is_open || quarantined,
            "slot {slot} is lent for tag {}, which is not open",
            held.tag
        );
        if !is_open {
            let model = &kernel.tags[usize::from(held.tag)];
            let before = if model.handled { 0 } else { model.stuck_before };
            let stuck = (model.faults_met.stuck | before) & (1 << slot);
            assert!(stuck != 0, "slot {slot} is in quarantine for no reason");
        }
        // Operations in the lane's backlog are not visible here.
        assert!(
            held.unaccounted == 0 || backlogged,
            "slot {slot} has borrows of operations that are not in flight"
        );
    }

    /// A buffer in the table is lent to its request, or its delivery is not handled yet, or its
    /// commit is about to remove it.
    fn check_table(&self, held: &[Option<Held>; MAX_SLOTS], kernel: &Kernel) {
        for (slot, buffer) in kernel.table.iter().enumerate() {
            let Some(Buffer::Lent { tag }) = *buffer else { continue };
            let model = &kernel.tags[usize::from(tag)];
            let by_driver = model.auto_slot().is_some_and(|auto| usize::from(auto) == slot);
            let in_passing = !model.handled || model.held || !self.engine.has_request(Tag(tag));
            if by_driver && in_passing {
                continue;
            }
            let ours = held[slot].is_some_and(|held| held.tag == tag);
            assert!(ours, "slot {slot} has the buffer of tag {tag} and the registry does not know");
        }
    }

    fn check_totals(&self, kernel: &Kernel) {
        let holdings = self.engine.holdings();
        assert_eq!(holdings.leaked, 0, "leaks: {:?}", self.engine.leaks().next());
        let slots = holdings.slots;
        let sum = slots.free + slots.reserved + slots.active + slots.retiring + slots.quarantined;
        assert_eq!(sum, slots.capacity, "{slots:?}");
        assert_eq!(slots.capacity, u32::from(kernel.setup.slots.capacity()));
        let serving = kernel.serving();
        // Requests with a commit in flight are still with the server, but no longer with the
        // engine.
        assert!(holdings.requests <= serving, "{} of {serving} requests", holdings.requests);
        if !kernel.backlogged {
            let committing = kernel.pushed().filter(|entry| entry.is_commit()).count();
            assert_eq!(holdings.requests + committing, serving, "requests that are open");
        }
        for (tag, model) in kernel.tags.iter().enumerate() {
            let is_open = self.engine.has_request(Tag(u16::try_from(tag).unwrap_or(u16::MAX)));
            let may_be = model.phase == Phase::Serving && model.handled;
            assert!(is_open || !model.held, "the engine has lost the held request of tag {tag}");
            assert!(!is_open || may_be, "the engine has a request of tag {tag} that is not open");
        }
    }

    /// Only operations that were pushed are cancelled.
    fn check_cancels(&self, kernel: &mut Kernel) {
        let is_cancel = |entry: &Entry| matches!(entry.work, Work::Cancel { .. });
        if !kernel.pushed().any(is_cancel) {
            return;
        }
        for at in 0..kernel.queues[kernel.io_ring()].len() {
            let Work::Cancel { user_data } = kernel.queues[kernel.io_ring()][at].work else {
                continue;
            };
            let posted = |posted: &Posted| label(posted.cqe.user_data) == label(user_data);
            let known = self.engine.borrower(label(user_data)).is_some()
                && !kernel.posted.iter().any(posted);
            if known {
                let mut entries = kernel.entries_mut();
                let pushed = entries.any(|entry| label(entry.user_data) == label(user_data));
                assert!(pushed, "{user_data:#x} is cancelled and not pushed");
            }
        }
    }

    /// Operations past their deadline have been cancelled. If they are past the deadline for that
    /// too, their slots are in quarantine.
    fn check_deadlines(&self, kernel: &Kernel, held: &[Option<Held>; MAX_SLOTS]) {
        let Some(limit) = kernel.setup.deadline.filter(|_| !kernel.backlogged) else { return };
        let flights = kernel.queued.iter().chain(&kernel.running);
        let entries = flights.flat_map(crate::kernel::Flight::entries);
        for entry in kernel.pushed().chain(entries).filter(|entry| entry.is_operation()) {
            let Some(cancelled_at) = entry.cancelled_at else {
                let late = entry.pushed_at + limit <= self.lane_time;
                assert!(!late, "{:#x} is past its deadline and not cancelled", entry.user_data);
                continue;
            };
            if let Work::Transfer(transfer) = entry.work {
                let lost = cancelled_at + limit <= self.lane_time;
                let state = held[usize::from(transfer.slot)].map(|held| held.state);
                let apart = state == Some(SlotState::Quarantined);
                assert!(!lost || apart, "{:#x} is lost and its slot is {state:?}", entry.user_data);
            }
        }
        if self.lane_time.saturating_sub(kernel.busy_at) > 2 * limit {
            self.check_quarantine(kernel, held, limit);
        }
    }

    /// No slot is in quarantine before its time. Checked only if nothing has waited in the lane's
    /// backlog: otherwise the engine's times may be earlier than the kernel's.
    fn check_quarantine(&self, kernel: &Kernel, held: &[Option<Held>; MAX_SLOTS], limit: u64) {
        for held in held.iter().flatten().filter(|held| held.state == SlotState::Quarantined) {
            if !self.engine.has_request(Tag(held.tag)) || kernel.is_stuck(held.tag) {
                continue;
            }
            let flights = kernel.queued.iter().chain(&kernel.running);
            let entries = flights.flat_map(crate::kernel::Flight::entries);
            let posted = kernel.posted.iter().filter_map(|posted| posted.of.as_ref());
            let mut all = kernel.pushed().chain(entries).chain(posted);
            let lost = |entry: &Entry| {
                let overdue = |at| at + limit <= self.lane_time;
                entry.tag == Some(held.tag) && entry.cancelled_at.is_some_and(overdue)
            };
            let faults_met = &kernel.tags[usize::from(held.tag)].faults_met;
            // A polling ring has no cancel commands, so only the age of the request counts.
            let aged =
                kernel.setup.polled && faults_met.since.saturating_add(limit) <= self.lane_time;
            // The lost operation may have completed while others of the request are still running.
            let given_up = all.any(lost) || faults_met.overdue || aged;
            assert!(given_up, "the slot of tag {} is in quarantine before its time", held.tag);
        }
    }
}

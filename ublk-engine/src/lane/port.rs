//! Turns the engine's decisions into entries of a ring.

use std::collections::VecDeque;

use bufreg::{Incarnation, SlotIndex};
use uring_ext::nvme::{Namespace, Outcome};
use uring_ext::pool::Direction;
use uring_ext::sqe::{Delivery, FixedBuffer, Sqe};
use uring_ext::{Errno, sys};

use super::event::Event;
use super::fault::{Fault, Faults};
use super::table_range::{NO_SLOT, TableRange};
use super::{LaneIo, RingRole};
use crate::engine::{Answer, EngineConfig, OpKey, Port, SlotTable, TagKey};
use crate::lend::LendMode;
use crate::plan::{BackingIndex, Op, OpKind, WINDOW_OPS};
use crate::route::{DiscardCall, Route};
use crate::units::Tag;

/// Deallocates; the range reads as zeros afterwards. On block devices: write zeroes with unmapping.
const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
/// Keeps the space allocated; the range reads as zeros afterwards. On block devices: write zeroes
/// without unmapping.
const ZERO: i32 = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;

/// A request is shorter than 4 GiB: the driver's largest buffer bounds the sector count of a read
/// or write.
const _: () = assert!(sys::UBLK_IO_BUF_BITS < 32);

/// The configuration of a port.
#[derive(Clone, Debug, Default)]
pub struct PortConfig {
    /// The route to each backing.
    pub routes: Box<[Route]>,
    /// The ring that issues operations polls for completions. It takes only operations with data.
    pub polled: bool,
    /// Test faults to inject.
    pub faults: Option<Faults>,
    /// The queue's files and slots in the ring's tables.
    pub place: TableRange,
}

/// The entries of an operation.
enum OpEntry {
    Single([Sqe; 1]),
    Double([Sqe; 2]),
}

impl OpEntry {
    fn map(self, change: impl Fn(Sqe) -> Sqe) -> Self {
        match self {
            Self::Single([sqe]) => Self::Single([change(sqe)]),
            // The first half of the entry holds the common fields.
            Self::Double([first, second]) => Self::Double([change(first), second]),
        }
    }

    fn sqes(&self) -> &[Sqe] {
        match self {
            Self::Single(sqes) => sqes,
            Self::Double(sqes) => sqes,
        }
    }
}

/// The state of a queue's port between calls.
pub(super) struct PortState {
    qid: u16,
    place: TableRange,
    incarnation: Incarnation,
    lend: LendMode,
    slots: SlotTable,
    block: u64,
    routes: Box<[Route]>,
    polled: bool,
    pub faults: Option<Faults>,
    /// Automatic registrations must fail (a test fault).
    misregisters: bool,
    /// All operations with data go to files, and no faults are injected.
    is_plain: bool,
    /// Entries that the ring had no room for, in order. The list has room for everything that a
    /// queue's tags can ask for.
    backlog: VecDeque<(RingRole, Sqe)>,
    /// The first error of a push. The ring is then unusable, and the lane ends.
    pub failure: Option<Errno>,
    /// There is a backlog, or a failure.
    pub is_held_up: bool,
}

/// The port for the time of one call: turns the engine's decisions into entries of a ring.
pub(super) struct RingPort<'a, Io> {
    pub state: &'a mut PortState,
    pub io: &'a mut Io,
}

impl PortState {
    pub fn new(config: &EngineConfig, port: PortConfig) -> Self {
        let PortConfig { routes, polled, faults, place } = port;
        let places = if routes.iter().any(|route| route.is_namespace()) { 2 } else { 1 };
        // For every tag: a command or a chain; or a window of operations and their cancellations,
        // plus the cancellations of the window before, if its operations have completed meanwhile.
        let room = usize::from(config.queue.depth) * WINDOW_OPS * (2 + places) + 8;
        Self {
            qid: config.queue.qid.0,
            place,
            incarnation: config.incarnation,
            lend: config.lend,
            slots: config.slots,
            block: config.geometry.block.into(),
            misregisters: faults.is_some_and(|faults| faults.auto_register),
            is_plain: faults.is_none() && !routes.iter().any(|route| route.is_namespace()),
            routes,
            polled,
            faults,
            backlog: VecDeque::with_capacity(room),
            failure: None,
            is_held_up: false,
        }
    }

    /// The number of entries that wait for room.
    pub fn backlog(&self) -> usize {
        self.backlog.len()
    }
}

impl<Io: LaneIo> RingPort<'_, Io> {
    /// Pushes entries that the ring had no room for, as far as it has room now.
    pub fn drain_backlog(&mut self) {
        while let Some((role, _)) = self.state.backlog.front() {
            let role = *role;
            // A chain is pushed whole or not at all.
            let group = first_group(&self.state.backlog);
            let sqes: smallvec::SmallVec<[Sqe; 4]> =
                self.state.backlog.iter().take(group).map(|(_, sqe)| sqe.clone()).collect();
            match self.io.push(role, &sqes) {
                Ok(()) => drop(self.state.backlog.drain(..group)),
                Err(Errno::EBUSY) => return,
                Err(errno) => {
                    self.state.failure.get_or_insert(errno);
                    return;
                }
            }
        }
        self.state.is_held_up = self.state.failure.is_some();
    }

    /// Pushes entries of the lane itself.
    #[inline(always)]
    pub fn push(&mut self, role: RingRole, sqes: &[Sqe]) {
        let pushed = if self.state.backlog.is_empty() {
            self.io.push(role, sqes)
        } else {
            Err(Errno::EBUSY)
        };
        if let Err(errno) = pushed {
            self.not_pushed(role, sqes, errno);
        }
    }

    #[cold]
    fn not_pushed(&mut self, role: RingRole, sqes: &[Sqe], errno: Errno) {
        self.state.is_held_up = true;
        if errno == Errno::EBUSY {
            self.state.backlog.extend(sqes.iter().map(|sqe| (role, sqe.clone())));
        } else {
            self.state.failure.get_or_insert(errno);
        }
    }

    #[inline]
    fn named(&self, sqe: Sqe, event: Event) -> Sqe {
        sqe.user_data(event.encode(self.state.incarnation))
    }

    #[inline(always)]
    fn delivery(&self, tag: Tag, slot: SlotIndex) -> Delivery {
        match self.state.lend {
            LendMode::Fused if !self.state.misregisters => {
                Delivery::AutoRegister { slot: self.state.place.slot(slot) }
            }
            LendMode::Fused => Delivery::AutoRegister { slot: NO_SLOT },
            LendMode::Slot | LendMode::UserCopy => Delivery::ByServer,
            LendMode::Copy => Delivery::Copy(self.io.pool_addr(tag.0, 0)),
        }
    }

    #[inline]
    fn buffer(&self, slot: SlotIndex, offset: u32) -> FixedBuffer {
        let (place, slots) = (self.state.place, &self.state.slots);
        match slot.0.checked_sub(slots.lent) {
            Some(index) => FixedBuffer::Pool {
                slot: place.pool_slot(slots, index),
                addr: self.io.pool_addr(index, offset),
            },
            None => FixedBuffer::Lent { slot: place.slot(slot), offset },
        }
    }

    fn register_sqe(&self, key: TagKey, slot: SlotIndex) -> Sqe {
        let beyond = self.state.faults.is_some_and(|faults| faults.register);
        let slot = if beyond { NO_SLOT } else { self.state.place.slot(slot) };
        let sqe = Sqe::register_buffer(self.state.place.cdev(), self.state.qid, key.tag.0, slot);
        self.named(sqe, Event::Registered(key))
    }

    fn unregister_sqe(&self, key: TagKey, slot: SlotIndex) -> Sqe {
        let sqe = Sqe::unregister_buffer(
            self.state.place.cdev(),
            self.state.qid,
            key.tag.0,
            self.state.place.slot(slot),
        );
        self.named(sqe, Event::Unregistered(key))
    }

    #[inline(never)]
    fn op_entry(&mut self, key: OpKey, op: &Op, slot: Option<SlotIndex>) -> OpEntry {
        let mut op = *op;
        let route = self.state.routes[usize::from(op.backing.0)];
        if let Some(faults) = &mut self.state.faults {
            // A command is carried out as a whole or not at all.
            let may_be_short = op.has_data() && !route.is_namespace();
            match faults.next(may_be_short.then_some(op.len), self.state.block) {
                Fault::None => {}
                Fault::Short(len) => op.len = len,
                Fault::Again => {
                    return OpEntry::Single([self.named(Sqe::nop(), Event::Injected(key))]);
                }
            }
            match faults.weaken(op.kind) {
                Some(kind) => op.kind = kind,
                // Succeeds, as a flush does.
                None => return OpEntry::Single([self.named(Sqe::nop(), Event::Op(key))]),
            }
        }
        let buffer = self.buffer(slot.unwrap_or(SlotIndex(0)), op.buf_offset);
        match route {
            Route::Namespace { namespace, deallocates_zeroes } if op.kind != OpKind::Delay => {
                let sqes = self.command(key, &op, buffer, namespace, deallocates_zeroes);
                OpEntry::Double(sqes).map(|sqe| self.named(sqe, Event::Command(key)))
            }
            Route::File(_) | Route::Namespace { .. } => OpEntry::Single([
                self.named(file_sqe(&op, buffer, route, self.state.place), Event::Op(key))
            ]),
        }
    }

    fn command(
        &mut self,
        key: OpKey,
        op: &Op,
        buffer: FixedBuffer,
        namespace: Namespace,
        deallocates_zeroes: bool,
    ) -> [Sqe; 2] {
        let file = self.state.place.backing_file(op.backing.0);
        let len = u32::try_from(op.len).unwrap_or(u32::MAX);
        match op.kind {
            OpKind::Read | OpKind::ReadScratch => namespace.read(file, buffer, len, op.offset),
            OpKind::Write { fua } | OpKind::WriteScratch { fua } => {
                namespace.write(file, buffer, len, op.offset, fua)
            }
            // Delays do not reach this.
            OpKind::Flush | OpKind::Delay => namespace.flush(file),
            OpKind::Discard => {
                namespace.deallocate(file, self.io.range(key.index, namespace, op.offset, op.len))
            }
            OpKind::WriteZeroes { may_unmap } => {
                namespace.write_zeroes(file, op.offset, op.len, may_unmap && deallocates_zeroes)
            }
        }
    }

    #[inline(never)]
    fn submit_other(&mut self, key: OpKey, op: &Op, slot: Option<SlotIndex>) {
        let entry = self.op_entry(key, op, slot);
        self.push(self.role(op), entry.sqes());
    }

    /// Translates the result of a command to a backing. For an abandoned operation it does not
    /// matter.
    pub fn outcome(&self, backing: Option<BackingIndex>, res: i32) -> Outcome {
        let route = backing.and_then(|backing| self.state.routes.get(usize::from(backing.0)));
        match route {
            Some(Route::Namespace { namespace, .. }) => namespace.outcome(res),
            Some(Route::File(_)) | None => Outcome::Failed(Errno::EIO),
        }
    }

    /// The ring for an operation.
    fn role(&self, op: &Op) -> RingRole {
        if self.state.polled && !op.has_data() { RingRole::Side } else { RingRole::Io }
    }
}

/// The number of entries at the front that belong together: one, or a chain.
fn first_group(backlog: &VecDeque<(RingRole, Sqe)>) -> usize {
    let mut group = 0;
    while let Some((_, sqe)) = backlog.get(group) {
        // Only the first half of a double entry has flags.
        group += sqe.width();
        if !sqe.is_linked() {
            break;
        }
    }
    group
}

#[inline]
fn file_sqe(op: &Op, buffer: FixedBuffer, route: Route, place: TableRange) -> Sqe {
    let file = place.backing_file(op.backing.0);
    let len = u32::try_from(op.len).unwrap_or(u32::MAX);
    match op.kind {
        OpKind::Read | OpKind::ReadScratch => Sqe::read_fixed(file, buffer, len, op.offset),
        OpKind::Write { fua } | OpKind::WriteScratch { fua } => {
            Sqe::write_fixed(file, buffer, len, op.offset, fua)
        }
        OpKind::Flush => Sqe::datasync(file),
        OpKind::Delay => Sqe::delay(op.len),
        OpKind::Discard if route == Route::File(DiscardCall::BlockCommand) => {
            Sqe::discard(file, op.offset, op.len)
        }
        OpKind::Discard => Sqe::fallocate(file, PUNCH, op.offset, op.len),
        OpKind::WriteZeroes { may_unmap: true } => Sqe::fallocate(file, PUNCH, op.offset, op.len),
        OpKind::WriteZeroes { may_unmap: false }
            if route == Route::File(DiscardCall::OnlyHoles) =>
        {
            Sqe::fallocate(file, PUNCH, op.offset, op.len)
        }
        OpKind::WriteZeroes { may_unmap: false } => Sqe::fallocate(file, ZERO, op.offset, op.len),
    }
}

impl<Io: LaneIo> Port for RingPort<'_, Io> {
    fn fetch(&mut self, key: TagKey, slot: SlotIndex) {
        let sqe = Sqe::fetch(
            self.state.place.cdev(),
            self.state.qid,
            key.tag.0,
            self.delivery(key.tag, slot),
        );
        self.push(RingRole::Fetch, &[self.named(sqe, Event::Fetched(key))]);
    }

    #[inline]
    fn commit(&mut self, key: TagKey, answer: Answer, slot: SlotIndex) {
        let (delivery, result) = (self.delivery(key.tag, slot), answer.result());
        let sqe = Sqe::commit_and_fetch(
            self.state.place.cdev(),
            self.state.qid,
            key.tag.0,
            result,
            delivery,
        );
        self.push(RingRole::Fetch, &[self.named(sqe, Event::Fetched(key))]);
    }

    fn register(&mut self, key: TagKey, slot: SlotIndex) {
        self.push(RingRole::Io, &[self.register_sqe(key, slot)]);
    }

    fn unregister(&mut self, key: TagKey, slot: SlotIndex) {
        self.push(RingRole::Io, &[self.unregister_sqe(key, slot)]);
    }

    #[inline(always)]
    fn submit(&mut self, key: OpKey, op: &Op, slot: Option<SlotIndex>) {
        if let (Some(slot), true, Ok(len)) = (slot, self.state.is_plain, u32::try_from(op.len)) {
            let file = self.state.place.backing_file(op.backing.0);
            let buffer = self.buffer(slot, op.buf_offset);
            let sqe = match op.kind {
                OpKind::Read => Sqe::read_fixed(file, buffer, len, op.offset),
                OpKind::Write { fua } => Sqe::write_fixed(file, buffer, len, op.offset, fua),
                OpKind::ReadScratch
                | OpKind::WriteScratch { .. }
                | OpKind::Flush
                | OpKind::Discard
                | OpKind::WriteZeroes { .. }
                | OpKind::Delay => return self.submit_other(key, op, Some(slot)),
            };
            return self.push(RingRole::Io, &[self.named(sqe, Event::Op(key))]);
        }
        self.submit_other(key, op, slot);
    }

    fn submit_chain(&mut self, tag: TagKey, slot: SlotIndex, key: OpKey, op: &Op) {
        // Hard links: the buffer is unregistered even if registration or operation fails.
        let register = self.register_sqe(tag, slot).hard_link().skip_success();
        let unregister = self.unregister_sqe(tag, slot);
        match self.op_entry(key, op, Some(slot)).map(Sqe::hard_link) {
            OpEntry::Single([op]) => self.push(RingRole::Io, &[register, op, unregister]),
            OpEntry::Double([first, second]) => {
                self.push(RingRole::Io, &[register, first, second, unregister]);
            }
        }
    }

    fn copy(&mut self, tag: Tag, slot: SlotIndex, direction: Direction, from: u32, to: u32) -> i32 {
        self.io.copy(tag, slot.0 - self.state.slots.lent, direction, from, to)
    }

    fn explain(&mut self, op: &Op, errno: Errno) -> Errno {
        // A removed drive has 0 bytes, so the kernel returns for writes the error of a write beyond
        // the end. To users that would mean a full disk.
        let is_gone = errno == Errno::ENOSPC
            && self.io.has_shrunk(op.backing, op.offset.saturating_add(op.len));
        if is_gone { Errno::EIO } else { errno }
    }

    fn cancel(&mut self, key: OpKey, op: &Op) {
        let role = self.role(op);
        // A polling ring refuses to cancel, and a polled drive cannot cancel.
        if self.state.polled && role == RingRole::Io {
            return;
        }
        let event = match self.state.routes[usize::from(op.backing.0)] {
            Route::Namespace { .. } if op.kind != OpKind::Delay => Event::Command(key),
            Route::File(_) | Route::Namespace { .. } => Event::Op(key),
        };
        let sqe = Sqe::cancel(event.encode(self.state.incarnation));
        self.push(role, &[self.named(sqe, Event::Cancelled)]);
    }

    fn take_spare(&mut self) -> bool {
        self.io.take_spare()
    }

    fn give_spare(&mut self) {
        self.io.give_spare();
    }

    fn now(&mut self) -> u64 {
        self.io.now()
    }
}

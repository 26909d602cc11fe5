//! A kernel's part in a stack of devices: the workers that it shares, the device below, and the
//! requests of devices above.
//!
//! After `io_uring/io-wq.c`: a thread has a bounded number of workers for operations that may
//! block. A worker carries out `fallocate` and `fsync`, and waits for the end of their I/O. A
//! worker starts each discard. A worker also starts each operation that finds no free tag, and
//! waits for the tag.

use std::cell::RefCell;
use std::ops::Range;
use std::rc::Rc;

use ublk_engine::request::{Request, RequestKind};

use super::backing::Zeroing;
use super::{Ask, Buffer, Flight, Kernel, Phase};
use crate::draw::Draw as _;
use crate::entry::Work;

/// The workers of a thread.
#[derive(Debug)]
pub struct Workers {
    /// The maximum number.
    pub count: usize,
    /// For each worker in use: the device of its operation.
    pub held_by: Vec<usize>,
    /// How often none was free.
    pub missed: u64,
}

impl Workers {
    /// Whether a worker is free.
    #[must_use]
    pub fn has_free(&self) -> bool {
        self.held_by.len() < self.count
    }

    fn take(&mut self, device: usize) -> bool {
        let is_free = self.has_free();
        if is_free {
            self.held_by.push(device);
        } else {
            self.missed += 1;
        }
        is_free
    }

    fn give_back(&mut self, device: usize) {
        let at = self.held_by.iter().position(|holder| *holder == device);
        self.held_by.swap_remove(at.unwrap_or_else(|| panic!("device {device} holds no worker")));
    }
}

/// An operation that waits to become a request of the device below.
#[derive(Clone, Copy, Debug)]
pub struct PendingRequest {
    /// Its number.
    pub ticket: u64,
    /// It has found no free tag, so a worker has to start it.
    pub is_punted: bool,
}

/// A request of a device above has ended.
#[derive(Clone, Debug)]
pub struct EndedRequest {
    /// The device above, and the number of its operation.
    pub of: (usize, u64),
    /// The result that it was committed with.
    pub result: i32,
    /// The data of a read.
    pub data: Option<Vec<u8>>,
}

/// A device's part in a stack.
#[derive(Debug)]
pub struct StackPart {
    /// The device.
    pub device: usize,
    /// The workers of the thread that serves it.
    pub workers: Rc<RefCell<Workers>>,
    /// The bytes that clients use. The bytes after them belong to devices above.
    pub clients: Range<u64>,
    /// Its backing is another device, not a drive.
    pub is_on_device: bool,
    /// Operations that have started and are no request of the device below yet.
    pub wanted: Vec<PendingRequest>,
    /// Requests of devices above that have ended.
    pub ended: Vec<EndedRequest>,
    /// How many operations have a number.
    tickets: u64,
}

impl StackPart {
    /// The part of a device without requests.
    #[must_use]
    pub fn new(
        device: usize,
        workers: Rc<RefCell<Workers>>,
        clients: Range<u64>,
        is_on_device: bool,
    ) -> Self {
        let (wanted, ended) = (Vec::new(), Vec::new());
        Self { device, workers, clients, is_on_device, wanted, ended, tickets: 0 }
    }
}

/// Whether a worker always carries out an operation.
const fn needs_worker(work: &Work) -> bool {
    matches!(work, Work::Flush { .. } | Work::Zero { .. })
}

/// Whether its worker is free again once it has started.
const fn only_begins(work: &Work) -> bool {
    matches!(work, Work::Transfer(_) | Work::Zero { how: Zeroing::Discard, .. })
}

impl Kernel {
    /// Whether one of the waiting operations could start.
    #[must_use]
    pub fn can_start(&self) -> bool {
        let has_free = self.has_free_worker();
        self.queued.iter().any(|flight| has_free || !needs_worker(&flight.entry.work))
    }

    /// The index of a waiting operation that could start.
    pub(super) fn pick_startable(&mut self) -> Option<usize> {
        let has_free = self.has_free_worker();
        let is_staffed = |flight: &Flight| has_free || !needs_worker(&flight.entry.work);
        let count = self.queued.iter().filter(|flight| is_staffed(flight)).count();
        let number = self.rng.index(count);
        let startable = self.queued.iter().enumerate().filter(|(_, flight)| is_staffed(flight));
        startable.map(|(at, _)| at).nth(number)
    }

    fn has_free_worker(&self) -> bool {
        self.part.as_ref().is_none_or(|part| part.workers.borrow().has_free())
    }

    /// Assigns a worker to an operation that needs one. Queues the operation if none is free.
    pub(super) fn assign_worker(&mut self, mut flight: Flight) -> Option<Flight> {
        let Some(part) = self.part.as_ref().filter(|_| needs_worker(&flight.entry.work)) else {
            return Some(flight);
        };
        if !part.workers.borrow_mut().take(part.device) {
            self.queued.push(flight);
            return None;
        }
        flight.has_worker = true;
        Some(flight)
    }

    /// Passes an operation that has started to the device below, if there is one.
    pub(super) fn pass_down(&mut self, flight: &mut Flight) {
        let Some(part) = self.part.as_mut() else { return };
        if part.is_on_device {
            part.tickets += 1;
            (flight.ticket, flight.held_until) = (part.tickets, u64::MAX);
            part.wanted.push(PendingRequest { ticket: flight.ticket, is_punted: false });
        } else if only_begins(&flight.entry.work) {
            self.release_worker(flight);
        }
    }

    /// Releases the worker of an operation.
    pub(super) fn release_worker(&self, flight: &mut Flight) {
        if let Some(part) = self.part.as_ref().filter(|_| flight.has_worker) {
            part.workers.borrow_mut().give_back(part.device);
            flight.has_worker = false;
        }
    }

    fn passed_down(&self, ticket: u64) -> usize {
        let at = self.running.iter().position(|flight| flight.ticket == ticket);
        at.unwrap_or_else(|| panic!("operation {ticket} has ended before its request"))
    }

    /// Whether a worker runs an operation.
    #[must_use]
    pub fn has_worker(&self, ticket: u64) -> bool {
        self.running[self.passed_down(ticket)].has_worker
    }

    /// Makes a worker start an operation again. Returns whether a worker was free.
    pub fn punt(&mut self, ticket: u64) -> bool {
        let at = self.passed_down(ticket);
        let Some(part) = &self.part else { return false };
        let is_taken = part.workers.borrow_mut().take(part.device);
        self.running[at].has_worker |= is_taken;
        is_taken
    }

    /// The request of an operation to the device below, with its offset increased by `offset`, and
    /// the data of a write. Called when the operation gets a tag.
    pub fn request_below(&mut self, ticket: u64, offset: u64) -> (Request, Option<Vec<u8>>) {
        let at = self.passed_down(ticket);
        let mut flight = self.running[at];
        if only_begins(&flight.entry.work) {
            self.release_worker(&mut flight);
            self.running[at] = flight;
        }
        let request = |kind, at, len| Request { kind, offset: at, len };
        match flight.entry.work {
            Work::Transfer(it) => {
                let kind = match it.write {
                    true => RequestKind::Write { fua: it.dsync },
                    false => RequestKind::Read,
                };
                let bytes = self.lent_bytes(&flight, it.addr, it.len);
                let data = it.write.then(|| bytes.to_vec());
                (request(kind, offset + it.at, it.len.into()), data)
            }
            Work::Flush { .. } => (request(RequestKind::Flush, 0, 0), None),
            Work::Zero { at, len, how, .. } => {
                let kind = match how {
                    Zeroing::Discard => RequestKind::Discard,
                    Zeroing::Punch => RequestKind::WriteZeroes { may_unmap: true },
                    Zeroing::ZeroRange => RequestKind::WriteZeroes { may_unmap: false },
                };
                (request(kind, offset + at, len), None)
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

    fn lent_bytes(&self, flight: &Flight, addr: u64, len: u32) -> &[u8] {
        let (bytes, start) = match flight.buffer {
            Some(Buffer::Lent { tag }) => {
                let start = usize::try_from(addr).unwrap_or(usize::MAX);
                (&self.tags[usize::from(tag)].data[..], start)
            }
            Some(Buffer::Pool { index }) => {
                (&self.pool[usize::from(index)][..], self.addresses.find(addr).1)
            }
            None => unreachable!("a running transfer has its buffer"),
        };
        &bytes[start..start + len as usize]
    }

    /// Records the end of an operation's request below. Data that was read is stored as the
    /// contents of the backing.
    pub fn complete_below(&mut self, ended: &EndedRequest) {
        assert!(ended.result >= 0, "a sound device below fails: {ended:?}");
        let at = self.passed_down(ended.of.1);
        self.running[at].held_until = 0;
        if let (Work::Transfer(it), Some(data)) = (self.running[at].entry.work, &ended.data) {
            self.backings[it.backing].put(it.at, data);
        }
    }

    /// A tag for a request of a device above.
    #[must_use]
    pub fn free_tag(&self) -> Option<u16> {
        let is_free = |tag: &u16| {
            let model = &self.tags[usize::from(*tag)];
            model.phase == Phase::Waiting && model.ask.is_none()
        };
        (0..self.setup.depth).find(is_free)
    }

    /// Delivers a request of a device above.
    pub fn deliver_from_above(
        &mut self,
        tag: u16,
        request: Request,
        data: Option<&[u8]>,
        of: (usize, u64),
    ) {
        let model = &mut self.tags[usize::from(tag)];
        model.ask = Some(Ask::sound(request));
        model.of = Some(of);
        if let Some(data) = data {
            model.data[..data.len()].copy_from_slice(data);
        }
        self.asked += 1;
        self.deliver(tag);
    }

    /// Reports the end of a request to the device above.
    pub(super) fn report_above(&mut self, tag: u16, request: &Request) {
        let model = &mut self.tags[usize::from(tag)];
        let Some((of, part)) = model.of.take().zip(self.part.as_mut()) else { return };
        let len = usize::try_from(request.len).unwrap_or(usize::MAX);
        let data = (request.kind == RequestKind::Read).then(|| model.data[..len].to_vec());
        part.ended.push(EndedRequest { of, result: model.result, data });
    }
}

//! A kernel's part in a stack of devices: the workers that it shares with others, the device that its
//! backing is, and the requests of devices above.
//!
//! After `io_uring/io-wq.c`: a thread has a bounded number of workers for operations that may block.
//! `fallocate` and `fsync` are always carried out by one, which waits for the end of their I/O.
//! A discard is begun by one. What finds no free tag is begun by one, which waits for the tag.

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
    /// How many there can be.
    pub count: usize,
    /// The devices whose operations hold one.
    pub held_by: Vec<usize>,
    /// How often one was wanted and none was free.
    pub missed: u64,
}

impl Workers {
    /// Whether one is free.
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

/// An operation that is to become a request of the device below.
#[derive(Clone, Copy, Debug)]
pub struct Wanted {
    /// Its number.
    pub ticket: u64,
    /// It has found no free tag, so a worker has to begin it.
    pub is_punted: bool,
}

/// A request of a device above has ended.
#[derive(Clone, Debug)]
pub struct Ended {
    /// The device above, and the number of its operation.
    pub of: (usize, u64),
    /// What it was committed with.
    pub result: i32,
    /// What was read.
    pub data: Option<Vec<u8>>,
}

/// A device's part in a stack.
#[derive(Debug)]
pub struct Part {
    /// The device.
    pub device: usize,
    /// Those of the thread that serves it.
    pub workers: Rc<RefCell<Workers>>,
    /// The bytes that clients ask for; those behind are of the devices above.
    pub clients: Range<u64>,
    /// Its backing is another device, and not a drive.
    pub is_on_device: bool,
    /// Operations that have begun and that the device below does not know of.
    pub wanted: Vec<Wanted>,
    /// Requests of devices above that have ended.
    pub ended: Vec<Ended>,
    /// How many operations have been given a number.
    tickets: u64,
}

impl Part {
    /// That of a device that serves nobody yet.
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

/// Whether an operation is always carried out by a worker.
const fn needs_worker(work: &Work) -> bool {
    matches!(work, Work::Flush { .. } | Work::Zero { .. })
}

/// Whether its worker is free again once it has begun.
const fn only_begins(work: &Work) -> bool {
    matches!(work, Work::Transfer(_) | Work::Zero { how: Zeroing::Discard, .. })
}

impl Kernel {
    /// Whether one of those that wait could start.
    #[must_use]
    pub fn can_start(&self) -> bool {
        let has_free = self.has_free_worker();
        self.queued.iter().any(|flight| has_free || !needs_worker(&flight.entry.work))
    }

    /// The place of one of those that wait and could start.
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

    /// Finds a worker for an operation that needs one, or has it wait.
    pub(super) fn staff(&mut self, mut flight: Flight) -> Option<Flight> {
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

    /// An operation has begun. One on another device waits for that.
    pub(super) fn hand_down(&mut self, flight: &mut Flight) {
        let Some(part) = self.part.as_mut() else { return };
        if part.is_on_device {
            part.tickets += 1;
            (flight.ticket, flight.held_until) = (part.tickets, u64::MAX);
            part.wanted.push(Wanted { ticket: flight.ticket, is_punted: false });
        } else if only_begins(&flight.entry.work) {
            self.dismiss(flight);
        }
    }

    /// An operation does without a worker from now on.
    pub(super) fn dismiss(&self, flight: &mut Flight) {
        if let Some(part) = self.part.as_ref().filter(|_| flight.has_worker) {
            part.workers.borrow_mut().give_back(part.device);
            flight.has_worker = false;
        }
    }

    fn handed_down(&self, ticket: u64) -> usize {
        let at = self.running.iter().position(|flight| flight.ticket == ticket);
        at.unwrap_or_else(|| panic!("operation {ticket} has ended before its request"))
    }

    /// Whether a worker has an operation in hand.
    #[must_use]
    pub fn has_worker(&self, ticket: u64) -> bool {
        self.running[self.handed_down(ticket)].has_worker
    }

    /// Has a worker begin an operation again. Whether there is one.
    pub fn punt(&mut self, ticket: u64) -> bool {
        let at = self.handed_down(ticket);
        let Some(part) = &self.part else { return false };
        let is_taken = part.workers.borrow_mut().take(part.device);
        self.running[at].has_worker |= is_taken;
        is_taken
    }

    /// What an operation asks of the device below, from `offset` there on, and what it writes. It has a tag
    /// now.
    pub fn ask_below(&mut self, ticket: u64, offset: u64) -> (Request, Option<Vec<u8>>) {
        let at = self.handed_down(ticket);
        let mut flight = self.running[at];
        if only_begins(&flight.entry.work) {
            self.dismiss(&mut flight);
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

    /// The request of an operation has ended below. What was read is on the backing, as that is.
    pub fn answered_below(&mut self, ended: &Ended) {
        assert!(ended.result >= 0, "a sound device below fails: {ended:?}");
        let at = self.handed_down(ended.of.1);
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
    pub fn take_up(&mut self, tag: u16, request: Request, data: Option<&[u8]>, of: (usize, u64)) {
        let model = &mut self.tags[usize::from(tag)];
        model.ask = Some(Ask::sound(request));
        model.of = Some(of);
        if let Some(data) = data {
            model.data[..data.len()].copy_from_slice(data);
        }
        self.asked += 1;
        self.deliver(tag);
    }

    /// A request has ended: whoever above waits for it hears of that.
    pub(super) fn tell_above(&mut self, tag: u16, request: &Request) {
        let model = &mut self.tags[usize::from(tag)];
        let Some((of, part)) = model.of.take().zip(self.part.as_mut()) else { return };
        let len = usize::try_from(request.len).unwrap_or(usize::MAX);
        let data = (request.kind == RequestKind::Read).then(|| model.data[..len].to_vec());
        part.ended.push(Ended { of, result: model.result, data });
    }
}

//! Control requests of socket clients to a server's main thread, which owns the lanes.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::mpsc::{Receiver, Sender, SyncSender, TryRecvError, channel, sync_channel};
use std::time::{Duration, Instant};

use nix::sys::eventfd::EventFd;
use ublk_engine::units::Bytes;

use crate::config::{LayerEdit, LayerName};
use crate::device::program::Program;
use crate::os::wakeups::Wakeups;

/// A control request.
#[derive(Debug)]
pub enum ControlRequest {
    /// Read the new size of the backings, or take a null device's new size.
    Grow {
        /// The new size of a null device.
        size: Option<Bytes>,
        /// Gets the largest size of the device.
        reply: Reply<Bytes>,
    },
    /// Change the layers.
    ChangeLayers {
        /// The change.
        edit: Box<LayerEdit>,
        /// How long to wait for the requests that have begun.
        limit: Duration,
        /// Gets the answer when the change is made.
        reply: Reply<LayersChanged>,
    },
    /// Hand the device over to another program.
    Upgrade {
        /// The program.
        program: Program,
        /// Gets the answer when the device is quiesced and the server is about to close it.
        reply: Reply<()>,
    },
}

/// A change of layers that was made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayersChanged {
    /// The layer that was attached or detached.
    pub name: Option<LayerName>,
    /// How long requests were held back.
    pub pause: Duration,
}

/// The main thread has not seen the request.
const ASKED: u8 = 0;
/// The main thread carries it out.
const BEGUN: u8 = 1;
/// The client has given up before.
const GIVEN_UP: u8 = 2;
/// The client is gone, and the main thread carries it out.
const UNWANTED: u8 = 3;

/// The main thread's end of a request. It must not carry out a request that the client has given up
/// before; [`Reply::begin`] decides which was first. It may break off one that nobody
/// [wants](Reply::is_wanted) any more.
#[derive(Debug)]
pub struct Reply<T> {
    /// There until it is dropped.
    sender: Option<SyncSender<Result<T, String>>>,
    state: Arc<AtomicU8>,
    /// Wakes the thread that waits for the answer, if it does not block on it.
    wake: Option<Arc<EventFd>>,
}

impl<T> Reply<T> {
    /// Whether to carry out the request: the client still waits.
    #[must_use]
    pub fn begin(&self) -> bool {
        replace(&self.state, BEGUN)
    }

    /// Whether the client still waits for a request that was begun.
    #[must_use]
    pub fn is_wanted(&self) -> bool {
        self.state.load(Ordering::Acquire) == BEGUN
    }

    /// Sends the answer.
    pub fn send(self, answer: Result<T, String>) {
        // It can only fail if the client has given up.
        let _ = self.sender.as_ref().map(|sender| sender.try_send(answer));
    }
}

/// Also one without an answer is told: the server ends.
impl<T> Drop for Reply<T> {
    fn drop(&mut self) {
        self.sender = None;
        // It can only fail at 2^64 - 1.
        let _ = self.wake.as_ref().map(|wake| wake.write(1));
    }
}

/// A request that was sent, and whose answer is not there yet. Nobody wants one that was dropped.
#[derive(Debug)]
pub struct PendingRequest<T> {
    answer: Receiver<Result<T, String>>,
    state: Arc<AtomicU8>,
    /// When it is given up if it has not begun.
    begin_by: Instant,
    /// When it is given up.
    end_by: Instant,
}

impl<T> PendingRequest<T> {
    /// The answer, if it is there or does not come any more.
    pub fn answer(&self, now: Instant) -> Option<Result<T, String>> {
        match self.answer.try_recv() {
            Ok(answer) => return Some(answer),
            Err(TryRecvError::Disconnected) => {
                let has_begun = self.state.load(Ordering::Acquire) == BEGUN;
                return Some(Err(if has_begun { unanswered() } else { busy() }));
            }
            Err(TryRecvError::Empty) => {}
        }
        if now >= self.begin_by && replace(&self.state, GIVEN_UP) {
            return Some(Err(busy()));
        }
        (now >= self.end_by).then(|| Err(unanswered()))
    }

    /// When to look for the answer even if nothing wakes the thread.
    pub fn deadline(&self, now: Instant) -> Instant {
        if now < self.begin_by { self.begin_by } else { self.end_by }
    }
}

impl<T> Drop for PendingRequest<T> {
    fn drop(&mut self) {
        if !replace(&self.state, GIVEN_UP) {
            self.state.store(UNWANTED, Ordering::Release);
        }
    }
}

fn busy() -> String {
    "the server is about to end, or is busy; try again".to_owned()
}

fn unanswered() -> String {
    "the server has begun the request, but has not reported a result".to_owned()
}

/// Sets the state of a request that nobody has decided; returns whether this call did.
fn replace(state: &AtomicU8, decision: u8) -> bool {
    state.compare_exchange(ASKED, decision, Ordering::AcqRel, Ordering::Acquire).is_ok()
}

/// Sends control requests to the main thread.
#[derive(Clone, Debug)]
pub struct ControlSender {
    sender: Sender<ControlRequest>,
    wakeups: Arc<Wakeups>,
    patience: Patience,
}

/// Time limits of the main thread.
#[derive(Clone, Copy, Debug)]
struct Patience {
    /// Until it begins. Shorter than the wait of a client, so the client learns that nothing has
    /// changed.
    to_begin: Duration,
    /// From the beginning to the answer.
    to_end: Duration,
}

const PATIENCE: Patience =
    Patience { to_begin: Duration::from_secs(4), to_end: Duration::from_secs(30) };

impl ControlSender {
    /// Makes a sender, and the main thread's receiver.
    #[must_use]
    pub fn new(wakeups: Arc<Wakeups>) -> (Self, Receiver<ControlRequest>) {
        let (sender, control_requests) = channel();
        (Self { sender, wakeups, patience: PATIENCE }, control_requests)
    }

    /// Sends a request, and waits for the answer.
    ///
    /// # Errors
    /// The error text of the server.
    pub fn ask<T>(
        &self,
        control_request: impl FnOnce(Reply<T>) -> ControlRequest,
    ) -> Result<T, String> {
        let pending = self.send(Duration::ZERO, None, control_request)?;
        if let Ok(answer) = pending.answer.recv_timeout(self.patience.to_begin) {
            return answer;
        }
        if replace(&pending.state, GIVEN_UP) {
            return Err(busy());
        }
        pending.answer.recv_timeout(self.patience.to_end).unwrap_or_else(|_| Err(unanswered()))
    }

    /// Sends a request that may take `longer` than others, and does not wait. `wake` is written to when
    /// the answer is there.
    ///
    /// # Errors
    /// The error text of the server.
    pub fn start<T>(
        &self,
        longer: Duration,
        wake: &Arc<EventFd>,
        control_request: impl FnOnce(Reply<T>) -> ControlRequest,
    ) -> Result<PendingRequest<T>, String> {
        self.send(longer, Some(Arc::clone(wake)), control_request)
    }

    fn send<T>(
        &self,
        longer: Duration,
        wake: Option<Arc<EventFd>>,
        control_request: impl FnOnce(Reply<T>) -> ControlRequest,
    ) -> Result<PendingRequest<T>, String> {
        let (sender, answer) = sync_channel(1);
        let state = Arc::new(AtomicU8::new(ASKED));
        let reply = Reply { sender: Some(sender), state: Arc::clone(&state), wake };
        let sent = self.sender.send(control_request(reply));
        self.wakeups.control_request();
        sent.map_err(|_| busy())?;
        let begin_by = Instant::now() + self.patience.to_begin;
        let end_by = begin_by + self.patience.to_end + longer;
        Ok(PendingRequest { answer, state, begin_by, end_by })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::os::wakeups::{Hangup, event_descriptor};

    fn control_sender() -> (ControlSender, Receiver<ControlRequest>) {
        let wakeups = Arc::new(Wakeups::new(Hangup::Ends).unwrap());
        let (control_sender, requests) = ControlSender::new(wakeups);
        let patience = Patience { to_begin: Duration::ZERO, to_end: Duration::from_secs(60) };
        (ControlSender { patience, ..control_sender }, requests)
    }

    fn grow(reply: Reply<Bytes>) -> ControlRequest {
        ControlRequest::Grow { size: None, reply }
    }

    fn reply_of(request: ControlRequest) -> Reply<Bytes> {
        let ControlRequest::Grow { reply, .. } = request else { panic!("another request") };
        reply
    }

    #[test]
    fn a_request_that_was_given_up_is_not_carried_out() {
        let (control_sender, requests) = control_sender();
        assert!(control_sender.ask(grow).unwrap_err().contains("busy"));
        assert!(!reply_of(requests.recv().unwrap()).begin());
    }

    #[test]
    fn a_request_that_is_dropped_wakes_its_client() {
        for (begins, expected) in [(false, "busy"), (true, "has not reported")] {
            let (control_sender, requests) = control_sender();
            let wake = Arc::new(event_descriptor().unwrap());
            let pending = control_sender.start(Duration::ZERO, &wake, grow).unwrap();
            let reply = reply_of(requests.recv().unwrap());
            assert!(pending.answer(Instant::now() - Duration::from_secs(1)).is_none());
            if begins {
                assert!(reply.begin());
            }
            assert!(wake.read().is_err(), "not yet");
            drop(reply);
            assert!(wake.read().is_ok(), "at once");
            assert!(pending.answer(Instant::now()).unwrap().unwrap_err().contains(expected));
        }
    }

    #[test]
    fn a_request_that_was_begun_is_waited_for() {
        let (control_sender, requests) = control_sender();
        let begun = |reply: Reply<Bytes>| {
            assert!(reply.begin());
            grow(reply)
        };
        std::thread::scope(|scope| {
            let asking = scope.spawn(|| control_sender.ask(begun));
            reply_of(requests.recv().unwrap()).send(Ok(Bytes(7)));
            assert_eq!(asking.join().unwrap(), Ok(Bytes(7)));
        });
    }

    #[test]
    fn a_server_that_ends_is_not_waited_for() {
        let (control_sender, requests) = control_sender();
        drop(requests);
        assert!(control_sender.ask(grow).unwrap_err().contains("about to end"));
    }
}

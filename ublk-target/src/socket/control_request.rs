//! Control requests: what clients of the socket ask of a server's main thread, which owns the lanes.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::time::Duration;

use ublk_engine::units::Bytes;

use crate::device::program::Program;
use crate::os::wakeups::Wakeups;

/// What is asked.
#[derive(Debug)]
pub enum ControlRequest {
    /// Take note of backings that have grown, or of a null device's new size.
    Grow {
        /// The size of a null device.
        size: Option<Bytes>,
        /// Told how long the device may be.
        reply: Reply<Bytes>,
    },
    /// Hand the device over to another program.
    Upgrade {
        /// The program.
        program: Program,
        /// Told when the driver delivers nothing more and the device is about to be let go of.
        reply: Reply<()>,
    },
}

/// Nobody has looked at the request.
const ASKED: u8 = 0;
/// The main thread carries it out.
const BEGUN: u8 = 1;
/// Whoever asked has given up.
const GIVEN_UP: u8 = 2;

/// The main thread's end of a request. A request that has been given up must not be carried out, and one
/// that has been begun is not given up: [`Reply::begin`] decides which.
#[derive(Debug)]
pub struct Reply<T> {
    sender: SyncSender<Result<T, String>>,
    state: Arc<AtomicU8>,
}

impl<T> Reply<T> {
    /// Whether the request is to be carried out: whoever asked still waits.
    #[must_use]
    pub fn begin(&self) -> bool {
        replace(&self.state, BEGUN)
    }

    /// Answers.
    pub fn send(self, answer: Result<T, String>) {
        // It can only fail if whoever asked has given up.
        let _ = self.sender.try_send(answer);
    }
}

/// Decides about a request that nobody has looked at; whether this call has.
fn replace(state: &AtomicU8, decision: u8) -> bool {
    state.compare_exchange(ASKED, decision, Ordering::AcqRel, Ordering::Acquire).is_ok()
}

/// Brings control requests to the main thread.
#[derive(Clone, Debug)]
pub struct Petitioner {
    sender: Sender<ControlRequest>,
    wakeups: Arc<Wakeups>,
    patience: Patience,
}

/// How long the main thread may take.
#[derive(Clone, Copy, Debug)]
struct Patience {
    /// Until it begins. Shorter than a client waits, who then learns that nothing has changed.
    to_begin: Duration,
    /// From then on.
    to_end: Duration,
}

const PATIENCE: Patience =
    Patience { to_begin: Duration::from_secs(4), to_end: Duration::from_secs(30) };

impl Petitioner {
    /// One, and the main thread's end.
    #[must_use]
    pub fn new(wakeups: Arc<Wakeups>) -> (Self, Receiver<ControlRequest>) {
        let (sender, control_requests) = channel();
        (Self { sender, wakeups, patience: PATIENCE }, control_requests)
    }

    /// Asks, and waits for the answer.
    ///
    /// # Errors
    /// The server's words, why it will not.
    pub fn ask<T>(
        &self,
        control_request: impl FnOnce(Reply<T>) -> ControlRequest,
    ) -> Result<T, String> {
        let (sender, answer) = sync_channel(1);
        let state = Arc::new(AtomicU8::new(ASKED));
        let reply = Reply { sender, state: Arc::clone(&state) };
        let sent = self.sender.send(control_request(reply));
        self.wakeups.control_request();
        let busy = || "the server is about to end, or is busy; try again".to_owned();
        sent.map_err(|_| busy())?;
        if let Ok(answer) = answer.recv_timeout(self.patience.to_begin) {
            return answer;
        }
        if replace(&state, GIVEN_UP) {
            return Err(busy());
        }
        let unanswered =
            |_| Err("the server has begun, and has not said what came of it".to_owned());
        answer.recv_timeout(self.patience.to_end).unwrap_or_else(unanswered)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::os::wakeups::Hangup;

    fn petitioner() -> (Petitioner, Receiver<ControlRequest>) {
        let wakeups = Arc::new(Wakeups::new(Hangup::Ends).unwrap());
        let (petitioner, requests) = Petitioner::new(wakeups);
        let patience = Patience { to_begin: Duration::ZERO, to_end: Duration::from_secs(60) };
        (Petitioner { patience, ..petitioner }, requests)
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
        let (petitioner, requests) = petitioner();
        assert!(petitioner.ask(grow).unwrap_err().contains("busy"));
        assert!(!reply_of(requests.recv().unwrap()).begin());
    }

    #[test]
    fn a_request_that_was_begun_is_waited_for() {
        let (petitioner, requests) = petitioner();
        let begun = |reply: Reply<Bytes>| {
            assert!(reply.begin());
            grow(reply)
        };
        std::thread::scope(|scope| {
            let asking = scope.spawn(|| petitioner.ask(begun));
            reply_of(requests.recv().unwrap()).send(Ok(Bytes(7)));
            assert_eq!(asking.join().unwrap(), Ok(Bytes(7)));
        });
    }

    #[test]
    fn a_server_that_ends_is_not_waited_for() {
        let (petitioner, requests) = petitioner();
        drop(requests);
        assert!(petitioner.ask(grow).unwrap_err().contains("about to end"));
    }
}

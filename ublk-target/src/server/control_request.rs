//! Control requests: what clients of the socket ask of a server's main thread, which owns the lanes.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::time::Duration;

use ublk_engine::units::Bytes;

use super::signals::Wakeups;
use crate::program::Program;

/// What is asked.
#[derive(Debug)]
pub enum ControlRequest {
    /// Take note of backings that have grown, or of a null device's new size.
    Grow {
        /// The size of a null device.
        size: Option<Bytes>,
        /// Told how long the device may be.
        reply: SyncSender<Result<Bytes, String>>,
    },
    /// Hand the device over to another program.
    Upgrade {
        /// The program.
        program: Program,
        /// Told whether it will be tried.
        reply: SyncSender<Result<(), String>>,
    },
}

/// Brings control requests to the main thread.
#[derive(Clone, Debug)]
pub struct Petitioner {
    sender: Sender<ControlRequest>,
    wakeups: Arc<Wakeups>,
}

/// How long the main thread may take for an answer.
const PATIENCE: Duration = Duration::from_secs(10);

impl Petitioner {
    /// One, and the main thread's end.
    #[must_use]
    pub fn new(wakeups: Arc<Wakeups>) -> (Self, Receiver<ControlRequest>) {
        let (sender, control_requests) = channel();
        (Self { sender, wakeups }, control_requests)
    }

    /// Asks, and waits for the answer.
    ///
    /// # Errors
    /// The server's words, why it will not.
    pub fn ask<T>(
        &self,
        control_request: impl FnOnce(SyncSender<Result<T, String>>) -> ControlRequest,
    ) -> Result<T, String> {
        let (reply, answer) = sync_channel(1);
        let sent = self.sender.send(control_request(reply));
        self.wakeups.control_request();
        let busy = || "the server is about to end, or is busy; try again".to_owned();
        sent.map_err(|_| busy())?;
        answer.recv_timeout(PATIENCE).unwrap_or_else(|_| Err(busy()))
    }
}

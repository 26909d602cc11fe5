//! A change of layers that a client waits for. There is at most one at a time.

use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::eventfd::EventFd;

use crate::config::LayerEdit;
use crate::socket::connection::Connection;
use crate::socket::control_request::{
    ControlRequest, ControlSender, LayersChanged, PendingRequest,
};
use crate::socket::protocol::{Answer, LayersAnswer};

/// A change that the main thread works at.
#[derive(Debug)]
pub(super) struct LayerChange {
    pending: PendingRequest<LayersChanged>,
    /// The connection that waits for it.
    connection: u64,
    /// Process id of its client, if that is in this pid namespace.
    client: Option<u32>,
}

impl LayerChange {
    /// Begins a change.
    ///
    /// # Errors
    /// The error text for the client: another change is not finished, or the server ends.
    pub fn begin(
        present: Option<&Self>,
        connection: &Connection,
        edit: LayerEdit,
        limit: Duration,
        sender: &ControlSender,
        wake: &Arc<EventFd>,
    ) -> Result<Self, String> {
        if let Some(present) = present {
            let who = present.client.map_or_else(
                || "a process in another pid namespace".to_owned(),
                |pid| format!("process {pid}"),
            );
            return Err(format!("{who} is changing the layers; try again when it has finished"));
        }
        let pending = sender.start(limit, wake, |reply| ControlRequest::ChangeLayers {
            edit: Box::new(edit),
            limit,
            reply,
        })?;
        Ok(Self { pending, connection: connection.serial, client: connection.client })
    }

    /// Sends the answer if it is there. Returns whether the change is over.
    pub fn take_answer(&self, connections: &mut [Connection], now: Instant) -> bool {
        let Some(answer) = self.pending.answer(now) else { return false };
        let waiting = connections.iter_mut().find(|each| each.serial == self.connection);
        if let Some(connection) = waiting {
            connection.send(answer.map_or_else(Answer::Error, |changed| {
                let pause_us = u64::try_from(changed.pause.as_micros()).unwrap_or(u64::MAX);
                Answer::Layers(LayersAnswer { name: changed.name, pause_us })
            }));
        }
        true
    }

    /// When to look for the answer at the latest.
    pub fn deadline(&self, now: Instant) -> Instant {
        self.pending.deadline(now)
    }
}

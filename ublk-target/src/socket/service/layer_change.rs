//! A change of layers that a client waits for. There is at most one at a time.

use std::time::{Duration, Instant};

use super::Service;
use crate::config::LayerEdit;
use crate::socket::control_request::{ControlRequest, LayersChanged, PendingRequest};
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

/// The longest limit of a change.
const MAX_LIMIT: Duration = Duration::from_secs(24 * 60 * 60);

impl Service {
    /// Begins a change for a connection, whose answer comes later.
    ///
    /// # Errors
    /// The error text for the client: another change is not finished, or the server ends.
    pub(super) fn begin_change(
        &mut self,
        index: usize,
        edit: LayerEdit,
        limit: Duration,
    ) -> Result<(), String> {
        self.layer_change.as_ref().map_or(Ok(()), |present| Err(present.refusal()))?;
        let (limit, edit) = (limit.min(MAX_LIMIT), Box::new(edit));
        let pending = self.control_sender.start(limit, &self.wake, |reply| {
            ControlRequest::ChangeLayers { edit, limit, reply }
        })?;
        let connection = &mut self.connections[index];
        connection.wait();
        let (serial, client) = (connection.serial, connection.client);
        self.layer_change = Some(LayerChange { pending, connection: serial, client });
        Ok(())
    }

    /// Passes on the answer to a change, if it is there.
    pub(super) fn take_answer(&mut self, now: Instant) {
        let Some(change) = &self.layer_change else { return };
        let Some(answer) = change.pending.answer(now) else { return };
        let serial = change.connection;
        self.layer_change = None;
        if let Some(connection) = self.connections.iter_mut().find(|it| it.serial == serial) {
            connection.send(answer.map_or_else(Answer::Error, |changed| {
                let pause_us = u64::try_from(changed.pause.as_micros()).unwrap_or(u64::MAX);
                Answer::Layers(LayersAnswer { name: changed.name, pause_us })
            }));
        }
    }

    /// Drops a change whose client has gone, which tells the main thread.
    pub(super) fn drop_unwanted_change(&mut self) {
        let is_there = |change: &LayerChange| {
            self.connections.iter().any(|each| each.serial == change.connection)
        };
        if !self.layer_change.as_ref().is_some_and(is_there) {
            self.layer_change = None;
        }
    }
}

impl LayerChange {
    /// What other clients are told that want the main thread.
    pub fn refusal(&self) -> String {
        let who = self.client.map_or_else(
            || "a process in another pid namespace".to_owned(),
            |pid| format!("process {pid}"),
        );
        format!("{who} is changing the layers; try again when it has finished")
    }

    /// When to look for the answer at the latest.
    pub fn deadline(&self, now: Instant) -> Instant {
        self.pending.deadline(now)
    }
}

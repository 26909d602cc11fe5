//! Queries the lanes.

use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use ublk_engine::engine::Recorder;
use ublk_engine::units::Qid;

use crate::io_thread::message::{LaneHandle, LaneMessage, LaneSnapshot};

/// A lane did not answer in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("queue {} does not answer", .0.0)]
pub(super) struct Silent(Qid);

/// The lanes of a device.
#[derive(Debug)]
pub(super) struct Lanes {
    handles: Vec<LaneHandle>,
    measuring: bool,
    /// An empty recorder for each lane, to swap with the one in use.
    spares: Vec<Option<Box<Recorder>>>,
    patience: Duration,
}

impl Lanes {
    pub fn new(handles: Vec<LaneHandle>, patience: Duration) -> Self {
        let spares = handles.iter().map(|_| None).collect();
        Self { handles, measuring: false, spares, patience }
    }

    /// Number of lanes, including those that have ended.
    pub fn count(&self) -> usize {
        self.handles.len()
    }

    /// A snapshot of each lane that has not ended, with its index.
    pub fn snapshots(&self, slots: bool) -> Result<Vec<(usize, Box<LaneSnapshot>)>, Silent> {
        let answers = self.ask(|_, lane, reply| {
            // A tag has its own slot, at times one of the pool, and perhaps one for scratch.
            let room = if slots { 3 * usize::from(lane.depth) } else { 0 };
            let snapshot = Box::new(LaneSnapshot::new(lane.qid, room));
            LaneMessage::Snapshot { snapshot, reply }
        })?;
        let indexed = answers.into_iter().enumerate();
        Ok(indexed.filter_map(|(index, answer)| Some((index, answer?))).collect())
    }

    pub fn are_measured(&self) -> bool {
        self.measuring
    }

    /// Starts to measure latencies.
    pub fn begin_measuring(&mut self) -> Result<(), Silent> {
        self.measuring = true;
        self.ask(|_, _, reply| LaneMessage::Measure { recorder: Some(Box::default()), reply })?;
        Ok(())
    }

    /// Stops measuring, and frees the memory here.
    pub fn end_measuring(&mut self) {
        if std::mem::take(&mut self.measuring) {
            self.spares.fill_with(|| None);
            // A lane that is slow to answer ends it when it comes to it.
            let _ = self.ask(|_, _, reply| LaneMessage::Measure { recorder: None, reply });
        }
    }

    /// Returns the latencies of each lane since the last call.
    pub fn harvest(&mut self, mut take: impl FnMut(usize, &Recorder)) -> Result<(), Silent> {
        if !self.measuring {
            return Ok(());
        }
        let mut spares = std::mem::take(&mut self.spares);
        let full = self.ask(|index, _, reply| {
            let recorder = Some(spares[index].take().unwrap_or_default());
            LaneMessage::Measure { recorder, reply }
        });
        self.spares = spares;
        // A lane that has ended takes its recorder with it.
        for (index, recorder) in full?.into_iter().enumerate() {
            if let Some(mut recorder) = recorder.flatten() {
                take(index, &recorder);
                recorder.clear();
                self.spares[index] = Some(recorder);
            }
        }
        Ok(())
    }

    /// Sends each lane a message, then waits for the answers. A lane that has ended gives none.
    fn ask<T>(
        &self,
        mut message: impl FnMut(usize, &LaneHandle, SyncSender<T>) -> LaneMessage,
    ) -> Result<Vec<Option<T>>, Silent> {
        let asked: Vec<_> = self
            .handles
            .iter()
            .enumerate()
            .map(|(index, lane)| {
                let (reply, answer) = sync_channel(1);
                lane.send(message(index, lane, reply));
                (lane.qid, answer)
            })
            .collect();
        let deadline = Instant::now() + self.patience;
        let answers = asked.into_iter().map(|(qid, answer)| {
            match answer.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(answer) => Ok(Some(answer)),
                Err(RecvTimeoutError::Disconnected) => Ok(None),
                Err(RecvTimeoutError::Timeout) => Err(Silent(qid)),
            }
        });
        answers.collect()
    }
}

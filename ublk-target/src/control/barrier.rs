//! The barrier: an instant at which no request of a device is begun and not ended, in any lane.
//!
//! The lanes go on taking deliveries, begin none of them, and end everything that has begun. The
//! driver knows nothing of it. Once all lanes are quiet, they stay so until they are released: that is
//! the instant at which control may change what all of them share.

use std::fmt;
use std::ops::ControlFlow;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use ublk_engine::engine::BegunRequest;
use ublk_engine::request::RequestKind;
use ublk_engine::units::Qid;
use uring_ext::Errno;

use crate::control::lanes::DeviceLanes;
use crate::io_thread::hold::{QuietSignal, TargetChange};
use crate::io_thread::message::LaneMessage;
use crate::os::steps::step;
use crate::os::wait::Wait;
use crate::os::wakeups::Wakeups;

/// How long lanes may take to answer. They answer between two batches.
const TO_ANSWER: Duration = Duration::from_secs(5);

/// All lanes of a device hold, and are quiet. Dropping it releases them without a change.
pub(super) struct Barrier<'a> {
    lanes: &'a DeviceLanes,
    since: Instant,
    is_released: bool,
}

/// Why a barrier was not reached. The device goes on as before.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum NotReached {
    /// A request that had begun did not end in time; the oldest one, with its queue.
    Busy { waited: Duration, oldest: Option<(Qid, BegunRequest)> },
    /// A signal came.
    Interrupted(Signal),
    /// A lane has ended: the device is stopped.
    Ended,
    /// There are no more descriptors.
    Failed(Errno),
}

impl<'a> Barrier<'a> {
    /// Waits at most `limit` until all lanes of a device are quiet.
    pub fn reach(
        lanes: &'a mut DeviceLanes,
        wakeups: &Wakeups,
        limit: Duration,
    ) -> Result<Self, NotReached> {
        let quiet = QuietSignal::of(lanes.count()).map_err(NotReached::Failed)?;
        if lanes.has_ended() {
            return Err(NotReached::Ended);
        }
        let lanes = &*lanes;
        let barrier = Self { lanes, since: Instant::now(), is_released: false };
        lanes.send(|| LaneMessage::Hold { quiet: Arc::clone(&quiet) });
        step("held");
        let mut wait = Wait::at_most(limit).since(barrier.since).or_signal(wakeups);
        let reached = wait.until_or(Some(quiet.as_fd()), || match quiet.is_complete() {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue("the requests that have begun"),
        });
        match reached {
            Ok(()) => {
                step("quiet");
                Ok(barrier)
            }
            Err(unmet) => match unmet.signal {
                Some(signal) => {
                    wakeups.give_back(signal);
                    Err(NotReached::Interrupted(signal))
                }
                None => {
                    let oldest = oldest_begun(lanes);
                    // The last request may have ended meanwhile. Lanes that are quiet stay so.
                    if quiet.is_complete() {
                        return Ok(barrier);
                    }
                    Err(NotReached::Busy { waited: limit, oldest })
                }
            },
        }
    }

    /// Gives each lane its new target, and lets it begin the requests that were held back. Returns how
    /// long they were.
    pub fn change(mut self, change: impl Fn(Qid) -> TargetChange) -> Duration {
        self.release(|qid| Some(Box::new(change(qid))));
        self.since.elapsed()
    }

    fn release(&mut self, change: impl Fn(Qid) -> Option<Box<TargetChange>>) {
        self.is_released = true;
        // The lanes must not wait for memory, so all changes are made first.
        let changes: Vec<_> = self.lanes.qids().map(change).collect();
        let (reply, released) = sync_channel(changes.len());
        let mut changes = changes.into_iter();
        self.lanes.send(|| LaneMessage::Release {
            change: changes.next().flatten(),
            reply: reply.clone(),
        });
        drop(reply);
        let deadline = Instant::now() + TO_ANSWER;
        for _ in 0..self.lanes.count() {
            let left = deadline.saturating_duration_since(Instant::now());
            match released.recv_timeout(left) {
                Ok(Some(change)) if !change.is_made => {
                    log::error!("a lane was not quiet, and keeps its layers");
                }
                Ok(_) => {}
                // A lane that has ended closes the channel.
                Err(_) => break,
            }
        }
    }
}

impl Drop for Barrier<'_> {
    fn drop(&mut self) {
        if !self.is_released {
            self.release(|_| None);
        }
    }
}

/// The oldest request of all lanes that has begun and not ended.
fn oldest_begun(lanes: &DeviceLanes) -> Option<(Qid, BegunRequest)> {
    let (reply, answers) = sync_channel(lanes.count());
    lanes.send(|| LaneMessage::OldestBegun { reply: reply.clone() });
    drop(reply);
    let deadline = Instant::now() + TO_ANSWER;
    let next = || answers.recv_timeout(deadline.saturating_duration_since(Instant::now())).ok();
    let found = std::iter::from_fn(next).filter_map(|(qid, begun)| Some((qid, begun?)));
    found.max_by_key(|(_, begun)| begun.age_ns)
}

/// A request in words, with the backing that it waits for.
pub(super) struct InWords<'a> {
    pub qid: Qid,
    pub begun: BegunRequest,
    /// The path of the backing of its operation.
    pub backing: Option<&'a std::path::Path>,
}

impl fmt::Display for InWords<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let BegunRequest { tag, request, age_ns, op } = self.begun;
        let kind = RequestKind::NAMES[request.kind.index()];
        write!(f, "a {kind} request")?;
        if request.len > 0 {
            write!(f, " of {} bytes at {}", request.len, request.offset)?;
        }
        let age = Duration::from_nanos(age_ns).as_secs_f64();
        write!(f, " (queue {}, tag {}), {age:.1} s old, waits for ", self.qid.0, tag.0)?;
        match (op, self.backing) {
            (None, _) => f.write_str("its buffer"),
            (Some(op), _) if op.kind == ublk_engine::plan::OpKind::Delay => {
                f.write_str("the end of a delay")
            }
            (Some(_), Some(path)) => write!(f, "{}", path.display()),
            (Some(op), None) => write!(f, "backing {}", op.backing.0),
        }
    }
}

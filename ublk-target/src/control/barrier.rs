//! The barrier: an instant at which no request of a device is begun and not ended, in any lane.
//!
//! The lanes go on taking deliveries, begin none of them, and end everything that has begun. The
//! driver knows nothing of it. Once all lanes are quiet, they stay so until they are released: that is
//! the instant at which control may change what all of them share.

use std::fmt;
use std::ops::ControlFlow;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use ublk_engine::engine::BegunRequest;
use ublk_engine::plan::OpKind;
use ublk_engine::request::RequestKind;
use ublk_engine::units::Qid;
use uring_ext::Errno;
use uring_ext::task::set_io_flusher;

use crate::control::lanes::DeviceLanes;
use crate::io_thread::hold::{LaneToken, QuietSignal, TargetChange, Told};
use crate::io_thread::message::LaneMessage;
use crate::os::steps::step;
use crate::os::wait::{Unmet, Wait};
use crate::os::wakeups::Wakeups;

/// How long lanes may take to answer. They answer between two batches.
const TO_ANSWER: Duration = Duration::from_secs(5);

/// The interval at which a wait looks whether somebody still wants the change.
const TO_LOOK: Duration = Duration::from_millis(100);

/// All lanes of a device hold, and are quiet. Dropping it releases them without a change.
pub(super) struct Barrier<'a> {
    lanes: &'a DeviceLanes,
    since: Instant,
    is_released: bool,
    /// Kept until the lanes are released, so that none of them frees it.
    quiet: Arc<QuietSignal>,
    _flusher: Flusher,
}

/// The calling thread does not wait for writeback while it has this: what it allocates while it holds a
/// device might wait for that device.
struct Flusher;

impl Flusher {
    fn begin() -> Self {
        // Not essential, and a lane has said if it cannot be.
        let _ = set_io_flusher(true);
        Self
    }
}

impl Drop for Flusher {
    fn drop(&mut self) {
        let _ = set_io_flusher(false);
    }
}

/// Why a barrier was not reached. The device goes on as before.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum NotReached {
    /// A request that had begun did not end in time; the oldest one, with its queue.
    Busy { waited: Duration, oldest: Option<(Qid, BegunRequest)> },
    /// A signal came.
    Interrupted(Signal),
    /// Nobody wants the change any more.
    Unwanted,
    /// A lane has ended.
    Ended,
    /// There are no more descriptors.
    Failed(Errno),
}

impl<'a> Barrier<'a> {
    /// Waits until all lanes of a device are quiet: at most `limit`, and while the change is wanted.
    pub fn reach(
        lanes: &'a DeviceLanes,
        wakeups: &Wakeups,
        limit: Duration,
        is_wanted: impl Fn() -> bool,
    ) -> Result<Self, NotReached> {
        let quiet = QuietSignal::of(lanes.count()).map_err(NotReached::Failed)?;
        let (since, _flusher) = (Instant::now(), Flusher::begin());
        let barrier = Self { lanes, since, is_released: false, quiet, _flusher };
        lanes.send(|| LaneMessage::Hold { quiet: LaneToken::of(&barrier.quiet) });
        step("held");
        let mut wait = Wait::at_most(limit).since(since).every(TO_LOOK).or_signal(wakeups);
        let reached = wait.until_or(Some(barrier.quiet.as_fd()), || match barrier.quiet.told() {
            Told::AllQuiet => ControlFlow::Break(Ok(())),
            Told::OneEnded => ControlFlow::Break(Err(NotReached::Ended)),
            Told::Nothing if !is_wanted() => ControlFlow::Break(Err(NotReached::Unwanted)),
            Told::Nothing => ControlFlow::Continue("the requests that have begun"),
        });
        match reached {
            Ok(reached) => reached?,
            Err(Unmet { signal: Some(signal), .. }) => {
                wakeups.give_back(signal);
                return Err(NotReached::Interrupted(signal));
            }
            Err(_) => {
                let oldest = oldest_begun(lanes);
                // The last request may have ended meanwhile. Lanes that are quiet stay so.
                match barrier.quiet.told() {
                    Told::AllQuiet => {}
                    Told::OneEnded => return Err(NotReached::Ended),
                    Told::Nothing => return Err(NotReached::Busy { waited: limit, oldest }),
                }
            }
        }
        step("quiet");
        Ok(barrier)
    }

    /// Gives each lane its new target, in the order of [`DeviceLanes::qids`], and lets it begin the
    /// requests that were held back. Returns how long they were.
    pub fn change(mut self, changes: Vec<TargetChange>) -> Duration {
        self.release(changes);
        self.since.elapsed()
    }

    /// Releases the lanes, with a change for each or none.
    fn release(&mut self, changes: Vec<TargetChange>) {
        self.is_released = true;
        let (reply, released) = sync_channel(self.lanes.count());
        let mut changes = changes.into_iter().map(Box::new);
        self.lanes.send(|| LaneMessage::Release { change: changes.next(), reply: reply.clone() });
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
            self.release(Vec::new());
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
    pub backing: Option<&'a Path>,
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
            (Some(op), _) if op.kind == OpKind::Delay => f.write_str("the end of a delay"),
            (Some(_), Some(path)) => write!(f, "{}", path.display()),
            (Some(op), None) => write!(f, "backing {}", op.backing.0),
        }
    }
}

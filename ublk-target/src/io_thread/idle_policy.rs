//! The idle policy of a lane: whether it polls for completions before it sleeps, and whether it runs at
//! real-time priority while requests come one at a time. Both follow from its last waits.

use nix::sched::{CpuSet, sched_getaffinity};
use nix::sys::resource::{UsageWho, getrusage};
use nix::unistd::Pid;
use uring_ext::task;

use crate::config::busy_wait::BusyWait;
use crate::io_thread::busy_poll::BusyPoll;
use crate::io_thread::realtime_boost::RealtimeBoost;
use crate::os::clock::precise_now;

/// How the calling thread, a lane's, waits.
#[derive(Debug)]
pub struct IdlePolicy {
    busy_poll: BusyPoll,
    /// If it may go first.
    boost: Option<RealtimeBoost>,
    /// Whoever it serves lets it do more than sleep.
    is_allowed: bool,
    /// When the last wait ended, if that was of interest. What is done between waits takes little,
    /// and one look at the clock for each is enough.
    last_ended: Option<u64>,
}

impl IdlePolicy {
    /// Of a lane on this thread.
    #[must_use]
    pub fn new(busy_wait: BusyWait) -> Self {
        // Polling on the only CPU would starve the client.
        let may_go_first = busy_wait != BusyWait::Off && is_bound() && can_go_first();
        Self {
            busy_poll: BusyPoll::new(busy_wait, processors()),
            boost: may_go_first.then(RealtimeBoost::default),
            is_allowed: true,
            last_ended: None,
        }
    }

    /// Whether it may do more than sleep.
    pub fn allow(&mut self, is_allowed: bool) {
        self.is_allowed = is_allowed;
        if let Some(boost) = self.boost.as_mut().filter(|_| !is_allowed) {
            if boost.is_first() {
                go_first(false);
            }
            *boost = RealtimeBoost::default();
        }
    }

    /// For how many nanoseconds to look for completions before the next sleep; 0 for not at all.
    #[must_use]
    pub const fn look_for(&self) -> u64 {
        if self.is_allowed { self.busy_poll.look_for() } else { 0 }
    }

    /// There was a wait, with so many operations in flight as it began.
    pub fn ended(&mut self, in_flight: usize) {
        if self.busy_poll.looks() {
            let now = self.busy_poll.is_timed().then(precise_now);
            let last = std::mem::replace(&mut self.last_ended, now);
            let ns = now.zip(last).map(|(now, last)| now - last);
            self.busy_poll.waited(ns, in_flight, times_preempted);
        } else if let Some(boost) = self.boost.as_mut().filter(|_| self.is_allowed) {
            if let Some(is_first) = boost.waited(in_flight) {
                go_first(is_first);
            }
        }
    }
}

/// Whether a ring should show when the kernel has work for this thread, so that it can be looked
/// for.
#[must_use]
pub fn may_look(busy_wait: BusyWait) -> bool {
    busy_wait != BusyWait::Off && processors() > 1
}

/// Whether this thread may run on one processor only. A share of several that amounts to one is
/// another thing: real-time priority would take more than the share.
fn is_bound() -> bool {
    let set = sched_getaffinity(Pid::from_raw(0));
    set.is_ok_and(|set| {
        (0..CpuSet::count()).filter(|cpu| set.is_set(*cpu) == Ok(true)).count() == 1
    })
}

/// Processors that this thread may use, or as many as its share amounts to.
fn processors() -> usize {
    std::thread::available_parallelism().map_or(1, Into::into)
}

/// Whether this thread may have real-time priority. One whose policy somebody has chosen keeps it.
fn can_go_first() -> bool {
    if !task::is_ordinary() {
        return false;
    }
    let tried = task::set_real_time(true).and_then(|()| task::set_real_time(false));
    if let Err(errno) = tried {
        log::debug!("a lane: sched_setscheduler: {errno}");
    }
    tried.is_ok()
}

/// It was possible when it was tried; should it not be any more, things stay as they are.
fn go_first(is_first: bool) {
    let _ = task::set_real_time(is_first);
}

/// How often another thread was given the processor while this one could run.
fn times_preempted() -> u64 {
    let usage = getrusage(UsageWho::RUSAGE_THREAD);
    usage.map_or(0, |it| u64::try_from(it.involuntary_context_switches()).unwrap_or(0))
}

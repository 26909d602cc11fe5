//! The idle policy of a lane: whether it polls for completions before it sleeps, and whether it
//! runs at real-time priority while requests come one at a time. It decides both by the lane's last
//! waits.

use nix::sched::{CpuSet, sched_getaffinity};
use nix::sys::resource::{UsageWho, getrusage};
use nix::unistd::Pid;
use uring_ext::task;

use crate::config::busy_wait::BusyWait;
use crate::io_thread::busy_poll::BusyPoll;
use crate::io_thread::realtime_boost::RealtimeBoost;
use crate::os::clock::precise_now;

/// How the calling lane thread waits.
#[derive(Debug)]
pub struct IdlePolicy {
    busy_poll: BusyPoll,
    /// The real-time boost, if the thread may have it.
    boost: Option<RealtimeBoost>,
    /// All devices of the lane allow more than sleeping.
    is_allowed: bool,
    /// The time at which the last wait ended, if that matters. The time between waits is short, so
    /// one clock read per wait is enough.
    last_ended: Option<u64>,
}

impl IdlePolicy {
    /// The policy of a lane on this thread.
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

    /// Sets whether the lane may do more than sleep.
    pub fn allow(&mut self, is_allowed: bool) {
        self.is_allowed = is_allowed;
        if let Some(boost) = self.boost.as_mut().filter(|_| !is_allowed) {
            if boost.is_first() {
                go_first(false);
            }
            *boost = RealtimeBoost::default();
        }
    }

    /// The time to poll for completions before the next sleep, in nanoseconds; 0 for not at all.
    #[must_use]
    pub const fn look_for(&self) -> u64 {
        if self.is_allowed { self.busy_poll.look_for() } else { 0 }
    }

    /// Records a wait, with so many operations in flight at its start.
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

/// Whether a ring must show pending kernel work for this thread, so that the thread can poll for
/// it.
#[must_use]
pub fn may_look(busy_wait: BusyWait) -> bool {
    busy_wait != BusyWait::Off && processors() > 1
}

/// Whether this thread may run on one CPU only. A CPU quota that amounts to one CPU is different:
/// at real-time priority the thread would exceed its quota.
fn is_bound() -> bool {
    let set = sched_getaffinity(Pid::from_raw(0));
    set.is_ok_and(|set| {
        (0..CpuSet::count()).filter(|cpu| set.is_set(*cpu) == Ok(true)).count() == 1
    })
}

/// The number of CPUs that this thread may use, by affinity and CPU quota.
fn processors() -> usize {
    std::thread::available_parallelism().map_or(1, Into::into)
}

/// Whether this thread may have real-time priority. If somebody has set its scheduling policy, it
/// keeps that.
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

/// The first attempt succeeded. If it fails now, the priority stays unchanged.
fn go_first(is_first: bool) {
    let _ = task::set_real_time(is_first);
}

/// How often this thread was preempted.
fn times_preempted() -> u64 {
    let usage = getrusage(UsageWho::RUSAGE_THREAD);
    usage.map_or(0, |it| u64::try_from(it.involuntary_context_switches()).unwrap_or(0))
}

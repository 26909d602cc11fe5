//! The supervisor: a process without a data path that replaces a dead server.
//!
//! It need not be the server's parent: it watches a process descriptor. So the server can replace a
//! dead supervisor too.

use std::ops::ControlFlow;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::poll::PollTimeout;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use uring_ext::control::{Control, ControlError};

use crate::control::leftovers;
use crate::device::description;
use crate::device::paths::RUN_DIR;
use crate::device::processes;
use crate::device::trouble::Trouble;
use crate::os::process::Watch;
use crate::os::steps::step;
use crate::os::wait::Wait;
use crate::os::wakeups::{Wake, Wakeups};

/// How soon, and how often, a dead server is replaced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    /// A server that has lived this long counts as healthy.
    pub sound: Duration,
    /// The pause before the second attempt. It doubles with each further one. The first attempt is
    /// immediate.
    pub pause: Duration,
    /// The longest pause.
    pub longest_pause: Duration,
    /// The maximum number of failed servers in a row. Servers that failed because something was
    /// lacking that may come later do not count.
    pub attempts: u32,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            sound: Duration::from_secs(1),
            pause: Duration::from_millis(50),
            longest_pause: Duration::from_secs(5),
            attempts: 10,
        }
    }
}

/// The number of failed servers in a row.
#[derive(Clone, Copy, Debug)]
struct Attempts {
    policy: Policy,
    failed: u32,
    /// The number of these that do not count.
    lacked: u32,
}

impl Attempts {
    /// Records the death of a server that has lived this long. Returns the pause before the next
    /// one, or `None` to give up.
    fn next(&mut self, lived: Duration) -> Option<Duration> {
        if lived >= self.policy.sound {
            (self.failed, self.lacked) = (0, 0);
            return Some(Duration::ZERO);
        }
        self.failed = self.failed.saturating_add(1);
        if self.failed - self.lacked >= self.policy.attempts {
            return None;
        }
        let doublings = self.failed.saturating_sub(2).min(16);
        let pause =
            if self.failed == 1 { Duration::ZERO } else { self.policy.pause * (1 << doublings) };
        Some(pause.min(self.policy.longest_pause))
    }
}

impl Attempts {
    /// As [`Attempts::next`], after a failure that may pass.
    fn next_when_lacking(&mut self) -> Duration {
        self.lacked = self.lacked.saturating_add(1);
        self.next(Duration::ZERO).unwrap_or(self.policy.longest_pause)
    }
}

/// How the supervision ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// The device is gone or stopped.
    Stopped,
    /// No server stays alive. This is the reason: the last error of the last one, or how it died.
    /// The device waits for `recover`.
    GivenUp(String),
}

/// Why a device has no new server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NotRecovered {
    /// A signal that ends the server came, and was passed on to the starting one.
    Signal(Signal),
    /// The server has failed, with this error.
    Failed(String),
    /// It has failed with an error that may pass: no memory, no processes, no space in the file
    /// system, a backing in use.
    Lacking(String),
}

/// Starts a server that recovers a device, and waits until it is live. Returns its process id, or
/// the reason for the failure. The calling process becomes its supervisor.
pub type Recover<'a> = dyn Fn(u32) -> Result<u32, NotRecovered> + 'a;

/// Supervises a device until it is gone, or no server stays alive. Passes signals that end a server
/// on to the server; SIGHUP too, after it has called `reopen_log`.
///
/// # Errors
/// [`ControlError`] if the driver cannot be used.
pub fn supervise(
    id: u32,
    server: u32,
    policy: Policy,
    wakeups: &Wakeups,
    recover: &Recover<'_>,
    reopen_log: &dyn Fn(),
) -> Result<End, ControlError> {
    let control = Control::open()?;
    let mut attempts = Attempts { policy, failed: 0, lacked: 0 };
    let mut pid = server;
    loop {
        let began = Instant::now();
        let watch = Watch::on(pid);
        let was_told = wait_for_its_end(pid, &watch, wakeups, reopen_log);
        let mut lived = began.elapsed();
        let mut why = format!("the server ({pid}) has died");
        let mut is_lacking = false;
        loop {
            if was_told || is_stopped(&control, id) {
                return Ok(End::Stopped);
            }
            let pause =
                if is_lacking { Some(attempts.next_when_lacking()) } else { attempts.next(lived) };
            let Some(pause) = pause else {
                return Ok(give_up(id, &why));
            };
            log::warn!("{why}: recovering device {id}");
            match rest(pause, wakeups, || is_stopped(&control, id)) {
                Rest::Over => {}
                Rest::Stopped => return Ok(End::Stopped),
                Rest::Signal(signal) => return Ok(leave(id, signal)),
            }
            step("recovering");
            let asked = Instant::now();
            match recover(id) {
                Ok(new) => {
                    let took = asked.elapsed().as_millis();
                    log::info!("device {id} has a new server ({new}) after {took} ms");
                    pid = new;
                    break;
                }
                Err(NotRecovered::Signal(signal)) => return Ok(leave(id, signal)),
                Err(failed @ (NotRecovered::Failed(_) | NotRecovered::Lacking(_))) => {
                    // Another process may have been faster.
                    if let Some(other) = live_server(&control, id) {
                        pid = other;
                        break;
                    }
                    is_lacking = matches!(failed, NotRecovered::Lacking(_));
                    if let NotRecovered::Failed(error) | NotRecovered::Lacking(error) = failed {
                        tell_trouble(id, &error, false);
                        (why, lived) = (error, Duration::ZERO);
                    }
                }
            }
        }
    }
}

/// Ends the supervision of a device without a server.
fn leave(id: u32, signal: Signal) -> End {
    log::info!("{signal}: ending; device {id} waits for recovery");
    End::Stopped
}

/// How a pause ends.
enum Rest {
    Over,
    Stopped,
    Signal(Signal),
}

/// Pauses. The deletion of the device ends the pause.
fn rest(pause: Duration, wakeups: &Wakeups, is_stopped: impl Fn() -> bool) -> Rest {
    let mut wait = Wait::at_most(pause).every(Duration::from_millis(50)).or_signal(wakeups);
    let stopped = wait.until(|| {
        if is_stopped() { ControlFlow::Break(()) } else { ControlFlow::Continue("its end") }
    });
    match stopped {
        Ok(()) => Rest::Stopped,
        Err(unmet) => unmet.signal.map_or(Rest::Over, Rest::Signal),
    }
}

/// Whether the server was told to end.
fn wait_for_its_end(pid: u32, watch: &Watch, wakeups: &Wakeups, reopen_log: &dyn Fn()) -> bool {
    let mut was_told = false;
    loop {
        let Some(fd) = watch.fd() else { return was_told };
        match wakeups.wait_or_hangup(Some(fd), PollTimeout::NONE) {
            Wake::Signal(signal) => {
                was_told = true;
                tell(pid, signal);
            }
            Wake::Hangup => {
                reopen_log();
                tell(pid, Signal::SIGHUP);
            }
            Wake::Other => return was_told,
            Wake::LaneEnded | Wake::Undelivered | Wake::ControlRequest | Wake::TimedOut => {}
        }
    }
}

fn tell(pid: u32, signal: Signal) {
    log::info!("{signal}: told the server ({pid})");
    let told = i32::try_from(pid).map(|pid| kill(Pid::from_raw(pid), signal));
    if let Ok(Err(errno)) = told {
        log::warn!("cannot tell the server ({pid}): {errno}");
    }
}

fn is_stopped(control: &Control, id: u32) -> bool {
    match control.info(id) {
        Ok(info) => !description::has_disk(&info),
        Err(error) => {
            if description::is_missing(&error) {
                // Removes what its server has left, if it was killed at its end.
                leftovers::remove_files_of(control, id);
            }
            description::is_missing(&error)
        }
    }
}

fn live_server(control: &Control, id: u32) -> Option<u32> {
    let info = control.info(id).ok()?;
    let pid = u32::try_from(info.ublksrv_pid).ok()?;
    (description::has_disk(&info) && processes::is_ours(pid)).then_some(pid)
}

/// Reports that the device has no server, and why.
fn tell_trouble(id: u32, why: &str, given_up: bool) {
    let trouble = Trouble { why: why.to_owned(), given_up };
    // If there is no room for the report, the log has it.
    if let Err(error) = trouble.write(Path::new(RUN_DIR), id) {
        log::warn!("cannot write to {RUN_DIR}: {error}");
    }
}

/// Reports that the device is not supervised any more.
fn give_up(id: u32, why: &str) -> End {
    log::error!("{why}: given up; `ublk-target recover -n {id}` tries again");
    tell_trouble(id, why, true);
    End::GivenUp(why.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_that_keep_dying_are_given_up() {
        let ms = Duration::from_millis;
        let policy = Policy { sound: ms(1000), pause: ms(50), longest_pause: ms(300), attempts: 7 };
        let mut attempts = Attempts { policy, failed: 0, lacked: 0 };
        let pauses: Vec<_> = std::iter::from_fn(|| attempts.next(ms(10))).collect();
        assert_eq!(pauses, [0, 50, 100, 200, 300, 300].map(ms));
    }

    #[test]
    fn what_may_be_there_later_is_waited_for() {
        let policy = Policy::default();
        let mut attempts = Attempts { policy, failed: 0, lacked: 0 };
        let pauses: Vec<_> = (0..1000).map(|_| attempts.next_when_lacking()).collect();
        assert!(pauses.is_sorted() && pauses[0] == Duration::ZERO);
        assert_eq!(pauses[999], policy.longest_pause);
        // Other failures count as before.
        let left = std::iter::from_fn(|| attempts.next(Duration::ZERO)).count();
        assert_eq!(left, usize::try_from(policy.attempts).unwrap() - 1);
    }

    #[test]
    fn a_server_that_served_begins_anew() {
        let mut attempts = Attempts { policy: Policy::default(), failed: 0, lacked: 0 };
        for _ in 0..1000 {
            assert_eq!(attempts.next(Duration::from_secs(1)), Some(Duration::ZERO));
            for _ in 1..Policy::default().attempts {
                assert!(attempts.next(Duration::ZERO).is_some());
            }
        }
        assert_eq!(attempts.next(Duration::ZERO), None);
    }
}

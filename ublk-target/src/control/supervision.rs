//! The server's side of its supervision: it watches the supervisor, and replaces a dead one.

use std::io;
use std::process::Child;
use std::time::{Duration, Instant};

use nix::poll::PollTimeout;

use crate::os::process::Watch;

/// The supervisor of the server.
pub(super) struct Supervision {
    pub watch: Option<Watch>,
    /// The supervisor, if this server has started it; kept so that it can be reaped.
    child: Option<Child>,
    /// When to start another one.
    revive_at: Option<Instant>,
}

impl Supervision {
    /// The pause after a supervisor's death, so that one that dies at once is not restarted in a
    /// tight loop.
    const PAUSE: Duration = Duration::from_millis(500);

    pub fn of(supervisor: Option<u32>) -> Self {
        let mut own = Self { watch: supervisor.map(Watch::on), child: None, revive_at: None };
        if own.watch.as_ref().is_some_and(|watch| watch.fd().is_none()) {
            own.has_died();
        }
        own
    }

    pub fn has_died(&mut self) {
        log::warn!("the supervisor has died");
        self.watch = None;
        if let Some(mut child) = self.child.take() {
            let _ = child.wait();
        }
        self.revive_at = Some(Instant::now() + Self::PAUSE);
    }

    /// The time until the next action of its own.
    pub fn pause(&self) -> PollTimeout {
        self.revive_at.map_or(PollTimeout::NONE, |at| {
            // Rounded up, so that the time has passed when the wait is over.
            let left = at.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
            PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
        })
    }

    /// Starts another supervisor. Returns its process id.
    pub fn revive(&mut self, start: impl FnOnce() -> io::Result<Child>) -> Option<u32> {
        match start() {
            Ok(child) => {
                log::info!("supervised by {}", child.id());
                self.watch = Some(Watch::on(child.id()));
                self.revive_at = None;
                self.child = Some(child);
            }
            Err(error) => {
                log::error!("cannot start a supervisor: {error}");
                self.revive_at = Some(Instant::now() + 10 * Self::PAUSE);
            }
        }
        self.child.as_ref().map(Child::id)
    }
}

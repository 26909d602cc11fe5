//! How a server ends: it stops the device, deletes it, or leaves it to the next one.

use std::ops::ControlFlow;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::Duration;

use uring_ext::Errno;

use crate::control::error::{ServeError, SetupError};
use crate::control::helpers::StopHelper;
use crate::control::server::Server;
use crate::device::description;
use crate::device::paths::{self, RUN_DIR};
use crate::device::state_file::StateFile;
use crate::io_thread::message::LaneMessage;
use crate::os::process::PidFd;
use crate::os::steps::step;
use crate::os::wait::{Wait, Words};

impl Server {
    /// Has the lanes end as soon as they have no request in hand, and waits for that.
    pub fn drain(&mut self) {
        self.lanes.send(|| LaneMessage::Drain);
        if let Err(error) = self.lanes.join() {
            log::error!("{error}");
        }
        // What these had to say has been said.
        while self.wakeups.take_lane_ended() || self.wakeups.take_undelivered() {}
    }

    /// Lets go of all that another server needs.
    pub fn let_go(&mut self) {
        self.control_requests = None;
        drop(self.stats.take());
        drop(self.cdev.take());
    }

    /// Stops the device, which completes or fails outstanding I/O. It may take as long as that
    /// I/O; a second signal cancels what is in flight on the backings, and a third ends the wait
    /// and leaves the rest to the kernel and to `del`.
    ///
    /// Another process does it. A server that is killed while a command of its own waits for
    /// outstanding I/O would wait for itself, for ever: the command keeps its files open, so the
    /// driver never learns of its death and fails no I/O.
    pub fn stop(&self, stop: &StopHelper<'_>) -> Result<(), ServeError> {
        let failed = |error: std::io::Error| {
            SetupError::new("cannot start a process that stops the device", Errno::of(&error))
        };
        let mut process = stop(self.id).map_err(failed)?;
        let pidfd = PidFd::of_child(&process).map_err(failed)?;
        let mut cancelled = false;
        let words = Duration::from_secs(10);
        let mut wait = Wait::endless().or_signal(&self.wakeups).telling(words, words, |what, _| {
            log::warn!("waiting for {what}");
        });
        let path = paths::block_path(self.id);
        let what = Words(|| format!("the outstanding I/O of {}", path.display()));
        let status = loop {
            let ended = wait.until_or(Some(pidfd.as_fd()), || match process.try_wait() {
                Ok(None) => ControlFlow::Continue(&what),
                Ok(Some(status)) => ControlFlow::Break(Ok(status)),
                Err(error) => ControlFlow::Break(Err(error)),
            });
            let signal = match ended {
                Ok(status) => break status.map_err(failed)?,
                Err(unmet) => unmet.signal,
            };
            if let Some(signal) = signal {
                if cancelled {
                    log::error!("{signal} again: ending with I/O outstanding");
                    std::process::exit(1);
                }
                log::warn!("{signal} again: cancelling the I/O on the backings");
                cancelled = true;
                self.lanes.send(|| LaneMessage::CancelAll);
            }
        };
        // It has said why.
        if status.success() { Ok(()) } else { Err(ServeError::NotStopped) }
    }

    /// Deletes the device and waits for the lanes, whose fetches thereby end. The character
    /// device stays open until the deletion is under way, so that the id cannot have passed to
    /// another device. A device that is left to the next server is only let go of.
    pub fn take_down(mut self) -> Result<(), ServeError> {
        let mut result = Ok(());
        if self.is_left {
            self.control_requests = None;
            // The fetches of the other lanes end with their process.
            drop(self.stats.take());
            return Ok(());
        }
        // One that was never opened may be another one by now.
        if self.cdev.is_none() && self.is_deleted() {
            return Ok(());
        }
        step("stopped");
        if self.is_removed() {
            // Deleting it again would not take back what was fetched since.
            let _ = self.control.stop(self.id).and_then(|pending| self.control.finish(pending));
        }
        let deleted = self.control.delete(self.id).and_then(|pending| self.control.finish(pending));
        step("deleted");
        match deleted {
            Err(error) if !description::is_missing(&error) => result = Err(error.into()),
            Ok(_) | Err(_) => {}
        }
        result = result.and(self.lanes.join().map_err(ServeError::from));
        // Whoever asks for something now is not answered any more, and must not be waited for.
        self.control_requests = None;
        // It tells of the lanes until they have ended. The id is still this device's, so that no
        // other server can have made a socket of this name.
        drop(self.stats.take());
        step("deaf");
        StateFile::remove(Path::new(RUN_DIR), self.id);
        step("forgotten");
        drop(self.cdev.take());
        result
    }

    /// Leaves the device to the next server, whatever comes, until [`Server::keep`].
    pub fn leave(&mut self) {
        self.is_left = true;
    }

    /// It is this server's now, to its orderly end.
    pub fn keep(&mut self) {
        self.is_left = false;
    }
}

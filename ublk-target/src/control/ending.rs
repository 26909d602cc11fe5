//! The end of a server: it stops its device, deletes it, or leaves it to the next server.

use std::ops::ControlFlow;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::ExitStatus;
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
    /// Tells the lanes to end as soon as no request is open, and waits for that.
    pub fn drain(&mut self) {
        self.lanes.send(|| LaneMessage::Drain);
        if let Err(error) = self.lanes.join() {
            log::error!("{error}");
        }
        // The lanes' errors were reported already.
        while self.wakeups.take_lane_ended() || self.wakeups.take_undelivered() {}
    }

    /// Closes everything that another server needs.
    pub fn let_go(&mut self) {
        self.control_requests = None;
        drop(self.stats.take());
        drop(self.cdev.take());
    }

    /// Stops the device, which completes or fails outstanding I/O. This may take as long as that
    /// I/O. A second signal cancels the operations in flight on the backings. A third one ends the
    /// wait, and leaves the rest to the kernel and to `del`.
    ///
    /// Another process does this. If the server gave the command itself and were killed while it
    /// waits for outstanding I/O, it would wait for itself for ever: the command keeps its files
    /// open, so the driver would never notice its death, and would fail no I/O.
    pub fn stop(&self, stop: &StopHelper<'_>) -> Result<(), ServeError> {
        let failed = |error: std::io::Error| {
            SetupError::new("cannot start a process that stops the device", Errno::of(&error))
        };
        let mut process = stop(self.id).map_err(failed)?;
        let pidfd = PidFd::of_child(&process).map_err(failed)?;
        self.set_throttling(false);
        let mut cancelled = false;
        let words = Duration::from_secs(10);
        let mut wait =
            Wait::endless().or_signal(&self.wakeups).reporting(words, words, |what, _| {
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
                Ok(status) => break status,
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
        if !status.as_ref().is_ok_and(ExitStatus::success) {
            self.set_throttling(true);
        }
        // It has reported the reason.
        if status.map_err(failed)?.success() { Ok(()) } else { Err(ServeError::NotStopped) }
    }

    /// Lets requests wait for their time, or not: what waits for all of them must not wait for that.
    pub fn set_throttling(&self, is_on: bool) {
        self.lanes.send(|| LaneMessage::SetThrottling { is_on });
    }

    /// Deletes the device and waits for the lanes: the deletion ends their fetches. The character
    /// device stays open until the deletion is in progress, so that no other device can have the
    /// id. A device kept for recovery is only closed.
    pub fn take_down(mut self) -> Result<(), ServeError> {
        let mut result = Ok(());
        if self.is_left {
            self.control_requests = None;
            // The fetches of the other lanes end with their process.
            drop(self.stats.take());
            return Ok(());
        }
        // Without the open character device, the id may belong to another device.
        if self.cdev.is_none() && self.is_deleted() {
            return Ok(());
        }
        step("stopped");
        self.set_throttling(false);
        if self.is_removed() {
            // A second deletion would not end the fetches made since.
            let _ = self.control.stop(self.id).and_then(|pending| self.control.finish(pending));
        }
        let deleted = self.control.delete(self.id).and_then(|pending| self.control.finish(pending));
        step("deleted");
        match deleted {
            Err(error) if !description::is_missing(&error) => result = Err(error.into()),
            Ok(_) | Err(_) => {}
        }
        result = result.and(self.lanes.join().map_err(ServeError::from));
        // Later requests on the socket get no answer, and must not wait.
        self.control_requests = None;
        // It reports on the lanes until they have ended. The id still belongs to this device, so no
        // other server can have made a socket of this name.
        drop(self.stats.take());
        step("deaf");
        StateFile::remove(Path::new(RUN_DIR), self.id);
        step("forgotten");
        drop(self.cdev.take());
        result
    }

    /// From now on the device is left to the next server, until [`Server::keep`].
    pub fn leave(&mut self) {
        self.is_left = true;
    }

    /// From now on the device belongs to this server, until its orderly end.
    pub fn keep(&mut self) {
        self.is_left = false;
    }
}

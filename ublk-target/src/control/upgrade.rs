//! Passes a live device from one program to the next. Its I/O waits meanwhile, and none fails.
//!
//! The process stays the same. Its lanes end, it closes the device, and becomes a process of the
//! new program (`execve(2)`), which recovers the device. So its process id, its supervisor and
//! other watchers stay valid. If execve fails, it recovers the device itself.

use std::io;
use std::ops::ControlFlow;
use std::time::Duration;

use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use nix::unistd::getppid;
use uring_ext::Errno;
use uring_ext::control::{Control, ControlError};

use crate::control::error::{ServeError, SetupError};
use crate::control::helpers::Helpers;
use crate::control::plan::Plan;
use crate::control::recoverable;
use crate::control::recovery;
use crate::control::server::Server;
use crate::device::paths;
use crate::device::program::Program;
use crate::os::steps::step;
use crate::os::wait::Wait;
use crate::socket::control_request::Reply;

/// How long the driver waits until each queue has a fetch that it can take back. After that, I/O
/// waits all the same.
const PATIENCE: Duration = Duration::from_secs(5);

/// Makes the I/O of a device wait for its next server. Outstanding I/O continues.
///
/// Must be called by another process than the server: a server that is killed while it waits for
/// itself would wait for ever.
///
/// `server` is the parent of the calling process. If it is gone, the device may belong to another
/// server by now, which must not be quiesced.
///
/// # Errors
/// Errors of the driver; the I/O then continues.
pub fn quiesce(id: u32, server: u32) -> Result<(), ControlError> {
    let control = Control::open()?;
    // Not essential: the next server notices a late quiesce, and serves again.
    let _ = set_pdeathsig(Signal::SIGKILL);
    if u32::try_from(getppid().as_raw()) != Ok(server) {
        return Ok(());
    }
    step("quiescing");
    let mut pending = control.quiesce(id, PATIENCE)?;
    step("quiesce-sent");
    loop {
        match control.wait(&mut pending, Duration::from_secs(10)) {
            // The queues had no idle tag. Their fetches end with their ring.
            Some(Err(error)) if matches!(error.errno(), Some(Errno::EBUSY | Errno::EINTR)) => {
                return Ok(());
            }
            Some(answer) => return answer.map(drop),
            None => {}
        }
    }
}

impl Server {
    /// Becomes a process of another program that serves the device. Returns only if that fails; the
    /// device is then served again. The client is told once the driver delivers nothing more, or
    /// why nothing has changed.
    pub(super) fn hand_over(
        &mut self,
        plan: Plan,
        program: &Program,
        reply: Reply<()>,
        helpers: &Helpers<'_>,
    ) -> Result<Plan, ServeError> {
        log::info!("handing over to {}", program.path().display());
        step("upgrade-asked");
        // The driver wants a tag that has no request.
        self.set_throttling(false);
        if let Err(error) = self.stop_deliveries(helpers) {
            log::error!("cannot upgrade; this program still serves the device: {error}");
            self.set_throttling(true);
            reply.send(Err(format!("it still serves the device: {error}")));
            return Ok(plan);
        }
        step("upgrade-quiesced");
        // The answer must be passed on before the thread that sends it ends.
        reply.send(Ok(()));
        self.let_device_go(plan);
        step("upgrade-let-go");
        let error = (helpers.become_next)(self.id, program, self.supervisor);
        log::error!("cannot execute {}: {error}; this program continues", program.path().display());
        self.take_back()
    }

    /// Serves a quiesced device again. Another process may have quiesced it, for instance a late
    /// one of an earlier upgrade. New I/O waits until the device is recovered.
    pub(super) fn hand_over_to_self(&mut self, plan: Plan) -> Result<Plan, ServeError> {
        self.let_device_go(plan);
        self.take_back()
    }

    /// From here on the device waits for its next server, whichever that is.
    fn let_device_go(&mut self, plan: Plan) {
        self.leave();
        self.drain();
        self.let_go();
        drop(plan);
    }

    fn take_back(&mut self) -> Result<Plan, ServeError> {
        let record = recoverable::read(&self.control, self.id)?;
        let mut progress = |what: &str| log::warn!("{what}");
        let taken = recovery::take_over(self, &record, false, &mut progress)?;
        self.keep();
        log::info!("{} is live again: {}", paths::block_path(self.id).display(), taken.times);
        Ok(taken.plan)
    }

    /// Makes the driver deliver nothing more.
    fn stop_deliveries(&self, helpers: &Helpers<'_>) -> Result<(), ServeError> {
        let failed = |error: io::Error| {
            SetupError::new("cannot start a process that quiesces the device", Errno::of(&error))
        };
        // Events that come meanwhile are handled later: a blocked signal survives execve(2), and
        // other wake-ups stay.
        let quiesce = || (helpers.quiesce)(self.id).and_then(|mut process| process.wait());
        let stopped = Wait::at_most(3 * PATIENCE).every(Duration::ZERO).until(|| match quiesce() {
            Err(error) => ControlFlow::Break(Err(failed(error).into())),
            Ok(status) => match status.code() {
                Some(0) => ControlFlow::Break(Ok(())),
                // It has reported the reason.
                Some(_) => ControlFlow::Break(Err(ServeError::NotQuiesced)),
                // It was killed, so it is unknown whether the driver was asked.
                None => ControlFlow::Continue(ServeError::NotQuiesced),
            },
        });
        stopped.unwrap_or_else(|unmet| Err(unmet.reason))
    }
}

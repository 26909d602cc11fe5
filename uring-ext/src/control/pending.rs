//! Submits commands to the control ring, and waits for their answers.

use std::cell::RefCell;
use std::marker::PhantomData;
use std::time::{Duration, Instant};

use io_uring::{squeue, types};
use libublk::with_ctrl_ring_mut;

use super::error::ControlError;
use super::in_flight::{Answer, InFlight};
use crate::Errno;

thread_local! {
    /// The commands of this thread; each thread has its own control ring.
    static IN_FLIGHT: RefCell<InFlight> = RefCell::default();
}

/// A command without an answer yet. Dropping it discards the answer; the command goes on.
#[derive(Debug)]
#[must_use]
pub struct Pending {
    command: &'static str,
    key: usize,
    started: Instant,
    _thread: PhantomData<*const ()>,
}

impl Pending {
    /// The result that an answer stands for.
    pub(super) fn result(&self, res: i32) -> Result<u32, ControlError> {
        let command = self.command;
        Errno::from_result(res).map_err(|errno| ControlError::Refused { command, errno })
    }

    /// The error if the answer did not come in time.
    pub(super) fn late(&self) -> ControlError {
        ControlError::Timeout { command: self.command, waited: self.started.elapsed() }
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        // At the end of the thread, the table of commands may be gone already.
        let _ = IN_FLIGHT.try_with(|it| it.borrow_mut().abandon(self.key));
    }
}

/// Submits a command that may use a buffer. `entry` gets the buffer's address, and names no other memory.
pub(super) fn submit<T: Send + 'static>(
    command: &'static str,
    buffer: Option<Box<T>>,
    entry: impl FnOnce(u64) -> squeue::Entry128,
) -> Result<Pending, ControlError> {
    let (key, address) = IN_FLIGHT.with(|it| it.borrow_mut().add(buffer));
    let pending = Pending { command, key, started: Instant::now(), _thread: PhantomData };
    let sqe = entry(address).user_data(key as u64);
    let refused = |errno| ControlError::Refused { command, errno };
    with_ctrl_ring_mut(|ring| {
        // SAFETY: the entry names only the buffer, or memory that the kernel reads during submission.
        // `InFlight` keeps the buffer in place until the command is answered, even if `pending` is
        // dropped. The node stays open while the ring can submit.
        let pushed = unsafe { ring.submission().push(&sqe) };
        if pushed.is_err() {
            // The kernel never sees it.
            IN_FLIGHT.with(|it| it.borrow_mut().withdraw(key));
            return Err(refused(Errno::EBUSY));
        }
        // If the kernel does not take the entry now, it takes it with a later one.
        ring.submit().map(drop).map_err(|error| refused(Errno::of(&error)))
    })?;
    Ok(pending)
}

/// Waits at most `timeout` for an answer.
pub(super) fn await_answer(pending: &mut Pending, timeout: Duration) -> Option<Answer> {
    let deadline = Instant::now() + timeout;
    loop {
        reap();
        if let Some(answer) = IN_FLIGHT.with(|it| it.borrow_mut().take(pending.key)) {
            // No command has this key; dropping `pending` does nothing.
            pending.key = usize::MAX;
            return Some(answer);
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return None;
        }
        let timespec = types::Timespec::from(left);
        let args = types::SubmitArgs::new().timespec(&timespec);
        // A signal or the time-out ends the wait early. The loop checks which.
        let _ = with_ctrl_ring_mut(|ring| ring.submitter().submit_with_args(1, &args));
    }
}

fn reap() {
    with_ctrl_ring_mut(|ring| {
        IN_FLIGHT.with(|it| {
            let mut commands = it.borrow_mut();
            for cqe in ring.completion() {
                if let Ok(key) = usize::try_from(cqe.user_data()) {
                    commands.answer(key, cqe.result());
                }
            }
        });
    });
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write;
    use std::os::fd::AsRawFd;
    use std::os::unix::net::UnixStream;
    use std::sync::Arc;

    use io_uring::opcode;

    use super::*;
    use crate::control::Control;

    /// What a command has of memory, and what tells whether it is still there.
    struct Memory(Arc<()>);

    /// On the ring of this thread, without a driver: a command that takes a while.
    #[test]
    fn the_memory_of_an_abandoned_command_is_freed_by_its_late_answer() {
        let control = Control::with(File::open("/dev/null").unwrap()).unwrap();
        let memory = Memory(Arc::new(()));
        let watch = Arc::downgrade(&memory.0);
        let (reader, mut writer) = UnixStream::pair().unwrap();
        let poll = opcode::PollAdd::new(types::Fd(reader.as_raw_fd()), libc::POLLIN as u32);
        let mut slow = submit("slow", Some(Box::new(memory)), |_| poll.build().into()).unwrap();
        assert!(control.wait(&mut slow, Duration::from_millis(1)).is_none());
        assert!(matches!(slow.late(), ControlError::Timeout { command: "slow", .. }));
        drop(slow);
        assert_eq!(watch.strong_count(), 1, "the kernel has it");
        // Other commands go on, and the thread that waits for them sees the late answer.
        let nop = |_| opcode::Nop::new().build().into();
        let mut next = submit("next", None::<Box<()>>, nop).unwrap();
        let answer = control.wait(&mut next, Duration::from_secs(60));
        assert_eq!(answer.unwrap().unwrap(), 0);
        assert_eq!(watch.strong_count(), 1, "the kernel has it still");
        writer.write_all(b"x").unwrap();
        let soon = types::Timespec::from(Duration::from_millis(50));
        let timeout = |_| opcode::Timeout::new(&soon).build().into();
        let mut last = submit("last", None::<Box<()>>, timeout).unwrap();
        let answer = control.wait(&mut last, Duration::from_secs(60)).unwrap();
        assert_eq!(answer.unwrap_err().errno(), Some(Errno::new(libc::ETIME)));
        assert_eq!(watch.strong_count(), 0);
        drop((next, last));
        assert_eq!(IN_FLIGHT.with(|it| it.borrow().count()), 0);
    }

    #[test]
    fn an_answer_is_given_once() {
        let control = Control::with(File::open("/dev/null").unwrap()).unwrap();
        let nop = || submit("nop", None::<Box<()>>, |_| opcode::Nop::new().build().into()).unwrap();
        let (mut one, mut two) = (nop(), nop());
        for pending in [&mut two, &mut one] {
            assert_eq!(control.wait(pending, Duration::from_secs(60)).unwrap().unwrap(), 0);
            assert!(control.wait(pending, Duration::ZERO).is_none());
        }
    }
}

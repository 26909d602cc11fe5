//! A lane's ring: set-up with fallback, the file and buffer tables, and a safe submission side.

mod setup;
mod tables;

pub use setup::{Polling, RingMode, RingSetup};

#[cfg(test)]
pub(crate) use setup::{SetupParams, flag};

use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::time::{Duration, Instant};

use io_uring::{CompletionQueue, IoUring, SubmissionQueue, Submitter, types};

use crate::Errno;
use crate::sqe::Sqe;

/// The maximum number of slots of a ring's buffer table (`IORING_MAX_REG_BUFFERS`,
/// `io_uring/rsrc.h`).
pub const MAX_BUFFER_SLOTS: u32 = 1 << 14;

/// The ring of one thread. Only the thread that made it may submit (`SINGLE_ISSUER`).
#[derive(Debug)]
pub struct Ring {
    ring: RingInner,
    mode: RingMode,
    /// The times of queued delays, one for each entry; the kernel reads them here. Declared after
    /// the ring, which is dropped first.
    times: Box<[types::Timespec]>,
}

struct RingInner {
    ring: IoUring,
    /// The size of the file table.
    files: usize,
}

impl Drop for RingInner {
    fn drop(&mut self) {
        // The kernel frees a closed ring with a delay (`io_ring_exit_work`). Its files would stay
        // open until then and could prevent an unmount. Unregistering the whole table would wait
        // for all outstanding operations before Linux 6.13.
        let _ = self.ring.submitter().register_files_update(0, &vec![-1; self.files]);
    }
}

impl std::fmt::Debug for RingInner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "IoUring({})", self.ring.as_raw_fd())
    }
}

impl Ring {
    /// Makes a ring with the best set-up that the kernel accepts.
    ///
    /// # Errors
    /// `ENOSYS` or `EPERM` where io_uring is absent or forbidden (`kernel.io_uring_disabled`),
    /// `EINVAL` where the kernel lacks what was asked for, `ENOMEM` where memory or the
    /// locked-memory limit does not suffice.
    pub fn new(setup: &RingSetup) -> Result<Self, Errno> {
        let mut last = Errno::EINVAL;
        for mode in RingMode::ALL {
            match setup.build(mode) {
                Ok(ring) => {
                    let times = vec![types::Timespec::new(); ring.params().sq_entries() as usize];
                    let ring = RingInner { ring, files: 0 };
                    return Ok(Self { ring, mode, times: times.into() });
                }
                // Only an unknown flag justifies another attempt.
                Err(error) if Errno::of(&error) == Errno::EINVAL => last = Errno::EINVAL,
                Err(error) => return Err(Errno::of(&error)),
            }
        }
        Err(last)
    }

    /// How the ring was set up.
    #[must_use]
    pub const fn mode(&self) -> RingMode {
        self.mode
    }

    /// Registers a table of `count` empty entries for fixed files; see [`Queues::set_files`].
    ///
    /// # Errors
    /// `EMFILE` beyond the limit of open files, `ENOMEM`.
    pub fn register_empty_files(&mut self, count: u16) -> Result<(), Errno> {
        let registered = self.ring.ring.submitter().register_files_sparse(count.into());
        registered.map_err(|error| Errno::of(&error))?;
        self.ring.files = count.into();
        Ok(())
    }

    /// Registers a buffer table of empty slots, which the driver fills.
    ///
    /// # Errors
    /// `EINVAL` beyond [`MAX_BUFFER_SLOTS`], `ENOMEM`.
    pub fn register_slots(&self, slots: u32) -> Result<(), Errno> {
        self.ring.ring.submitter().register_buffers_sparse(slots).map_err(|error| Errno::of(&error))
    }

    /// The two queues and the submitter, for the thread that made the ring. Registers the ring's
    /// own descriptor (Linux 5.18), which saves a lookup in every system call.
    pub fn queues(&mut self) -> Queues<'_> {
        let (mut submitter, sq, cq) = self.ring.ring.split();
        // Older kernels lack this; then the plain descriptor is used.
        let _ = submitter.register_ring_fd();
        let times = &mut self.times;
        Queues { submitter, sq, cq, pushed: 0, times, next_time: 0 }
    }
}

/// The ring's descriptor, for messages from other rings.
impl AsRawFd for Ring {
    fn as_raw_fd(&self) -> RawFd {
        self.ring.ring.as_raw_fd()
    }
}

/// A completion.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cqe {
    /// The `user_data` of the entry.
    pub user_data: u64,
    /// The result: 0 or more, or a negated error number.
    pub res: i32,
}

/// `IORING_CQE_F_SKIP`: fills the last entry of the queue, since a double completion must be
/// contiguous.
const CQE_SKIP: u32 = 1 << 5;
/// `IORING_CQE_F_32`: a second half follows.
const CQE_DOUBLE: u32 = 1 << 15;

/// Submission and completion side of a [`Ring`].
pub struct Queues<'ring> {
    submitter: Submitter<'ring>,
    sq: SubmissionQueue<'ring>,
    cq: CompletionQueue<'ring>,
    /// How many entries this ring has queued, to know which entry is the last of the array.
    pushed: usize,
    times: &'ring mut [types::Timespec],
    next_time: usize,
}

impl Queues<'_> {
    /// Queues all entries or none, so that a chain of links is submitted as a whole. If there is no
    /// space, submits the queued entries first.
    ///
    /// # Errors
    /// `EBUSY` if there is still no space, since the kernel did not take the queued entries;
    /// otherwise as `io_uring_enter(2)`.
    #[inline(always)]
    pub fn push(&mut self, sqes: &[Sqe]) -> Result<(), Errno> {
        if let [sqe] = sqes {
            if !sqe.is_delay() {
                // SAFETY: an `Sqe` names memory only by slot or in a pool that is never unmapped.
                if unsafe { self.sq.push(sqe.entry()) }.is_ok() {
                    self.pushed = self.pushed.wrapping_add(1);
                    return Ok(());
                }
            }
        }
        self.push_any(sqes)
    }

    #[cold]
    fn push_any(&mut self, sqes: &[Sqe]) -> Result<(), Errno> {
        let padding = padding(sqes, self.sq.capacity(), self.pushed);
        let room = self.sq.capacity() - self.sq.len();
        if room < padding + sqes.len() {
            self.enter(0)?;
            if self.sq.capacity() - self.sq.len() < padding + sqes.len() {
                return Err(Errno::EBUSY);
            }
        }
        if let [sqe] = sqes {
            if let Some(ns) = sqe.delay_ns() {
                return self.push_delay(sqe, ns);
            }
        }
        for _ in 0..padding {
            self.push_entries(&[Sqe::nop().skip_success()])?;
        }
        self.push_entries(sqes)
    }

    #[inline]
    fn push_entries(&mut self, sqes: &[Sqe]) -> Result<(), Errno> {
        // SAFETY: an `Sqe` names memory only by slot or in a pool that is never unmapped.
        let pushed = unsafe { self.sq.push_multiple(Sqe::entries(sqes)) };
        self.pushed = self.pushed.wrapping_add(sqes.len());
        pushed.map_err(|_full| Errno::EBUSY)
    }

    /// Queues a delay. The kernel reads its time when it takes the entry.
    #[cold]
    fn push_delay(&mut self, sqe: &Sqe, ns: u64) -> Result<(), Errno> {
        // The kernel takes entries in order, and there are as many times as entries. So before a
        // time is used again, the kernel has taken the entry that used it before.
        if self.sq.is_full() {
            return Err(Errno::EBUSY);
        }
        let time = &mut self.times[self.next_time];
        *time = types::Timespec::from(Duration::from_nanos(ns));
        let entry = sqe.delay_at(time);
        // SAFETY: the time belongs to the ring, which outlives its queue, and is not overwritten
        // before the kernel has read it; see above.
        let pushed = unsafe { self.sq.push_multiple(Sqe::entries(&[entry])) };
        self.pushed = self.pushed.wrapping_add(1);
        pushed.map_err(|_full| Errno::EBUSY)?;
        self.next_time = (self.next_time + 1) % self.times.len();
        Ok(())
    }

    /// Submits what is queued. A ring that polls polls once, and a ring that [shows its
    /// work](RingSetup::show_work) runs it. Does not wait.
    ///
    /// # Errors
    /// See [`Queues::submit_and_wait`].
    pub fn submit(&mut self) -> Result<(), Errno> {
        self.enter(0)
    }

    /// Submits what is queued and waits for a completion. An interrupted wait, or a kernel that
    /// asks for completions to be reaped first (`EBUSY`), is not an error.
    ///
    /// # Errors
    /// `EBADF`, `EINVAL`, `ENXIO`: the ring is unusable.
    pub fn submit_and_wait(&mut self) -> Result<(), Errno> {
        self.enter(1)
    }

    /// Submits what is queued and runs all the kernel's work for this thread. At some time during
    /// the call none was left, unless [entries](Queues::has_queued) or completions are. Only for a
    /// ring that polls and has nothing to poll for; other rings would wait.
    ///
    /// [`Queues::submit`] may leave work: what exceeds a limit (`IO_LOCAL_TW_DEFAULT_MAX`), and,
    /// since Linux 7.2, the whole list while another CPU adds to it (`mpscq_pop`). Work that is
    /// added while work is left is not [signalled](Queues::register_event).
    ///
    /// # Errors
    /// See [`Queues::submit_and_wait`].
    pub fn submit_and_settle(&mut self) -> Result<(), Errno> {
        // The kernel continues until there are that many completions or no work
        // (`io_run_local_work_continue`), and does not wait if there is nothing to poll for.
        self.enter(self.cq.capacity())
    }

    fn enter(&mut self, want: usize) -> Result<(), Errno> {
        self.enter_with(|submitter| submitter.submit_and_wait(want))
    }

    fn enter_with(
        &mut self,
        call: impl FnOnce(&Submitter<'_>) -> std::io::Result<usize>,
    ) -> Result<(), Errno> {
        self.sq.sync();
        let entered = call(&self.submitter);
        self.sq.sync();
        match entered {
            Ok(_) => Ok(()),
            Err(error) => match Errno::of(&error) {
                Errno::EINTR | Errno::EBUSY | Errno::EAGAIN | Errno::ETIME => Ok(()),
                errno => Err(errno),
            },
        }
    }

    /// As [`Queues::submit_and_wait`], but waits no longer than `limit` (Linux 5.11).
    ///
    /// # Errors
    /// See [`Queues::submit_and_wait`].
    pub fn submit_and_wait_for(&mut self, limit: Duration) -> Result<(), Errno> {
        let limit = types::Timespec::from(limit);
        self.enter_with(|submitter| {
            submitter.submit_with_args(1, &types::SubmitArgs::new().timespec(&limit))
        })
    }

    /// Reads the queue's tail, so that new completions can be [taken](Self::take), and writes its
    /// head. Call this before a wait: otherwise the kernel counts completions that were already
    /// taken, and does not wait.
    #[inline]
    pub fn sync(&mut self) {
        self.cq.sync();
    }

    /// Takes a completion off the queue, of those that the last [sync](Self::sync) found.
    #[inline(always)]
    pub fn take(&mut self) -> Option<Cqe> {
        loop {
            let cqe = self.cq.next()?;
            let flags = cqe.flags();
            if flags & (CQE_SKIP | CQE_DOUBLE) != 0 {
                if flags & CQE_SKIP != 0 {
                    continue;
                }
                // The second half follows the first. Nothing in it is needed.
                let _ = self.cq.next();
            }
            return Some(Cqe { user_data: cqe.user_data(), res: cqe.result() });
        }
    }

    /// Takes completions off the queue, as many as fit; returns how many.
    pub fn reap(&mut self, into: &mut [Cqe]) -> usize {
        self.sync();
        let mut count = 0;
        for (slot, cqe) in into.iter_mut().zip(std::iter::from_fn(|| self.take())) {
            *slot = cqe;
            count += 1;
        }
        self.sync();
        count
    }

    /// Submits what is queued, and polls for completions, or for work that produces them, for at
    /// most `ns` nanoseconds. Returns whether there are any. For a ring that [shows its
    /// work](RingSetup::show_work).
    ///
    /// # Errors
    /// See [`Queues::submit_and_wait`].
    pub fn submit_and_poll(&mut self, ns: u64) -> Result<bool, Errno> {
        /// How often to poll before the clock is read again, which costs more.
        const POLLS_PER_CLOCK: u32 = 32;
        self.submit()?;
        let limit = Duration::from_nanos(ns);
        let mut began = None;
        loop {
            for _ in 0..POLLS_PER_CLOCK {
                self.cq.sync();
                if !self.cq.is_empty() {
                    return Ok(true);
                }
                if self.sq.taskrun() {
                    self.submit()?;
                }
                std::hint::spin_loop();
            }
            let now = Instant::now();
            if now - *began.get_or_insert(now) >= limit {
                return Ok(false);
            }
        }
    }

    /// Whether entries wait to be submitted.
    pub fn has_queued(&mut self) -> bool {
        self.sq.sync();
        !self.sq.is_empty()
    }

    /// Whether there are completions, or the kernel has work for this thread that
    /// [`Queues::submit`] would run. Only rings that [show their work](RingSetup::show_work) know
    /// of the latter.
    pub fn has_pending(&mut self) -> bool {
        self.cq.sync();
        self.sq.taskrun() || !self.cq.is_empty()
    }

    /// Registers an event descriptor (`IORING_REGISTER_EVENTFD`). The kernel writes to it when
    /// there is work or a completion, while [`Queues::signal`] is on.
    ///
    /// # Errors
    /// `EBUSY` if there is one.
    pub fn register_event(&mut self, event: BorrowedFd<'_>) -> Result<(), Errno> {
        let registered = self.submitter.register_eventfd(event.as_raw_fd());
        registered.map_err(|error| Errno::of(&error))
    }

    /// Turns writes to the event descriptor on or off (`IORING_CQ_EVENTFD_DISABLED`, Linux 5.8).
    pub fn signal(&mut self, on: bool) {
        if on {
            self.cq.enable_eventfd();
        } else {
            self.cq.disable_eventfd();
        }
    }
}

/// How many entries to put before these, after `pushed` others, so that no double entry wraps
/// around the end of the array, which the kernel does not accept.
fn padding(sqes: &[Sqe], capacity: usize, pushed: usize) -> usize {
    if sqes.len() == 1 {
        return 0;
    }
    let left = capacity - pushed % capacity;
    let mut at = 0;
    while let Some(sqe) = sqes.get(at) {
        if at < left && left < at + sqe.width() {
            return left;
        }
        at += sqe.width();
    }
    0
}

#[cfg(test)]
mod tests;

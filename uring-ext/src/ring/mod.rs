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

/// The greatest buffer table of a ring (`IORING_MAX_REG_BUFFERS`, `io_uring/rsrc.h`).
pub const MAX_BUFFER_SLOTS: u32 = 1 << 14;

/// The ring of one thread. Only the thread that made it may submit (`SINGLE_ISSUER`).
#[derive(Debug)]
pub struct Ring {
    ring: RingInner,
    mode: RingMode,
    /// Where the kernel finds the times of delays that are queued; one for each entry. It comes
    /// behind the ring, which is dropped first.
    times: Box<[types::Timespec]>,
}

struct RingInner {
    ring: IoUring,
    /// How many files are registered.
    files: usize,
}

impl Drop for RingInner {
    fn drop(&mut self) {
        // The kernel takes a ring apart some time after it is closed (`io_ring_exit_work`), and its
        // files, such as those of a file system that is to be unmounted, would stay open until then.
        // Taking the whole table away would wait, before Linux 6.13, for all that is outstanding.
        let _ = self.ring.submitter().register_files_update(0, &vec![-1; self.files]);
    }
}

impl std::fmt::Debug for RingInner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "IoUring({})", self.ring.as_raw_fd())
    }
}

impl Ring {
    /// Makes a ring with the best set-up that the kernel takes.
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
                // Only an unknown flag is worth another try.
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

    /// Registers a table of fixed files that are all missing yet; see [`Queues::set_files`].
    ///
    /// # Errors
    /// `EMFILE` beyond the limit of open files, `ENOMEM`.
    pub fn register_places_of_files(&mut self, count: u16) -> Result<(), Errno> {
        let registered = self.ring.ring.submitter().register_files_sparse(count.into());
        registered.map_err(|error| Errno::of(&error))?;
        self.ring.files = count.into();
        Ok(())
    }

    /// Registers a buffer table of empty slots, to be filled by the driver.
    ///
    /// # Errors
    /// `EINVAL` beyond [`MAX_BUFFER_SLOTS`], `ENOMEM`.
    pub fn register_slots(&self, slots: u32) -> Result<(), Errno> {
        self.ring.ring.submitter().register_buffers_sparse(slots).map_err(|error| Errno::of(&error))
    }

    /// The two queues and the submitter, for the thread that made the ring. Registers the ring's
    /// own descriptor (Linux 5.18), which saves a look-up in every system call.
    pub fn queues(&mut self) -> Queues<'_> {
        let (mut submitter, sq, cq) = self.ring.ring.split();
        // Older kernels lack it; then the plain descriptor serves.
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

/// A completion, as the kernel gave it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cqe {
    /// What the entry was pushed with.
    pub user_data: u64,
    /// Zero or more, or a negated error number.
    pub res: i32,
}

/// `IORING_CQE_F_SKIP`: fills the end of the queue, since a double completion has no gap.
const CQE_SKIP: u32 = 1 << 5;
/// `IORING_CQE_F_32`: a second half follows.
const CQE_DOUBLE: u32 = 1 << 15;

/// Submission and completion side of a [`Ring`].
pub struct Queues<'ring> {
    submitter: Submitter<'ring>,
    sq: SubmissionQueue<'ring>,
    cq: CompletionQueue<'ring>,
    /// Entries queued in this ring's life, to know which of them is at the end of the array.
    pushed: usize,
    times: &'ring mut [types::Timespec],
    next_time: usize,
}

impl Queues<'_> {
    /// Queues entries, all or none of them, so that a chain of links is submitted whole. Where
    /// there is no room for them, what is queued is submitted first.
    ///
    /// # Errors
    /// `EBUSY` if there is still no room, since the kernel did not take what was queued; otherwise
    /// that of `io_uring_enter(2)`.
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

    /// Queues a delay, whose time the kernel reads when it takes the entry.
    #[cold]
    fn push_delay(&mut self, sqe: &Sqe, ns: u64) -> Result<(), Errno> {
        // Entries are taken in order, and there are as many times as entries: when the turn comes
        // to this one again, the entry that it was for has been taken.
        if self.sq.is_full() {
            return Err(Errno::EBUSY);
        }
        let time = &mut self.times[self.next_time];
        *time = types::Timespec::from(Duration::from_nanos(ns));
        let entry = sqe.delay_at(time);
        // SAFETY: the time is the ring's, which outlives its queue, and it is not written to until
        // the kernel has read it; see above.
        let pushed = unsafe { self.sq.push_multiple(Sqe::entries(&[entry])) };
        self.pushed = self.pushed.wrapping_add(1);
        pushed.map_err(|_full| Errno::EBUSY)?;
        self.next_time = (self.next_time + 1) % self.times.len();
        Ok(())
    }

    /// Submits what is queued. A ring that polls looks once for completions, and one that
    /// [shows its work](RingSetup::show_work) does it. Does not wait.
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

    /// Submits what is queued and does all the work that the kernel has for this thread: at some
    /// time during the call there was none left, unless [entries](Queues::has_queued) or
    /// completions are. For a ring that polls and has nothing to poll for; others wait.
    ///
    /// [`Queues::submit`] may leave work undone: beyond a certain amount (`IO_LOCAL_TW_DEFAULT_MAX`),
    /// and, since Linux 7.2, all that another CPU is just adding to (`mpscq_pop`). What is added to
    /// work that was left is not [signalled](Queues::register_event).
    ///
    /// # Errors
    /// See [`Queues::submit_and_wait`].
    pub fn submit_and_settle(&mut self) -> Result<(), Errno> {
        // The kernel goes on until there are that many completions or no work
        // (`io_run_local_work_continue`), and does not wait where nothing is to be polled for.
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

    /// Sees what has come since the last time, and tells the kernel what was [taken](Self::take):
    /// before the next wait, lest it takes that for news and does not wait.
    #[inline]
    pub fn look(&mut self) {
        self.cq.sync();
    }

    /// Takes a completion off the queue, of those that were there at the last [look](Self::look).
    #[inline(always)]
    pub fn take(&mut self) -> Option<Cqe> {
        loop {
            let cqe = self.cq.next()?;
            let flags = cqe.flags();
            if flags & (CQE_SKIP | CQE_DOUBLE) != 0 {
                if flags & CQE_SKIP != 0 {
                    continue;
                }
                // The second half comes with the first; nothing in it is of use here.
                let _ = self.cq.next();
            }
            return Some(Cqe { user_data: cqe.user_data(), res: cqe.result() });
        }
    }

    /// Takes completions off the queue, as many as fit; returns how many.
    pub fn reap(&mut self, into: &mut [Cqe]) -> usize {
        self.look();
        let mut count = 0;
        for (place, cqe) in into.iter_mut().zip(std::iter::from_fn(|| self.take())) {
            *place = cqe;
            count += 1;
        }
        self.look();
        count
    }

    /// Submits what is queued, and looks for completions, or work that brings some, for so many
    /// nanoseconds at most. Says whether there are any. For a ring that
    /// [shows its work](RingSetup::show_work).
    ///
    /// # Errors
    /// See [`Queues::submit_and_wait`].
    pub fn submit_and_look(&mut self, ns: u64) -> Result<bool, Errno> {
        /// So that the clock is not what the time is spent on.
        const LOOKS_A_CLOCK: u32 = 32;
        self.submit()?;
        let limit = Duration::from_nanos(ns);
        let mut began = None;
        loop {
            for _ in 0..LOOKS_A_CLOCK {
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

    /// Whether the kernel has work for this thread that [`Queues::submit`] would run, or
    /// completions are there. Known only to rings that [show it](RingSetup::show_work).
    pub fn has_news(&mut self) -> bool {
        self.cq.sync();
        self.sq.taskrun() || !self.cq.is_empty()
    }

    /// Registers an event descriptor that is written to when there is work or a completion, as
    /// long as [`Queues::signal`] asks for that (`IORING_REGISTER_EVENTFD`).
    ///
    /// # Errors
    /// `EBUSY` if there is one.
    pub fn register_event(&mut self, event: BorrowedFd<'_>) -> Result<(), Errno> {
        let registered = self.submitter.register_eventfd(event.as_raw_fd());
        registered.map_err(|error| Errno::of(&error))
    }

    /// Turns the writing to the event descriptor on or off (`IORING_CQ_EVENTFD_DISABLED`, Linux
    /// 5.8).
    pub fn signal(&mut self, on: bool) {
        if on {
            self.cq.enable_eventfd();
        } else {
            self.cq.disable_eventfd();
        }
    }
}

/// How many entries to put in front of these, `pushed` having gone before, so that no double one
/// lies across the end of the array, where the kernel does not take it.
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

//! The I/O lane: a second thread and ring that issue a lane's operations, and register the buffers
//! for them (`UBLK_F_BUF_REG_OFF_DAEMON`, Linux 6.17). It decides nothing: entries come from the
//! lane, and completions go back to it.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use std::thread::JoinHandle;

use nix::sys::eventfd::EventFd;
use rtrb::{Consumer, Producer, RingBuffer};
use smallvec::SmallVec;
use ublk_engine::lane::LaneError;
use ublk_engine::lane::event::Event;
use uring_ext::Errno;
use uring_ext::pool::BufferPool;
use uring_ext::ring::{Cqe, Queues, Ring};
use uring_ext::sqe::{FixedFile, Sqe};

use crate::io_thread::setup::{EVENT, LaneConfig, REAP_BATCH, RingNeeds, failed};
use crate::io_thread::spawn::{prepare_thread, spawn_lane};
use crate::io_thread::station::{Berth, OWN};
use crate::os::wakeups::event_descriptor;

/// The lane's side of its I/O lane.
pub(crate) struct IoLane {
    entries: Producer<Sqe>,
    completions: Consumer<Cqe>,
    /// The I/O lane's ring.
    ring: RawFd,
    /// There are entries that the I/O lane has not been notified of.
    is_unnotified: bool,
    end: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

/// The state of the thread.
struct Worker<'ring> {
    queues: Queues<'ring>,
    entries: Consumer<Sqe>,
    completions: Producer<Cqe>,
    /// An entry from `entries` that is not queued yet.
    chain: SmallVec<[Sqe; 4]>,
    /// The lane's ring, and the descriptor that wakes the lane if rings do not work.
    lane: RawFd,
    wake: Arc<EventFd>,
    failed: bool,
}

impl IoLane {
    /// Starts the thread. Its ring has the station's files and buffers. `lane` is the descriptor of
    /// the ring that gets a message for completions. If that fails, the thread writes to `wake`.
    pub fn start(
        config: &LaneConfig,
        tables: IoTables,
        lane: RawFd,
        wake: &Arc<EventFd>,
    ) -> Result<Self, LaneError> {
        // Queues for entries and completions in transit.
        let room = config.entries_in_flight();
        let (to_worker, entries) = RingBuffer::new(room);
        let (completions, from_worker) = RingBuffer::new(room);
        let end = Arc::new(event_descriptor().map_err(failed("making an event descriptor"))?);
        let (ready, is_ready) = sync_channel(1);
        let (config, end_of_worker, wake) = (config.clone(), Arc::clone(&end), Arc::clone(wake));
        let name = format!("ublkb{}-io{}", config.engine.queue.device, config.engine.queue.qid.0);
        let thread = spawn_lane(name, move || {
            prepare_thread(&config);
            let mut ring = match set_up(&config, &end_of_worker, &tables) {
                Ok(ring) => ring,
                Err(error) => {
                    let _ = ready.send(Err(error));
                    return;
                }
            };
            let _ = ready.send(Ok(ring.as_raw_fd()));
            let (queues, chain) = (ring.queues(), SmallVec::new());
            Worker { queues, entries, completions, chain, lane, wake, failed: false }.run();
        });
        let thread = thread.map_err(|error| failed("starting the I/O lane")(Errno::of(&error)))?;
        let died = Err(failed("starting the I/O lane")(Errno::EIO));
        let ring = is_ready.recv().unwrap_or(died)?;
        Ok(Self {
            entries: to_worker,
            completions: from_worker,
            ring,
            is_unnotified: false,
            end,
            thread: Some(thread),
        })
    }

    /// Passes entries to the I/O lane, all or none.
    ///
    /// # Errors
    /// `EBUSY` if there is no room now.
    pub fn push(&mut self, sqes: &[Sqe]) -> Result<(), Errno> {
        // In one step, so that the other side never sees part of a chain.
        let chunk = self.entries.write_chunk_uninit(sqes.len()).map_err(|_full| Errno::EBUSY)?;
        chunk.fill_from_iter(sqes.iter().cloned());
        self.is_unnotified = true;
        Ok(())
    }

    /// The message that announces entries passed since the last message.
    pub fn message(&mut self) -> Option<Sqe> {
        let [notified, unsent] = [Event::Notified, Event::Unsent].map(|event| event.encode(OWN));
        std::mem::take(&mut self.is_unnotified)
            .then(|| Sqe::message(self.ring, notified).user_data(unsent))
    }

    /// The next completion.
    pub fn reap(&mut self) -> Option<Cqe> {
        self.completions.pop().ok()
    }
}

impl Drop for IoLane {
    fn drop(&mut self) {
        // It can only fail after 2^64 - 1 ends.
        let _ = self.end.write(1);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The contents of the tables of an I/O lane's ring.
#[derive(Clone, Copy, Debug)]
pub(crate) struct IoTables {
    /// The ranges of the station.
    pub berth: Berth,
    /// The station's own buffers.
    pub pool: Option<BufferPool>,
}

fn set_up(config: &LaneConfig, end: &EventFd, tables: &IoTables) -> Result<Ring, LaneError> {
    let needs = RingNeeds::of_queue(config);
    let mut ring = needs.make(end)?;
    needs.make_slots(&ring)?;
    let Berth { first_file, first_slot, spare, .. } = tables.berth;
    let mut queues = ring.queues();
    let set = queues.set_files(FixedFile(first_file), &config.files());
    set.map_err(failed("registering files"))?;
    let own = tables.pool.map(|pool| (first_slot + config.engine.slots.lent, pool));
    for (first, pool) in own.into_iter().chain(spare.map(|spare| (spare.slot, spare.pool))) {
        queues.set_buffers(first, &pool).map_err(failed("registering buffers"))?;
    }
    drop(queues);
    Ok(ring)
}

impl Worker<'_> {
    fn run(mut self) {
        // No completion of this ring has this number: the lane encodes its events differently.
        const END: u64 = u64::MAX;
        let watch = Sqe::poll_readable(EVENT).user_data(END);
        if self.queues.push(&[watch]).is_err() {
            return;
        }
        let notified = Event::Notified.encode(OWN);
        let mut batch = [Cqe::default(); REAP_BATCH];
        loop {
            if self.queues.submit_and_wait().is_err() {
                return self.fail(Errno::EIO);
            }
            let mut finished = 0;
            loop {
                let count = self.queues.reap(&mut batch);
                for cqe in &batch[..count] {
                    match cqe.user_data {
                        END => return,
                        user_data if user_data == notified => {}
                        _ => {
                            // There is room for everything that can be in flight.
                            let _ = self.completions.push(*cqe);
                            finished += 1;
                        }
                    }
                }
                if count < batch.len() {
                    break;
                }
            }
            self.take_entries();
            if finished > 0 {
                self.tell();
            }
            if self.failed {
                return;
            }
        }
    }

    /// Submits the entries from the lane. A chain is submitted whole.
    fn take_entries(&mut self) {
        loop {
            // Takes nothing more while a chain has no room.
            let mut is_whole = !self.chain.is_empty();
            while !is_whole {
                let Ok(sqe) = self.entries.pop() else { return };
                let width = sqe.width();
                is_whole = !sqe.is_linked();
                self.chain.push(sqe);
                // The second half of a double entry follows the first at once.
                self.chain.extend((1..width).filter_map(|_| self.entries.pop().ok()));
            }
            match self.queues.push(&self.chain) {
                Ok(()) => self.chain.clear(),
                // There is no room until the kernel has taken the queued entries.
                Err(Errno::EBUSY) => return,
                Err(errno) => return self.fail(errno),
            }
        }
    }

    /// Notifies the lane of completions.
    fn tell(&mut self) {
        let [notified, unsent] = [Event::Notified, Event::Unsent].map(|event| event.encode(OWN));
        let message = Sqe::message(self.lane, notified).user_data(unsent);
        if let Err(errno) = self.queues.push(&[message]) {
            self.fail(errno);
        }
    }

    /// The ring is unusable. The lane notices it as a failed message of its own.
    fn fail(&mut self, errno: Errno) {
        let user_data = Event::Unsent.encode(OWN);
        let _ = self.completions.push(Cqe { user_data, res: errno.negated() });
        let _ = self.wake.write(1);
        self.failed = true;
    }
}

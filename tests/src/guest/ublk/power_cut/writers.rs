//! Threads that write until the power is cut.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};

use crate::guest::wait_for;

/// When the threads have to end, and why they may fail.
#[derive(Debug, Clone, Default)]
pub struct Ending {
    cut: Arc<AtomicBool>,
    wanted: Arc<AtomicBool>,
}

impl Ending {
    /// They are to end.
    pub fn is_wanted(&self) -> bool {
        self.wanted.load(Ordering::SeqCst)
    }

    /// The power is about to be cut.
    pub fn expect_cut(&self) {
        self.cut.store(true, Ordering::SeqCst);
    }

    /// Whether what a file system has just called durable can be relied on: not once its device
    /// fails. When a commit of ext4's journal fails, an `fsync` that asks for it right afterwards
    /// finds that it is no longer under way, and returns success (`jbd2_complete_transaction()` in
    /// `fs/jbd2/journal.c`, 7.2).
    ///
    /// # Errors
    /// When it cannot.
    pub fn ensure_promised(&self) -> Result<()> {
        ensure!(!self.cut.load(Ordering::SeqCst), "this was called durable after the power cut");
        Ok(())
    }

    /// An error is none if the power is being cut.
    ///
    /// # Errors
    /// That error, if not.
    pub fn excuse(&self, error: anyhow::Error) -> Result<()> {
        if self.cut.load(Ordering::SeqCst) {
            return Ok(());
        }
        Err(error.context("before the power was cut"))
    }
}

/// The threads; each returns what it knows.
#[derive(Debug)]
pub struct Writers<T> {
    threads: Vec<JoinHandle<Result<T>>>,
    ending: Ending,
    acknowledged: Arc<AtomicU64>,
}

impl<T> Writers<T> {
    /// Starts threads: `start` is given the number of each, how it learns of its end, and what it
    /// has to count all that it was told is durable.
    pub fn start(
        count: usize,
        mut start: impl FnMut(usize, Ending, Arc<AtomicU64>) -> Result<JoinHandle<Result<T>>>,
    ) -> Result<Self> {
        let (ending, acknowledged) = (Ending::default(), Arc::new(AtomicU64::new(0)));
        let mut writers = Self { threads: Vec::new(), ending, acknowledged };
        for number in 0..count {
            let (ending, acknowledged) = (writers.ending.clone(), &writers.acknowledged);
            let thread = start(number, ending, Arc::clone(acknowledged))?;
            writers.threads.push(thread);
        }
        Ok(writers)
    }

    /// Waits until they have been told of so many things that they are durable.
    ///
    /// # Errors
    /// When a thread has failed, or they take minutes.
    pub fn wait_for(&self, acknowledged: u64) -> Result<()> {
        wait_for("the writers", Duration::from_secs(180), || {
            let over = self.threads.iter().any(JoinHandle::is_finished);
            let enough = self.acknowledged.load(Ordering::Relaxed) >= acknowledged;
            Ok((over || enough).then_some(()))
        })
    }

    /// From now on errors are what a power cut brings about.
    pub fn expect_cut(&self) {
        self.ending.expect_cut();
    }

    /// How many things they have been told are durable.
    pub fn acknowledged(&self) -> u64 {
        self.acknowledged.load(Ordering::Relaxed)
    }

    /// Waits for their end.
    ///
    /// # Errors
    /// When one has failed.
    pub fn join(mut self) -> Result<Vec<T>> {
        self.ending.wanted.store(true, Ordering::SeqCst);
        let join = |thread: JoinHandle<Result<T>>| {
            thread.join().map_err(|_| anyhow!("a writer has panicked"))?
        };
        let known = self.threads.drain(..).map(join).collect::<Vec<_>>();
        let known = known.into_iter().collect::<Result<Vec<_>>>().context("a writer")?;
        ensure!(!known.is_empty(), "no writers");
        Ok(known)
    }
}

impl<T> Drop for Writers<T> {
    fn drop(&mut self) {
        self.ending.wanted.store(true, Ordering::SeqCst);
        // What they write to is still there, or its requests fail.
        self.threads.drain(..).for_each(|thread| drop(thread.join()));
    }
}

//! Threads that write records to a device, or to a file, and make them durable.

use std::fs::File;
use std::io::IoSlice;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use anyhow::{Result, ensure};
use rand::{RngExt as _, SeedableRng as _};
use rand_xoshiro::SplitMix64;
use rustix::io::{ReadWriteFlags, pwritev2};

use super::records::{Findings, Records, fill};
use super::writers::{Ending, Writers};
use crate::guest::direct::{self, Aligned};

/// Threads, each with blocks of its own, so that no two writes to a block overlap.
const THREADS: usize = 4;
/// Blocks of the longest write.
const LONGEST: usize = 12;
/// Writes before a flush, at most: one of these.
const BATCHES: [u64; 3] = [2, 6, 20];
/// Bytes read at once when everything is checked.
const CHECKED: usize = 256 << 10;

/// How writes are made durable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Habit {
    /// By `fdatasync` after some of them.
    Flush,
    /// Each by `RWF_DSYNC`.
    Fua,
    /// Some so and some so.
    Both,
}

/// The records, and where they are.
#[derive(Debug)]
pub struct Database {
    block_bytes: usize,
    records: Arc<Mutex<Records>>,
}

fn lock(records: &Mutex<Records>) -> MutexGuard<'_, Records> {
    records.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Database {
    /// A database of so many blocks that read as zeros.
    pub fn new(blocks: usize, block_bytes: usize) -> Self {
        Self { block_bytes, records: Arc::new(Mutex::new(Records::new(blocks))) }
    }

    /// Its size in bytes.
    pub fn bytes(&self) -> usize {
        lock(&self.records).len() * self.block_bytes
    }

    /// Starts the threads. Some of them, as many as are drawn, only write: a flush of
    /// one makes durable what all have written, and there would be little to lose.
    ///
    /// # Errors
    /// When what they write to cannot be opened.
    pub fn start(&self, path: &Path, habit: Habit, rng: &mut SplitMix64) -> Result<Writers<()>> {
        let share = lock(&self.records).len() / THREADS;
        let idle = rng.random_range(0..THREADS);
        let batch = BATCHES[rng.random_range(0..BATCHES.len())];
        println!("{idle} of {THREADS} writers never flush, the others after up to {batch} writes");
        Writers::start(THREADS, |number, ending, acknowledged| {
            let mut writer = Writer {
                file: direct::open(path)?,
                block_bytes: self.block_bytes,
                records: Arc::clone(&self.records),
                own: number * share..(number + 1) * share,
                buffer: Aligned::new(LONGEST * self.block_bytes, 0),
                habit: (number >= idle).then_some(habit),
                batch,
                rng: rng.fork(),
                acknowledged,
            };
            Ok(thread::Builder::new()
                .name(format!("writer-{number}"))
                .spawn(move || writer.run(&ending))?)
        })
    }

    /// Reads everything, compares it with what has to be there, and takes it as what has to be
    /// there from now on.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn check(&self, path: &Path) -> Result<Findings> {
        let file = direct::open(path)?;
        let mut buffer = Aligned::new(CHECKED, 0);
        let mut contents = Vec::new();
        let bytes = self.bytes();
        while contents.len() < bytes {
            let length = CHECKED.min(bytes - contents.len());
            let piece = &mut buffer.bytes()[..length];
            file.read_exact_at(piece, u64::try_from(contents.len())?)?;
            contents.extend_from_slice(piece);
        }
        let mut findings = Findings::default();
        let mut records = lock(&self.records);
        records.compare(0, &contents, self.block_bytes, &mut findings);
        records.adopt(0, &contents, self.block_bytes);
        Ok(findings)
    }

    /// Makes a file for it whose blocks are allocated and written, so that from then on writes
    /// change nothing but data.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn lay_out(&self, path: &Path) -> Result<()> {
        let file = File::create_new(path)?;
        file.write_all_at(&vec![0; self.bytes()], 0)?;
        file.sync_all()?;
        let directory = path.parent().map(PathBuf::from).unwrap_or_default();
        Ok(File::open(directory)?.sync_all()?)
    }
}

struct Writer {
    file: File,
    block_bytes: usize,
    records: Arc<Mutex<Records>>,
    own: Range<usize>,
    buffer: Aligned,
    habit: Option<Habit>,
    batch: u64,
    rng: SplitMix64,
    /// Flushes and writes with FUA that have succeeded.
    acknowledged: Arc<AtomicU64>,
}

impl Writer {
    /// Writes until it is told to end, or the device is gone because its power was cut.
    fn run(&mut self, ending: &Ending) -> Result<()> {
        while !ending.is_wanted() {
            let done = match self.habit {
                None => self.write(false),
                Some(habit) => self.write_durably(habit),
            };
            if let Err(error) = done {
                return ending.excuse(error);
            }
        }
        Ok(())
    }

    fn write_durably(&mut self, habit: Habit) -> Result<()> {
        let fua = match habit {
            Habit::Flush => false,
            Habit::Fua => true,
            Habit::Both => self.rng.random_ratio(3, 8),
        };
        if fua {
            self.write(true)?;
        } else {
            self.write_some_and_flush()?;
        }
        self.acknowledged.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn write_some_and_flush(&mut self) -> Result<()> {
        for _ in 0..self.rng.random_range(1..=self.batch) {
            self.write(false)?;
        }
        let covers = lock(&self.records).begin_flush();
        self.file.sync_data()?;
        lock(&self.records).end_flush(covers);
        Ok(())
    }

    fn write(&mut self, fua: bool) -> Result<()> {
        // Most are short; the others are divided where there are several drives.
        let most = if self.rng.random_ratio(1, 4) { LONGEST } else { 2 };
        let blocks = self.rng.random_range(1..=most);
        let first = self.rng.random_range(self.own.start..=self.own.end - blocks);
        let slots = first..first + blocks;
        let buffer = &mut self.buffer.bytes()[..blocks * self.block_bytes];
        let offset = u64::try_from(first * self.block_bytes)?;
        let sequence = lock(&self.records).issue(slots.clone());
        fill(buffer, self.block_bytes, first, sequence);
        if fua {
            let flags = ReadWriteFlags::DSYNC;
            let written = pwritev2(&self.file, &[IoSlice::new(buffer)], offset, flags)?;
            ensure!(written == buffer.len(), "{written} bytes were written");
        } else {
            self.file.write_all_at(buffer, offset)?;
        }
        lock(&self.records).acknowledge(slots, sequence, fua);
        Ok(())
    }
}

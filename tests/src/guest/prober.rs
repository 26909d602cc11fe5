//! Reads all the time, to tell how long nothing came back.

use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};

use super::direct::{self, Aligned};
use super::wait_for;

/// How long a read may take to come back.
const PATIENCE: Duration = Duration::from_secs(60);
const BLOCK: usize = 4096;
const BLOCKS: u64 = 64;
/// So that it takes no CPU that others need.
const PAUSE: Duration = Duration::from_millis(1);

/// A read, from its submission to its completion.
#[derive(Clone, Copy, Debug)]
pub struct Read {
    /// Its submission.
    pub began: Instant,
    /// Its completion.
    pub ended: Instant,
}

/// A thread that reads blocks of 4 KiB of its own, one after the other, past the page cache, and
/// compares them. It ends with its handle.
#[derive(Debug)]
pub struct Prober {
    stop: Arc<AtomicBool>,
    reads: Arc<Mutex<Vec<Read>>>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Prober {
    /// Writes its blocks at `start`, and starts to read them.
    pub fn start(device: &str, start: u64) -> Result<Self> {
        let file = direct::open(device)?;
        let mut block = Aligned::new(BLOCK, 0);
        for (number, at) in (0..BLOCKS).zip((start..).step_by(BLOCK)) {
            fill(block.bytes(), number);
            file.write_all_at(block.bytes(), at)?;
        }
        let (stop, reads) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(Vec::new())));
        let thread = {
            let (stop, reads) = (Arc::clone(&stop), Arc::clone(&reads));
            let mut expected = vec![0; BLOCK];
            let read = move || -> Result<()> {
                for (number, at) in (0..BLOCKS).zip((start..).step_by(BLOCK)).cycle() {
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                    let began = Instant::now();
                    file.read_exact_at(block.bytes(), at).context("the prober's read")?;
                    let read = Read { began, ended: Instant::now() };
                    lock(&reads).push(read);
                    fill(&mut expected, number);
                    ensure!(block.bytes() == expected, "the prober has read something else");
                    thread::sleep(PAUSE);
                }
                Ok(())
            };
            thread::Builder::new().name("prober".into()).spawn(read)?
        };
        Ok(Self { stop, reads, thread: Some(thread) })
    }

    /// Waits for the first read that ends after `instant`; when it did.
    pub fn first_after(&self, instant: Instant) -> Result<Instant> {
        wait_for("a read to come back", PATIENCE, || {
            let has_failed = self.thread.as_ref().is_none_or(JoinHandle::is_finished);
            ensure!(!has_failed, "the prober has ended");
            let reads = lock(&self.reads);
            let after = reads.partition_point(|read| read.ended <= instant);
            Ok(reads.get(after).map(|read| read.ended))
        })
    }

    /// Ends it; all that it has read.
    pub fn end(mut self) -> Result<Vec<Read>> {
        self.stop.store(true, Ordering::Relaxed);
        let thread = self.thread.take().context("a thread")?;
        thread.join().map_err(|_| anyhow!("the prober has panicked"))??;
        Ok(std::mem::take(&mut lock(&self.reads)))
    }
}

impl Drop for Prober {
    fn drop(&mut self) {
        // Not waited for: in a test that has failed its read may never end.
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// A thread that does nothing but sleep: what it oversleeps, the machine was busy with other things.
#[derive(Debug)]
pub struct Sleeper {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Duration>,
}

impl Sleeper {
    /// Starts to sleep.
    ///
    /// # Errors
    /// When there can be no thread.
    pub fn start() -> Result<Self> {
        const NAP: Duration = Duration::from_millis(5);
        let stop = Arc::new(AtomicBool::new(false));
        let thread = {
            let stop = Arc::clone(&stop);
            thread::Builder::new().name("sleeper".into()).spawn(move || {
                let mut longest = Duration::ZERO;
                while !stop.load(Ordering::Relaxed) {
                    let began = Instant::now();
                    thread::sleep(NAP);
                    longest = longest.max(began.elapsed().saturating_sub(NAP));
                }
                longest
            })?
        };
        Ok(Self { stop, thread })
    }

    /// Ends it; the longest that it has overslept.
    pub fn end(self) -> Result<Duration> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| anyhow!("the sleeper has panicked"))
    }
}

/// The longest of the reads that were under way between two instants.
#[must_use]
pub fn longest(reads: &[Read], from: Instant, to: Instant) -> Duration {
    let under_way = reads.iter().filter(|read| read.began < to && read.ended > from);
    under_way.map(|read| read.ended - read.began).max().unwrap_or_default()
}

/// `n times: median …, 9 of 10 …, 99 of 100 …, longest …`.
pub fn distribution(times: &mut [Duration]) -> String {
    times.sort_unstable();
    let at = |part: usize| times.get(times.len() * part / 100).or(times.last()).copied();
    let [median, most, nearly, longest] =
        [50, 90, 99, 100].map(|part| at(part).unwrap_or_default());
    format!(
        "{} times: median {median:.0?}, 9 of 10 {most:.0?}, 99 of 100 {nearly:.0?}, longest {longest:.0?}",
        times.len()
    )
}

fn lock(reads: &Mutex<Vec<Read>>) -> MutexGuard<'_, Vec<Read>> {
    reads.lock().unwrap_or_else(PoisonError::into_inner)
}

/// No block is like another one.
fn fill(block: &mut [u8], number: u64) {
    for (word, bytes) in (number << 9..).zip(block.chunks_exact_mut(8)) {
        bytes.copy_from_slice(&(word | 0x5eed << 48).to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_read_under_way_is_found() {
        let (ms, start) = (Duration::from_millis, Instant::now());
        let read = |from, took| Read { began: start + ms(from), ended: start + ms(from + took) };
        let reads = [read(0, 5), read(6, 50), read(60, 9)];
        assert_eq!(longest(&reads, start, start + ms(6)), ms(5));
        assert_eq!(longest(&reads, start + ms(40), start + ms(61)), ms(50));
        assert_eq!(longest(&reads, start + ms(90), start + ms(99)), ms(0));
    }

    #[test]
    fn times_are_summed_up() {
        let mut times: Vec<_> = (1..=10).rev().map(Duration::from_millis).collect();
        assert_eq!(
            distribution(&mut times),
            "10 times: median 6ms, 9 of 10 10ms, 99 of 100 10ms, longest 10ms"
        );
        assert!(distribution(&mut []).starts_with("0 times"));
    }
}

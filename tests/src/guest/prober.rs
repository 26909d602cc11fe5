//! How long a device keeps somebody waiting.

use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};

use super::direct::{self, Aligned};

/// A thread that reads one block of a device again and again.
#[derive(Debug)]
pub struct Prober {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<Vec<Read>>>>,
}

/// When a read began, and how long it took.
type Read = (Instant, Duration);

/// All reads of a [`Prober`].
#[derive(Debug)]
pub struct Reads(Vec<Read>);

impl Prober {
    /// Begins to read. The reads of others must not be in the way of this one: it has no queue.
    ///
    /// # Errors
    /// When the device cannot be opened.
    pub fn start(device: &str) -> Result<Self> {
        let file = direct::open(device)?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let mut block = Aligned::new(4096, 0);
            let mut reads = Vec::new();
            while !stopped.load(Ordering::Relaxed) {
                let began = Instant::now();
                file.read_exact_at(block.bytes(), 0).context("the prober's read")?;
                reads.push((began, began.elapsed()));
                std::thread::sleep(Duration::from_millis(1));
            }
            Ok(reads)
        });
        Ok(Self { stop, thread: Some(thread) })
    }

    /// Ends, and says how long the reads took.
    ///
    /// # Errors
    /// The first error of a read.
    pub fn finish(mut self) -> Result<Reads> {
        self.stop.store(true, Ordering::Relaxed);
        let thread = self.thread.take().context("it runs")?;
        thread.join().map_err(|_| anyhow!("the prober has panicked"))?.map(Reads)
    }
}

impl Drop for Prober {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

impl Reads {
    /// The longest read of those that were under way between two instants.
    pub fn longest(&self, from: Instant, to: Instant) -> Duration {
        let under_way = self.0.iter().filter(|(began, took)| *began < to && *began + *took > from);
        under_way.map(|(_, took)| *took).max().unwrap_or_default()
    }
}

/// `n median …, nine of ten …, longest …` of some times.
pub fn distribution(times: &mut [Duration]) -> String {
    times.sort_unstable();
    let at = |part: usize| times.get(times.len() * part / 100).or(times.last()).copied();
    let [median, most, longest] = [50, 90, 100].map(|part| at(part).unwrap_or_default());
    format!("{} times: median {median:.0?}, 9 of 10 {most:.0?}, longest {longest:.0?}", times.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_read_under_way_is_found() {
        let ms = Duration::from_millis;
        let start = Instant::now();
        let reads = Reads(vec![(start, ms(5)), (start + ms(6), ms(50)), (start + ms(60), ms(9))]);
        assert_eq!(reads.longest(start, start + ms(6)), ms(5));
        assert_eq!(reads.longest(start + ms(40), start + ms(61)), ms(50));
        assert_eq!(reads.longest(start + ms(90), start + ms(99)), ms(0));
    }

    #[test]
    fn times_are_summed_up() {
        let mut times: Vec<_> = (1..=10).rev().map(Duration::from_millis).collect();
        assert_eq!(distribution(&mut times), "10 times: median 6ms, 9 of 10 10ms, longest 10ms");
        assert!(distribution(&mut []).starts_with("0 times"));
    }
}

//! Memory pressure: little memory is left, and what is left is dirtied all the time.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};

const PAGE: usize = 4096;
const MIB: usize = 1 << 20;
const PIECE: usize = 64 << 10;
/// The hog takes memory until no more than this is available, and gives some back when less is
/// than the second: close to the limit, but with room for a program to start.
const AVAILABLE_KIB: [u64; 2] = [56 << 10, 40 << 10];
/// The pace of the hog, which would else take a CPU for itself.
const LOOK: Duration = Duration::from_millis(10);
/// The pace of the writer, a MiB at a time, which would else take the drives for itself.
const WRITE: Duration = Duration::from_millis(100);

/// Two threads: one holds anonymous memory and rewrites its pages, one rewrites a file through the
/// page cache. Both end with their handle.
#[derive(Debug)]
pub struct Pressure {
    stop: Arc<AtomicBool>,
    hog: Option<JoinHandle<Result<usize>>>,
    writer: Option<JoinHandle<Result<Written>>>,
    reclaimed: Reclaimed,
}

/// What there was of it.
#[derive(Debug)]
pub struct Suffered {
    /// Most anonymous memory that was held, in MiB.
    pub held_mib: usize,
    /// Pages that the kernel took back.
    pub reclaimed: Reclaimed,
    /// The file as it has to be now.
    pub written: Written,
}

impl Pressure {
    /// Starts it. The file gets `mib` MiB, again and again.
    ///
    /// # Errors
    /// When the file cannot be made.
    pub fn start(file: &Path, mib: u64) -> Result<Self> {
        set_oom_score("1000")?;
        let reclaimed = Reclaimed::now()?;
        let stop = Arc::new(AtomicBool::new(false));
        let hog = {
            let stop = Arc::clone(&stop);
            thread::Builder::new().name("hog".into()).spawn(move || hog(&stop))?
        };
        let writer = {
            let (stop, path) = (Arc::clone(&stop), file.to_owned());
            let write = move || Written::rewrite(path, mib, &stop);
            thread::Builder::new().name("dirtier".into()).spawn(write)?
        };
        Ok(Self { stop, hog: Some(hog), writer: Some(writer), reclaimed })
    }

    /// Ends it.
    ///
    /// # Errors
    /// When the file could not be written.
    pub fn end(mut self) -> Result<Suffered> {
        self.stop.store(true, Ordering::Relaxed);
        let held_mib = join(self.hog.take())?;
        let written = join(self.writer.take())?;
        let reclaimed = Reclaimed::now()?.since(&self.reclaimed);
        set_oom_score("0")?;
        Ok(Suffered { held_mib, reclaimed, written })
    }
}

impl Drop for Pressure {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = self.hog.take().map(JoinHandle::join);
        let _ = self.writer.take().map(JoinHandle::join);
    }
}

fn join<T>(thread: Option<JoinHandle<Result<T>>>) -> Result<T> {
    thread.context("a thread")?.join().map_err(|_| anyhow!("a thread has panicked"))?
}

/// If memory should run out all the same, the process with the highest score is killed: the test,
/// which then fails, and not a server.
fn set_oom_score(score: &str) -> Result<()> {
    fs::write("/proc/self/oom_score_adj", score).context("oom_score_adj")
}

/// Holds memory, and rewrites a part of it at each look. Returns the most that it held, in MiB.
fn hog(stop: &AtomicBool) -> Result<usize> {
    let [enough, scarce] = AVAILABLE_KIB;
    let (mut blocks, mut most, mut turn) = (Vec::new(), 0, 0_usize);
    while !stop.load(Ordering::Relaxed) {
        let available = available_kib()?;
        if available > enough {
            for _ in 0..(available - enough).div_ceil(1 << 10).min(16) {
                blocks.push(vec![1_u8; MIB]);
            }
        } else if available < scarce {
            for _ in 0..(scarce - available).div_ceil(1 << 10) {
                blocks.pop();
            }
        }
        most = most.max(blocks.len());
        turn += 1;
        let chosen = turn % blocks.len().max(1);
        if let Some(block) = blocks.get_mut(chosen) {
            block.iter_mut().step_by(PAGE).for_each(|byte| *byte = byte.wrapping_add(1));
        }
        thread::sleep(LOOK);
    }
    Ok(most)
}

fn available_kib() -> Result<u64> {
    field(&fs::read_to_string("/proc/meminfo")?, "MemAvailable:")
}

/// The number behind a name in a file of `/proc`.
fn field(text: &str, name: &str) -> Result<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    let number = line.and_then(|rest| rest.split_whitespace().next());
    number.with_context(|| format!("no {name}"))?.parse().with_context(|| name.to_owned())
}

/// Pages that the kernel took back from their users.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reclaimed {
    /// By its own thread.
    pub by_kswapd: u64,
    /// By tasks that wanted memory, which had to wait for it.
    pub directly: u64,
}

impl Reclaimed {
    fn now() -> Result<Self> {
        let text = fs::read_to_string("/proc/vmstat")?;
        let by_kswapd = field(&text, "pgsteal_kswapd ")?;
        Ok(Self { by_kswapd, directly: field(&text, "pgsteal_direct ")? })
    }

    fn since(self, before: &Self) -> Self {
        Self {
            by_kswapd: self.by_kswapd - before.by_kswapd,
            directly: self.directly - before.directly,
        }
    }

    /// All of them.
    pub fn all(&self) -> u64 {
        self.by_kswapd + self.directly
    }
}

/// A file that was rewritten MiB by MiB, and what is in each of them.
#[derive(Debug)]
pub struct Written {
    path: PathBuf,
    /// Which writing of each MiB was the last.
    rounds: Vec<u64>,
    /// Longest time for a write of 64 KiB.
    pub longest: Duration,
    /// All MiB written.
    pub mib: u64,
}

impl Written {
    fn rewrite(path: PathBuf, mib: u64, stop: &AtomicBool) -> Result<Self> {
        let file = File::options().write(true).create(true).truncate(true).open(&path)?;
        let mut written = Self { path, rounds: Vec::new(), longest: Duration::ZERO, mib: 0 };
        let mut piece = vec![0; MIB];
        while !stop.load(Ordering::Relaxed) {
            let (number, round) = (written.mib % mib, written.mib / mib);
            fill(&mut piece, number, round);
            for (at, bytes) in (number << 20..).step_by(PIECE).zip(piece.chunks(PIECE)) {
                let start = Instant::now();
                file.write_all_at(bytes, at)?;
                written.longest = written.longest.max(start.elapsed());
            }
            match written.rounds.get_mut(usize::try_from(number)?) {
                Some(last) => *last = round,
                None => written.rounds.push(round),
            }
            written.mib += 1;
            thread::sleep(WRITE);
        }
        file.sync_all()?;
        Ok(written)
    }

    /// Compares the file, after the page cache was dropped.
    ///
    /// # Errors
    /// When it cannot be read, or is not what was written.
    pub fn check(&self) -> Result<()> {
        fs::write("/proc/sys/vm/drop_caches", "3")?;
        let file = File::open(&self.path)?;
        let (mut piece, mut expected) = (vec![0; MIB], vec![0; MIB]);
        for (number, round) in (0..).zip(&self.rounds) {
            file.read_exact_at(&mut piece, number << 20)?;
            fill(&mut expected, number, *round);
            ensure!(piece == expected, "MiB {number} of {} differs", self.path.display());
        }
        Ok(())
    }
}

/// No two words of a file are the same, nor a word of two rounds.
fn fill(piece: &mut [u8], number: u64, round: u64) {
    for (word, bytes) in (number << 17..).zip(piece.chunks_exact_mut(8)) {
        bytes.copy_from_slice(&(word | round << 40).to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found_by_name() {
        let text = "MemFree:  5 kB\nMemAvailable:   371416 kB\n";
        assert_eq!(field(text, "MemAvailable:").unwrap(), 371_416);
        assert!(field(text, "Mem:").is_err());
    }

    #[test]
    fn a_rewritten_file_is_told_from_any_other() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        let mut pieces = [vec![0; MIB], vec![0; MIB], vec![0; MIB]];
        fill(&mut pieces[0], 1, 2);
        fill(&mut pieces[1], 2, 2);
        fill(&mut pieces[2], 1, 3);
        assert!(pieces[0] != pieces[1] && pieces[0] != pieces[2] && pieces[1] != pieces[2]);
        assert_eq!(pieces[0][8..16], (((1_u64 << 17) + 1) | (2 << 40)).to_le_bytes());
        let stop = AtomicBool::new(true);
        let written = Written::rewrite(path, 4, &stop).unwrap();
        assert_eq!((written.mib, written.rounds.len()), (0, 0));
    }
}

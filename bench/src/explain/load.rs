//! A small load: reads of one block, one at a time, spread over the device.

use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use nix::fcntl::OFlag;
use nix::time::{ClockId, clock_gettime};

use super::stages::Read;

/// An alignment that suffices for direct I/O on every device.
const ALIGNMENT: usize = 4096;

/// Bytes of a sector, the unit of the trace.
const SECTOR: u64 = 512;

/// A load.
#[derive(Debug)]
pub struct Load {
    device: File,
    blocks: u64,
    block_bytes: u64,
    buffer: Vec<u8>,
}

impl Load {
    /// Opens a device for reading.
    ///
    /// # Errors
    /// A one-line message: it cannot be opened, or is too short for blocks of this size.
    pub fn open(device: &Path, block_bytes: u64) -> anyhow::Result<Self> {
        let mut options = OpenOptions::new();
        options.read(true).custom_flags(OFlag::O_DIRECT.bits());
        let opened = options.open(device).and_then(|file| Ok((measure(&file)?, file)));
        let (size, file) = opened.with_context(|| format!("cannot open {}", device.display()))?;
        Self::of(file, size, block_bytes)
            .with_context(|| format!("cannot read from {}", device.display()))
    }

    fn of(device: File, size: u64, block_bytes: u64) -> anyhow::Result<Self> {
        let blocks = size / block_bytes;
        ensure!(blocks > 0, "it has {size} bytes, less than one block of {block_bytes}");
        let buffer = vec![0; usize::try_from(block_bytes)? + ALIGNMENT];
        Ok(Self { device, blocks, block_bytes, buffer })
    }

    /// Reads this many blocks, or until the time is over or `stop` is set.
    ///
    /// # Errors
    /// A one-line message if a read fails or is short.
    pub fn run(
        &mut self,
        reads: usize,
        limit: Duration,
        stop: &Arc<AtomicBool>,
    ) -> anyhow::Result<Vec<Read>> {
        let deadline = Instant::now() + limit;
        let mut done = Vec::with_capacity(reads);
        for number in 0_u64.. {
            if done.len() >= reads || Instant::now() >= deadline || stop.load(Ordering::Relaxed) {
                break;
            }
            done.push(self.read(block_of_read(number, self.blocks))?);
        }
        Ok(done)
    }

    fn read(&mut self, block: u64) -> anyhow::Result<Read> {
        let offset = block * self.block_bytes;
        let from = self.buffer.as_ptr().align_offset(ALIGNMENT);
        let length = usize::try_from(self.block_bytes)?;
        let buffer = &mut self.buffer[from..from + length];
        let began_us = now_us()?;
        let read = self.device.read_at(buffer, offset);
        let ended_us = now_us()?;
        let read = read.with_context(|| format!("a read of {length} bytes at {offset} fails"))?;
        ensure!(read > 0, "the device has gone away: a read at {offset} returned nothing");
        ensure!(read == length, "a read of {length} bytes at {offset} returned {read}");
        Ok(Read { sector: offset / SECTOR, began_us, ended_us })
    }
}

fn measure(mut file: &File) -> std::io::Result<u64> {
    file.seek(SeekFrom::End(0))
}

/// The block of the nth read. Blocks are spread over the device, and two reads in a row are of
/// different blocks unless there is only one.
fn block_of_read(number: u64, blocks: u64) -> u64 {
    // Multiples of the golden ratio are spread evenly.
    number.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_shr(16) % blocks
}

/// The monotonic clock, rounded down to microseconds as in the kernel's trace.
fn now_us() -> anyhow::Result<u64> {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC)?;
    let (seconds, nanos) = (u64::try_from(now.tv_sec())?, u64::try_from(now.tv_nsec())?);
    Ok(seconds * 1_000_000 + nanos / 1000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_all_over_the_device() {
        let places: Vec<u64> = (0..1000).map(|number| block_of_read(number, 1 << 18)).collect();
        for part in 0..8 {
            let range = (part << 15)..((part + 1) << 15);
            let within = places.iter().filter(|place| range.contains(*place)).count();
            assert!((90..160).contains(&within), "{within} in part {part}");
        }
        assert!((0..100).all(|number| block_of_read(number, 1) == 0));
    }

    #[test]
    fn a_load_reads_and_stops() {
        let file = || {
            let file = tempfile::tempfile().unwrap();
            file.set_len(1 << 20).unwrap();
            file
        };
        assert_eq!(measure(&file()).unwrap(), 1 << 20);
        let mut load = Load::of(file(), 1 << 20, 4096).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let reads = load.run(50, Duration::from_secs(60), &stop).unwrap();
        assert_eq!(reads.len(), 50);
        assert!(reads.iter().all(|read| read.began_us <= read.ended_us && read.sector < 2048));
        assert!(load.run(50, Duration::ZERO, &stop).unwrap().is_empty());
        stop.store(true, Ordering::Relaxed);
        assert!(load.run(50, Duration::from_secs(60), &stop).unwrap().is_empty());
        let long = Load::of(file(), 1 << 20, 2 << 20).unwrap_err().to_string();
        assert!(long.contains("less than one block"), "{long}");
        let missing = Load::open(Path::new("/no/such"), 4096).unwrap_err().to_string();
        assert_eq!(missing, "cannot open /no/such");
        let mut short = Load::of(file(), 2 << 20, 2 << 20).unwrap();
        let said = short.run(1, Duration::from_secs(60), &Arc::default()).unwrap_err().to_string();
        assert!(said.ends_with("returned 1048576"), "{said}");
    }
}

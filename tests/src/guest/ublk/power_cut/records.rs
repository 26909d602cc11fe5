//! Numbered records, one a block, and what of them has to be there after a power cut.

use std::fmt;

use rand::{Rng as _, SeedableRng as _};
use rand_xoshiro::SplitMix64;

/// A record tells by itself where it belongs and which one it is: every word of it follows from
/// that, so one that is torn or mixed with another one is no record at all.
const MAGIC: u64 = 0x7562_6c6b_7265_6331;

/// What is wrong with a block after a power cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wrong {
    /// A record that was acknowledged as durable is not there, but an older one.
    Lost { slot: usize, durable: u64, found: u64 },
    /// Neither zeros nor a record of this block.
    Garbage { slot: usize },
    /// A record of this block that was lost in an earlier cut, or never written.
    Foreign { slot: usize, found: u64 },
}

impl fmt::Display for Wrong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Lost { slot, durable, found } => {
                write!(f, "block {slot}: record {durable} was durable, {found} is there")
            }
            Self::Garbage { slot } => write!(f, "block {slot}: garbage"),
            Self::Foreign { slot, found } => {
                write!(f, "block {slot}: record {found}, which cannot be there")
            }
        }
    }
}

/// What is known of a block.
#[derive(Debug, Clone, Default)]
struct Slot {
    /// The newest record that is known to be on stable storage, 0 for zeros.
    durable: u64,
    /// Records that writes were issued for since, the oldest first. Writes to a block never
    /// overlap.
    later: Vec<u64>,
}

/// What was found after a power cut.
#[derive(Debug, Default)]
pub struct Findings {
    pub wrong: Vec<Wrong>,
    /// Blocks whose record became durable since the cut before.
    pub durable: u64,
    /// Blocks with a newer write, acknowledged or not, that was not durable.
    pub uncertain: u64,
    /// Of these: without that write.
    pub undone: u64,
}

/// What was written, what of it was acknowledged, and what of that as durable.
#[derive(Debug)]
pub struct Records {
    slots: Vec<Slot>,
    /// Writes that were acknowledged but not as durable, in this order.
    acknowledged: Vec<(usize, u64)>,
    /// How many of these a flush has made durable.
    flushed: usize,
    sequence: u64,
    /// Blocks that have a record which became durable since the cut before.
    renewed: Vec<bool>,
}

impl Records {
    /// Of a device that reads as zeros.
    pub fn new(slots: usize) -> Self {
        Self {
            slots: vec![Slot::default(); slots],
            acknowledged: Vec::new(),
            flushed: 0,
            sequence: 0,
            renewed: vec![false; slots],
        }
    }

    /// How many blocks there are.
    pub fn len(&self) -> usize {
        self.slots.len()
    }

    /// A write to blocks is about to be issued. Returns the number of its records.
    pub fn issue(&mut self, slots: std::ops::Range<usize>) -> u64 {
        self.sequence += 1;
        self.slots[slots].iter_mut().for_each(|slot| slot.later.push(self.sequence));
        self.sequence
    }

    /// A write has succeeded; if it was one with FUA, it is durable.
    pub fn acknowledge(&mut self, slots: std::ops::Range<usize>, sequence: u64, fua: bool) {
        for slot in slots {
            if fua {
                self.make_durable(slot, sequence);
            } else {
                self.acknowledged.push((slot, sequence));
            }
        }
    }

    /// A flush is about to be issued. Returns what it covers.
    pub fn begin_flush(&self) -> usize {
        self.acknowledged.len()
    }

    /// A flush has succeeded.
    pub fn end_flush(&mut self, covers: usize) {
        for number in self.flushed..covers {
            let (slot, sequence) = self.acknowledged[number];
            self.make_durable(slot, sequence);
        }
        self.flushed = self.flushed.max(covers);
    }

    fn make_durable(&mut self, slot: usize, sequence: u64) {
        let known = &mut self.slots[slot];
        if sequence > known.durable {
            known.durable = sequence;
            known.later.retain(|later| *later > sequence);
            self.renewed[slot] = true;
        }
    }

    /// Compares blocks, the first of which is `first`, with what has to be there after a cut.
    pub fn compare(&self, first: usize, blocks: &[u8], block_bytes: usize, into: &mut Findings) {
        for (slot, block) in (first..).zip(blocks.chunks(block_bytes)) {
            let known = &self.slots[slot];
            into.durable += u64::from(self.renewed[slot]);
            into.uncertain += u64::from(!known.later.is_empty());
            let Some(found) = parse(block, slot) else {
                into.wrong.push(Wrong::Garbage { slot });
                continue;
            };
            into.undone += u64::from(known.later.last().is_some_and(|newest| *newest != found));
            if found < known.durable {
                into.wrong.push(Wrong::Lost { slot, durable: known.durable, found });
            } else if found != known.durable && !known.later.contains(&found) {
                into.wrong.push(Wrong::Foreign { slot, found });
            }
        }
    }

    /// What is there after a cut is what has to be there from now on: a drive without power has
    /// no cache.
    pub fn adopt(&mut self, first: usize, blocks: &[u8], block_bytes: usize) {
        for (slot, block) in (first..).zip(blocks.chunks(block_bytes)) {
            let durable = parse(block, slot).unwrap_or(0);
            self.slots[slot] = Slot { durable, later: Vec::new() };
            self.renewed[slot] = false;
        }
        self.acknowledged.clear();
        self.flushed = 0;
    }
}

/// Makes the records of blocks, the first of which is `first`.
pub fn fill(blocks: &mut [u8], block_bytes: usize, first: usize, sequence: u64) {
    for (slot, block) in (first..).zip(blocks.chunks_mut(block_bytes)) {
        for (number, word) in (0..).zip(block.chunks_exact_mut(8)) {
            word.copy_from_slice(&word_of(slot, sequence, number).to_le_bytes());
        }
    }
}

fn word_of(slot: usize, sequence: u64, number: u64) -> u64 {
    let hash = |word| SplitMix64::seed_from_u64(word).next_u64();
    let slot = u64::try_from(slot).unwrap_or(u64::MAX);
    match number {
        0 => MAGIC,
        1 => sequence,
        _ => hash(hash(sequence) ^ slot) ^ number,
    }
}

/// The number of the record in a block, 0 for zeros.
fn parse(block: &[u8], slot: usize) -> Option<u64> {
    if block.iter().all(|byte| *byte == 0) {
        return Some(0);
    }
    let words = block.chunks_exact(8).map(|word| word.try_into().map_or(0, u64::from_le_bytes));
    let sequence = words.clone().nth(1)?;
    let seed = word_of(slot, sequence, 2) ^ 2;
    let expected = [MAGIC, sequence].into_iter().chain((2..).map(|number| seed ^ number));
    words.zip(expected).all(|(word, expected)| word == expected).then_some(sequence)
}

#[cfg(test)]
mod tests {
    use super::*;

    const BLOCK: usize = 512;

    fn block(slot: usize, sequence: u64) -> Vec<u8> {
        let mut block = vec![0; BLOCK];
        if sequence > 0 {
            fill(&mut block, BLOCK, slot, sequence);
        }
        block
    }

    fn compared(records: &Records, found: [u64; 2]) -> Findings {
        let blocks = [block(0, found[0]), block(1, found[1])].concat();
        let mut findings = Findings::default();
        records.compare(0, &blocks, BLOCK, &mut findings);
        findings
    }

    #[test]
    fn records_are_whole_and_in_their_place_or_garbage() {
        for sequence in [1, 2, u64::from(u32::MAX)] {
            assert_eq!(parse(&block(7, sequence), 7), Some(sequence));
            assert_eq!(parse(&block(7, sequence), 8), None, "of another block");
        }
        assert_eq!(parse(&[0; BLOCK], 3), Some(0));
        let torn = [&block(7, 1)[..256], &block(7, 2)[256..]].concat();
        assert_eq!(parse(&torn, 7), None);
        for byte in 0..BLOCK {
            let mut spoilt = block(7, 1);
            spoilt[byte] ^= 1;
            assert_eq!(parse(&spoilt, 7), None, "byte {byte}");
        }
    }

    #[test]
    fn a_durable_record_or_a_newer_one_has_to_be_there() {
        let mut records = Records::new(2);
        for _ in 0..2 {
            let sequence = records.issue(0..1);
            records.acknowledge(0..1, sequence, false);
        }
        let covers = records.begin_flush();
        records.issue(0..1); // 3, never acknowledged
        records.end_flush(covers);
        for (found, wrong) in [
            (0, Some(Wrong::Lost { slot: 0, durable: 2, found: 0 })),
            (1, Some(Wrong::Lost { slot: 0, durable: 2, found: 1 })),
            (2, None),
            (3, None),
            (4, Some(Wrong::Foreign { slot: 0, found: 4 })),
        ] {
            let findings = compared(&records, [found, 0]);
            assert_eq!(findings.wrong, Vec::from_iter(wrong), "record {found}");
            assert_eq!((findings.durable, findings.uncertain), (1, 1));
            assert_eq!(findings.undone, u64::from(found != 3));
        }
    }

    #[test]
    fn a_flush_covers_what_was_acknowledged_before_it_was_issued() {
        let mut records = Records::new(2);
        let first = records.issue(0..1);
        records.acknowledge(0..1, first, false);
        let covers = records.begin_flush();
        let second = records.issue(1..2);
        records.acknowledge(1..2, second, false);
        records.end_flush(covers);
        assert!(compared(&records, [first, 0]).wrong.is_empty());
        assert_eq!(compared(&records, [0, 0]).wrong.len(), 1);
        // An earlier flush that ends later takes nothing back.
        let covers = records.begin_flush();
        records.end_flush(covers);
        records.end_flush(0);
        assert_eq!(compared(&records, [first, 0]).wrong.len(), 1);
    }

    #[test]
    fn a_write_with_fua_is_durable_and_no_other_is() {
        let mut records = Records::new(2);
        let plain = records.issue(0..2);
        records.acknowledge(0..2, plain, false);
        let durable = records.issue(1..2);
        records.acknowledge(1..2, durable, true);
        assert!(compared(&records, [0, durable]).wrong.is_empty());
        let wrong = compared(&records, [0, plain]).wrong;
        assert_eq!(wrong, [Wrong::Lost { slot: 1, durable, found: plain }]);
    }

    #[test]
    fn what_a_cut_has_undone_must_not_come_back() {
        let mut records = Records::new(2);
        let undone = records.issue(0..2);
        records.adopt(0, &[0; 2 * BLOCK], BLOCK);
        let later = records.issue(0..1);
        assert!(compared(&records, [later, 0]).wrong.is_empty());
        assert_eq!(
            compared(&records, [undone, undone]).wrong,
            [0, 1].map(|slot| Wrong::Foreign { slot, found: undone })
        );
    }
}

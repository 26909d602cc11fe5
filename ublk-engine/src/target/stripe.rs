//! The stripe target (RAID 0): chunks of the device alternate between the backings.

use uring_ext::Errno;

use super::push_flushes;
use super::transfer_limit::TransferLimit;
use crate::plan::{BackingIndex, BackingPosition, Op, OpKind, Plan, Planner};
use crate::request::{Request, RequestKind};

/// Minimum and maximum number of backings.
pub const BACKINGS: std::ops::RangeInclusive<usize> = 2..=64;
/// Minimum chunk size in bytes.
pub const MIN_CHUNK: u64 = 4096;

/// A part of the device that is striped over the same backings: first all of them, then, behind the
/// end of the smaller ones, the larger ones.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Zone {
    /// First byte on the device.
    device_start: u64,
    /// First byte on each of its backings.
    start: u64,
    /// Length on each of its backings, in chunks.
    rows: u64,
    backings: Box<[BackingIndex]>,
}

/// Stripes the device over backings. Their sizes may differ.
#[derive(Clone, Debug)]
pub struct StripeTarget {
    chunk: u64,
    /// In the order of the device, without gaps.
    zones: Box<[Zone]>,
    backings: u16,
    size: u64,
    limit: TransferLimit,
}

/// The sizes and the chunk do not make a stripe.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadStripe {
    /// Too few or too many backings.
    #[error("{0} backings; a stripe has 2 to 64")]
    Backings(usize),
    /// The chunk is not a power of two, or too small.
    #[error("a chunk of {0} bytes; it is a power of two of at least 4096")]
    Chunk(u64),
    /// A backing is smaller than a chunk.
    #[error("backing {index} has {size} bytes, less than a chunk of {chunk}")]
    TooSmall {
        /// Its index, in the order given.
        index: usize,
        /// Its size in bytes.
        size: u64,
        /// The chunk in bytes.
        chunk: u64,
    },
    /// The sum of their sizes exceeds the maximum size of a device.
    #[error("the backings are longer than a device can be")]
    TooLong,
}

impl StripeTarget {
    /// Stripes chunks of `chunk` bytes over backings of these sizes in bytes. The rest of a backing
    /// behind its last whole chunk stays unused.
    ///
    /// # Errors
    /// [`BadStripe`].
    pub fn new(chunk: u64, sizes: &[u64]) -> Result<Self, BadStripe> {
        let count = u16::try_from(sizes.len()).ok().filter(|_| BACKINGS.contains(&sizes.len()));
        let count = count.ok_or(BadStripe::Backings(sizes.len()))?;
        if chunk < MIN_CHUNK || !chunk.is_power_of_two() {
            return Err(BadStripe::Chunk(chunk));
        }
        if let Some((index, size)) = sizes.iter().enumerate().find(|(_, size)| **size < chunk) {
            return Err(BadStripe::TooSmall { index, size: *size, chunk });
        }
        let rows_of = |index: &BackingIndex| sizes[usize::from(index.0)] / chunk;
        let mut left: Vec<_> = (0..count).map(BackingIndex).collect();
        let (mut zones, mut device_start, mut first_row) = (Vec::new(), 0_u64, 0);
        while let Some(last_row) = left.iter().map(rows_of).min() {
            let rows = last_row - first_row;
            let width = u64::try_from(left.len()).map_err(|_| BadStripe::TooLong)?;
            let bytes = chunk.checked_mul(rows).and_then(|bytes| bytes.checked_mul(width));
            let start = first_row * chunk;
            zones.push(Zone { device_start, start, rows, backings: left.clone().into() });
            let end = bytes.and_then(|bytes| device_start.checked_add(bytes));
            device_start = end.ok_or(BadStripe::TooLong)?;
            first_row = last_row;
            left.retain(|index| rows_of(index) > last_row);
        }
        let (zones, size) = (zones.into(), device_start);
        Ok(Self { chunk, zones, backings: count, size, limit: TransferLimit::UNLIMITED })
    }

    /// Sets the limit of one transfer on the backings.
    #[must_use]
    pub fn within(self, limit: TransferLimit) -> Self {
        Self { limit, ..self }
    }

    /// Size of the device in bytes.
    #[must_use]
    pub const fn size(&self) -> u64 {
        self.size
    }

    /// The chunk in bytes.
    #[must_use]
    pub const fn chunk(&self) -> u64 {
        self.chunk
    }

    /// Whether every byte of `other` is at the same place here. There may be more bytes behind
    /// them.
    #[must_use]
    pub fn extends(&self, other: &Self) -> bool {
        let same_kind = self.chunk == other.chunk && self.backings == other.backings;
        let last = other.zones.len() - 1;
        let begins_so = self.zones.get(..last) == Some(&other.zones[..last]);
        let goes_on = self.zones.get(last).is_some_and(|zone| {
            let old = &other.zones[last];
            zone.rows >= old.rows && *zone == Zone { rows: zone.rows, ..old.clone() }
        });
        same_kind && begins_so && goes_on
    }

    fn zone_of(&self, at: u64) -> usize {
        self.zones.partition_point(|zone| zone.device_start <= at) - 1
    }

    /// Chunk by chunk, for operations with data: adjacent chunks on a backing are not adjacent in
    /// the buffer.
    fn plan_chunks(&self, request: &Request, from: u64, plan: &mut Plan) -> Result<(), Errno> {
        let end = request.end_within(self.size)?;
        let mut at = request.offset + from;
        while at < end {
            let zone = &self.zones[self.zone_of(at)];
            let into = at - zone.device_start;
            let (chunk, into_chunk) = (into / self.chunk, into % self.chunk);
            let (row, column) = zone.row_and_column(chunk);
            let offset = zone.start + row * self.chunk + into_chunk;
            let len = self.limit.first(offset, (self.chunk - into_chunk).min(end - at));
            let op = Op {
                kind: OpKind::of_request(request.kind),
                backing: zone.backings[column],
                offset,
                len,
                buf_offset: request.buf_offset(at)?,
            };
            if plan.push(op).is_err() {
                plan.continue_at(at - request.offset);
                return Ok(());
            }
            at += len;
        }
        Ok(())
    }

    /// One operation per backing and zone, for operations without data: on each backing the chunks
    /// of a range are adjacent. The cursor counts columns of zones.
    fn plan_ranges(&self, request: &Request, from: u64, plan: &mut Plan) -> Result<(), Errno> {
        let end = request.end_within(self.size)?;
        let mut cursor = 0;
        for zone in &self.zones[self.zone_of(request.offset)..] {
            if zone.device_start >= end {
                break;
            }
            let width = zone.width();
            let first = request.offset.max(zone.device_start) - zone.device_start;
            let last =
                end.min(zone.device_start + zone.rows * width * self.chunk) - zone.device_start;
            for (column, backing) in (0..width).zip(zone.backings.iter()) {
                cursor += 1;
                let (start, stop) =
                    (self.position(first, column, width), self.position(last, column, width));
                if cursor <= from || start == stop {
                    continue;
                }
                let op = Op {
                    kind: OpKind::of_request(request.kind),
                    backing: *backing,
                    offset: zone.start + start,
                    len: stop - start,
                    buf_offset: 0,
                };
                if plan.push(op).is_err() {
                    plan.continue_at(cursor - 1);
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// The number of bytes of a column before byte `at` of its zone.
    fn position(&self, at: u64, column: u64, width: u64) -> u64 {
        let (chunk, into_chunk) = (at / self.chunk, at % self.chunk);
        let (row, at_column) = (chunk / width, chunk % width);
        let in_row = match column.cmp(&at_column) {
            std::cmp::Ordering::Less => self.chunk,
            std::cmp::Ordering::Equal => into_chunk,
            std::cmp::Ordering::Greater => 0,
        };
        row * self.chunk + in_row
    }
}

impl Zone {
    fn width(&self) -> u64 {
        self.backings.len() as u64
    }

    fn row_and_column(&self, chunk: u64) -> (u64, usize) {
        // A remainder modulo the number of backings is an index of a backing.
        let column = usize::try_from(chunk % self.width()).unwrap_or(0);
        (chunk / self.width(), column)
    }
}

impl Planner for StripeTarget {
    fn plan(&self, request: &Request, from: u64, plan: &mut Plan) -> Result<(), Errno> {
        match request.kind {
            RequestKind::Read | RequestKind::Write { .. } => self.plan_chunks(request, from, plan),
            RequestKind::Discard | RequestKind::WriteZeroes { .. } => {
                self.plan_ranges(request, from, plan)
            }
            RequestKind::Flush => push_flushes(self.backings, from, plan),
        }
    }

    #[inline]
    fn single(&self, request: &Request) -> Option<BackingPosition> {
        if !request.has_data() || request.end_within(self.size).is_err() {
            return None;
        }
        let zone = &self.zones[self.zone_of(request.offset)];
        let into = request.offset - zone.device_start;
        let (chunk, into_chunk) = (into / self.chunk, into % self.chunk);
        if request.len > self.chunk - into_chunk {
            return None;
        }
        let (row, column) = zone.row_and_column(chunk);
        let offset = zone.start + row * self.chunk + into_chunk;
        let position = BackingPosition { backing: zone.backings[column], offset };
        self.limit.holds(offset, request.len).then_some(position)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::oracle::{self, Geometry};
    use super::*;

    fn geometry() -> impl Strategy<Value = Geometry<StripeTarget>> {
        let sizes = prop::collection::vec(4096..40_000_u64, 2..12);
        (0..2_u32, sizes, oracle::transfer_limits()).prop_map(|(shift, sizes, limit)| {
            let chunk = MIN_CHUNK << shift;
            let sizes: Vec<_> = sizes.into_iter().map(|size| size.max(chunk)).collect();
            let target = StripeTarget::new(chunk, &sizes).unwrap().within(limit);
            let size = target.size();
            Geometry { target, size, backings: sizes }
        })
    }

    #[test]
    fn agrees_with_an_array_of_bytes() {
        oracle::check(geometry());
    }

    #[test]
    fn every_whole_chunk_of_unequal_backings_is_used() {
        let target = StripeTarget::new(4096, &[4096 * 3 + 100, 4096, 4096 * 2]).unwrap();
        assert_eq!(target.size(), 4096 * 6);
        let backing_of = |chunk: u64| {
            let mut plan = Plan::default();
            let request = Request { kind: RequestKind::Read, offset: chunk * 4096 + 512, len: 512 };
            target.plan(&request, 0, &mut plan).unwrap();
            let op = *plan.ops().next().unwrap();
            (op.backing.0, op.offset)
        };
        let expected = [(0, 512), (1, 512), (2, 512), (0, 4608), (2, 4608), (0, 8704)];
        for (chunk, expected) in (0..).zip(expected) {
            assert_eq!(backing_of(chunk), expected, "chunk {chunk}");
        }
    }

    #[test]
    fn a_long_discard_is_one_operation_a_backing() {
        let target = StripeTarget::new(4096, &[1 << 30; 4]).unwrap();
        let request = Request { kind: RequestKind::Discard, offset: 512, len: (1 << 30) - 1024 };
        let mut plan = Plan::default();
        target.plan(&request, 0, &mut plan).unwrap();
        assert_eq!((plan.ops().count(), plan.next()), (4, None));
        assert_eq!(plan.ops().map(|op| op.len).sum::<u64>(), request.len);
    }

    #[test]
    fn what_makes_no_stripe_is_refused() {
        let sizes = [1 << 20; 65];
        let table = [
            (4096, &sizes[..1], BadStripe::Backings(1)),
            (4096, &sizes[..], BadStripe::Backings(65)),
            (2048, &sizes[..2], BadStripe::Chunk(2048)),
            (12_288, &sizes[..2], BadStripe::Chunk(12_288)),
            (4096, &[1 << 20, 512], BadStripe::TooSmall { index: 1, size: 512, chunk: 4096 }),
            (4096, &[u64::MAX; 2], BadStripe::TooLong),
        ];
        for (chunk, sizes, expected) in table {
            assert_eq!(StripeTarget::new(chunk, sizes).unwrap_err(), expected);
        }
    }
}

//! The linear target: concatenates extents of several backings.

use uring_ext::Errno;

use super::push_flushes;
use super::transfer_limit::TransferLimit;
use crate::plan::{BackingIndex, BackingPosition, Op, OpKind, Plan, Planner};
use crate::request::{Request, RequestKind};

/// A contiguous range of a backing, and its start on the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Extent {
    backing: BackingIndex,
    /// First byte on the backing.
    start: u64,
    /// First byte on the device.
    device_start: u64,
    /// Length in bytes; not 0.
    len: u64,
}

/// Maps the device onto extents of backings, one after the other.
#[derive(Clone, Debug)]
pub struct LinearTarget {
    /// In the order of the device, without gaps.
    extents: Box<[Extent]>,
    /// One more than the largest index of a backing.
    backings: u16,
    size: u64,
    limit: TransferLimit,
}

/// The extents do not make a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadExtents {
    /// There is no extent, or one is empty.
    #[error("an extent without a length")]
    Empty,
    /// The sum of their lengths exceeds the maximum size of a device.
    #[error("the extents are longer than a device can be")]
    TooLong,
}

impl LinearTarget {
    /// Makes a target from extents in the order of the device: backing, first byte on it, length in
    /// bytes.
    ///
    /// # Errors
    /// [`BadExtents`].
    pub fn new(
        extents: impl IntoIterator<Item = (BackingIndex, u64, u64)>,
    ) -> Result<Self, BadExtents> {
        let (mut placed, mut size, mut backings) = (Vec::new(), 0_u64, 0);
        for (backing, start, len) in extents {
            if len == 0 {
                return Err(BadExtents::Empty);
            }
            placed.push(Extent { backing, start, device_start: size, len });
            start.checked_add(len).ok_or(BadExtents::TooLong)?;
            size = size.checked_add(len).ok_or(BadExtents::TooLong)?;
            backings = backings.max(backing.0 + 1);
        }
        if placed.is_empty() {
            return Err(BadExtents::Empty);
        }
        Ok(Self { extents: placed.into(), backings, size, limit: TransferLimit::UNLIMITED })
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

    /// Whether every byte of `other` is at the same place here. There may be more bytes behind
    /// them.
    #[must_use]
    pub fn extends(&self, other: &Self) -> bool {
        let last = other.extents.len() - 1;
        let begins_so = self.extents.get(..last) == Some(&other.extents[..last]);
        let goes_on = self.extents.get(last).is_some_and(|extent| {
            let old = other.extents[last];
            extent.len >= old.len && *extent == Extent { len: extent.len, ..old }
        });
        // The last extent may grow only if no extent follows it.
        let is_last = self.extents.len() == other.extents.len();
        begins_so && goes_on && (is_last || self.extents[last] == other.extents[last])
    }

    /// The extent that contains a byte of the device.
    fn index_of(&self, at: u64) -> usize {
        self.extents.partition_point(|extent| extent.device_start <= at) - 1
    }
}

impl Planner for LinearTarget {
    fn plan(&self, request: &Request, from: u64, plan: &mut Plan) -> Result<(), Errno> {
        if request.kind == RequestKind::Flush {
            return push_flushes(self.backings, from, plan);
        }
        let end = request.end_within(self.size)?;
        let mut at = request.offset + from;
        let mut index = self.index_of(at);
        while at < end {
            let extent = &self.extents[index];
            let into = at - extent.device_start;
            let offset = extent.start + into;
            let left = (extent.len - into).min(end - at);
            let len = if request.has_data() { self.limit.first(offset, left) } else { left };
            let op = Op {
                kind: OpKind::of_request(request.kind),
                backing: extent.backing,
                offset,
                len,
                buf_offset: request.buf_offset(at)?,
            };
            if plan.push(op).is_err() {
                plan.continue_at(at - request.offset);
                break;
            }
            at += len;
            index += usize::from(into + len == extent.len);
        }
        Ok(())
    }

    #[inline]
    fn single(&self, request: &Request) -> Option<BackingPosition> {
        if !request.has_data() || request.end_within(self.size).is_err() {
            return None;
        }
        let extent = self.extents.get(self.index_of(request.offset))?;
        let into = request.offset - extent.device_start;
        let offset = extent.start + into;
        let is_inside = request.len <= extent.len - into && self.limit.holds(offset, request.len);
        is_inside.then_some(BackingPosition { backing: extent.backing, offset })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::oracle::{self, Geometry};
    use super::*;

    fn geometry() -> impl Strategy<Value = Geometry<LinearTarget>> {
        let extent = (0..4_u16, 0..40_u64, 1..30_u64);
        let extents = prop::collection::vec(extent, 1..24);
        (extents, oracle::transfer_limits()).prop_map(|(extents, limit)| {
            // Extents must not overlap on a backing, or the device would alias itself.
            let mut free = [0_u64; 4];
            let extents: Vec<_> = extents
                .into_iter()
                .map(|(backing, gap, len)| {
                    let start = free[usize::from(backing)] + gap;
                    free[usize::from(backing)] = start + len;
                    (BackingIndex(backing), start * 512, len * 512)
                })
                .collect();
            let target = LinearTarget::new(extents).unwrap().within(limit);
            let size = target.size();
            let backings = free[..usize::from(target.backings)].iter();
            Geometry { size, backings: backings.map(|sectors| sectors * 512).collect(), target }
        })
    }

    #[test]
    fn agrees_with_an_array_of_bytes() {
        oracle::check(geometry());
    }

    #[test]
    fn what_makes_no_device_is_refused() {
        assert_eq!(LinearTarget::new([]).unwrap_err(), BadExtents::Empty);
        let empty = [(BackingIndex(0), 0, 512), (BackingIndex(1), 0, 0)];
        assert_eq!(LinearTarget::new(empty).unwrap_err(), BadExtents::Empty);
        let long = [(BackingIndex(0), 0, u64::MAX), (BackingIndex(1), 0, 512)];
        assert_eq!(LinearTarget::new(long).unwrap_err(), BadExtents::TooLong);
        let beyond = [(BackingIndex(0), 512, u64::MAX)];
        assert_eq!(LinearTarget::new(beyond).unwrap_err(), BadExtents::TooLong);
    }
}

//! The longest operation that a backing takes without a split.
//!
//! The block layer splits longer ones (`bio_split_io_at()` in `block/blk-merge.c`). The first
//! attempt of a ring must not wait, so there a split operation fails with `EAGAIN`, and a worker
//! thread repeats it. So the target cuts a request that is too long for a backing into several
//! operations.

/// The limit of one read or write on a backing. Sizes in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TransferLimit {
    /// Maximum length; a multiple of the logical block, not 0.
    max: u64,
    /// No operation crosses a multiple of this; 0 for none.
    boundary: u64,
    /// If possible, operations end at multiples of this.
    align: u64,
}

impl TransferLimit {
    /// A backing that takes any request.
    pub const UNLIMITED: Self = Self { max: u64::MAX, boundary: 0, align: 1 };

    /// A backing with logical blocks of `block` bytes. It takes `max` bytes, no operation that
    /// crosses a multiple of `boundary` (0 for none), and prefers writes of whole multiples of
    /// `align`.
    #[must_use]
    pub fn new(block: u32, max: u32, boundary: u64, align: u32) -> Self {
        let block = u64::from(block.max(1));
        let max = (u64::from(max) / block * block).max(block);
        // A value that is not a multiple of a block is ignored.
        let boundary = if boundary % block == 0 { boundary } else { 0 };
        Self { max, boundary, align: u64::from(align.max(1)) }
    }

    /// Whether one operation can cover the whole range.
    #[must_use]
    #[inline(always)]
    pub const fn holds(&self, offset: u64, len: u64) -> bool {
        len <= self.max && (self.boundary == 0 || len <= self.room_at(offset))
    }

    /// The length of the first operation of such a range: the whole range, or whole blocks.
    #[must_use]
    pub fn first(&self, offset: u64, len: u64) -> u64 {
        if self.holds(offset, len) {
            return len;
        }
        let most = self.max.min(self.room_at(offset));
        let end = offset.saturating_add(most);
        let aligned = end - end % self.align;
        if aligned > offset { aligned - offset } else { most }
    }

    const fn room_at(&self, offset: u64) -> u64 {
        if self.boundary == 0 { u64::MAX } else { self.boundary - offset % self.boundary }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const KIB: u64 = 1024;

    #[test]
    fn ranges_are_cut_at_limits_boundaries_and_physical_blocks() {
        let limited = TransferLimit::new(512, 127 * 1024, 0, 4096);
        let bounded = TransferLimit::new(512, 1 << 20, 128 * KIB, 4096);
        let table = [
            ("what fits is left alone", limited, 512, 127 * KIB, 127 * KIB),
            ("the end of a physical block", limited, 0, 128 * KIB, 124 * KIB),
            ("the same from the middle of one", limited, 512, 128 * KIB, 124 * KIB - 512),
            ("a boundary", bounded, 4096, 128 * KIB, 124 * KIB),
            ("up to a boundary", bounded, 4096, 124 * KIB, 124 * KIB),
            (
                "no multiple of the physical block",
                TransferLimit::new(512, 1024, 0, 4096),
                512,
                4096,
                1024,
            ),
            ("less than a block", TransferLimit::new(4096, 512, 0, 4096), 4096, 8192, 4096),
            ("a boundary within blocks", TransferLimit::new(4096, 8192, 512, 1), 4096, 8192, 8192),
            ("anything", TransferLimit::UNLIMITED, 512, u64::MAX - 512, u64::MAX - 512),
        ];
        for (what, limit, offset, len, expected) in table {
            assert_eq!(limit.first(offset, len), expected, "{what}");
            assert_eq!(limit.holds(offset, len), expected == len, "{what}");
        }
    }

    proptest! {
        #[test]
        fn parts_are_whole_blocks_that_the_backing_takes(
            (shift, max, boundary, align) in (0..4_u32, 1..600_u32, 0..40_u64, 0..5_u32),
            (first, blocks) in (0..1000_u64, 1..1000_u64),
        ) {
            let block = 512_u32 << shift;
            let boundary = boundary * u64::from(block);
            let limit = TransferLimit::new(block, max * 512, boundary, 512 << align);
            let block = u64::from(block);
            let (mut at, end) = (first * block, (first + blocks) * block);
            while at < end {
                let len = limit.first(at, end - at);
                prop_assert!(len > 0 && len % block == 0 && len <= end - at);
                prop_assert!(len <= (u64::from(max) * 512).max(block));
                prop_assert!(boundary == 0 || at / boundary == (at + len - 1) / boundary);
                prop_assert!(limit.holds(at, len));
                at += len;
            }
        }
    }
}

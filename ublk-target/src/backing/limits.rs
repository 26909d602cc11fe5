//! Limits of a device, inherited from its backings.
//!
//! An operation beyond a backing's limits would be split below, fail with `EINVAL`, or go to a
//! worker thread. So every limit is the backing's own. But a device in a mode without a copy may
//! take longer requests, which its target cuts ([`TransferLimit`]): one delivery, several
//! operations.

use ublk_engine::plan::WINDOW_OPS;
use ublk_engine::target::TransferLimit;
use ublk_engine::units::Bytes;
use uring_ext::params::Params;
use uring_ext::sys;

/// Limits for discards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiscardLimits {
    /// Discard granularity in bytes.
    pub granularity: u32,
    /// Offset of the first such unit in bytes.
    pub alignment: u32,
    /// Most bytes in one request.
    pub max_bytes: u64,
}

impl DiscardLimits {
    fn and(self, other: Self) -> Self {
        Self {
            granularity: self.granularity.max(other.granularity),
            // Extents and chunks move it anyway.
            alignment: 0,
            max_bytes: self.max_bytes.min(other.max_bytes),
        }
    }
}

/// The limits of a device for the block layer. Sizes in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Smallest unit of addressing; a power of two from 512 to the page size.
    pub logical_block: u32,
    /// Physical block: the smallest unit written without a read; a power of two.
    pub physical_block: u32,
    /// Smallest I/O that performs well.
    pub io_min: u32,
    /// I/O size that performs best, 0 if unknown.
    pub io_opt: u32,
    /// Most bytes in one read or write.
    pub max_io: u32,
    /// Reads and writes do not cross multiples of this, 0 for none.
    pub chunk: u64,
    /// Alignment of buffers in memory; a power of two.
    pub dma_alignment: u32,
    /// Gaps between segments are allowed only at multiples of this plus one, 0 for anywhere.
    pub virt_boundary_mask: u64,
    /// Most segments of a request.
    pub max_segments: u16,
    /// Most bytes in a segment.
    pub max_segment_size: u32,
    /// Limits for discards, `None` if they are not supported.
    pub discard: Option<DiscardLimits>,
    /// Most bytes in one write-zeroes request, 0 if it is not supported.
    pub max_write_zeroes: u64,
    /// Completed writes may be lost until a flush.
    pub volatile_cache: bool,
    /// A write can be made durable without a flush.
    pub fua: bool,
    /// Seeks are expensive.
    pub rotational: bool,
    /// Writes are refused.
    pub read_only: bool,
}

impl Default for Limits {
    /// Limits that any backing meets.
    fn default() -> Self {
        Self {
            logical_block: 512,
            physical_block: 4096,
            io_min: 4096,
            io_opt: 0,
            max_io: 1 << 20,
            chunk: 0,
            dma_alignment: 4,
            virt_boundary_mask: 0,
            max_segments: 128,
            max_segment_size: 1 << 20,
            discard: None,
            max_write_zeroes: 0,
            volatile_cache: false,
            fua: false,
            rotational: false,
            read_only: false,
        }
    }
}

/// The driver's own limit of one request's data (`UBLK_IO_BUF_BITS`): 32 MiB.
const DRIVER_MAX_IO: u32 = 1 << sys::UBLK_IO_BUF_BITS;
/// The largest physical block, `io_min` and `io_opt` that the driver takes (`ublk_validate_params`,
/// Linux 7.0). These are hints, so larger values are cut to this.
const DRIVER_MAX_HINT: u32 = 256 << 20;
/// The largest supported logical block: the smallest page size of all architectures. The driver's
/// limit is a page (`ublk_validate_params`).
pub const MAX_BLOCK: u32 = 4096;

impl Limits {
    /// The common limits of several backings, for a device whose requests may go to any of them, or
    /// to several at once. `None` without a backing.
    #[must_use]
    pub fn of_all<'a>(backings: impl IntoIterator<Item = &'a Self>) -> Option<Self> {
        let mut backings = backings.into_iter();
        let first = backings.next()?;
        let all = backings.fold(*first, |all, other| Self {
            logical_block: all.logical_block.max(other.logical_block),
            physical_block: all.physical_block.max(other.physical_block),
            io_min: all.io_min.max(other.io_min),
            io_opt: if all.io_opt == other.io_opt { all.io_opt } else { 0 },
            max_io: all.max_io.min(other.max_io),
            chunk: common_chunk(all.chunk, other.chunk),
            dma_alignment: all.dma_alignment.max(other.dma_alignment),
            virt_boundary_mask: all.virt_boundary_mask | other.virt_boundary_mask,
            max_segments: all.max_segments.min(other.max_segments),
            max_segment_size: all.max_segment_size.min(other.max_segment_size),
            discard: all.discard.zip(other.discard).map(|(all, other)| all.and(other)),
            max_write_zeroes: all.max_write_zeroes.min(other.max_write_zeroes),
            volatile_cache: all.volatile_cache || other.volatile_cache,
            // Where nothing is volatile, every write is durable.
            fua: (all.fua || !all.volatile_cache) && (other.fua || !other.volatile_cache),
            rotational: all.rotational || other.rotational,
            read_only: all.read_only || other.read_only,
        });
        // Parts of a request begin at any block of its buffer, which must do as an address.
        let logical_block = all.logical_block.max(all.dma_alignment);
        Some(Self { logical_block, physical_block: all.physical_block.max(logical_block), ..all })
    }

    /// The largest operation.
    #[must_use]
    pub fn transfer_limit(&self) -> TransferLimit {
        TransferLimit::new(self.logical_block, self.max_io, self.chunk, self.physical_block)
    }

    /// Whether requests can be cut: a part begins at any block of the buffer, and its address must
    /// satisfy the DMA alignment.
    #[must_use]
    pub const fn can_cut(&self) -> bool {
        self.dma_alignment <= self.logical_block
    }

    /// Limits of a device whose target cuts requests ([`Limits::transfer_limit`]). A request may be
    /// as long as one operation, or `longest` if that fits a window of operations.
    #[must_use]
    pub fn of_cut_requests(&self, longest: u32) -> Self {
        if !self.can_cut() {
            return *self;
        }
        let window = u32::try_from(WINDOW_OPS).unwrap_or(1);
        let max_io = self.max_io.max(longest.min(self.max_io.saturating_mul(window)));
        // The longest operation may have a page a segment: then so may all parts of a request.
        let has_room = self.max_segments >= segments(self.max_io);
        let longest = if has_room { segments(max_io) } else { 0 };
        Self { max_io, chunk: 0, max_segments: self.max_segments.max(longest), ..*self }
    }

    /// Size of a request's buffer in bytes: the largest I/O, at least a page, and at most `cap`.
    #[must_use]
    pub fn buffer_bytes(&self, cap: u32, page: u32) -> u32 {
        let max_io = self.max_io.min(cap).min(DRIVER_MAX_IO);
        (max_io / page * page).max(page)
    }

    /// The parameters of a device of `size` with buffers of `buffer_bytes`.
    #[must_use]
    pub fn params(&self, size: Bytes, buffer_bytes: u32) -> Params {
        // The driver takes no less than a page, and every buffer has one.
        let max_io = u64::from(self.max_io.min(buffer_bytes).max(MAX_BLOCK));
        let hint = |bytes: u32| shift(bytes.max(self.logical_block).min(DRIVER_MAX_HINT));
        let basic = sys::ublk_param_basic {
            attrs: self.attrs(),
            logical_bs_shift: shift(self.logical_block),
            physical_bs_shift: hint(self.physical_block),
            io_opt_shift: hint(self.optimal()),
            io_min_shift: hint(self.io_min),
            max_sectors: sectors(max_io),
            chunk_sectors: sectors(self.chunk),
            dev_sectors: size.sectors().0,
            virt_boundary_mask: self.virt_boundary_mask,
        };
        let params = Params::new(basic).with_dma_alignment(self.dma_alignment).with_segments(
            sys::ublk_param_segment {
                // sysfs does not tell; the block layer's default, and NVMe's.
                seg_boundary_mask: u64::from(u32::MAX),
                max_segment_size: self.max_segment_size.max(sys::UBLK_MIN_SEGMENT_SIZE),
                max_segments: self.max_segments,
                pad: [0; 2],
            },
        );
        if self.discard.is_none() && self.max_write_zeroes == 0 {
            return params;
        }
        let discard = self.discard.unwrap_or(DiscardLimits {
            granularity: self.logical_block,
            alignment: 0,
            max_bytes: 0,
        });
        params.with_discard(sys::ublk_param_discard {
            discard_alignment: discard.alignment,
            // 0 is refused.
            discard_granularity: discard.granularity.max(self.logical_block),
            max_discard_sectors: sectors(discard.max_bytes),
            max_write_zeroes_sectors: sectors(self.max_write_zeroes),
            // The driver takes no other number (`ublk_validate_params`).
            max_discard_segments: 1,
            reserved0: 0,
        })
    }

    fn attrs(&self) -> u32 {
        let table = [
            (self.read_only, sys::UBLK_ATTR_READ_ONLY),
            (self.rotational, sys::UBLK_ATTR_ROTATIONAL),
            (self.volatile_cache, sys::UBLK_ATTR_VOLATILE_CACHE),
            (self.volatile_cache && self.fua, sys::UBLK_ATTR_FUA),
        ];
        table.iter().filter(|(set, _)| *set).fold(0, |attrs, (_, bit)| attrs | bit)
    }

    /// The optimal I/O size as a power of two, since the driver takes no other: the largest that
    /// divides the backing's, or the physical block if that is unknown.
    const fn optimal(&self) -> u32 {
        if self.io_opt == 0 { self.physical_block } else { 1 << self.io_opt.trailing_zeros() }
    }
}

/// Most segments of a request of this length in bytes, if only the first and the last are shorter
/// than a page.
fn segments(bytes: u32) -> u16 {
    const PAGE: u32 = 4096;
    u16::try_from(bytes.div_ceil(PAGE) + 1).unwrap_or(u16::MAX)
}

/// A boundary for both: an operation that does not cross its multiples crosses no multiple of
/// either.
fn common_chunk(one: u64, other: u64) -> u64 {
    if other == 0 { one } else { common_chunk(other, one % other) }
}

/// Base-two logarithm, rounded down.
fn shift(bytes: u32) -> u8 {
    u8::try_from(bytes.max(1).ilog2()).unwrap_or(u8::MAX)
}

/// Whole sectors, at most 32 bits.
fn sectors(bytes: u64) -> u32 {
    u32::try_from(Bytes(bytes).sectors().0).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn sizes_become_shifts_and_sectors() {
        let limits = Limits {
            logical_block: 4096,
            io_opt: 96 << 10,
            max_io: 512 << 10,
            ..Limits::default()
        };
        let basic = *limits.params(Bytes(1 << 30), 512 << 10).basic();
        assert_eq!((basic.logical_bs_shift, basic.physical_bs_shift), (12, 12));
        assert_eq!(basic.io_opt_shift, 15, "32 KiB is the greatest power of two in 96 KiB");
        assert_eq!((basic.max_sectors, basic.dev_sectors), (1024, 1 << 21));
    }

    #[test]
    fn io_never_exceeds_the_buffer() {
        let limits = Limits { max_io: u32::MAX, ..Limits::default() };
        assert_eq!(limits.buffer_bytes(u32::MAX, 4096), 32 << 20);
        assert_eq!(limits.buffer_bytes(512 << 10, 4096), 512 << 10);
        assert_eq!(Limits { max_io: 512, ..limits }.buffer_bytes(1 << 20, 4096), 4096);
        let params = limits.params(Bytes(1 << 30), 512 << 10);
        assert_eq!(params.basic().max_sectors, 1024);
    }

    #[test]
    fn several_backings_leave_what_all_of_them_meet() {
        let discard =
            |granularity, max_bytes| Some(DiscardLimits { granularity, alignment: 512, max_bytes });
        let one = Limits {
            io_opt: 1 << 20,
            max_io: 512 << 10,
            discard: discard(512, 1 << 30),
            max_write_zeroes: 1 << 20,
            volatile_cache: true,
            fua: true,
            chunk: 128 << 10,
            ..Limits::default()
        };
        let other = Limits {
            logical_block: 4096,
            dma_alignment: 512,
            virt_boundary_mask: 4095,
            max_segments: 33,
            discard: discard(4096, 1 << 20),
            max_write_zeroes: 1 << 21,
            ..Limits::default()
        };
        let both = Limits::of_all([&one, &other]).unwrap();
        let expected = Limits {
            logical_block: 4096,
            dma_alignment: 512,
            virt_boundary_mask: 4095,
            max_segments: 33,
            max_io: 512 << 10,
            chunk: 128 << 10,
            discard: Some(DiscardLimits { granularity: 4096, alignment: 0, max_bytes: 1 << 20 }),
            max_write_zeroes: 1 << 20,
            volatile_cache: true,
            fua: true,
            ..Limits::default()
        };
        assert_eq!(both, expected);
        assert_eq!(Limits::of_all([&other, &one]).unwrap(), expected);
        let without = Limits { discard: None, max_write_zeroes: 0, fua: false, ..one };
        let worse = Limits::of_all([&one, &without]).unwrap();
        assert_eq!((worse.discard, worse.max_write_zeroes, worse.fua), (None, 0, false));
        let chunks = |one, other| {
            let with = |chunk| Limits { chunk, ..Limits::default() };
            Limits::of_all([&with(one), &with(other)]).unwrap().chunk
        };
        assert_eq!(
            (chunks(128 << 10, 96 << 10), chunks(0, 4096), chunks(0, 0)),
            (32 << 10, 4096, 0)
        );
        let coarse = Limits { dma_alignment: 4096, ..Limits::default() };
        assert_eq!(Limits::of_all([&coarse]).unwrap().logical_block, 4096);
    }

    #[test]
    fn requests_that_are_cut_may_be_longer() {
        let limits = |max_io, chunk, dma_alignment| {
            let limits = Limits { max_io, chunk, dma_alignment, ..Limits::default() };
            let Limits { max_io, chunk, .. } = limits.of_cut_requests(1 << 20);
            (max_io, chunk)
        };
        let table = [
            ("a window of operations", (64 << 10, 0, 4), (512 << 10, 0)),
            ("no more than a MiB", (256 << 10, 128 << 10, 512), (1 << 20, 0)),
            ("what is longer stays", (4 << 20, 128 << 10, 4), (4 << 20, 0)),
            ("parts would be unaligned", (64 << 10, 128 << 10, 4096), (64 << 10, 128 << 10)),
            ("nothing overflows", (u32::MAX, 0, 4), (u32::MAX, 0)),
        ];
        for (what, (max_io, chunk, dma_alignment), expected) in table {
            assert_eq!(limits(max_io, chunk, dma_alignment), expected, "{what}");
        }
        let bounded = Limits { chunk: 4096, ..Limits::default() };
        assert_eq!(bounded.of_cut_requests(0), Limits::default());
        let segments = |max_segments| {
            let limits = Limits { max_io: 512 << 10, max_segments, ..Limits::default() };
            limits.of_cut_requests(1 << 20).max_segments
        };
        let table = [("as many as pages", 129, 257), ("fewer", 128, 128), ("many", 400, 400)];
        for (what, backing, expected) in table {
            assert_eq!(segments(backing), expected, "{what}");
        }
    }

    #[test]
    fn attributes_are_inherited() {
        let plain = Limits::default();
        let table = [
            (plain, 0),
            (Limits { volatile_cache: true, ..plain }, 4),
            (Limits { volatile_cache: true, fua: true, ..plain }, 12),
            (Limits { fua: true, ..plain }, 0),
            (Limits { read_only: true, rotational: true, ..plain }, 3),
        ];
        for (limits, attrs) in table {
            assert_eq!(limits.params(Bytes(512), 4096).basic().attrs, attrs, "{limits:?}");
        }
    }

    /// The checks of `ublk_validate_params` in Linux 7.3 for the fields set here.
    fn driver_takes(params: &Params, buffer_bytes: u32) -> Result<(), String> {
        let basic = params.basic();
        let check = |holds: bool, what: &str| if holds { Ok(()) } else { Err(what.to_owned()) };
        check((9..=12).contains(&basic.logical_bs_shift), "logical block")?;
        check(basic.physical_bs_shift <= 28, "physical block")?;
        check(basic.io_min_shift <= 28 && basic.io_opt_shift <= 28, "io_min, io_opt")?;
        check(basic.logical_bs_shift <= basic.physical_bs_shift, "logical above physical")?;
        check(basic.max_sectors <= buffer_bytes >> 9, "more than the buffer")?;
        check(basic.max_sectors >= 8, "less than a page")?;
        if let Some(discard) = params.discard() {
            let segments = discard.max_discard_segments;
            check(discard.max_discard_sectors == 0 || segments == 1, "discard segments")?;
            check(discard.discard_granularity != 0, "discard granularity")?;
        }
        let dma = params.dma_alignment().unwrap_or(1);
        check(dma <= 4096 && dma.is_power_of_two(), "dma alignment")?;
        let segments = params.segments().ok_or("no segments")?;
        check(segments.max_segment_size >= sys::UBLK_MIN_SEGMENT_SIZE, "segment size")
    }

    fn limits() -> impl Strategy<Value = Limits> {
        // Blocks and alignments are powers of two; sysfs may show anything else.
        let block = || (9_u32..=12).prop_map(|shift| 1 << shift);
        let advice =
            || prop_oneof![Just(0), any::<u32>(), (0_u32..32).prop_map(|shift| 1 << shift)];
        let discard = (advice(), any::<u32>(), any::<u64>()).prop_map(|it| {
            let (granularity, alignment, max_bytes) = it;
            DiscardLimits { granularity, alignment, max_bytes }
        });
        let sizes = (block(), block(), advice(), advice(), any::<u32>(), any::<u64>());
        let rest =
            (0_u32..=12, any::<u16>(), any::<u32>(), proptest::option::of(discard), any::<u64>());
        (sizes, rest).prop_map(|(sizes, rest)| {
            let (logical_block, physical_block, io_min, io_opt, max_io, chunk) = sizes;
            let (dma, max_segments, max_segment_size, discard, max_write_zeroes) = rest;
            let dma_alignment = 1 << dma;
            Limits {
                logical_block,
                physical_block,
                io_min,
                io_opt,
                max_io,
                chunk,
                dma_alignment,
                max_segments,
                max_segment_size,
                discard,
                max_write_zeroes,
                ..Limits::default()
            }
        })
    }

    proptest! {
        /// The driver takes the device, whatever limits the backings report.
        #[test]
        fn the_driver_takes_all_limits(backings in proptest::collection::vec(limits(), 1..5)) {
            for limits in [backings[0], Limits::of_all(&backings).unwrap()] {
                for limits in [limits, limits.of_cut_requests(1 << 20)] {
                    let bytes = limits.buffer_bytes(u32::MAX, 4096);
                    let params = limits.params(Bytes(1 << 30), bytes);
                    prop_assert_eq!(driver_takes(&params, bytes), Ok(()), "{:?}", limits);
                }
            }
        }
    }
}

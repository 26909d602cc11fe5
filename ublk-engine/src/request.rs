//! Block requests, decoded from the driver's descriptors.

use uring_ext::iod::IoDesc;
use uring_ext::{Errno, sys};

use crate::units::{Bytes, Sectors};

/// The kind of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestKind {
    /// Fill the buffer from the device (`UBLK_IO_OP_READ`).
    Read,
    /// Write the buffer to the device (`UBLK_IO_OP_WRITE`).
    Write {
        /// The data must be on stable storage before the request completes (`UBLK_IO_F_FUA`).
        fua: bool,
    },
    /// All writes completed before it must be on stable storage (`UBLK_IO_OP_FLUSH`).
    Flush,
    /// The range is no longer used, and its contents become undefined (`UBLK_IO_OP_DISCARD`).
    Discard,
    /// The range must read as zeros (`UBLK_IO_OP_WRITE_ZEROES`).
    WriteZeroes {
        /// The space may be deallocated (`UBLK_IO_F_NOUNMAP` is not set).
        may_unmap: bool,
    },
}

/// A block request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Its kind.
    pub kind: RequestKind,
    /// First byte on the device; a multiple of 512.
    pub offset: u64,
    /// Length in bytes; a multiple of 512, 0 for a flush.
    pub len: u64,
}

/// The limits of a device's requests. The block layer enforces them. They are checked nevertheless,
/// since an invalid descriptor must not become an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Size of the device in bytes.
    pub size: u64,
    /// Logical block size in bytes. All offsets and lengths are multiples of it.
    pub block: u32,
    /// Maximum length of a read or write in bytes.
    pub max_bytes: u32,
}

/// Why a descriptor is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// An operation that no target serves (zone commands, write same).
    #[error("operation {0} is not known")]
    Unknown(u32),
    /// A range that exceeds the device, is too long, or is unaligned.
    #[error("the range does not fit the device")]
    Malformed,
}

impl Refusal {
    /// The errno to answer the request with.
    #[must_use]
    pub const fn errno(self) -> Errno {
        match self {
            Self::Unknown(_) => Errno::EOPNOTSUPP,
            Self::Malformed => Errno::EIO,
        }
    }
}

impl Request {
    /// Decodes a descriptor and checks it.
    ///
    /// # Errors
    /// [`Refusal`].
    #[inline(always)]
    pub fn decode(iod: IoDesc, geometry: &Geometry) -> Result<Self, Refusal> {
        let kind = match iod.op() {
            sys::UBLK_IO_OP_READ => RequestKind::Read,
            sys::UBLK_IO_OP_WRITE => RequestKind::Write { fua: iod.has(sys::UBLK_IO_F_FUA) },
            sys::UBLK_IO_OP_FLUSH => {
                return Ok(Self { kind: RequestKind::Flush, offset: 0, len: 0 });
            }
            sys::UBLK_IO_OP_DISCARD => RequestKind::Discard,
            sys::UBLK_IO_OP_WRITE_ZEROES => {
                RequestKind::WriteZeroes { may_unmap: !iod.has(sys::UBLK_IO_F_NOUNMAP) }
            }
            op => return Err(Refusal::Unknown(op)),
        };
        let offset = Sectors(iod.start_sector).checked_bytes().ok_or(Refusal::Malformed)?.0;
        let request = Self { kind, offset, len: Bytes::from(Sectors(iod.nr_sectors.into())).0 };
        if request.fits(geometry) { Ok(request) } else { Err(Refusal::Malformed) }
    }

    #[inline(always)]
    fn fits(&self, geometry: &Geometry) -> bool {
        let inside = self.offset.checked_add(self.len).is_some_and(|end| end <= geometry.size);
        // Blocks are powers of two.
        let into_block = u64::from(geometry.block) - 1;
        let aligned = (self.offset | self.len) & into_block == 0;
        let short = !self.has_data() || self.len <= u64::from(geometry.max_bytes);
        inside && aligned && short && self.len > 0
    }

    /// The end of the range on a device of `size` bytes.
    ///
    /// # Errors
    /// `EIO` beyond the device's end: deliveries of the driver are not trusted.
    pub fn end_within(&self, size: u64) -> Result<u64, Errno> {
        self.offset.checked_add(self.len).filter(|end| *end <= size).ok_or(Errno::EIO)
    }

    /// The offset of a byte of the device in the request's buffer; 0 if it has none.
    ///
    /// # Errors
    /// `EINVAL` for offsets of 4 GiB or more, which the driver never delivers.
    pub fn buf_offset(&self, at: u64) -> Result<u32, Errno> {
        let offset = if self.has_data() { at - self.offset } else { 0 };
        u32::try_from(offset).map_err(|_| Errno::EINVAL)
    }

    /// Whether it has a buffer.
    #[must_use]
    pub const fn has_data(&self) -> bool {
        matches!(self.kind, RequestKind::Read | RequestKind::Write { .. })
    }
}

impl RequestKind {
    /// The kinds in the order of [`RequestKind::index`].
    pub const NAMES: [&str; 5] = ["read", "write", "flush", "discard", "write-zeroes"];

    /// Index into tables with an entry for each kind.
    #[must_use]
    pub const fn index(self) -> usize {
        match self {
            Self::Read => 0,
            Self::Write { .. } => 1,
            Self::Flush => 2,
            Self::Discard => 3,
            Self::WriteZeroes { .. } => 4,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GEOMETRY: Geometry = Geometry { size: 1 << 42, block: 4096, max_bytes: 1 << 20 };

    fn iod(op_flags: u32) -> IoDesc {
        IoDesc { op_flags, nr_sectors: 8, start_sector: 1 << 32 }
    }

    #[test]
    fn descriptors_are_decoded() {
        let table = [
            (0, RequestKind::Read, true),
            (1, RequestKind::Write { fua: false }, true),
            (1 | 1 << 13, RequestKind::Write { fua: true }, true),
            (3, RequestKind::Discard, false),
            (5, RequestKind::WriteZeroes { may_unmap: true }, false),
            (5 | 1 << 15, RequestKind::WriteZeroes { may_unmap: false }, false),
        ];
        for (op_flags, kind, has_data) in table {
            let request = Request::decode(iod(op_flags), &GEOMETRY).unwrap();
            assert_eq!(request, Request { kind, offset: 1 << 41, len: 4096 });
            assert_eq!(request.has_data(), has_data);
        }
        let flush = Request::decode(iod(2), &GEOMETRY).unwrap();
        assert_eq!(flush, Request { kind: RequestKind::Flush, offset: 0, len: 0 });
    }

    #[test]
    fn unknown_operations_are_refused() {
        for op in [4, 10, 13, 15, 18, 200] {
            let refused = Request::decode(iod(op), &GEOMETRY).unwrap_err();
            assert_eq!((refused, refused.errno()), (Refusal::Unknown(op), Errno::EOPNOTSUPP));
        }
    }

    #[test]
    fn malformed_ranges_are_refused() {
        let last = (1 << 33) - 8;
        let table = [
            ("the last block", 0, last, 8, true),
            ("one block too far", 0, last + 8, 8, false),
            ("across the end", 3, last, 16, false),
            ("a start that wraps", 0, u64::MAX, 8, false),
            ("a start that overflows in bytes", 1, 1 << 55, 8, false),
            ("the longest read", 0, 0, 2048, true),
            ("too long for a buffer", 1, 0, 2056, false),
            ("a long discard", 3, 0, 1 << 20, true),
            ("an unaligned start", 0, 4, 8, false),
            ("an unaligned length", 1, 0, 9, false),
            ("nothing", 0, 0, 0, false),
        ];
        for (what, op_flags, start_sector, nr_sectors, fits) in table {
            let iod = IoDesc { op_flags, nr_sectors, start_sector };
            let decoded = Request::decode(iod, &GEOMETRY);
            let expected = if fits { None } else { Some(Refusal::Malformed) };
            assert_eq!(decoded.err(), expected, "{what}");
        }
    }
}

//! Block requests, decoded from the driver's descriptors.

use uring_ext::iod::IoDesc;
use uring_ext::{Errno, sys};

use crate::units::{Bytes, Sectors};

/// What a request asks for.
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
    /// The range is no longer used; what it reads as is undefined (`UBLK_IO_OP_DISCARD`).
    Discard,
    /// The range must read as zeros (`UBLK_IO_OP_WRITE_ZEROES`).
    WriteZeroes {
        /// Space may be given back (`UBLK_IO_F_NOUNMAP` is absent).
        may_unmap: bool,
    },
}

/// A block request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// What it asks for.
    pub kind: RequestKind,
    /// First byte on the device; a multiple of 512.
    pub offset: u64,
    /// Length in bytes; a multiple of 512, 0 for a flush.
    pub len: u64,
}

impl Request {
    /// Decodes a descriptor.
    ///
    /// # Errors
    /// `EOPNOTSUPP` for operations that no target serves (zone commands, write same).
    pub fn decode(iod: IoDesc) -> Result<Self, Errno> {
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
            _ => return Err(Errno::EOPNOTSUPP),
        };
        Ok(Self {
            kind,
            offset: Bytes::from(Sectors(iod.start_sector)).0,
            len: Bytes::from(Sectors(u64::from(iod.nr_sectors))).0,
        })
    }

    /// Whether the driver lends a buffer for it.
    #[must_use]
    pub const fn has_data(&self) -> bool {
        matches!(self.kind, RequestKind::Read | RequestKind::Write { .. })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
            let request = Request::decode(iod(op_flags)).unwrap();
            assert_eq!(request, Request { kind, offset: 1 << 41, len: 4096 });
            assert_eq!(request.has_data(), has_data);
        }
        let flush = Request::decode(iod(2)).unwrap();
        assert_eq!(flush, Request { kind: RequestKind::Flush, offset: 0, len: 0 });
    }

    #[test]
    fn unknown_operations_are_refused() {
        for op in [4, 10, 13, 15, 18, 200] {
            assert_eq!(Request::decode(iod(op)), Err(Errno::EOPNOTSUPP), "{op}");
        }
    }
}

//! Requests of the clients, which never overlap while they are open, and descriptors that must be
//! refused.

use rand_xoshiro::rand_core::Rng as _;
use ublk_engine::request::{Request, RequestKind};
use uring_ext::iod::IoDesc;
use uring_ext::{Errno, sys};

use super::Kernel;
use super::backing::MAX_BACKINGS;
use crate::draw::Draw as _;
use crate::fault::Fault;
use crate::{MAX_REQUEST, SECTOR};

/// A request of a client.
#[derive(Clone, Copy, Debug)]
pub struct Ask {
    /// The driver's descriptor.
    pub iod: IoDesc,
    /// The decoded request; `None` if it must be refused.
    pub request: Option<Request>,
    /// The errno that it must be refused with.
    pub refusal: Option<Errno>,
    /// The last write to each backing that a flush must make durable.
    pub(super) flush_to: [u64; MAX_BACKINGS],
}

impl Ask {
    /// A request that must be carried out.
    ///
    /// # Panics
    /// If it does not consist of whole sectors, or of too many.
    #[must_use]
    pub fn sound(request: Request) -> Self {
        // Does not use the code under test.
        let op_flags = match request.kind {
            RequestKind::Read => sys::UBLK_IO_OP_READ,
            RequestKind::Write { fua: false } => sys::UBLK_IO_OP_WRITE,
            RequestKind::Write { fua: true } => sys::UBLK_IO_OP_WRITE | sys::UBLK_IO_F_FUA,
            RequestKind::Flush => sys::UBLK_IO_OP_FLUSH,
            RequestKind::Discard => sys::UBLK_IO_OP_DISCARD,
            RequestKind::WriteZeroes { may_unmap: true } => sys::UBLK_IO_OP_WRITE_ZEROES,
            RequestKind::WriteZeroes { may_unmap: false } => {
                sys::UBLK_IO_OP_WRITE_ZEROES | sys::UBLK_IO_F_NOUNMAP
            }
        };
        let whole = request.offset % SECTOR == 0 && request.len % SECTOR == 0;
        let sectors = u32::try_from(request.len / SECTOR).ok().filter(|_| whole);
        let nr_sectors = sectors.unwrap_or_else(|| panic!("{request:?} is not of sectors"));
        let iod = IoDesc { op_flags, nr_sectors, start_sector: request.offset / SECTOR };
        Self { iod, request: Some(request), refusal: None, flush_to: [0; MAX_BACKINGS] }
    }

    /// A request that must be refused.
    #[must_use]
    pub const fn refused(iod: IoDesc, refusal: Errno) -> Self {
        Self { iod, request: None, refusal: Some(refusal), flush_to: [0; MAX_BACKINGS] }
    }

    /// Records the writes that a flush must make durable.
    pub(super) fn note_delivery(&mut self, acknowledged: &[u64; MAX_BACKINGS]) {
        self.flush_to = *acknowledged;
    }

    pub(super) fn sectors(&self) -> std::ops::Range<usize> {
        let Some(request) = self.request else { return 0..0 };
        let index = |bytes: u64| usize::try_from(bytes / SECTOR).unwrap_or(usize::MAX);
        index(request.offset)..index(request.offset + request.len)
    }
}

impl Kernel {
    /// The next request of a tag, or the one that an earlier server did not answer.
    pub(super) fn next_ask(&mut self, tag: u16) -> Option<Ask> {
        if let Some(ask) = self.tags[usize::from(tag)].ask {
            return Some(ask);
        }
        if self.closing {
            return None;
        }
        let ask = self.malformed_ask().or_else(|| self.sound_ask(tag))?;
        self.asked += 1;
        Some(ask)
    }

    fn sound_ask(&mut self, tag: u16) -> Option<Ask> {
        let kind = match self.rng.below(100) {
            0..40 => RequestKind::Read,
            40..75 => RequestKind::Write { fua: self.rng.chance(300) },
            75..80 => RequestKind::Flush,
            80..88 => RequestKind::Discard,
            _ => RequestKind::WriteZeroes { may_unmap: self.rng.chance(512) },
        };
        let (start_sector, nr_sectors) = match kind {
            RequestKind::Flush => (0, 0),
            RequestKind::Read | RequestKind::Write { .. } => self.free_range(false)?,
            RequestKind::Discard | RequestKind::WriteZeroes { .. } => self.free_range(true)?,
        };
        let (offset, len) = (start_sector * SECTOR, u64::from(nr_sectors) * SECTOR);
        if matches!(kind, RequestKind::Write { .. }) {
            self.compose(tag, len);
        }
        Some(Ask::sound(Request { kind, offset, len }))
    }

    /// A range that no open request overlaps; mostly a short one.
    fn free_range(&mut self, long: bool) -> Option<(u64, u32)> {
        let block = u64::from(self.setup.geometry.block) / SECTOR;
        let all = 0..self.setup.geometry.size;
        let clients = self.part.as_ref().map_or(all, |part| part.clients.clone());
        let (first, total) = (clients.start / SECTOR, (clients.end - clients.start) / SECTOR);
        for _ in 0..3 {
            let most = u64::from(MAX_REQUEST) / SECTOR / block;
            let blocks = match self.rng.below(16) {
                0 if long => most * 2,
                0 | 1 => 1 + u64::from(self.rng.below(u32::try_from(most).unwrap_or(1))),
                _ => 1 + u64::from(self.rng.below(8.min(u32::try_from(most).unwrap_or(1)))),
            };
            let count = (blocks * block).min(total / 4 / block * block).max(block);
            let places = u32::try_from((total - count) / block + 1).unwrap_or(1);
            let start = first + u64::from(self.rng.below(places)) * block;
            let overlaps = |ask: &Ask| {
                ask.request.is_some_and(|other| {
                    let (from, to) = (other.offset / SECTOR, (other.offset + other.len) / SECTOR);
                    start < to && from < start + count
                })
            };
            if !self.tags.iter().filter_map(|model| model.ask.as_ref()).any(overlaps) {
                return Some((start, u32::try_from(count).unwrap_or(1)));
            }
        }
        None
    }

    /// Fills the buffer of a write. All words differ, and no byte looks like garbage.
    fn compose(&mut self, tag: u16, len: u64) {
        const NO_GARBAGE: u64 = 0x7f7f_7f7f_7f7f_7f7f;
        let mut word = self.rng.next_u64();
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        for bytes in self.tags[usize::from(tag)].data[..len].chunks_exact_mut(8) {
            word = word.wrapping_add(0x9e37_79b9_7f4a_7c15);
            bytes.copy_from_slice(&(word & NO_GARBAGE).to_ne_bytes());
        }
    }

    fn malformed_ask(&mut self) -> Option<Ask> {
        if !self.setup.hostile {
            return None;
        }
        let strikes = |(fault, _): &(Fault, Malformation)| self.rng.chance(self.setup.rate(*fault));
        let (fault, move_part) = MALFORMED.into_iter().find(strikes)?;
        let block = self.setup.geometry.block / 512;
        let total = self.setup.geometry.size / SECTOR;
        let any = [sys::UBLK_IO_OP_READ, sys::UBLK_IO_OP_WRITE, sys::UBLK_IO_OP_DISCARD];
        let op_flags = self.rng.pick(&any);
        let mut iod = IoDesc { op_flags, nr_sectors: block, start_sector: 0 };
        match move_part {
            Malformation::BeyondEnd => {
                let across = self.rng.chance(512);
                iod.nr_sectors *= 2;
                iod.start_sector = if across { total - u64::from(block) } else { total };
            }
            Malformation::TooLong => {
                iod.op_flags = self.rng.pick(&any[..2]);
                iod.nr_sectors = MAX_REQUEST / 512 + block;
            }
            Malformation::Unaligned if block == 1 => return None,
            Malformation::Unaligned if self.rng.chance(512) => iod.start_sector = 1,
            Malformation::Unaligned => iod.nr_sectors += 1,
            Malformation::Empty => iod.nr_sectors = 0,
            Malformation::Overflow => {
                let huge = [u64::MAX, 1 << 55, u64::MAX / 512, (u64::MAX >> 9) & !7];
                iod.start_sector = self.rng.pick(&huge);
            }
            Malformation::Unknown => iod.op_flags = self.rng.pick(&[4, 10, 11, 13, 15, 18, 200]),
        }
        self.tally.note(fault);
        let unknown = fault == Fault::Unknown;
        let refusal = if unknown { Errno::EOPNOTSUPP } else { Errno::EIO };
        Some(Ask::refused(iod, refusal))
    }
}

/// An error in a descriptor.
#[derive(Clone, Copy)]
enum Malformation {
    BeyondEnd,
    TooLong,
    Unaligned,
    Empty,
    Overflow,
    Unknown,
}

const MALFORMED: [(Fault, Malformation); 6] = [
    (Fault::BeyondEnd, Malformation::BeyondEnd),
    (Fault::TooLong, Malformation::TooLong),
    (Fault::Unaligned, Malformation::Unaligned),
    (Fault::Empty, Malformation::Empty),
    (Fault::Overflow, Malformation::Overflow),
    (Fault::Unknown, Malformation::Unknown),
];

//! The loop target: one backing, block for block.

use uring_ext::Errno;

use super::transfer_limit::TransferLimit;
use crate::plan::{BackingIndex, BackingPosition, Op, OpKind, Plan, Planner};
use crate::request::Request;

/// Maps the device onto the start of backing 0.
#[derive(Clone, Copy, Debug)]
pub struct LoopTarget {
    size: u64,
    limit: TransferLimit,
}

impl LoopTarget {
    /// A device of `size` bytes, at most the backing's.
    #[must_use]
    pub const fn new(size: u64) -> Self {
        Self { size, limit: TransferLimit::UNLIMITED }
    }

    /// Sets the limit of one transfer on the backing.
    #[must_use]
    pub const fn within(self, limit: TransferLimit) -> Self {
        Self { limit, ..self }
    }

    /// The limit of one transfer on the backing.
    #[must_use]
    pub const fn transfer_limit(&self) -> TransferLimit {
        self.limit
    }

    /// Size of the device in bytes.
    #[must_use]
    pub const fn size(&self) -> u64 {
        self.size
    }
}

impl Planner for LoopTarget {
    fn plan(&self, request: &Request, from: u64, plan: &mut Plan) -> Result<(), Errno> {
        let end = request.end_within(self.size)?;
        let mut offset = request.offset + from;
        loop {
            let left = end - offset;
            let len = if request.has_data() { self.limit.first(offset, left) } else { left };
            let op = Op {
                kind: OpKind::of_request(request.kind),
                backing: BackingIndex(0),
                offset,
                len,
                buf_offset: request.buf_offset(offset)?,
            };
            if plan.push(op).is_err() {
                plan.continue_at(offset - request.offset);
                return Ok(());
            }
            offset += len;
            // A flush has no length, but is one operation.
            if offset >= end {
                return Ok(());
            }
        }
    }

    #[inline(always)]
    fn single(&self, request: &Request) -> Option<BackingPosition> {
        let is_inside = request.end_within(self.size).is_ok();
        let is_one = self.limit.holds(request.offset, request.len);
        let position = BackingPosition { backing: BackingIndex(0), offset: request.offset };
        (is_inside && is_one && request.has_data()).then_some(position)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::oracle::{self, Geometry};
    use super::*;
    use crate::request::RequestKind;

    #[test]
    fn agrees_with_an_array_of_bytes() {
        oracle::check((1..200_u64, oracle::transfer_limits()).prop_map(|(sectors, limit)| {
            let size = sectors * 512;
            let target = LoopTarget::new(size).within(limit);
            Geometry { target, size, backings: vec![size + 512] }
        }));
    }

    #[test]
    fn a_long_request_becomes_what_the_backing_takes() {
        let target = LoopTarget::new(1 << 30).within(TransferLimit::new(512, 96 << 10, 0, 4096));
        let read = |kind, len| {
            let mut plan = Plan::default();
            target.plan(&Request { kind, offset: 512, len }, 0, &mut plan).unwrap();
            let parts: Vec<_> = plan.ops().map(|op| (op.offset, op.len, op.buf_offset)).collect();
            (parts, plan.next())
        };
        let kib = |kib: u64| kib << 10;
        let parts = vec![
            (512, kib(96) - 512, 0),
            (kib(96), kib(96), (96 << 10) - 512),
            (kib(192), 512, (192 << 10) - 512),
        ];
        assert_eq!(read(RequestKind::Read, kib(192)), (parts, None));
        let (first, next) = read(RequestKind::Write { fua: false }, kib(1024));
        assert_eq!((first.len(), next), (8, Some(kib(768) - 512)), "a window, and more to come");
        let (whole, next) = read(RequestKind::Discard, kib(1024));
        assert_eq!((whole, next), (vec![(512, kib(1024), 0)], None));
    }
}

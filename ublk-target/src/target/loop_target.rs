//! The loop target: one backing, block for block.

use uring_ext::Errno;

use crate::plan::{BackingIndex, Op, OpKind, Place, Plan, Planner};
use crate::request::Request;

/// Maps the device onto the start of backing 0.
#[derive(Clone, Copy, Debug)]
pub struct LoopTarget {
    /// Size of the device in bytes, at most the backing's.
    pub size: u64,
}

impl Planner for LoopTarget {
    fn plan(&self, request: &Request, from: u64, plan: &mut Plan) -> Result<(), Errno> {
        request.end_within(self.size)?;
        let offset = request.offset + from;
        let op = Op {
            kind: OpKind::of_request(request.kind),
            backing: BackingIndex(0),
            offset,
            len: request.len - from,
            buf_offset: request.buf_offset(offset)?,
        };
        plan.push(op).map_err(|_full| Errno::EIO)
    }

    #[inline(always)]
    fn single(&self, request: &Request) -> Option<Place> {
        let is_inside = request.end_within(self.size).is_ok();
        let place = Place { backing: BackingIndex(0), offset: request.offset };
        (is_inside && request.has_data()).then_some(place)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::oracle::{self, Geometry};
    use super::*;

    #[test]
    fn agrees_with_an_array_of_bytes() {
        oracle::check((1..200_u64).prop_map(|sectors| {
            let size = sectors * 512;
            Geometry { target: LoopTarget { size }, size, backings: vec![size + 512] }
        }));
    }
}

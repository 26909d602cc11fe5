//! The null target: discards writes, reads as zeros.

use uring_ext::Errno;

use crate::plan::{BackingIndex, Op, OpKind, Plan, Planner};
use crate::request::{Request, RequestKind};

/// Reads are filled from backing 0, which is `/dev/zero`. A read that succeeds has filled every
/// byte; otherwise the reader would see old kernel memory. All other requests complete at once.
#[derive(Clone, Copy, Debug, Default)]
pub struct NullTarget;

impl Planner for NullTarget {
    fn plan(&self, request: &Request, from: u64, plan: &mut Plan) -> Result<(), Errno> {
        match request.kind {
            RequestKind::Read => {
                let backing = BackingIndex(0);
                let buf_offset = u32::try_from(from).map_err(|_| Errno::EINVAL)?;
                let len = request.len - from;
                let op = Op { kind: OpKind::Read, backing, offset: 0, len, buf_offset };
                plan.push(op).map_err(|_full| Errno::EIO)
            }
            RequestKind::Write { .. }
            | RequestKind::Flush
            | RequestKind::Discard
            | RequestKind::WriteZeroes { .. } => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_are_filled_and_the_rest_needs_nothing() {
        let table = [
            (RequestKind::Read, 1),
            (RequestKind::Write { fua: true }, 0),
            (RequestKind::Discard, 0),
            (RequestKind::WriteZeroes { may_unmap: false }, 0),
        ];
        for (kind, ops) in table {
            let mut plan = Plan::default();
            let request = Request { kind, offset: 4096, len: 8192 };
            NullTarget.plan(&request, 0, &mut plan).unwrap();
            assert_eq!((plan.ops().count(), plan.next()), (ops, None), "{kind:?}");
            assert!(plan.ops().all(|op| op.len == 8192 && op.offset == 0));
        }
    }
}

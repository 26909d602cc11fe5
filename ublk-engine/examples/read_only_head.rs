//! An example target: two backings, one after the other. The first is read-only.
//!
//! `cargo run -p ublk-engine --example read_only_head` prints the plans of some requests.

use ublk_engine::plan::{BackingIndex, Op, OpKind, Plan, Planner};
use ublk_engine::request::{Request, RequestKind};
use uring_ext::Errno;

const HEAD: BackingIndex = BackingIndex(0);
const TAIL: BackingIndex = BackingIndex(1);

/// `head` read-only bytes, then `tail` writable bytes.
struct ReadOnlyHead {
    head: u64,
    tail: u64,
}

impl Planner for ReadOnlyHead {
    // A planner only decides. The engine carries the operations out, continues short ones, and
    // answers the request when all have ended.
    fn plan(&self, request: &Request, _from: u64, plan: &mut Plan) -> Result<(), Errno> {
        let kind = OpKind::of_request(request.kind);
        if request.kind == RequestKind::Flush {
            // Nothing is written to the head, so it needs no flush.
            let op = Op { kind, backing: TAIL, offset: 0, len: 0, buf_offset: 0 };
            return plan.push(op).map_err(|_| Errno::EIO);
        }
        let (start, end) = (request.offset, request.end_within(self.head + self.tail)?);
        if start < self.head && request.kind != RequestKind::Read {
            return Err(Errno::EPERM);
        }
        // At most two operations. They fit a window and may run concurrently.
        let boundary = self.head.clamp(start, end);
        for (backing, first, from, to) in
            [(HEAD, 0, start, boundary), (TAIL, self.head, boundary, end)]
        {
            if from < to {
                let (offset, len, buf_offset) =
                    (from - first, to - from, request.buf_offset(from)?);
                let op = Op { kind, backing, offset, len, buf_offset };
                plan.push(op).map_err(|_| Errno::EIO)?;
            }
        }
        Ok(())
    }
}

fn main() {
    let target = ReadOnlyHead { head: 1 << 20, tail: 1 << 20 };
    let around = (1 << 20) - 4096;
    let write = RequestKind::Write { fua: false };
    let requests = [
        (RequestKind::Read, 0, 4096),
        (RequestKind::Read, around, 8192),
        (write, 1 << 20, 4096),
        (write, around, 8192),
        (RequestKind::Flush, 0, 0),
    ];
    let mut planned = Vec::new();
    for (kind, offset, len) in requests {
        let mut plan = Plan::default();
        let result = target.plan(&Request { kind, offset, len }, 0, &mut plan);
        println!("{kind:?} of {len} bytes at {offset}: {result:?}");
        for op in plan.ops() {
            println!("  {op:?}");
        }
        planned.push((result.is_ok(), plan.len()));
    }
    assert_eq!(planned, [(true, 1), (true, 2), (true, 1), (false, 0), (true, 1)]);
}

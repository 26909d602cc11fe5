//! The loop target: one backing, block for block.

use uring_ext::Errno;

use crate::plan::{BackingIndex, Op, OpKind, Plan, Planner};
use crate::request::{Request, RequestKind};

/// Maps the device onto the start of backing 0.
#[derive(Clone, Copy, Debug)]
pub struct LoopTarget {
    /// Size of the device in bytes, at most the backing's.
    pub size: u64,
}

impl Planner for LoopTarget {
    fn plan(&self, request: &Request, from: u64, plan: &mut Plan) -> Result<(), Errno> {
        let end = request.offset.checked_add(request.len).ok_or(Errno::EINVAL)?;
        if end > self.size {
            // The block layer keeps requests inside the device; answer, do not trust.
            return Err(Errno::EIO);
        }
        let kind = match request.kind {
            RequestKind::Read => OpKind::Read,
            RequestKind::Write { fua } => OpKind::Write { fua },
            RequestKind::Flush => OpKind::Flush,
            RequestKind::Discard => OpKind::Discard,
            RequestKind::WriteZeroes { may_unmap } => OpKind::WriteZeroes { may_unmap },
        };
        let len = request.len - from;
        let buf_offset =
            if request.has_data() { u32::try_from(from).map_err(|_| Errno::EINVAL)? } else { 0 };
        let offset = request.offset + from;
        let op = Op { kind, backing: BackingIndex(0), offset, len, buf_offset };
        plan.push(op).map_err(|_full| Errno::EIO)?;
        plan.cover(len);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SIZE: u64 = 1 << 16;

    fn kinds() -> impl Strategy<Value = RequestKind> {
        prop_oneof![
            Just(RequestKind::Read),
            any::<bool>().prop_map(|fua| RequestKind::Write { fua }),
            Just(RequestKind::Discard),
            any::<bool>().prop_map(|may_unmap| RequestKind::WriteZeroes { may_unmap }),
        ]
    }

    /// Carries a plan out on bytes.
    fn apply(plan: &Plan, backing: &mut [u8], buffer: &mut [u8]) {
        for op in plan.ops() {
            let at = usize::try_from(op.offset).unwrap();
            let len = usize::try_from(op.len).unwrap();
            let buf = usize::try_from(op.buf_offset).unwrap();
            match op.kind {
                OpKind::Read => buffer[buf..buf + len].copy_from_slice(&backing[at..at + len]),
                OpKind::Write { .. } => {
                    backing[at..at + len].copy_from_slice(&buffer[buf..buf + len]);
                }
                OpKind::Discard | OpKind::WriteZeroes { .. } => backing[at..at + len].fill(0),
                OpKind::Flush => {}
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 1000, ..ProptestConfig::default() })]

        /// Against an oracle: the device is an array of bytes, and each request does to it what
        /// its name says.
        #[test]
        fn agrees_with_an_array_of_bytes(
            requests in prop::collection::vec((kinds(), 0..120_u64, 1..16_u64, any::<u8>()), 1..20)
        ) {
            let target = LoopTarget { size: SIZE };
            let mut oracle = vec![1_u8; usize::try_from(SIZE).unwrap()];
            let mut backing = oracle.clone();
            for (kind, sector, sectors, fill) in requests {
                let request = Request { kind, offset: sector * 512, len: sectors * 512 };
                let mut plan = Plan::default();
                let planned = target.plan(&request, 0, &mut plan);
                if request.offset + request.len > SIZE {
                    prop_assert_eq!(planned, Err(Errno::EIO));
                    continue;
                }
                prop_assert_eq!(planned, Ok(()));
                prop_assert_eq!(plan.covered(), request.len);
                let range = usize::try_from(request.offset).unwrap()
                    ..usize::try_from(request.offset + request.len).unwrap();
                let mut buffer = vec![fill; range.len()];
                apply(&plan, &mut backing, &mut buffer);
                match kind {
                    RequestKind::Read => prop_assert_eq!(&buffer, &oracle[range]),
                    RequestKind::Write { .. } => oracle[range].fill(fill),
                    RequestKind::Discard | RequestKind::WriteZeroes { .. } => oracle[range].fill(0),
                    RequestKind::Flush => {}
                }
                prop_assert_eq!(&backing, &oracle);
            }
        }
    }

    #[test]
    fn flags_reach_the_backing() {
        let table = [
            (RequestKind::Write { fua: true }, OpKind::Write { fua: true }),
            (RequestKind::Write { fua: false }, OpKind::Write { fua: false }),
            (
                RequestKind::WriteZeroes { may_unmap: false },
                OpKind::WriteZeroes { may_unmap: false },
            ),
        ];
        for (kind, expected) in table {
            let mut plan = Plan::default();
            let request = Request { kind, offset: 0, len: 512 };
            LoopTarget { size: SIZE }.plan(&request, 0, &mut plan).unwrap();
            assert_eq!(plan.ops().next().unwrap().kind, expected);
        }
        let mut plan = Plan::default();
        let flush = Request { kind: RequestKind::Flush, offset: 0, len: 0 };
        LoopTarget { size: SIZE }.plan(&flush, 0, &mut plan).unwrap();
        assert_eq!(plan.ops().next().unwrap().kind, OpKind::Flush);
    }
}

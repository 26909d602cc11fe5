//! Copy on write: before a chunk of the device changes for the first time, its original contents
//! are copied to a store.

use std::cell::Cell;
use std::rc::Rc;

use ublk_engine::plan::{BackingIndex, Op, OpKind, Plan, Planner};
use ublk_engine::request::{Request, RequestKind};
use uring_ext::Errno;

/// Bytes of the scratch buffer.
const SCRATCH: u64 = 16 << 10;

const ORIGIN: BackingIndex = BackingIndex(0);
const STORE: BackingIndex = BackingIndex(1);

/// A device with a snapshot of its beginning.
#[derive(Clone, Debug)]
pub struct Cow {
    /// Bytes of a chunk. The device has at most 64 chunks.
    pub chunk: u64,
    /// A bit for each chunk in the store. The next server shares it, as if the store contained it.
    copied: Rc<Cell<u64>>,
    /// A bit for each chunk that a request is copying or has copied. Other requests that change the
    /// chunk wait for it.
    locked: Cell<u64>,
}

impl Cow {
    /// A device with an empty store.
    #[must_use]
    pub fn new(chunk: u64) -> Self {
        assert_eq!(SCRATCH % chunk, 0, "whole chunks fit the scratch buffer");
        Self { chunk, copied: Rc::default(), locked: Cell::new(0) }
    }

    /// Whether the store has the original contents of a chunk.
    #[must_use]
    pub fn is_copied(&self, chunk: u64) -> bool {
        self.copied.get() & (1 << chunk) != 0
    }

    /// Whether a request has chunks locked.
    #[must_use]
    pub fn is_locked(&self) -> bool {
        self.locked.get() != 0
    }

    /// The chunks that a request changes.
    fn changes(&self, request: &Request) -> std::ops::Range<u64> {
        match request.kind {
            RequestKind::Read | RequestKind::Flush => 0..0,
            RequestKind::Write { .. } | RequestKind::Discard | RequestKind::WriteZeroes { .. } => {
                let end = request.offset + request.len;
                request.offset / self.chunk..end.div_ceil(self.chunk)
            }
        }
    }

    /// Copies the first of these chunks that are not in the store, as many as fit the scratch
    /// buffer. Returns the chunk after the last one copied, or `None` if all are in the store.
    fn copy(&self, chunks: std::ops::Range<u64>, fua: bool, plan: &mut Plan) -> Option<u64> {
        let missing = chunks.filter(|chunk| !self.is_copied(*chunk));
        let room = usize::try_from(SCRATCH / self.chunk).unwrap_or(0);
        let places = (0..).step_by(usize::try_from(self.chunk).unwrap_or(1));
        let missing: Vec<(u32, u64)> = places.zip(missing.take(room)).collect();
        for (kind, backing) in
            [(OpKind::ReadScratch, ORIGIN), (OpKind::WriteScratch { fua }, STORE)]
        {
            for (buf_offset, chunk) in &missing {
                let (offset, len, buf_offset) = (chunk * self.chunk, self.chunk, *buf_offset);
                let pushed = plan.push(Op { kind, backing, offset, len, buf_offset });
                assert!(pushed.is_ok(), "a window holds two operations a chunk");
            }
            plan.next_stage();
        }
        missing.last().map(|(_, chunk)| chunk + 1)
    }

    fn change(request: &Request, plan: &mut Plan) -> Result<(), Errno> {
        let kind = match request.kind {
            RequestKind::Read => OpKind::Read,
            RequestKind::Write { fua } => OpKind::Write { fua },
            RequestKind::Discard => OpKind::Discard,
            RequestKind::WriteZeroes { may_unmap } => OpKind::WriteZeroes { may_unmap },
            RequestKind::Flush => {
                for backing in [ORIGIN, STORE] {
                    let op = Op { kind: OpKind::Flush, backing, offset: 0, len: 0, buf_offset: 0 };
                    plan.push(op).map_err(|_full| Errno::EIO)?;
                }
                return Ok(());
            }
        };
        let Request { offset, len, .. } = *request;
        let op = Op { kind, backing: ORIGIN, offset, len, buf_offset: 0 };
        plan.push(op).map_err(|_full| Errno::EIO)
    }
}

/// A mask of these chunks.
fn bits(chunks: std::ops::Range<u64>) -> u64 {
    chunks.fold(0, |bits, chunk| bits | 1 << chunk)
}

/// The cursor is one more than the number of chunks that are done.
impl Planner for Cow {
    fn plan(&self, request: &Request, from: u64, plan: &mut Plan) -> Result<(), Errno> {
        let chunks = self.changes(request);
        let done = chunks.start + from.saturating_sub(1);
        if from == 0 {
            let all = bits(chunks.clone());
            if all & self.locked.get() != 0 {
                plan.wait_at(0);
                return Ok(());
            }
            self.locked.set(self.locked.get() | all & !self.copied.get());
        }
        // The window before is done, so the store has what it copied.
        self.copied.set(self.copied.get() | bits(chunks.start..done));
        let fua = request.kind == RequestKind::Write { fua: true };
        match self.copy(done..chunks.end, fua, plan) {
            Some(next) => plan.continue_at(1 + next - chunks.start),
            None => return Self::change(request, plan),
        }
        Ok(())
    }

    fn scratch_bytes(&self) -> u32 {
        u32::try_from(SCRATCH).unwrap_or(u32::MAX)
    }

    /// A request has locked all its locked chunks itself: otherwise it would have waited.
    fn settled(&self, request: &Request, _result: Result<(), Errno>) {
        self.locked.set(self.locked.get() & !bits(self.changes(request)));
    }
}

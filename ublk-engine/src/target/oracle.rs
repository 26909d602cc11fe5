//! Tests planners against an oracle: an array of bytes that each request changes as its name says.

use std::fmt::Debug;

use proptest::prelude::*;
use proptest::test_runner::{TestCaseError, TestRunner, contextualize_config};
use uring_ext::Errno;

use super::transfer_limit::TransferLimit;
use crate::plan::{Op, OpKind, Plan, Planner, WINDOW_OPS};
use crate::request::{Request, RequestKind};

/// A target, the size of its device, and the sizes of its backings, all in bytes.
#[derive(Clone, Debug)]
pub struct Geometry<P> {
    pub target: P,
    pub size: u64,
    pub backings: Vec<u64>,
}

/// A request: its kind, range and data. Ranges are fractions of the device, so that they fit any
/// size.
pub type Asked = (RequestKind, f64, f64, u8);

fn kinds() -> impl Strategy<Value = RequestKind> {
    prop_oneof![
        3 => Just(RequestKind::Read),
        3 => any::<bool>().prop_map(|fua| RequestKind::Write { fua }),
        1 => Just(RequestKind::Flush),
        1 => Just(RequestKind::Discard),
        1 => any::<bool>().prop_map(|may_unmap| RequestKind::WriteZeroes { may_unmap }),
    ]
}

/// The number of test cases. The long run has enough for a million requests per target.
pub fn config() -> ProptestConfig {
    let usual = ProptestConfig::default();
    match std::env::var("UBLK_VM_LONG").as_deref() {
        Ok("1") => ProptestConfig { cases: 70_000, ..usual },
        Ok(_) | Err(_) => usual,
    }
}

/// Transfer limits of backings, often far below the length of a request.
pub fn transfer_limits() -> impl Strategy<Value = TransferLimit> {
    let limited = (1..24_u32, 0..12_u64, 0..4_u32);
    let limited = limited.prop_map(|(max, boundary, shift)| {
        TransferLimit::new(512, max * 512, boundary * 512, 512 << shift)
    });
    prop_oneof![1 => Just(TransferLimit::UNLIMITED), 2 => limited]
}

/// Random requests, some of them beyond the end; 16 on average.
pub fn requests() -> impl Strategy<Value = Vec<Asked>> {
    prop::collection::vec((kinds(), 0.0..1.05_f64, 0.0..1.0_f64, 1..=255_u8), 1..32)
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss)]
fn request<P>(geometry: &Geometry<P>, asked: Asked) -> Request {
    let (kind, place, length, _) = asked;
    let sectors = (geometry.size / 512) as f64;
    let offset = (sectors * place) as u64 * 512;
    // Most requests are short. Some are as long as the device.
    let len = ((sectors * length.powi(6)) as u64 + 1) * 512;
    match kind {
        RequestKind::Flush => Request { kind, offset: 0, len: 0 },
        RequestKind::Read
        | RequestKind::Write { .. }
        | RequestKind::Discard
        | RequestKind::WriteZeroes { .. } => Request { kind, offset, len },
    }
}

/// Runs random requests on such targets and on the oracle. All that fit the device succeed.
#[track_caller]
pub fn check<P: Planner + Debug>(geometries: impl Strategy<Value = Geometry<P>>) {
    // As in `proptest!`: a failure is recorded under the name of the target's file.
    let source_file = Some(std::panic::Location::caller().file());
    let config = ProptestConfig { source_file, ..contextualize_config(config()) };
    let mut runner = TestRunner::new(config);
    let checked = runner.run(&(geometries, requests()), |(geometry, asked)| {
        check_answers(&geometry, &asked, |request| {
            let inside = request.offset + request.len <= geometry.size;
            if inside { Ok(()) } else { Err(Errno::EIO) }
        })
    });
    checked.unwrap_or_else(|error| panic!("{error}\n{runner}"));
}

/// Runs requests on backings and on the oracle. `expected` says whether each succeeds. A failed one
/// changes nothing.
pub fn check_answers<P: Planner>(
    geometry: &Geometry<P>,
    asked: &[Asked],
    mut expected: impl FnMut(&Request) -> Result<(), Errno>,
) -> Result<(), TestCaseError> {
    let bytes = |size: u64| vec![0_u8; usize::try_from(size).unwrap()];
    let mut oracle = bytes(geometry.size);
    let mut backings: Vec<_> = geometry.backings.iter().map(|size| bytes(*size)).collect();
    for (number, asked) in asked.iter().enumerate() {
        let request = request(geometry, *asked);
        // No two nearby bytes are equal, so that shifted data is noticed.
        let mix = |at: usize| (at as u64).wrapping_mul(0x9e37_79b9) >> 11 ^ number as u64;
        let len = usize::try_from(request.len).unwrap();
        let mut buffer: Vec<u8> = (0..len).map(|at| mix(at).to_le_bytes()[0] ^ asked.3).collect();
        let written = buffer.clone();
        let played = play(&geometry.target, &request, &mut backings, &mut buffer);
        prop_assert_eq!(played, expected(&request), "{:?}", request);
        if played.is_err() {
            prop_assert!(buffer == written, "an error has filled the buffer");
            continue;
        }
        let start = usize::try_from(request.offset).unwrap();
        let range = start..start + len;
        match request.kind {
            RequestKind::Read => prop_assert_eq!(&buffer, &oracle[range]),
            RequestKind::Write { .. } => oracle[range].copy_from_slice(&written),
            RequestKind::Discard | RequestKind::WriteZeroes { .. } => oracle[range].fill(0),
            RequestKind::Flush => {}
        }
    }
    // Reads the whole device. Some targets fail now and then.
    let mut buffer = bytes(geometry.size);
    let request = Request { kind: RequestKind::Read, offset: 0, len: geometry.size };
    let mut tries =
        (0..10_000).map(|_| play(&geometry.target, &request, &mut backings, &mut buffer));
    prop_assert!(tries.any(|played| played.is_ok()), "the device cannot be read");
    prop_assert!(buffer == oracle, "the device differs from the oracle");
    Ok(())
}

/// Carries out all windows of a request.
fn play(
    target: &impl Planner,
    request: &Request,
    backings: &mut [Vec<u8>],
    buffer: &mut [u8],
) -> Result<(), Errno> {
    let mut plan = Plan::default();
    let mut from = 0;
    let mut flushed = vec![0; backings.len()];
    loop {
        plan.clear();
        target.plan(request, from, &mut plan)?;
        assert!(plan.ops().count() <= WINDOW_OPS);
        if let Some(place) = target.single(request).filter(|_| from == 0) {
            let op = Op::all_of(request, place);
            assert_eq!(plan.single(), Some(op), "the shortcut leads elsewhere");
        }
        if let Some(bytes) = plan.at_first() {
            assert!(from == 0 && request.has_data() && bytes > 0);
            assert_eq!(bytes % 512, 0, "what comes short is of whole blocks");
            let longest = plan.ops().map(|op| op.len).max().unwrap_or(0);
            assert!(bytes < longest.max(1024), "nothing comes short of {longest} bytes");
        }
        for op in plan.ops() {
            let size = |bytes: u64| usize::try_from(bytes).unwrap();
            let backing = &mut backings[usize::from(op.backing.0)];
            let range = size(op.offset)..size(op.offset + op.len);
            let start = op.buf_offset as usize;
            let borrowed = start..start + if op.has_data() { size(op.len) } else { 0 };
            assert!(op.len > 0 || op.kind == OpKind::Flush, "an operation without an effect");
            match op.kind {
                OpKind::Read => buffer[borrowed].copy_from_slice(&backing[range]),
                OpKind::Write { fua } => {
                    assert_eq!(request.kind, RequestKind::Write { fua }, "FUA is passed on");
                    backing[range].copy_from_slice(&buffer[borrowed]);
                }
                OpKind::Discard | OpKind::WriteZeroes { .. } => backing[range].fill(0),
                OpKind::Flush => flushed[usize::from(op.backing.0)] += 1,
                OpKind::ReadScratch | OpKind::WriteScratch { .. } | OpKind::Delay => {
                    panic!("{op:?} of a target without scratch")
                }
            }
        }
        match plan.next() {
            Some(next) => {
                assert!(next > from, "a window without progress");
                from = next;
            }
            None => break,
        }
    }
    let expected = usize::from(request.kind == RequestKind::Flush);
    assert!(flushed.iter().all(|count| *count == expected), "each backing is flushed once");
    Ok(())
}

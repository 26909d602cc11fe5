//! Decoder of NVMe commands: `struct nvme_uring_cmd` in a double entry.
//!
//! Written from the specification, as is the decoder of the other entries.

use crate::entry::{Transfer, Work, u16_at, u32_at};
use crate::kernel::backing::Zeroing;

/// `IORING_OP_URING_CMD128`.
pub const URING_CMD128: u8 = 64;

const NVME_URING_CMD_IO: u32 = 0xc048_4e80;
const URING_CMD_FIXED: u32 = 1;

/// The number of the namespace, for backings that are one.
pub const NSID: u32 = 5;
/// Base-two logarithm of its block size.
pub const BLOCK_SHIFT: u8 = 9;

/// Status: internal error, do not retry. The engine takes it as `EIO`.
pub const INTERNAL_ERROR: i32 = 0x4006;
/// Status: namespace not ready. The engine retries.
pub const NOT_READY: i32 = 0x0082;

/// A range that the engine has stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// Its address.
    pub addr: u64,
    /// First byte.
    pub at: u64,
    /// Bytes.
    pub len: u64,
}

/// The payload of a double entry.
struct Payload([u8; 80]);

impl Payload {
    fn dword(&self, at: usize) -> u32 {
        u32::from_ne_bytes([self.0[at], self.0[at + 1], self.0[at + 2], self.0[at + 3]])
    }

    fn qword(&self, at: usize) -> u64 {
        u64::from(self.dword(at)) | u64::from(self.dword(at + 4)) << 32
    }
}

/// Decodes the command of a double entry.
///
/// # Panics
/// If the drive or the kernel would refuse it.
#[must_use]
pub fn decode(first: &[u8; 64], second: &[u8; 64], ranges: &[Range]) -> Work {
    let mut payload = [0; 80];
    payload[..16].copy_from_slice(&first[48..]);
    payload[16..].copy_from_slice(second);
    let payload = Payload(payload);
    assert_eq!(u32_at(first, 8), NVME_URING_CMD_IO, "command of a double entry");
    assert_eq!(payload.dword(4), NSID, "namespace");
    let backing =
        (u32_at(first, 4) as usize).checked_sub(1).expect("a command to the character device");
    let (addr, len) = (payload.qword(24), payload.dword(36));
    let at = payload.qword(40) << BLOCK_SHIFT;
    let dword12 = payload.dword(48);
    let blocks_len = (u64::from(dword12 & 0xffff) + 1) << BLOCK_SHIFT;
    match payload.0[0] {
        opcode @ (1 | 2) => {
            assert_eq!(u32_at(first, 28), URING_CMD_FIXED, "data lies in a slot");
            assert_eq!(u64::from(len), blocks_len, "length in bytes and in blocks");
            Work::Transfer(Transfer {
                write: opcode == 1,
                dsync: dword12 & (1 << 30) != 0,
                backing,
                at,
                len,
                slot: u16_at(first, 40),
                addr,
            })
        }
        0 => Work::Flush { backing },
        8 => {
            let unmaps = dword12 & (1 << 25) != 0;
            let how = if unmaps { Zeroing::Punch } else { Zeroing::ZeroRange };
            Work::Zero { backing, at, len: blocks_len, how }
        }
        9 => {
            assert_eq!((payload.dword(40), payload.dword(44), len), (0, 4, 16), "one range");
            let range = ranges.iter().find(|range| range.addr == addr);
            let range = range.unwrap_or_else(|| panic!("no range at {addr:#x}"));
            Work::Zero { backing, at: range.at, len: range.len, how: Zeroing::Discard }
        }
        other => panic!("NVMe opcode {other:#x}"),
    }
}

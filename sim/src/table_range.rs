//! Converts entries of a queue that shares the ring's tables to entries of a queue with its own
//! tables.

use ublk_engine::engine::SlotTable;
use ublk_engine::lane::TableRange;

use crate::command::URING_CMD128;
use crate::entry::{u16_at, u32_at};

const IOSQE_FIXED_FILE: u8 = 1 << 0;
const IORING_OP_READ_FIXED: u8 = 4;
const IORING_OP_WRITE_FIXED: u8 = 5;
const IORING_OP_URING_CMD: u8 = 46;
const IORING_URING_CMD_FIXED: u32 = 1 << 0;
const UBLK_U_IO_FETCH_REQ: u32 = 0xc010_7520;
const UBLK_U_IO_COMMIT_AND_FETCH_REQ: u32 = 0xc010_7521;
const UBLK_U_IO_REGISTER_IO_BUF: u32 = 0xc010_7523;
const UBLK_U_IO_UNREGISTER_IO_BUF: u32 = 0xc010_7524;

/// The first half of an entry, with file and slot counted from the queue's first.
///
/// # Panics
/// If it names a file or a slot of another queue.
#[must_use]
pub fn rebased(raw: &[u8; 64], range: TableRange, slots: &SlotTable) -> [u8; 64] {
    let mut own = *raw;
    let (opcode, flags) = (raw[0], raw[1]);
    if flags & IOSQE_FIXED_FILE != 0 {
        let file = u32_at(raw, 4).checked_sub(range.first_file);
        let file = file.unwrap_or_else(|| panic!("a file of another queue"));
        own[4..8].copy_from_slice(&file.to_ne_bytes());
    }
    let slot_at = match (opcode, u32_at(raw, 8)) {
        (IORING_OP_READ_FIXED | IORING_OP_WRITE_FIXED, _) => Some(40),
        (IORING_OP_URING_CMD, UBLK_U_IO_REGISTER_IO_BUF | UBLK_U_IO_UNREGISTER_IO_BUF) => Some(56),
        // The bits above the slot are flags of automatic registration
        // (`UBLK_AUTO_BUF_REG_FALLBACK`).
        (IORING_OP_URING_CMD, UBLK_U_IO_FETCH_REQ | UBLK_U_IO_COMMIT_AND_FETCH_REQ) => {
            (u16_at(raw, 18) != 0).then_some(16)
        }
        (URING_CMD128, _) if u32_at(raw, 28) & IORING_URING_CMD_FIXED != 0 => Some(40),
        _ => None,
    };
    if let Some(at) = slot_at {
        let slot = own_slot(u16_at(raw, at), range, slots);
        own[at..at + 2].copy_from_slice(&slot.to_ne_bytes());
    }
    own
}

/// The number that the queue's engine has for a slot of the ring.
fn own_slot(slot: u16, range: TableRange, slots: &SlotTable) -> u16 {
    if Some(slot) == range.spare {
        return slots.lent;
    }
    let own = slot.checked_sub(range.first_slot);
    let own = own.unwrap_or_else(|| panic!("a slot of another queue"));
    // The queue has no slot of its own for a shared spare buffer.
    let shared = if range.spare.is_some() { slots.pool } else { 0 };
    if own < slots.lent { own } else { own + shared }
}

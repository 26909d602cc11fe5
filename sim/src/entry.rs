//! Decoder of submission queue entries: `struct io_uring_sqe`, 64 bytes.
//!
//! It is written from the kernel's headers and shares no code with the encoder in `uring-ext`.

use ublk_engine::plan::{Op, OpKind};
use ublk_engine::request::RequestKind;

use crate::command::{self, Range};
use crate::kernel::backing::Zeroing;

const IOSQE_FIXED_FILE: u8 = 1 << 0;
const IOSQE_IO_HARDLINK: u8 = 1 << 3;
const IOSQE_ASYNC: u8 = 1 << 4;
const IOSQE_CQE_SKIP_SUCCESS: u8 = 1 << 6;

const IORING_OP_NOP: u8 = 0;
const IORING_OP_FSYNC: u8 = 3;
const IORING_OP_READ_FIXED: u8 = 4;
const IORING_OP_WRITE_FIXED: u8 = 5;
const IORING_OP_TIMEOUT_REMOVE: u8 = 12;
const IORING_OP_ASYNC_CANCEL: u8 = 14;
const IORING_OP_FALLOCATE: u8 = 17;
const IORING_OP_URING_CMD: u8 = 46;

const IORING_FSYNC_DATASYNC: u32 = 1;
const RWF_DSYNC: u32 = 2;
const FALLOC_FL_KEEP_SIZE: u32 = 1;
const FALLOC_FL_PUNCH_HOLE: u32 = 2;
const FALLOC_FL_ZERO_RANGE: u32 = 0x10;

const UBLK_U_IO_FETCH_REQ: u32 = 0xc010_7520;
const UBLK_U_IO_COMMIT_AND_FETCH_REQ: u32 = 0xc010_7521;
const UBLK_U_IO_REGISTER_IO_BUF: u32 = 0xc010_7523;
const UBLK_U_IO_UNREGISTER_IO_BUF: u32 = 0xc010_7524;
const BLOCK_URING_CMD_DISCARD: u32 = 0x1200;
const UBLK_AUTO_BUF_REG_FALLBACK: u64 = 1;

/// The work of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// Nothing.
    Nop,
    /// Fetches a tag's next request.
    Fetch(Fetch),
    /// Completes a tag's request, and fetches the next one.
    Commit {
        /// Bytes, or a negated error number.
        result: i32,
        /// How the next one is to be delivered.
        fetch: Fetch,
    },
    /// Registers a request's buffer in a slot.
    Register {
        /// The request's tag.
        tag: u16,
        /// The slot.
        slot: u16,
    },
    /// Removes a buffer from a slot.
    Unregister {
        /// The tag that the server names.
        tag: u16,
        /// The slot.
        slot: u16,
    },
    /// A read or write of a fixed buffer.
    Transfer(Transfer),
    /// A flush of a backing's cache.
    Flush {
        /// The backing.
        backing: usize,
    },
    /// A discard or a write of zeros.
    Zero {
        /// The backing.
        backing: usize,
        /// Its first byte.
        at: u64,
        /// Bytes.
        len: u64,
        /// Which.
        how: Zeroing,
    },
    /// A delay.
    Timeout {
        /// Nanoseconds.
        ns: u64,
    },
    /// Cancels another entry.
    Cancel {
        /// The `user_data` of that entry.
        user_data: u64,
    },
}

/// How the next request of a tag is to be delivered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fetch {
    /// The tag.
    pub tag: u16,
    /// `sqe->addr`, which contains the slot for automatic registration.
    pub auto: u64,
    /// `ublksrv_io_cmd.addr`: the address of the data in copy mode.
    pub copy_to: u64,
}

impl Fetch {
    /// The slot for automatic registration.
    ///
    /// # Panics
    /// If `UBLK_AUTO_BUF_REG_FALLBACK` is not set: then a failed registration would end the request
    /// and the server would not see it.
    #[must_use]
    pub fn auto_slot(&self) -> u16 {
        assert_eq!(self.auto >> 16, UBLK_AUTO_BUF_REG_FALLBACK, "fallback is always asked for");
        u16::try_from(self.auto & 0xffff).unwrap_or(u16::MAX)
    }
}

/// A read or write of a fixed buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transfer {
    /// From the buffer to the backing.
    pub write: bool,
    /// The data has to be on stable storage at completion.
    pub dsync: bool,
    /// The backing.
    pub backing: usize,
    /// Its first byte.
    pub at: u64,
    /// Bytes.
    pub len: u32,
    /// The slot.
    pub slot: u16,
    /// The first byte in the buffer: an offset if it is lent, an address if it is of the pool.
    pub addr: u64,
}

/// An entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its work.
    pub work: Work,
    /// The `user_data` of its completion.
    pub user_data: u64,
    /// The next entry starts when this one has completed.
    pub linked: bool,
    /// There is no completion unless it fails.
    pub skip_success: bool,
    /// The tag that the engine issued it for. The checker fills it in.
    pub tag: Option<u16>,
    /// It is an NVMe command: its result is 0 or a status.
    pub command: bool,
    /// When it was pushed.
    pub pushed_at: u64,
    /// When its cancellation was pushed.
    pub cancelled_at: Option<u64>,
}

pub(crate) fn u16_at(raw: &[u8; 64], at: usize) -> u16 {
    u16::from_ne_bytes([raw[at], raw[at + 1]])
}

pub(crate) fn u32_at(raw: &[u8; 64], at: usize) -> u32 {
    u32::from_ne_bytes([raw[at], raw[at + 1], raw[at + 2], raw[at + 3]])
}

fn i32_at(raw: &[u8; 64], at: usize) -> i32 {
    i32::from_ne_bytes([raw[at], raw[at + 1], raw[at + 2], raw[at + 3]])
}

fn u64_at(raw: &[u8; 64], at: usize) -> u64 {
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&raw[at..at + 8]);
    u64::from_ne_bytes(bytes)
}

impl Entry {
    /// Decodes an entry.
    ///
    /// # Panics
    /// If the kernel would refuse it, or the engine must never push it.
    #[must_use]
    pub fn decode(raw: &[u8; 64], qid: u16) -> Self {
        let (opcode, flags, user_data) = (raw[0], raw[1], u64_at(raw, 32));
        let discards = opcode == IORING_OP_URING_CMD && u32_at(raw, 8) == BLOCK_URING_CMD_DISCARD;
        // A discard that the submitter starts may not wait, and some drivers refuse that.
        let needed = if discards { IOSQE_ASYNC } else { 0 };
        let known = IOSQE_FIXED_FILE | IOSQE_IO_HARDLINK | IOSQE_CQE_SKIP_SUCCESS;
        assert_eq!(flags & !known, needed, "flags of an entry");
        let without = [IORING_OP_NOP, IORING_OP_TIMEOUT_REMOVE, IORING_OP_ASYNC_CANCEL];
        let takes_file = !without.contains(&opcode);
        assert_eq!(flags & IOSQE_FIXED_FILE != 0, takes_file, "files are fixed");
        let (off, addr, len, rw_flags) =
            (u64_at(raw, 8), u64_at(raw, 16), u32_at(raw, 24), u32_at(raw, 28));
        let work = match opcode {
            IORING_OP_NOP => Work::Nop,
            IORING_OP_FSYNC => {
                assert_eq!(rw_flags, IORING_FSYNC_DATASYNC, "flags of fsync");
                Work::Flush { backing: backing(raw) }
            }
            IORING_OP_READ_FIXED | IORING_OP_WRITE_FIXED => Work::Transfer(Transfer {
                write: opcode == IORING_OP_WRITE_FIXED,
                dsync: rw_flags & RWF_DSYNC != 0,
                backing: backing(raw),
                at: off,
                len,
                slot: u16_at(raw, 40),
                addr,
            }),
            IORING_OP_TIMEOUT_REMOVE => {
                assert_eq!((off, rw_flags, flags), (0, 0, 0), "a delay, and no update");
                // A ring replaces this entry by a timeout.
                Work::Timeout { ns: addr }
            }
            IORING_OP_ASYNC_CANCEL => Work::Cancel { user_data: addr },
            IORING_OP_FALLOCATE => {
                Work::Zero { backing: backing(raw), at: off, len: addr, how: zeroing(len) }
            }
            IORING_OP_URING_CMD if u32_at(raw, 8) == BLOCK_URING_CMD_DISCARD => Work::Zero {
                backing: backing(raw),
                at: addr,
                len: u64_at(raw, 48),
                how: Zeroing::Discard,
            },
            IORING_OP_URING_CMD => ublk_command(raw, qid),
            other => panic!("opcode {other}"),
        };
        Self {
            work,
            user_data,
            linked: flags & IOSQE_IO_HARDLINK != 0,
            skip_success: flags & IOSQE_CQE_SKIP_SUCCESS != 0,
            tag: None,
            command: false,
            pushed_at: 0,
            cancelled_at: None,
        }
    }

    /// Decodes a double entry.
    ///
    /// # Panics
    /// As [`Entry::decode`].
    #[must_use]
    pub fn decode_double(first: &[u8; 64], second: &[u8; 64], ranges: &[Range]) -> Self {
        let (flags, user_data) = (first[1], u64_at(first, 32));
        let known = IOSQE_FIXED_FILE | IOSQE_IO_HARDLINK;
        assert_eq!(flags & !known, 0, "flags of a command");
        assert_ne!(flags & IOSQE_FIXED_FILE, 0, "files are fixed");
        Self {
            work: command::decode(first, second, ranges),
            user_data,
            linked: flags & IOSQE_IO_HARDLINK != 0,
            skip_success: false,
            tag: None,
            command: true,
            pushed_at: 0,
            cancelled_at: None,
        }
    }
}

impl Entry {
    /// Whether it is an operation of a request, which can be cancelled.
    #[must_use]
    pub const fn is_operation(&self) -> bool {
        self.is_transfer() || self.is_delay() || self.changes_cache()
    }

    const fn changes_cache(&self) -> bool {
        matches!(self.work, Work::Flush { .. } | Work::Zero { .. })
    }

    /// Whether it is a delay.
    #[must_use]
    pub const fn is_delay(&self) -> bool {
        matches!(self.work, Work::Timeout { .. })
    }

    /// Whether a polling ring accepts it.
    #[must_use]
    pub const fn may_be_polled(&self) -> bool {
        matches!(
            self.work,
            Work::Nop
                | Work::Fetch(_)
                | Work::Commit { .. }
                | Work::Register { .. }
                | Work::Unregister { .. }
                | Work::Transfer(_)
        )
    }

    /// Whether it reads or writes.
    #[must_use]
    pub const fn is_transfer(&self) -> bool {
        matches!(self.work, Work::Transfer(_))
    }

    /// Whether a request of this kind may need it.
    #[must_use]
    pub fn serves(&self, kind: RequestKind) -> bool {
        match self.work {
            Work::Nop | Work::Timeout { .. } => true,
            Work::Transfer(it) if it.write => matches!(kind, RequestKind::Write { .. }),
            Work::Transfer(_) => kind == RequestKind::Read,
            Work::Flush { .. } => {
                matches!(kind, RequestKind::Flush | RequestKind::Write { fua: true })
            }
            Work::Zero { how, .. } => match kind {
                RequestKind::Discard => how != Zeroing::ZeroRange,
                RequestKind::WriteZeroes { may_unmap: true } => how != Zeroing::Discard,
                RequestKind::WriteZeroes { may_unmap: false } => how == Zeroing::ZeroRange,
                RequestKind::Read | RequestKind::Write { .. } | RequestKind::Flush => false,
            },
            Work::Fetch(_)
            | Work::Commit { .. }
            | Work::Register { .. }
            | Work::Unregister { .. }
            | Work::Cancel { .. } => false,
        }
    }

    /// Whether it is the engine's operation, or what a fault of the port replaces it by.
    #[must_use]
    pub fn says(&self, op: &Op) -> bool {
        let same =
            |backing: usize, at: u64| backing == usize::from(op.backing.0) && at == op.offset;
        match self.work {
            Work::Nop => true,
            Work::Transfer(it) => {
                let kind = if it.write {
                    let fua = it.dsync;
                    op.kind == OpKind::Write { fua } || op.kind == OpKind::WriteScratch { fua }
                } else {
                    op.is_read() && !it.dsync
                };
                kind && same(it.backing, it.at) && u64::from(it.len) <= op.len
            }
            Work::Flush { backing } => op.kind == OpKind::Flush && same(backing, op.offset),
            Work::Zero { backing, at, len, how } => {
                let unmaps = op.kind == OpKind::WriteZeroes { may_unmap: true };
                let kind = match how {
                    Zeroing::Discard => op.kind == OpKind::Discard,
                    Zeroing::Punch => op.kind == OpKind::Discard || unmaps,
                    // A drive that does not zero deallocated blocks must not deallocate them.
                    Zeroing::ZeroRange if unmaps => self.command,
                    Zeroing::ZeroRange => op.kind == OpKind::WriteZeroes { may_unmap: false },
                };
                kind && same(backing, at) && len == op.len
            }
            Work::Timeout { ns } => op.kind == OpKind::Delay && ns == op.len,
            Work::Fetch(_)
            | Work::Commit { .. }
            | Work::Register { .. }
            | Work::Unregister { .. }
            | Work::Cancel { .. } => false,
        }
    }

    /// Its backing.
    #[must_use]
    pub const fn backing(&self) -> Option<usize> {
        if let Work::Transfer(Transfer { backing, .. })
        | Work::Flush { backing }
        | Work::Zero { backing, .. } = self.work
        {
            return Some(backing);
        }
        None
    }

    /// Whether it commits a request.
    #[must_use]
    pub const fn is_commit(&self) -> bool {
        matches!(self.work, Work::Commit { .. })
    }
}

/// The character device is fixed file 0, the backings follow.
fn backing(raw: &[u8; 64]) -> usize {
    let file = u32_at(raw, 4);
    assert!(file > 0, "an operation on the character device");
    file as usize - 1
}

fn zeroing(mode: u32) -> Zeroing {
    const PUNCH: u32 = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;
    const ZERO: u32 = FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE;
    match mode {
        PUNCH => Zeroing::Punch,
        ZERO => Zeroing::ZeroRange,
        other => panic!("mode {other:#x} of fallocate"),
    }
}

/// `struct ublksrv_io_cmd`, in the entry's last 16 bytes.
fn ublk_command(raw: &[u8; 64], qid: u16) -> Work {
    assert_eq!(u32_at(raw, 4), 0, "a command to the driver goes to its character device");
    assert_eq!(u16_at(raw, 48), qid, "queue of a command");
    let (tag, result, addr) = (u16_at(raw, 50), i32_at(raw, 52), u64_at(raw, 56));
    let fetch = Fetch { tag, auto: u64_at(raw, 16), copy_to: addr };
    let slot = || u16::try_from(addr).unwrap_or_else(|_| panic!("slot {addr}"));
    match u32_at(raw, 8) {
        UBLK_U_IO_FETCH_REQ => Work::Fetch(fetch),
        UBLK_U_IO_COMMIT_AND_FETCH_REQ => Work::Commit { result, fetch },
        UBLK_U_IO_REGISTER_IO_BUF => Work::Register { tag, slot: slot() },
        UBLK_U_IO_UNREGISTER_IO_BUF => Work::Unregister { tag, slot: slot() },
        other => panic!("command {other:#x}"),
    }
}

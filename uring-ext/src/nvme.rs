//! NVMe commands to a namespace's generic device (`/dev/ngXnY`), past the block layer.
//!
//! The kernel passes such a command to the drive unchanged: it is never split, and fails with
//! `EINVAL` if it is longer than `max_hw_sectors`. If its segments exceed the queue's limits, the
//! kernel silently copies the data (`blk_rq_map_user_iov`). A device that inherits all limits never
//! gets such requests. Numbers are those of the NVMe base and NVM command set specifications.

mod identify;

use crate::Errno;
use crate::pool::{BufferPool, PoolAddr};
use crate::sqe::{FixedBuffer, FixedFile, Sqe};

pub use identify::{Identity, identify};

/// `NVME_URING_CMD_IO` (`include/uapi/linux/nvme_ioctl.h`, Linux 5.19).
const URING_CMD_IO: u32 = 0xc048_4e80;
/// `NVME_IOCTL_ID`.
const IOCTL_ID: u32 = 0x4e40;
/// `NVME_IOCTL_ADMIN_CMD`.
const IOCTL_ADMIN_CMD: u32 = 0xc048_4e41;

/// The maximum number of blocks of a read, write or write-zeroes command (its count has 16 bits).
pub const MAX_BLOCKS: u64 = 1 << 16;

/// `struct nvme_uring_cmd`; `struct nvme_passthru_cmd` differs only in its last field, the result.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct Command {
    opcode: u8,
    flags: u8,
    rsvd1: u16,
    nsid: u32,
    cdw2: u32,
    cdw3: u32,
    metadata: u64,
    addr: u64,
    metadata_len: u32,
    data_len: u32,
    cdw10: u32,
    cdw11: u32,
    cdw12: u32,
    cdw13: u32,
    cdw14: u32,
    cdw15: u32,
    timeout_ms: u32,
    rsvd2: u32,
}

mod opcode {
    pub const FLUSH: u8 = 0x00;
    pub const WRITE: u8 = 0x01;
    pub const READ: u8 = 0x02;
    pub const WRITE_ZEROES: u8 = 0x08;
    pub const DATASET_MANAGEMENT: u8 = 0x09;
    /// Admin.
    pub const IDENTIFY: u8 = 0x06;
}

/// Command dword 10 of `Identify`: the namespace, the controller (`CNS`).
const IDENTIFY_NAMESPACE: u32 = 0;
const IDENTIFY_CONTROLLER: u32 = 1;

/// Command dword 12: force unit access.
const FUA: u32 = 1 << 30;
/// Command dword 12 of write-zeroes: the blocks may be deallocated.
const DEALLOCATE: u32 = 1 << 25;
/// Command dword 11 of dataset management: deallocate the ranges.
const AD: u32 = 1 << 2;

/// A namespace, and what its commands depend on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Namespace {
    /// Its number (`NSID`).
    pub nsid: u32,
    /// Base-two logarithm of its block size.
    pub block_shift: u8,
    /// The delays that its drive may demand before a retry.
    pub retry_delays: RetryDelays,
}

impl Namespace {
    /// The number of the block that contains a byte.
    fn block_of(self, offset: u64) -> u64 {
        offset >> self.block_shift
    }

    /// The number of blocks minus one, as in the commands.
    fn count_less_one(self, len: u64) -> u32 {
        u32::try_from((len >> self.block_shift).saturating_sub(1)).unwrap_or(u32::MAX)
    }

    fn command(self, opcode: u8) -> Command {
        Command { opcode, nsid: self.nsid, ..Command::default() }
    }

    fn transfer(self, opcode: u8, buffer: FixedBuffer, len: u32, offset: u64) -> Command {
        Command {
            addr: buffer.addr(),
            data_len: len,
            cdw12: self.count_less_one(len.into()),
            ..self.ranged(opcode, offset)
        }
    }

    fn ranged(self, opcode: u8, offset: u64) -> Command {
        let [cdw10, cdw11] = halves(self.block_of(offset));
        Command { cdw10, cdw11, ..self.command(opcode) }
    }

    /// Reads `len` bytes at byte `offset` into a fixed buffer.
    #[must_use]
    pub fn read(self, file: FixedFile, buffer: FixedBuffer, len: u32, offset: u64) -> [Sqe; 2] {
        entry(file, Some(buffer.slot()), self.transfer(opcode::READ, buffer, len, offset))
    }

    /// Writes `len` bytes from a fixed buffer at byte `offset`. With `fua` the data is on stable
    /// storage at completion.
    #[must_use]
    pub fn write(
        self,
        file: FixedFile,
        buffer: FixedBuffer,
        len: u32,
        offset: u64,
        fua: bool,
    ) -> [Sqe; 2] {
        let mut command = self.transfer(opcode::WRITE, buffer, len, offset);
        command.cdw12 |= if fua { FUA } else { 0 };
        entry(file, Some(buffer.slot()), command)
    }

    /// Writes all completed writes to stable storage.
    #[must_use]
    pub fn flush(self, file: FixedFile) -> [Sqe; 2] {
        entry(file, None, self.command(opcode::FLUSH))
    }

    /// Makes at most [`MAX_BLOCKS`] blocks read as zeros; they may be deallocated.
    #[must_use]
    pub fn write_zeroes(
        self,
        file: FixedFile,
        offset: u64,
        len: u64,
        deallocate: bool,
    ) -> [Sqe; 2] {
        let mut command = self.ranged(opcode::WRITE_ZEROES, offset);
        command.cdw12 = self.count_less_one(len) | if deallocate { DEALLOCATE } else { 0 };
        entry(file, None, command)
    }

    /// Deallocates the range that [`Ranges::set`] stored.
    #[must_use]
    pub fn deallocate(self, file: FixedFile, range: RangeAddr) -> [Sqe; 2] {
        let mut command = self.command(opcode::DATASET_MANAGEMENT);
        command.addr = range.0.get();
        command.data_len = RANGE_BYTES;
        command.cdw11 = AD;
        entry(file, None, command)
    }
}

fn halves(number: u64) -> [u32; 2] {
    let [a, b, c, d, e, f, g, h] = number.to_le_bytes();
    [u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h])]
}

fn entry(file: FixedFile, buffer: Option<u16>, command: Command) -> [Sqe; 2] {
    const { assert!(size_of::<Command>() == 72) };
    // SAFETY: a command is 72 bytes of integers without padding.
    let bytes = unsafe { std::mem::transmute::<Command, [u8; 72]>(command) };
    let mut payload = [0; 80];
    payload[..72].copy_from_slice(&bytes);
    Sqe::double_command(file, URING_CMD_IO, buffer, &payload)
}

/// How often the block layer retries a command (`nvme_max_retries`).
pub const MAX_RETRIES: u8 = 5;

/// Status: do not retry (`NVME_STATUS_DNR`).
const DO_NOT_RETRY: i32 = 1 << 14;
/// Status: number of the drive's retry delay, 1 to 3; 0 for no delay (`NVME_STATUS_CRD`).
const RETRY_DELAY_SHIFT: u32 = 11;
/// How long to wait for another path to the drive, in nanoseconds.
const PATH_PAUSE_NS: u64 = 100_000_000;

/// The outcome of a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The command was carried out.
    Done,
    /// The command failed.
    Failed(Errno),
    /// The command failed and is to be retried, at most [`MAX_RETRIES`] times.
    Again {
        /// The error if there are no retries left.
        errno: Errno,
        /// How long to wait before the retry, in nanoseconds.
        pause_ns: u64,
    },
}

/// The delays before a retry that a drive may demand (`CRDT1` to `CRDT3`), in units of 100 ms.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RetryDelays([u16; 3]);

impl RetryDelays {
    /// Parses `Identify Controller` data.
    fn parse(data: &[u8; 4096]) -> Self {
        Self([128, 130, 132].map(|at| u16::from_le_bytes([data[at], data[at + 1]])))
    }

    /// The delay that a status demands, in nanoseconds.
    fn of(self, status: i32) -> u64 {
        let which = usize::try_from(status >> RETRY_DELAY_SHIFT & 0x3).unwrap_or(0);
        let tenths = which.checked_sub(1).and_then(|which| self.0.get(which));
        u64::from(tenths.copied().unwrap_or(0)) * 100_000_000
    }
}

impl Namespace {
    /// The outcome for a command's result: a negated error number of the kernel, or a status of the
    /// drive, which is treated as in the block layer (`nvme_decide_disposition`,
    /// `nvme_error_status`).
    #[must_use]
    pub fn outcome(&self, res: i32) -> Outcome {
        if let Err(errno) = Errno::from_result(res) {
            return Outcome::Failed(errno);
        }
        let Some(errno) = error_of(res) else { return Outcome::Done };
        let (kind, code) = (res >> 8 & 0x7, res & 0x7ff);
        // Status 0x191 demands authentication, which is not implemented.
        if res & DO_NOT_RETRY != 0 || code == 0x191 {
            return Outcome::Failed(errno);
        }
        let is_of_path = kind == 3;
        let least = if is_of_path { PATH_PAUSE_NS } else { 0 };
        Outcome::Again { errno, pause_ns: self.retry_delays.of(res).max(least) }
    }
}

/// The errno for a status (`nvme_error_status`); `None` for success.
fn error_of(status: i32) -> Option<Errno> {
    // Status code type and status code. The bits above advise about retries.
    match status & 0x7ff {
        0 => None,
        // Invalid opcode, field or namespace; bad attributes.
        0x001 | 0x002 | 0x00b | 0x180 => Some(Errno::EOPNOTSUPP),
        // Interrupted, beyond the end, not ready.
        0x021 | 0x080 | 0x082 => Some(Errno::EREMOTEIO),
        // Capacity exceeded.
        0x081 => Some(Errno::ENOSPC),
        // Reservation conflict.
        0x083 => Some(Errno::EBADE),
        // Protection information is invalid, or does not match.
        0x181 | 0x282..=0x284 => Some(Errno::EILSEQ),
        // Read-only, write fault, unrecovered read, compare failure, access denied, deallocated.
        0x182 | 0x280 | 0x281 | 0x285..=0x287 => Some(Errno::ENODATA),
        // No path to the drive.
        0x370 => Some(Errno::ENOLINK),
        _ => Some(Errno::EIO),
    }
}

const RANGE_BYTES: u32 = 16;

/// Memory for the ranges of dataset management commands, which the kernel reads while the commands
/// are in flight. It stays mapped until the process ends.
#[derive(Clone, Copy, Debug)]
pub struct Ranges(BufferPool);

/// The address of a range, in memory that is never unmapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RangeAddr(PoolAddr);

impl RangeAddr {
    /// The address as the kernel takes it.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0.get()
    }
}

impl Ranges {
    /// Memory for `count` ranges.
    ///
    /// # Errors
    /// `ENOMEM`; `EINVAL` for none.
    pub fn new(count: u16) -> Result<Self, Errno> {
        BufferPool::new(1, u32::from(count) * RANGE_BYTES).map(Self)
    }

    /// Stores the range of `len` bytes at byte `offset` of a namespace as number `index`.
    ///
    /// # Panics
    /// If `index` is not below the count.
    pub fn set(&mut self, index: u16, namespace: Namespace, offset: u64, len: u64) -> RangeAddr {
        let blocks = u32::try_from(len >> namespace.block_shift).unwrap_or(u32::MAX);
        let mut range = [0; RANGE_BYTES as usize];
        range[4..8].copy_from_slice(&blocks.to_le_bytes());
        range[8..16].copy_from_slice(&namespace.block_of(offset).to_le_bytes());
        let at = u32::from(index) * RANGE_BYTES;
        self.0.write(0, at, &range);
        RangeAddr(self.0.addr(0, at))
    }
}

/// The facts that `uapi_test` compares with the kernel's headers.
#[cfg(test)]
pub(crate) fn facts(mut add: impl FnMut(&str, u64)) {
    use std::mem::offset_of;
    add("sizeof(struct nvme_uring_cmd)", 72);
    add("sizeof(struct nvme_passthru_cmd)", 72);
    add("offsetof(struct nvme_uring_cmd, nsid)", offset_of!(Command, nsid) as u64);
    add("offsetof(struct nvme_uring_cmd, addr)", offset_of!(Command, addr) as u64);
    add("offsetof(struct nvme_passthru_cmd, addr)", offset_of!(Command, addr) as u64);
    add("offsetof(struct nvme_uring_cmd, data_len)", offset_of!(Command, data_len) as u64);
    add("offsetof(struct nvme_uring_cmd, cdw10)", offset_of!(Command, cdw10) as u64);
    add("offsetof(struct nvme_uring_cmd, timeout_ms)", offset_of!(Command, timeout_ms) as u64);
    add("NVME_URING_CMD_IO", URING_CMD_IO.into());
    add("NVME_IOCTL_ID", IOCTL_ID.into());
    add("NVME_IOCTL_ADMIN_CMD", IOCTL_ADMIN_CMD.into());
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAMESPACE: Namespace =
        Namespace { nsid: 3, block_shift: 12, retry_delays: RetryDelays([0; 3]) };

    /// The 72 bytes of a command, from both halves of its entry.
    fn command(entry: &[Sqe; 2]) -> Vec<u8> {
        assert_eq!((entry[0].width(), entry[0].as_bytes()[0]), (2, 64), "IORING_OP_URING_CMD128");
        [&entry[0].as_bytes()[48..], &entry[1].as_bytes()[..56]].concat()
    }

    fn dword(command: &[u8], at: usize) -> u32 {
        u32::from_ne_bytes(command[at..at + 4].try_into().unwrap())
    }

    #[test]
    fn transfers_name_slot_offset_and_blocks() {
        let lent = FixedBuffer::Lent { slot: 9, offset: 512 };
        let start = (5 << 44) | 0x3000;
        let entry = NAMESPACE.write(FixedFile(2), lent, 8192, start, true);
        let head = entry[0].as_bytes();
        assert_eq!((head[1], head[4], head[28], head[40]), (1, 2, 1, 9), "fixed file and buffer");
        assert_eq!(u32::from_ne_bytes(head[8..12].try_into().unwrap()), 0xc048_4e80);
        let bytes = command(&entry);
        assert_eq!((bytes[0], dword(&bytes, 4)), (1, 3), "write to namespace 3");
        assert_eq!((dword(&bytes, 24), dword(&bytes, 36)), (512, 8192), "address and length");
        assert_eq!((dword(&bytes, 40), dword(&bytes, 44)), (3, 5), "first block, two dwords");
        assert_eq!(dword(&bytes, 48), (1 << 30) | 1, "FUA, and two blocks less one");
        let bytes = command(&NAMESPACE.read(FixedFile(2), lent, 4096, 0));
        assert_eq!((bytes[0], dword(&bytes, 48)), (2, 0));
    }

    #[test]
    fn commands_without_data_have_no_buffer() {
        let flush = NAMESPACE.flush(FixedFile(1));
        assert_eq!((flush[0].as_bytes()[28], command(&flush)[0]), (0, 0));
        let zeroes = command(&NAMESPACE.write_zeroes(FixedFile(1), 8192, 1 << 20, true));
        assert_eq!((zeroes[0], dword(&zeroes, 40), dword(&zeroes, 48)), (8, 2, (1 << 25) | 255));
        let kept = command(&NAMESPACE.write_zeroes(FixedFile(1), 0, MAX_BLOCKS << 12, false));
        assert_eq!(dword(&kept, 48), 0xffff);
        let mut ranges = Ranges::new(3).unwrap();
        let range = ranges.set(2, NAMESPACE, 4096 * 7, 4096 * 100);
        let entry = NAMESPACE.deallocate(FixedFile(1), range);
        let bytes = command(&entry);
        assert_eq!((bytes[0], dword(&bytes, 40), dword(&bytes, 44)), (9, 0, 4));
        assert_eq!((entry[0].as_bytes()[28], dword(&bytes, 36)), (0, 16));
        let addr =
            std::ptr::with_exposed_provenance::<[u32; 4]>(usize::try_from(range.get()).unwrap());
        // SAFETY: the range lies in memory that is never unmapped, and nobody writes to it now.
        let written = unsafe { addr.read() };
        assert_eq!(written, [0, 100, 7, 0], "attributes, blocks, first block");
    }

    #[test]
    fn a_status_is_what_the_block_layer_makes_of_it() {
        use Outcome::{Done, Failed};
        let again = |errno, pause_ns| Outcome::Again { errno, pause_ns };
        let ms = 1_000_000;
        let namespace = Namespace { retry_delays: RetryDelays([2, 0, 70]), ..NAMESPACE };
        let table = [
            (0, Done),
            // An error number of the kernel.
            (-5, Failed(Errno::EIO)),
            (-libc::EAGAIN, Failed(Errno::EAGAIN)),
            (-libc::EINTR, Failed(Errno::EINTR)),
            // Do not retry.
            (0x4002, Failed(Errno::EOPNOTSUPP)),
            (0x4081, Failed(Errno::ENOSPC)),
            (0x4281, Failed(Errno::ENODATA)),
            (0x4082, Failed(Errno::EREMOTEIO)),
            (0x4370, Failed(Errno::ENOLINK)),
            (0x5821, Failed(Errno::EREMOTEIO)),
            // The same kind of status without that bit.
            (0x2080, again(Errno::EREMOTEIO, 0)),
            (0x0281, again(Errno::ENODATA, 0)),
            (0x0006, again(Errno::EIO, 0)),
            (0x0021, again(Errno::EREMOTEIO, 0)),
            (0x0082, again(Errno::EREMOTEIO, 0)),
            (0x0182, again(Errno::ENODATA, 0)),
            // After a delay that the drive demands.
            (0x0821, again(Errno::EREMOTEIO, 200 * ms)),
            (0x1021, again(Errno::EREMOTEIO, 0)),
            (0x1882, again(Errno::EREMOTEIO, 7000 * ms)),
            // A path error.
            (0x0301, again(Errno::EIO, 100 * ms)),
            (0x0370, again(Errno::ENOLINK, 100 * ms)),
            (0x0b70, again(Errno::ENOLINK, 200 * ms)),
            (0x0371, again(Errno::EIO, 100 * ms)),
            (0x0191, Failed(Errno::EIO)),
        ];
        for (res, expected) in table {
            assert_eq!(namespace.outcome(res), expected, "{res:#x}");
        }
    }

    #[test]
    fn retry_delays_are_read() {
        let mut data = [0; 4096];
        data[128..134].copy_from_slice(&[1, 0, 0, 1, 0xff, 0xff]);
        assert_eq!(RetryDelays::parse(&data), RetryDelays([1, 256, 65535]));
    }
}

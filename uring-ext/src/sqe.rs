//! Submission queue entries: ublk I/O commands and the operations that borrow a lent buffer.
//!
//! Constructors take memory only as a slot of the ring's buffer table, which the kernel checks, or
//! as a [`PoolAddr`], which is never unmapped. So pushing an [`Sqe`] is safe.

use std::os::fd::RawFd;

use io_uring::{opcode, squeue, types};
use libublk::sys;

use crate::pool::PoolAddr;

/// `IORING_OP_URING_CMD128` (Linux 6.19).
const URING_CMD128: u8 = 64;
/// `IORING_URING_CMD_FIXED`.
const URING_CMD_FIXED: u32 = 1;

/// An index into the ring's table of registered files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FixedFile(pub u32);

/// A submission queue entry built by this module.
#[derive(Clone, Debug)]
#[repr(transparent)]
pub struct Sqe(squeue::Entry);

/// How the driver provides the data of a tag's next request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// Register the request's buffer in this slot before delivery, and return it at commit
    /// (`UBLK_F_AUTO_BUF_REG`, Linux 6.16). `UBLK_AUTO_BUF_REG_FALLBACK` is always set: without
    /// it a failed registration ends the request with an error that the server never sees.
    AutoRegister {
        /// The slot of this ring's buffer table.
        slot: u16,
    },
    /// Copy to and from this address (Linux 6.0).
    Copy(PoolAddr),
    /// It does nothing: the server registers the buffer or copies the data
    /// (`UBLK_F_SUPPORT_ZERO_COPY`, `UBLK_F_USER_COPY`).
    ByServer,
}

impl Delivery {
    /// The value of `sqe->addr`: `struct ublk_auto_buf_reg` packed by
    /// `ublk_auto_buf_reg_to_sqe_addr`, or unused.
    fn sqe_addr(self) -> Option<u64> {
        match self {
            Self::AutoRegister { slot } => {
                Some(u64::from(slot) | (u64::from(sys::UBLK_AUTO_BUF_REG_FALLBACK) << 16))
            }
            Self::Copy(_) | Self::ByServer => None,
        }
    }

    /// The value of `ublksrv_io_cmd.addr`.
    fn cmd_addr(self) -> u64 {
        match self {
            Self::AutoRegister { .. } | Self::ByServer => 0,
            Self::Copy(addr) => addr.get(),
        }
    }
}

/// The memory of an operation, as a position in the ring's buffer table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FixedBuffer {
    /// A lent request buffer: addresses in it count from 0 (`io_buffer_register_bvec` leaves
    /// `imu->ubuf` 0).
    Lent {
        /// The slot that the buffer is registered in.
        slot: u16,
        /// First byte, counted from the start of the request.
        offset: u32,
    },
    /// A buffer of the pool, registered under its index.
    Pool {
        /// The index of the buffer, which is also its slot.
        slot: u16,
        /// The address of the first byte.
        addr: PoolAddr,
    },
}

impl FixedBuffer {
    pub(crate) fn slot(self) -> u16 {
        match self {
            Self::Lent { slot, .. } | Self::Pool { slot, .. } => slot,
        }
    }

    /// The address of the first byte as the kernel takes it.
    pub(crate) fn addr(self) -> u64 {
        match self {
            Self::Lent { offset, .. } => u64::from(offset),
            Self::Pool { addr, .. } => addr.get(),
        }
    }
}

/// `struct ublksrv_io_cmd` as bytes.
fn io_cmd(qid: u16, tag: u16, result: i32, addr: u64) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[0..2].copy_from_slice(&qid.to_ne_bytes());
    bytes[2..4].copy_from_slice(&tag.to_ne_bytes());
    bytes[4..8].copy_from_slice(&result.to_ne_bytes());
    bytes[8..16].copy_from_slice(&addr.to_ne_bytes());
    bytes
}

/// `struct io_uring_sqe` as eight words. The entries that every request needs are written this way
/// because it is much faster than the builders of `io-uring`. The tests compare both.
#[inline(always)]
fn from_words(words: [u64; 8]) -> Sqe {
    // SAFETY: an entry is 64 bytes of plain integers, `repr(C)` and without padding.
    Sqe(unsafe { std::mem::transmute::<[u64; 8], squeue::Entry>(words) })
}

/// Two halves of a word, in the order of their addresses.
#[inline(always)]
const fn pair(first: u32, second: u32) -> u64 {
    if cfg!(target_endian = "little") {
        (second as u64) << 32 | first as u64
    } else {
        (first as u64) << 32 | second as u64
    }
}

/// The first word: opcode, flags and file.
#[inline(always)]
fn head(opcode: u8, file: FixedFile) -> u64 {
    pair(u32::from_ne_bytes([opcode, squeue::Flags::FIXED_FILE.bits(), 0, 0]), file.0)
}

/// A read or write at `offset` of a file.
#[inline(always)]
fn transfer(
    opcode: u8,
    file: FixedFile,
    buffer: FixedBuffer,
    len: u32,
    offset: u64,
    rw_flags: u32,
) -> Sqe {
    let [low, high] = buffer.slot().to_ne_bytes();
    let index = pair(u32::from_ne_bytes([low, high, 0, 0]), 0);
    from_words([head(opcode, file), offset, buffer.addr(), pair(len, rw_flags), 0, index, 0, 0])
}

fn ublk(cdev: FixedFile, op: u32, cmd: [u8; 16], addr: Option<u64>) -> Sqe {
    Sqe(opcode::UringCmd16::new(types::Fixed(cdev.0), op).cmd(cmd).addr(addr).build())
}

impl Sqe {
    /// `UBLK_U_IO_FETCH_REQ`: hand a tag to the driver for the first time.
    #[must_use]
    pub fn fetch(cdev: FixedFile, qid: u16, tag: u16, delivery: Delivery) -> Self {
        let cmd = io_cmd(qid, tag, 0, delivery.cmd_addr());
        ublk(cdev, sys::UBLK_U_IO_FETCH_REQ, cmd, delivery.sqe_addr())
    }

    /// `UBLK_U_IO_COMMIT_AND_FETCH_REQ`: complete a tag's request with `result` (bytes moved, or a
    /// negated error number) and fetch its next one. Must be pushed to the ring that fetched: on
    /// another ring the buffer is not returned, and the request never ends.
    #[must_use]
    #[inline(always)]
    pub fn commit_and_fetch(
        cdev: FixedFile,
        qid: u16,
        tag: u16,
        result: i32,
        delivery: Delivery,
    ) -> Self {
        let ([q0, q1], [t0, t1]) = (qid.to_ne_bytes(), tag.to_ne_bytes());
        let request = u32::from_ne_bytes([q0, q1, t0, t1]);
        from_words([
            head(opcode::UringCmd16::CODE, cdev),
            pair(sys::UBLK_U_IO_COMMIT_AND_FETCH_REQ, 0),
            delivery.sqe_addr().unwrap_or(0),
            0,
            0,
            0,
            pair(request, u32::from_ne_bytes(result.to_ne_bytes())),
            delivery.cmd_addr(),
        ])
    }

    /// `UBLK_U_IO_REGISTER_IO_BUF` (Linux 6.15): put the buffer of a delivered request into a slot.
    #[must_use]
    pub fn register_buffer(cdev: FixedFile, qid: u16, tag: u16, slot: u16) -> Self {
        ublk(cdev, sys::UBLK_U_IO_REGISTER_IO_BUF, io_cmd(qid, tag, 0, u64::from(slot)), None)
    }

    /// `UBLK_U_IO_UNREGISTER_IO_BUF` (Linux 6.15): remove it from the slot.
    #[must_use]
    pub fn unregister_buffer(cdev: FixedFile, qid: u16, tag: u16, slot: u16) -> Self {
        ublk(cdev, sys::UBLK_U_IO_UNREGISTER_IO_BUF, io_cmd(qid, tag, 0, u64::from(slot)), None)
    }

    /// Reads `len` bytes at byte `offset` of a file into a fixed buffer.
    #[must_use]
    #[inline(always)]
    pub fn read_fixed(file: FixedFile, buffer: FixedBuffer, len: u32, offset: u64) -> Self {
        transfer(opcode::ReadFixed::CODE, file, buffer, len, offset, 0)
    }

    /// Writes `len` bytes from a fixed buffer at byte `offset` of a file. With `dsync`
    /// (`RWF_DSYNC`) the data is on stable storage at completion: a FUA write on block devices that
    /// support it, otherwise a write and a flush.
    #[must_use]
    #[inline(always)]
    pub fn write_fixed(
        file: FixedFile,
        buffer: FixedBuffer,
        len: u32,
        offset: u64,
        dsync: bool,
    ) -> Self {
        let flags = if dsync { u32::from_ne_bytes(libc::RWF_DSYNC.to_ne_bytes()) } else { 0 };
        transfer(opcode::WriteFixed::CODE, file, buffer, len, offset, flags)
    }

    /// `fdatasync` of a file, or a flush of a block device's cache. Runs on an io-wq thread.
    #[must_use]
    pub fn datasync(file: FixedFile) -> Self {
        let flags = types::FsyncFlags::DATASYNC;
        Self(opcode::Fsync::new(types::Fixed(file.0)).flags(flags).build())
    }

    /// `fallocate(2)` with `mode` over a range of bytes. Runs on an io-wq thread.
    #[must_use]
    pub fn fallocate(file: FixedFile, mode: i32, offset: u64, len: u64) -> Self {
        Self(opcode::Fallocate::new(types::Fixed(file.0), len).offset(offset).mode(mode).build())
    }

    /// A command with 80 bytes of payload, as a double entry (`IORING_OP_URING_CMD128`, Linux
    /// 6.19). `buffer` is the slot that addresses in the payload refer to
    /// (`IORING_URING_CMD_FIXED`).
    pub(crate) fn double_command(
        file: FixedFile,
        op: u32,
        buffer: Option<u16>,
        payload: &[u8; 80],
    ) -> [Self; 2] {
        let [mut first, mut second] = [[0; 64]; 2];
        first[0] = URING_CMD128;
        first[1] = squeue::Flags::FIXED_FILE.bits();
        first[4..8].copy_from_slice(&file.0.to_ne_bytes());
        first[8..12].copy_from_slice(&op.to_ne_bytes());
        if let Some(slot) = buffer {
            first[28..32].copy_from_slice(&URING_CMD_FIXED.to_ne_bytes());
            first[40..42].copy_from_slice(&slot.to_ne_bytes());
        }
        first[48..64].copy_from_slice(&payload[..16]);
        second.copy_from_slice(&payload[16..]);
        [first, second].map(Self::from_bytes)
    }

    /// `BLOCK_URING_CMD_DISCARD` (Linux 6.12, `block/ioctl.c`): discards a range of a block device.
    /// Starts on an io-wq thread. If the submitter started it, it would be `REQ_NOWAIT`: the block
    /// layer fails that with `EOPNOTSUPP` on drivers that may wait, such as dm-crypt
    /// (`submit_bio_noacct`), and io_uring does not retry it.
    #[must_use]
    pub fn discard(file: FixedFile, offset: u64, len: u64) -> Self {
        // `_IO(0x12, 0)`. The start is in `sqe->addr`, the length in `sqe->addr3`, where the
        // command bytes begin.
        const BLOCK_URING_CMD_DISCARD: u32 = 0x12 << 8;
        let mut cmd = [0; 16];
        cmd[0..8].copy_from_slice(&len.to_ne_bytes());
        Self(
            opcode::UringCmd16::new(types::Fixed(file.0), BLOCK_URING_CMD_DISCARD)
                .cmd(cmd)
                .addr(Some(offset))
                .build()
                .flags(squeue::Flags::ASYNC),
        )
    }

    /// `IORING_OP_ASYNC_CANCEL`: cancels the entry that was pushed with `user_data`. The result is
    /// 0, `-ENOENT` (no such entry) or `-EALREADY` (it is running and cannot be stopped).
    #[must_use]
    pub fn cancel(user_data: u64) -> Self {
        Self(opcode::AsyncCancel::new(user_data).build())
    }

    /// `IORING_OP_NOP`: completes at once with 0.
    #[must_use]
    pub fn nop() -> Self {
        Self(opcode::Nop::new().build())
    }

    /// `IORING_OP_TIMEOUT`: completes with `-ETIME` after `ns` nanoseconds. The kernel reads the
    /// time from memory, which the ring provides. Until it is pushed, the entry is an
    /// `IORING_OP_TIMEOUT_REMOVE` with the time in the field for the entry to remove. In a chain it
    /// would remain that, and fail with `ENOENT`.
    #[must_use]
    pub fn delay(ns: u64) -> Self {
        Self(opcode::TimeoutRemove::new(ns).build())
    }

    /// Whether this is a [`delay`](Self::delay).
    #[inline]
    pub(crate) fn is_delay(&self) -> bool {
        self.as_bytes()[0] == opcode::TimeoutRemove::CODE
    }

    /// The time of a [`delay`](Self::delay) that has not been pushed, in nanoseconds.
    #[must_use]
    pub fn delay_ns(&self) -> Option<u64> {
        let raw = self.as_bytes();
        let ns = || raw[16..24].iter().rev().fold(0, |ns, byte| ns << 8 | u64::from(*byte));
        self.is_delay().then(ns)
    }

    /// A delay with its time at an address.
    pub(crate) fn delay_at(&self, time: *const types::Timespec) -> Self {
        Self(opcode::Timeout::new(time).build().user_data(self.0.get_user_data()))
    }

    /// Completes once when `file` is readable, without reading it.
    #[must_use]
    pub fn poll_readable(file: FixedFile) -> Self {
        let events = u32::try_from(libc::POLLIN).unwrap_or(1);
        Self(opcode::PollAdd::new(types::Fixed(file.0), events).build())
    }

    /// `IORING_OP_MSG_RING` (Linux 5.18): posts a completion with `user_data` to another ring,
    /// given by its descriptor. Its own completion appears only if it fails.
    #[must_use]
    pub fn message(ring: RawFd, user_data: u64) -> Self {
        let message = opcode::MsgRingData::new(types::Fd(ring), 0, user_data, None);
        Self(message.build()).skip_success()
    }

    /// The next entry pushed starts when this one has completed, even if it failed
    /// (`IOSQE_IO_HARDLINK`).
    #[must_use]
    pub fn hard_link(self) -> Self {
        Self(self.0.flags(squeue::Flags::IO_HARDLINK))
    }

    /// No completion appears unless it fails (`IOSQE_CQE_SKIP_SUCCESS`, Linux 5.17).
    #[must_use]
    pub fn skip_success(self) -> Self {
        Self(self.0.flags(squeue::Flags::SKIP_SUCCESS))
    }

    /// Whether the next entry belongs to this one's chain.
    #[must_use]
    pub fn is_linked(&self) -> bool {
        self.as_bytes()[1] & squeue::Flags::IO_HARDLINK.bits() != 0
    }

    /// How many entries of the queue it takes: 2 for the first half of a double entry.
    #[must_use]
    pub fn width(&self) -> usize {
        if self.as_bytes()[0] == URING_CMD128 { 2 } else { 1 }
    }

    /// The entry as the kernel reads it (`struct io_uring_sqe`).
    #[must_use]
    pub fn as_bytes(&self) -> &[u8; 64] {
        const { assert!(size_of::<squeue::Entry>() == 64) };
        // SAFETY: an entry is 64 bytes of plain integers, `repr(C)` and without padding.
        unsafe { &*std::ptr::from_ref(&self.0).cast() }
    }

    /// Completes when the thread runs the kernel's work for it (`IORING_NOP_TW`, Linux 6.16; before
    /// that at once with `EINVAL`).
    #[cfg(test)]
    pub(crate) fn nop_as_work() -> Self {
        const IORING_NOP_TW: u32 = 1 << 4;
        let mut bytes = *Self::nop().as_bytes();
        bytes[28..32].copy_from_slice(&IORING_NOP_TW.to_ne_bytes());
        Self::from_bytes(bytes)
    }

    fn from_bytes(bytes: [u8; 64]) -> Self {
        // SAFETY: an entry is 64 bytes of plain integers, `repr(C)` and without padding.
        Self(unsafe { std::mem::transmute::<[u8; 64], squeue::Entry>(bytes) })
    }

    /// Sets the `user_data` of the completion.
    #[must_use]
    pub fn user_data(self, user_data: u64) -> Self {
        Self(self.0.user_data(user_data))
    }

    pub(crate) const fn entry(&self) -> &squeue::Entry {
        &self.0
    }

    pub(crate) fn entries(sqes: &[Self]) -> &[squeue::Entry] {
        // SAFETY: `Sqe` is a transparent wrapper, so a slice of them is a slice of entries.
        unsafe { std::slice::from_raw_parts(sqes.as_ptr().cast(), sqes.len()) }
    }
}

#[cfg(test)]
mod tests;

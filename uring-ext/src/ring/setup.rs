//! `io_uring_setup(2)` with flags that the `io-uring` crate does not know.

use std::io;
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};

use io_uring::{IoUring, Parameters};

/// `IORING_SETUP_*` (`include/uapi/linux/io_uring.h`).
pub(crate) mod flag {
    pub const IOPOLL: u32 = 1 << 0;
    pub const CQSIZE: u32 = 1 << 3;
    pub const CLAMP: u32 = 1 << 4;
    pub const SUBMIT_ALL: u32 = 1 << 7;
    pub const COOP_TASKRUN: u32 = 1 << 8;
    pub const TASKRUN_FLAG: u32 = 1 << 9;
    pub const SINGLE_ISSUER: u32 = 1 << 12;
    pub const DEFER_TASKRUN: u32 = 1 << 13;
    pub const NO_SQARRAY: u32 = 1 << 16;
    pub const HYBRID_IOPOLL: u32 = 1 << 17;
    pub const CQE_MIXED: u32 = 1 << 18;
    pub const SQE_MIXED: u32 = 1 << 19;
}

/// How a ring was set up, best first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RingMode {
    /// `SINGLE_ISSUER | DEFER_TASKRUN | NO_SQARRAY` (Linux 6.6).
    DeferTaskrunNoSqarray,
    /// `SINGLE_ISSUER | DEFER_TASKRUN` (Linux 6.1).
    DeferTaskrun,
    /// `COOP_TASKRUN` (Linux 5.19).
    CoopTaskrun,
}

impl RingMode {
    /// Best first.
    pub(super) const ALL: [Self; 3] =
        [Self::DeferTaskrunNoSqarray, Self::DeferTaskrun, Self::CoopTaskrun];

    const fn flags(self) -> u32 {
        match self {
            Self::DeferTaskrunNoSqarray => {
                flag::SINGLE_ISSUER | flag::DEFER_TASKRUN | flag::NO_SQARRAY
            }
            Self::DeferTaskrun => flag::SINGLE_ISSUER | flag::DEFER_TASKRUN,
            Self::CoopTaskrun => flag::COOP_TASKRUN,
        }
    }
}

/// How completions are detected.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Polling {
    /// By interrupts of the drive.
    #[default]
    Off,
    /// The thread polls the drive (`IORING_SETUP_IOPOLL`). Such a ring takes reads, writes and
    /// commands, and refuses other operations with `EINVAL`.
    Busy,
    /// As `Busy`, but the thread first sleeps for half of the usual duration of an operation
    /// (`IORING_SETUP_HYBRID_IOPOLL`, Linux 6.13).
    Hybrid,
}

/// The configuration of a ring.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RingSetup {
    /// The minimum number of submission queue entries of 64 bytes.
    pub sq_entries: u32,
    /// The minimum size of the completion queue.
    pub cq_entries: u32,
    /// How completions are detected.
    pub polling: Polling,
    /// Accept entries of 128 bytes and return completions of 32 bytes, beside the usual ones
    /// (`IORING_SETUP_SQE_MIXED`, Linux 6.19, and `IORING_SETUP_CQE_MIXED`, Linux 6.18).
    pub mixed_sizes: bool,
    /// Set a flag in the submission queue while the kernel has work for this thread, for threads
    /// that do not wait on the ring (`IORING_SETUP_TASKRUN_FLAG`, Linux 5.19).
    pub show_work: bool,
}

impl RingSetup {
    const fn flags(&self) -> u32 {
        let polling = match self.polling {
            Polling::Off => 0,
            Polling::Busy => flag::IOPOLL,
            Polling::Hybrid => flag::IOPOLL | flag::HYBRID_IOPOLL,
        };
        let mixed = if self.mixed_sizes { flag::SQE_MIXED | flag::CQE_MIXED } else { 0 };
        let show_work = if self.show_work { flag::TASKRUN_FLAG } else { 0 };
        flag::CQSIZE | flag::CLAMP | flag::SUBMIT_ALL | polling | mixed | show_work
    }

    pub(super) fn build(&self, mode: RingMode) -> io::Result<IoUring> {
        // A double entry counts twice, in both queues.
        let factor = if self.mixed_sizes { 2 } else { 1 };
        let params = SetupParams {
            flags: self.flags() | mode.flags(),
            cq_entries: self.cq_entries * factor,
            ..SetupParams::default()
        };
        setup(self.sq_entries * factor, params)
    }
}

/// `struct io_uring_params`, with the offsets that the kernel fills in as opaque bytes.
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct SetupParams {
    pub sq_entries: u32,
    pub cq_entries: u32,
    pub flags: u32,
    pub sq_thread_cpu: u32,
    pub sq_thread_idle: u32,
    pub features: u32,
    pub wq_fd: u32,
    pub resv: [u32; 3],
    pub sq_off: [u64; 5],
    pub cq_off: [u64; 5],
}

fn setup(entries: u32, mut params: SetupParams) -> io::Result<IoUring> {
    const { assert!(size_of::<SetupParams>() == size_of::<Parameters>()) };
    // SAFETY: `params` has the layout of `struct io_uring_params` and outlives the call.
    let fd = unsafe {
        libc::syscall(libc::SYS_io_uring_setup, entries, std::ptr::from_mut(&mut params))
    };
    let fd = i32::try_from(fd).ok().filter(|fd| *fd >= 0).ok_or_else(io::Error::last_os_error)?;
    // SAFETY: the kernel has just opened it for this thread, and nothing else owns it.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: `Parameters` is a transparent wrapper of `struct io_uring_params`, which consists of
    // integers. The kernel has filled it in for this ring.
    let parameters = unsafe { std::mem::transmute::<SetupParams, Parameters>(params) };
    // SAFETY: the descriptor is that of a ring and owned, and these are its parameters. Entries
    // have 64 bytes and completions 16, as `IoUring` expects; a double one counts as two.
    unsafe { IoUring::from_fd(fd.into_raw_fd(), parameters) }
}

//! io_uring for ublk servers: what the `io-uring` and `libublk` crates lack.
//!
//! * [`ring`]: ring set-up with fallback. A ring takes only entries that this crate built, so
//!   pushing one is safe.
//! * [`sqe`]: builders for the ublk I/O commands (fetch, commit, register, unregister) and for
//!   the secondary operations that borrow a lent buffer.
//! * [`nvme`]: NVMe commands to a namespace's generic device, and its `Identify` data.
//! * [`pool`]: page-aligned memory for the copy modes, and the buffer table entries for it.
//! * [`iod`]: the shared array of request descriptors that the driver fills.
//! * [`block`]: the files behind kernel loop devices.
//! * [`control`]: commands to `/dev/ublk-control` and their parameters, with bounded waits.
//! * [`feature`]: the driver's features: names, first kernel versions, and a probe.
//!
//! All `unsafe` of the project lives in this crate. Facts about the kernel are cited by file and
//! symbol of its source, with the first version.

pub mod block;
pub mod control;
pub mod errno;
pub mod feature;
pub mod iod;
pub mod nvme;
pub mod params;
pub mod pool;
pub mod ring;
pub mod sqe;
pub mod task;

#[cfg(test)]
mod uapi_test;

pub use errno::Errno;

/// The UAPI of the driver (`include/uapi/linux/ublk_cmd.h`), as bound by `libublk`.
pub use libublk::sys;

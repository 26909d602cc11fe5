//! io_uring for ublk servers: what the `io-uring` and `libublk` crates do not give.
//!
//! * [`ring`]: ring set-up with fallback, and a handle that can only be fed with
//!   entries which this crate built, so that pushing one is safe.
//! * [`sqe`]: builders for the ublk I/O commands (fetch, commit, register, unregister) and for
//!   the secondary operations that borrow a lent buffer.
//! * [`nvme`]: NVMe commands to a namespace's generic device, and what it says of itself.
//! * [`pool`]: page-aligned memory for the copy modes, and the buffer table entries for it.
//! * [`iod`]: the shared array of request descriptors that the driver fills.
//! * [`block`]: what loop devices of the kernel are attached to.
//! * [`control`]: commands to `/dev/ublk-control` and their parameters, with bounded waits.
//! * [`feature`]: names, first kernel versions and a probe of the driver's features.
//!
//! All `unsafe` of the project lives in this crate. Facts about the kernel are cited as
//! file and symbol of its source, with the first version that has them.

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

//! A simulator: the real engine, registry and port of a lane on a simulated kernel.
//!
//! A seed chooses a device (lend mode, buffer table, planner, depth, deadline) and how hostile its
//! kernel is. The kernel decodes the bytes of the entries that the lane pushes and carries them
//! out, but in any order, partly, late or not at all. It duplicates and invents completions, fails
//! registrations, fills the submission queue, and kills the server at any step; then the next
//! incarnation continues. The invariants in [`check`] must hold after every step. In the end, every
//! request must have been answered once, and the data read must be that of an oracle. The seed
//! determines everything random, so a failure can be replayed.
//!
//! The models, with the modelled parts of the kernel:
//!
//! * the driver (`drivers/block/ublk_drv.c`): fetch and commit, automatic and explicit
//!   registration, user copy, and the references that keep a request open while its buffer is in a
//!   slot or in use;
//! * the ring (`io_uring/`): a submission queue of few entries, hard-linked chains, silent
//!   successes, the buffer table (other queues may own its first slots), cancellation;
//! * drives with a volatile cache, so that flushes and FUA can be checked;
//! * how drivers handle a success with too few bytes: one kind requeues the rest, the other treats
//!   it as the whole. The seed chooses the kind. Such an answer fails the run with both;
//! * the bounded number of workers of a thread for operations that may block, and devices on
//!   devices ([`stack`]);
//! * the lanes of one device, whose planner is changed in all of them at once ([`lanes`]);
//! * clients. Their requests never overlap while they are open.

#![forbid(unsafe_code)]

pub mod campaign;
pub mod check;
pub mod command;
pub mod cow;
pub mod draw;
mod ending;
pub mod entry;
pub mod fault;
mod hold;
pub mod kernel;
pub mod lanes;
mod layout;
pub mod mapping;
pub mod mirror;
mod noise;
mod pool;
pub mod setup;
pub mod stack;
mod table_range;
pub mod trace;
mod world;

pub use ending::Outcome;
pub use world::{Options, play, play_setup};

/// The default number of steps of a seed.
pub const DEFAULT_STEPS: u32 = 5000;

/// Bytes of a sector.
const SECTOR: u64 = 512;
/// Bytes of the longest request with data.
const MAX_REQUEST: u32 = 40 * 512;
/// The initial byte of buffers. No client writes it.
const GARBAGE: u8 = 0xee;

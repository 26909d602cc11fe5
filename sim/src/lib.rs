//! A simulator: the real engine, registry and port of a lane on a kernel that is a model.
//!
//! A seed chooses a device (lend mode, buffer table, planner, depth, deadline) and how hostile its
//! kernel is. The kernel decodes the entries that the lane pushes, as bytes, and does what they
//! say: but in any order, short, late, never for long, or not at all. It repeats completions and
//! makes some up, fails registrations, fills the submission queue, and kills the server at any
//! step, after which the next incarnation goes on. After every step the invariants in [`check`]
//! hold; in the end every request has been answered once, and what was read is what an oracle
//! says. All that is random follows from the seed, so a failure can be played again.
//!
//! What is modelled, and after which parts of the kernel:
//!
//! * the driver (`drivers/block/ublk_drv.c`): fetch and commit, automatic and explicit
//!   registration, user copy, and the references that keep a request open as long as its buffer
//!   is in a slot or in use;
//! * the ring (`io_uring/`): a submission queue of few entries, hard-linked chains, silent
//!   successes, the buffer table, of which other queues may have the beginning, cancelling;
//! * drives with a volatile cache, so that flushes and FUA can be checked;
//! * what drivers make of a success of fewer bytes than were asked for: one kind has the block layer
//!   ask again for the rest, the other takes it for the whole. The seed chooses the kind, and
//!   such an answer is a failure with either;
//! * workers of a thread for operations that may block, of which there is a bounded number, and devices on
//!   devices ([`stack`]);
//! * clients, whose requests never overlap while they are open.

#![forbid(unsafe_code)]

pub mod campaign;
pub mod check;
pub mod command;
pub mod cow;
pub mod draw;
mod ending;
pub mod entry;
pub mod fault;
pub mod kernel;
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

/// How many steps a seed has, unless somebody says otherwise.
pub const DEFAULT_STEPS: u32 = 5000;

/// Bytes of a sector.
const SECTOR: u64 = 512;
/// Bytes of the longest request with data.
const MAX_REQUEST: u32 = 40 * 512;
/// What a buffer holds before somebody puts something there; no client writes it.
const GARBAGE: u8 = 0xee;

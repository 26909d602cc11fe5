//! Turns the requests of a ublk device into operations on backings. The crate does no I/O: it opens
//! no file, reads no clock and starts no thread.
//!
//! ```text
//!  request ──> Planner::plan ──> Plan (stages of ops) ──> Engine ──> SQEs ──> ring ──> NVMe
//!     ^            (pure)             (bounded)          (sans-I/O)    ^                  |
//!     └───────────── commit <──── all borrows given back <── CQEs ─────┴──────────────────┘
//!                                        |
//!                                     bufreg (who holds what)
//! ```
//!
//! To write a target, implement [`plan::Planner`]; to write a layer, which may be before any target,
//! implement [`target::Layer`]. The example `read_only_head` implements a target and prints what
//! it plans.

#![forbid(unsafe_code)]

pub mod engine;
pub mod lane;
pub mod lend;
pub mod plan;
mod random;
pub mod request;
pub mod route;
pub mod target;
pub mod units;

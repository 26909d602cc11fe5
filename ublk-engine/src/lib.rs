//! What a ublk target does with a request, without any I/O of its own: it opens no file, reads no clock
//! and starts no thread.
//!
//! ```text
//!  request ──> Planner::plan ──> Plan (stages of ops) ──> Engine ──> SQEs ──> ring ──> NVMe
//!     ^            (pure)             (bounded)          (sans-I/O)    ^                  |
//!     └───────────── commit <──── all borrows given back <── CQEs ─────┴──────────────────┘
//!                                        |
//!                                     bufreg (who holds what)
//! ```
//!
//! A target of your own is a [`plan::Planner`], and what stands before any target is a
//! [`target::Layer`]. The example `read_only_head` has a target, and drives an [`engine::Engine`] with it.

#![forbid(unsafe_code)]

pub mod engine;
pub mod lane;
pub mod lend;
pub mod plan;
pub mod request;
pub mod route;
pub mod target;
pub mod units;

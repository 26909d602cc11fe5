//! The library behind `ublk-target`: block devices served from user space without touching the
//! data.
//!
//! ```text
//!  request ──> Planner::plan ──> Plan (stages of ops) ──> Engine ──> SQEs ──> ring ──> NVMe
//!     ^            (pure)             (bounded)          (sans-I/O)    ^                  |
//!     └───────────── commit <──── all borrows given back <── CQEs ─────┴──────────────────┘
//!                                        |
//!                                     bufreg (who holds what)
//! ```

pub mod backing;
pub mod delete;
pub mod engine;
pub mod inherited;
pub mod kernel;
pub mod lane;
pub mod leftovers;
pub mod lend;
pub mod mark;
pub mod own_files;
pub mod partitions;
pub mod plan;
pub mod processes;
pub mod program;
pub mod request;
pub mod server;
pub mod standing;
pub mod state;
pub mod stats;
pub mod steps;
pub mod supervise;
pub mod target;
pub mod text;
pub mod units;

//! The library behind `ublk-target`: servers of block devices, their lives, and what sees to them. What
//! they do with a request is in `ublk-engine`.

#![forbid(unsafe_code)]

pub mod backing;
pub mod delete;
pub mod inherited;
pub mod kernel;
pub mod leftovers;
pub mod lend;
pub mod mark;
pub mod own_files;
pub mod partitions;
pub mod processes;
pub mod program;
pub mod server;
pub mod standing;
pub mod state;
pub mod stats;
pub mod steps;
pub mod supervise;
pub mod text;
mod trouble;

//! The library behind `ublk-target`: servers of block devices, their lives, and what sees to them. What
//! they do with a request is in `ublk-engine`.

#![forbid(unsafe_code)]

pub mod backing;
pub mod config;
pub mod control;
pub mod device;
pub mod io_thread;
pub mod os;
pub mod socket;

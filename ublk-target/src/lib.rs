//! The library behind `ublk-target`: it adds, serves, recovers, upgrades and deletes block devices.
//! `ublk-engine` decides what happens to a request.

#![forbid(unsafe_code)]

pub mod backing;
pub mod config;
pub mod control;
pub mod device;
pub mod io_thread;
pub mod os;
pub mod socket;

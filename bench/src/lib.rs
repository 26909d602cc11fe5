//! `ublk-bench`: the zero-copy benchmark, and micro-benchmarks of the user-space parts of the data
//! path (`benches/`; `cargo bench -p ublk-bench` runs them on any machine).

#![forbid(unsafe_code)]

pub mod cli;
pub mod compare;
pub mod explain;
pub mod output;
pub mod report;
pub mod results;
mod run;
#[cfg(test)]
mod sample;
pub mod summary;
pub mod table;
#[cfg(test)]
mod untrusted;

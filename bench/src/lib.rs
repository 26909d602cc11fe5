//! Micro-benchmarks of the parts of the data path that run in user space; see `benches/`.
//!
//! `cargo bench -p ublk-bench` runs them on any machine. They say what the registry and the
//! engine cost for each request, and nothing about drives.

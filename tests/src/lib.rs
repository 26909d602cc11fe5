//! VM harness of `ublk-target`: makes a guest image out of distribution
//! packages, boots it in QEMU, and runs programs and tests in it.
//!
//! Two sides share this library. On the host the program `vm` uses [`setup`],
//! [`image`], [`payload`], [`vm`] and [`runner`]; in the guest `vm-agent` uses
//! [`agent`] and `guest-tests` uses [`guest`]. [`proto`] is what they say to
//! each other, and [`config`] and [`guest::TABLES`] are known to both, so that
//! the host lists tests without booting anything. [`witness`] is used wherever
//! the kernel itself is to say what happened.

pub mod agent;
pub mod artifact;
pub mod bench;
pub mod cargo_output;
pub mod cleanup;
pub mod config;
pub mod demo;
pub mod guest;
pub mod hosted;
pub mod image;
pub mod klog;
pub mod known_versions;
pub mod libtest;
pub mod mmdebstrap;
pub mod numbers;
pub mod paths;
pub mod payload;
pub mod proto;
pub mod qemu;
pub mod recipe;
pub mod runner;
pub mod rust_root;
pub mod setup;
pub mod shell;
pub mod ui;
pub mod vm;
pub mod witness;

//! Tests of ublk-target on the kernel's own driver and emulated drives.

mod arguments;
mod backing_errors;
mod commands;
mod data;
mod device;
mod fault_target;
mod filesystem;
mod lend_modes;
mod lifecycle;
mod old_kernel;
mod passthrough;
mod polled;
mod splitting;
mod stats;
pub(crate) mod trace;
mod verify;
mod zero_copy;

use super::TestCase;

/// The tests of all modules here.
pub const TABLES: [&[TestCase]; 14] = [
    arguments::TESTS,
    backing_errors::TESTS,
    commands::TESTS,
    data::TESTS,
    fault_target::TESTS,
    filesystem::TESTS,
    lend_modes::TESTS,
    lifecycle::TESTS,
    old_kernel::TESTS,
    passthrough::TESTS,
    polled::TESTS,
    splitting::TESTS,
    stats::TESTS,
    zero_copy::TESTS,
];

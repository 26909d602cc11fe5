//! Tests of ublk-target on the kernel's own driver and emulated drives.

mod arguments;
mod backing_errors;
mod bench;
mod busy_wait;
mod commands;
mod crossing;
mod data;
mod death;
mod deletion;
pub(crate) mod device;
mod explain;
mod fault_target;
mod filesystem;
pub(crate) mod fleet;
mod interpose;
mod lend_modes;
mod lifecycle;
mod limits;
mod old_kernel;
mod partitions;
mod passthrough;
mod polled;
mod power_cut;
mod reaching;
mod remains;
mod resize;
mod service;
mod short_transfers;
mod splitting;
mod stacks;
mod stats;
mod steps;
mod strangers;
mod throttle;
mod upgrade;
mod verify;
mod zero_copy;
mod zeroing;

use super::TestCase;

/// The tests of all modules here.
pub const TABLES: &[&[TestCase]] = &[
    arguments::TESTS,
    backing_errors::TESTS,
    bench::TESTS,
    commands::TESTS,
    crossing::TESTS,
    data::TESTS,
    death::modes::TESTS,
    death::mounted::TESTS,
    death::refusals::TESTS,
    death::storm::TESTS,
    death::supervision::TESTS,
    deletion::TESTS,
    explain::TESTS,
    fault_target::TESTS,
    filesystem::TESTS,
    fleet::TESTS,
    interpose::TESTS,
    lend_modes::TESTS,
    lifecycle::TESTS,
    limits::TESTS,
    old_kernel::TESTS,
    partitions::TESTS,
    passthrough::TESTS,
    polled::TESTS,
    busy_wait::TESTS,
    power_cut::TESTS,
    reaching::TESTS,
    resize::TESTS,
    service::TESTS,
    short_transfers::TESTS,
    splitting::TESTS,
    stacks::TESTS,
    stats::TESTS,
    strangers::backings::TESTS,
    strangers::callers::TESTS,
    strangers::endings::TESTS,
    strangers::namespaces::TESTS,
    steps::TESTS,
    throttle::TESTS,
    upgrade::TESTS,
    zero_copy::TESTS,
    zeroing::TESTS,
];

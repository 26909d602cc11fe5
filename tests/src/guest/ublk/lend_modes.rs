//! Lend modes: what is written is read back in each, with and without faults, and what went
//! wrong is counted exactly.

use anyhow::{Result, ensure};

use super::device::{Counters, Device, fresh_drive, text};
use super::verify::{BLOCKS, verify, verify_at_length};
use crate::config::DEFAULT;
use crate::guest::{Ctx, Outcome, TestCase, process};

pub const TESTS: &[TestCase] = &[
    verified("verify_nvme_fused", |ctx| sound(ctx, "fused", &["--lend", "fused"])),
    verified("verify_nvme_fused_2_queues", |ctx| sound(ctx, "fused", &["-q", "2"])),
    verified("verify_nvme_slot", |ctx| sound(ctx, "slot", &["--lend", "slot"])),
    verified("verify_nvme_slot_2_queues_chosen_slots", |ctx| {
        sound(ctx, "slot", &["--lend", "slot", "-q", "2", "--first-slot", "77"])
    }),
    verified("verify_nvme_slot_io_lane", |ctx| {
        sound(ctx, "slot", &["--lend", "slot", "-q", "2", "--io-lane"])
    }),
    verified("verify_nvme_user_copy", |ctx| {
        sound(ctx, "user-copy", &["--lend", "user-copy", "-q", "2"])
    }),
    verified("verify_nvme_copy", |ctx| sound(ctx, "copy", &["--lend", "copy", "-q", "2"])),
    verified("verify_nvme_with_deadlines", |ctx| sound(ctx, "fused", &["--io-timeout", "20"])),
    verified("faults_are_survived_and_counted_fused", |ctx| faulty(ctx, &["fused"])),
    verified("faults_are_survived_and_counted_slot", |ctx| faulty(ctx, &["slot"])),
    verified("faults_are_survived_and_counted_io_lane", |ctx| faulty(ctx, &["slot", "--io-lane"])),
    verified("faults_are_survived_and_counted_user_copy", |ctx| faulty(ctx, &["user-copy"])),
    verified("faults_are_survived_and_counted_copy", |ctx| faulty(ctx, &["copy"])),
    TestCase::guest("auto_says_why_it_chose", DEFAULT, reasons),
];

const fn verified(name: &'static str, run: fn(&Ctx) -> Result<Outcome>) -> TestCase {
    TestCase::guest(name, DEFAULT, run).seconds(900)
}

/// What must never be counted while nothing goes wrong.
const TROUBLE: [&str; 12] = [
    "failed",
    "refused unknown",
    "refused malformed",
    "retries",
    "failed registrations",
    "failed unregistrations",
    "copied",
    "timed out",
    "cancelled",
    "lost ops",
    "stale",
    "unexpected",
];

fn sound(ctx: &Ctx, lend: &str, options: &[&str]) -> Result<Outcome> {
    let drive = fresh_drive("drive0")?;
    let device = Device::add_loop(&drive.path(), options)?;
    ensure!(device.described.lend == lend, "{:?}", device.described);
    let requests = verify_at_length(ctx, device.path()?, &BLOCKS)?;
    let counters = device.stop_and_count()?;
    counters.ensure_none(&TROUBLE)?;
    ensure!(counters.get("commits") == counters.get("requests"));
    // The kernel splits some requests, and udev reads.
    ensure!(counters.get("requests") >= requests, "{counters:?}, fio did {requests}");
    let registered = counters.get("registered");
    ensure!(if lend == "slot" { registered >= requests } else { registered == 0 }, "{counters:?}");
    Ok(Outcome::Pass)
}

/// Runs with faults of the backing, with registrations that fail, and with both, and compares what
/// was counted with what was injected.
fn faulty(ctx: &Ctx, lend: &[&str]) -> Result<Outcome> {
    let blocks = [("bs=4k", 4), ("bs=64k", 8), ("bs=1m", 16)];
    let drive = fresh_drive("drive0")?;
    let backing = drive.path();
    let run = |faults: &str| -> Result<(u64, Counters)> {
        let arguments = [&["loop", "-f", text(&backing)?, "--lend"], lend].concat();
        let device = Device::add_with_faults(faults, &arguments)?;
        let requests = verify(ctx, device.path()?, &blocks)?;
        let counters = device.stop_and_count()?;
        println!("{faults}: {counters:?}");
        counters.ensure_none(&["failed", "failed unregistrations", "stale", "unexpected"])?;
        ensure!(counters.get("commits") == counters.get("requests"), "{counters:?}");
        Ok((requests, counters))
    };

    let (_, counters) = run("short=3,again=4")?;
    ensure!(counters.get("short") > 100 && counters.get("again") > 100, "{counters:?}");
    ensure!(counters.get("partial") == counters.get("short"), "{counters:?}");
    ensure!(counters.get("retries") == counters.get("again"), "{counters:?}");
    if lend[0] == "fused" {
        // The server registers what the driver could not.
        let (requests, counters) = run("auto-register")?;
        let delivered = counters.get("need reg buf");
        ensure!(delivered >= requests && counters.get("registered") == delivered, "{counters:?}");
        counters.ensure_none(&["copied"])?;
    }
    if ["fused", "slot"].contains(&lend[0]) {
        // No buffer can be registered at all: everything goes through the spare buffers.
        let (requests, counters) = run("auto-register,register")?;
        ensure!(counters.get("copied") >= requests, "{counters:?}");
        ensure!(counters.get("failed registrations") == counters.get("copied"), "{counters:?}");
        ensure!(counters.get("waited") > 0, "{counters:?}");
        counters.ensure_none(&["registered"])?;

        let (_, counters) = run("auto-register,register,short=3,again=5")?;
        ensure!(counters.get("copied") > 0, "{counters:?}");
        if lend[0] == "fused" {
            // In slot mode operations of chains that could not be registered met some faults.
            ensure!(counters.get("partial") == counters.get("short"), "{counters:?}");
            ensure!(counters.get("retries") == counters.get("again"), "{counters:?}");
        }
    }
    Ok(Outcome::Pass)
}

fn reasons(_ctx: &Ctx) -> Result<Outcome> {
    super::device::load_driver()?;
    let printed = process::run(&["ublk-target", "-v", "add", "null", "--size", "1G", "-n", "4"])?;
    process::run(&["ublk-target", "del", "-n", "4"])?;
    let reason = "lend mode fused: the kernel registers request buffers by itself (AUTO_BUF_REG)";
    ensure!(printed.stderr.contains(reason), "{}", printed.stderr);

    let wrong = [
        (vec!["--lend", "copy", "--first-slot", "3"], "--first-slot needs"),
        (vec!["--lend", "fused", "--io-lane"], "--io-lane needs"),
        (vec!["--lend", "slot", "--first-slot", "16300"], "do not fit a buffer table"),
    ];
    for (options, expected) in wrong {
        let argv = [vec!["ublk-target", "add", "null"], options].concat();
        let said = process::run_for_code(&argv, 1)?.stderr;
        ensure!(said.contains(expected) && said.trim_end().lines().count() == 1, "{said}");
    }
    Ok(Outcome::Pass)
}

//! `ublk-bench explain`: stages that add up, nothing that stays behind, and what it says where it
//! cannot.

use std::fs;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use super::device::{Device, fresh_drive};
use crate::config::DEFAULT;
use crate::guest::{Ctx, Outcome, TestCase, process, wait_for};

pub const TESTS: &[TestCase] = &[
    TestCase::guest("explain_divides_reads_into_stages", DEFAULT, stages),
    TestCase::guest("explain_leaves_no_trace_when_interrupted", DEFAULT, interrupted),
    TestCase::guest("explain_refuses_in_a_line", DEFAULT, refusals),
];

const PROGRAM: &str = "ublk-bench";
const INSTANCES: &str = "/sys/kernel/tracing/instances";

/// The trace instances that there are.
fn instances() -> Result<Vec<String>> {
    let entries = fs::read_dir(INSTANCES)?;
    entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
}

fn explain(device: &Device, more: &[&str]) -> Result<Value> {
    let argv = [&[PROGRAM, "explain", "--device", device.path()?, "--json"], more].concat();
    let printed = process::run(&argv)?;
    ensure!(printed.stderr.is_empty(), "{}", printed.stderr);
    ensure!(instances()?.is_empty(), "{:?} are left", instances()?);
    serde_json::from_str(&printed.stdout).context(printed.stdout)
}

/// The stages of an explanation, after a check that they add up to the whole.
fn checked(explained: &Value) -> Result<Vec<&str>> {
    let stages = explained["stages"].as_array().context("stages")?;
    let number = |value: &Value| value.as_f64().with_context(|| format!("{value}: {explained}"));
    let (mut sum, mut shares) = (0.0, 0.0);
    for stage in stages {
        sum += number(&stage["typical_ns"])?;
        shares += number(&stage["share"])?;
        ensure!(number(&stage["p99_ns"])? >= number(&stage["median_ns"])?, "{stage}");
    }
    let whole = number(&explained["whole"]["typical_ns"])?;
    ensure!(whole > 1000.0 && (sum - whole).abs() < 1.0, "{sum} is not {whole}: {explained}");
    ensure!((shares - 1.0).abs() < 1e-6, "{shares}: {explained}");
    let reads = number(&explained["reads"])?;
    let left_out = number(&explained["left_out"])?;
    ensure!(left_out <= reads / 20.0, "{left_out} left out: {explained}");
    stages.iter().map(|stage| stage["stage"].as_str().context("a name")).collect()
}

fn stages(_ctx: &Ctx) -> Result<Outcome> {
    let drive = fresh_drive("drive0")?;
    let device = Device::add_loop(&drive.path(), &[])?;
    crate::guest::udev::settle()?;
    let explained = explain(&device, &["--reads", "150"])?;
    let names = checked(&explained)?;
    let all = [
        "submit",
        "wake-server",
        "issue",
        "drive",
        "wake-answer",
        "answer",
        "wake-client",
        "return",
    ];
    ensure!(names == all, "{names:?}");
    ensure!(explained["lend"] == device.described.lend.as_str(), "{explained}");
    // On an emulated drive none of these is done within the resolution of the trace.
    for stage in ["issue", "drive", "answer"] {
        let found = explained["stages"].as_array().context("stages")?;
        let found = found.iter().find(|each| each["stage"] == stage).context(stage)?;
        ensure!(found["typical_ns"].as_f64() > Some(1000.0), "{found}");
    }
    // The server sees a part of what the trace shows between waking it and its answer.
    let server = explained["server"].as_array().context("server")?;
    let total = server.iter().find(|each| each["stage"] == "total").context("total")?;
    let (within, whole) = (&total["median_ns"], &explained["whole"]["median_ns"]);
    ensure!(within.as_f64() > Some(0.0) && within.as_f64() < whole.as_f64(), "{explained}");
    device.delete()?;
    without_a_drive()?;
    Ok(Outcome::Pass)
}

/// A device without a backing has no requests to a drive. This one is explained to people.
fn without_a_drive() -> Result<()> {
    let device = Device::add(&["null"])?;
    let argv = [PROGRAM, "explain", "--device", device.path()?, "--reads", "50", "--block", "64K"];
    let text = process::run(&argv)?.stdout;
    println!("{text}");
    for expected in [
        " reads of 64 KiB",
        "Most of the time typically goes to ",
        "server, and everything below it",
        "No requests to drives",
    ] {
        ensure!(text.contains(expected), "no {expected} in {text}");
    }
    ensure!(instances()?.is_empty(), "{:?} are left", instances()?);
    device.delete()
}

fn interrupted(_ctx: &Ctx) -> Result<Outcome> {
    let device = Device::add(&["null"])?;
    let mut child = Command::new(PROGRAM)
        .args(["explain", "--device", device.path()?, "--reads", "20000", "--seconds", "600"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    wait_for(
        "the trace",
        Duration::from_secs(30),
        || Ok((!instances()?.is_empty()).then_some(())),
    )?;
    kill(Pid::from_raw(i32::try_from(child.id())?), Signal::SIGINT)?;
    let status = child.wait()?;
    ensure!(status.code() == Some(130), "{status}");
    ensure!(instances()?.is_empty(), "{:?} are left", instances()?);
    // Nobody could remove it: the next one does.
    let mut child = Command::new(PROGRAM)
        .args(["explain", "--device", device.path()?, "--reads", "20000", "--seconds", "600"])
        .stdout(Stdio::piped())
        .spawn()?;
    wait_for(
        "the trace",
        Duration::from_secs(30),
        || Ok((!instances()?.is_empty()).then_some(())),
    )?;
    child.kill()?;
    child.wait()?;
    ensure!(instances()?.len() == 1, "{:?}", instances()?);
    let said = process::run(&[PROGRAM, "explain", "--device", device.path()?, "--reads", "10"])?;
    ensure!(said.stderr.contains("of a dead process") && instances()?.is_empty(), "{said:?}");
    device.delete()?;
    Ok(Outcome::Pass)
}

fn refusals(_ctx: &Ctx) -> Result<Outcome> {
    let drive = fresh_drive("drive0")?.path();
    let drive = super::device::text(&drive)?;
    for (device, expected) in [
        (drive, "is not a ublk device"),
        ("/dev/null", "is not a block device"),
        ("/dev/ublkb77", "cannot look at /dev/ublkb77"),
    ] {
        let argv = [PROGRAM, "explain", "--device", device];
        let said = process::run_for_code(&argv, 1)?.stderr;
        ensure!(said.contains(expected) && said.trim_end().lines().count() == 1, "{said}");
    }
    let device = Device::add(&["null"])?;
    let argv = [PROGRAM, "explain", "--device", device.path()?, "--block", "700"];
    let said = process::run_for_code(&argv, 1)?.stderr;
    ensure!(said.contains("has blocks of 512 bytes"), "{said}");
    ensure!(instances()?.is_empty(), "{:?} are left", instances()?);
    device.delete()?;
    Ok(Outcome::Pass)
}

//! `stats`: exact counters, latencies while somebody looks, its socket, and what it says when there
//! is nothing to be had.

pub mod reports;

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;

use super::device::{Device, PROGRAM, fresh_drive, start_load, text, wait_for_requests};
use crate::config::DEFAULT;
use crate::guest::{Ctx, Outcome, TestCase, fio, process, wait_for};
use reports::{Watch, number, report};

pub const TESTS: &[TestCase] = &[
    TestCase::guest("stats_count_every_request", DEFAULT, exact),
    TestCase::guest("stats_count_every_registration", DEFAULT, registrations),
    TestCase::guest("stats_show_latencies_while_somebody_looks", DEFAULT, latencies).seconds(180),
    TestCase::guest("stats_are_a_table_for_people", DEFAULT, table),
    TestCase::guest("stats_are_for_root_only", DEFAULT, root_only),
    TestCase::guest("stats_say_why_there_are_none", DEFAULT, refusals),
    TestCase::guest("stats_end_with_their_device", DEFAULT, watched_to_the_end).seconds(180),
    TestCase::guest("stats_leave_no_socket", DEFAULT, sockets),
];

fn socket(device: &Device) -> PathBuf {
    PathBuf::from(format!("/run/ublk-target/{}.sock", device.described.id))
}

/// Requests and bytes of a kind, all lanes together.
fn done(report: &Value, kind: &str) -> Result<(u64, u64)> {
    let at = |what: &str| number(report, &format!("/total/requests/{kind}/{what}"));
    Ok((at("requests")?, at("bytes")?))
}

/// 1,000 requests of 4 KiB, no two of them merged.
fn thousand(ctx: &Ctx, device: &Device, rw: &str) -> Result<fio::Report> {
    let nomerges = format!("/sys/block/ublkb{}/queue/nomerges", device.described.id);
    std::fs::write(nomerges, "2")?;
    let options = [
        &format!("filename={}", device.path()?),
        &format!("rw={rw}"),
        "bs=4k",
        "size=4000k",
        "iodepth=8",
        "ioengine=io_uring",
        "direct=1",
    ];
    let report = fio::run(ctx, &options)?;
    // Whoever looks at a device that was just written to has finished.
    crate::guest::udev::settle()?;
    Ok(report)
}

fn ensure_idle(report: &Value) -> Result<()> {
    for what in ["in_flight", "slots/lent", "slots/borrowed", "slots/quarantined", "slots/leaked"] {
        ensure!(number(report, &format!("/total/{what}"))? == 0, "{what}: {}", report["total"]);
    }
    let lanes = report["lanes"].as_array().context("lanes")?;
    for lane in lanes {
        ensure!(lane["lent"] == Value::Array(Vec::new()), "{lane}");
    }
    Ok(())
}

fn exact(ctx: &Ctx) -> Result<Outcome> {
    let drive = fresh_drive("drive0")?;
    let device = Device::add_loop(&drive.path(), &["-q", "2"])?;
    crate::guest::udev::settle()?;
    let start = report(&device)?;
    ensure!(start["version"] == 1 && start["device"] == device.described.id, "{start}");
    ensure!(start["lanes"].as_array().is_some_and(|lanes| lanes.len() == 2), "{start}");
    ensure_idle(&start)?;

    let wrote = thousand(ctx, &device, "randwrite")?;
    let written = report(&device)?;
    let difference =
        |after: (u64, u64), before: (u64, u64)| (after.0 - before.0, after.1 - before.1);
    let writes = difference(done(&written, "write")?, done(&start, "write")?);
    ensure!(writes == (wrote.write.requests, wrote.write.bytes), "{writes:?}, fio: {wrote:?}");
    ensure!(writes == (1000, 4_096_000), "{writes:?}");

    let did_read = thousand(ctx, &device, "randread")?;
    let read = report(&device)?;
    let reads = difference(done(&read, "read")?, done(&written, "read")?);
    ensure!(reads == (did_read.read.requests, did_read.read.bytes), "{reads:?}, {did_read:?}");
    ensure!(reads == (1000, 4_096_000), "{reads:?}");
    ensure!(done(&read, "write")? == done(&written, "write")?, "{}", read["total"]);
    ensure_idle(&read)?;

    let kinds = ["read", "write", "flush", "discard", "write-zeroes"];
    let all = kinds.iter().map(|kind| Ok(done(&read, kind)?.0)).sum::<Result<u64>>()?;
    ensure!(number(&read, "/total/counters/commits")? == all, "{}", read["total"]);
    for trouble in ["failed", "retries", "partial", "copied", "need_reg_buf", "stale", "unexpected"]
    {
        ensure!(
            number(&read, &format!("/total/counters/{trouble}"))? == 0,
            "{trouble}: {}",
            read["total"]
        );
    }
    device.delete()?;
    Ok(Outcome::Pass)
}

/// The driver registers no buffer, so the server registers each.
fn registrations(ctx: &Ctx) -> Result<Outcome> {
    let drive = fresh_drive("drive0")?.path();
    let arguments = ["loop", "-f", text(&drive)?, "--lend", "fused"];
    let device = Device::add_with_faults("auto-register", &arguments)?;
    thousand(ctx, &device, "randwrite")?;
    thousand(ctx, &device, "randread")?;
    let report = report(&device)?;
    let with_data = done(&report, "read")?.0 + done(&report, "write")?.0;
    ensure!(with_data >= 2000, "{}", report["total"]);
    for counter in ["need_reg_buf", "registered"] {
        let counted = number(&report, &format!("/total/counters/{counter}"))?;
        ensure!(counted == with_data, "{counter}: {}", report["total"]);
    }
    ensure_idle(&report)?;
    device.delete()?;
    Ok(Outcome::Pass)
}

/// The latencies of a kind, by stage, as a pair of count and mean.
fn stage(report: &Value, kind: &str, stage: &str) -> Result<(u64, u64)> {
    let latencies = report["latencies"].as_array().context("latencies")?;
    let found = latencies.iter().find(|each| each["kind"] == kind && each["stage"] == stage);
    let found = found.with_context(|| format!("no {stage} of {kind} in {latencies:?}"))?;
    let order = ["min_ns", "p50_ns", "p90_ns", "p99_ns", "p99_9_ns", "max_ns"];
    let values = order.iter().map(|name| number(found, &format!("/{name}")));
    let values = values.collect::<Result<Vec<_>>>()?;
    ensure!(values.is_sorted(), "{found}");
    Ok((number(found, "/count")?, number(found, "/mean_ns")?))
}

fn latencies(_ctx: &Ctx) -> Result<Outcome> {
    let drive = fresh_drive("drive0")?;
    let device = Device::add_loop(&drive.path(), &["-q", "2"])?;
    let mut load = start_load(device.path()?)?;
    wait_for_requests(&device, 500)?;

    let mut watch = Watch::start(&device)?;
    let mut last = Value::Null;
    for _ in 0..3 {
        last = watch.next()?;
        for kind in ["read", "write"] {
            let (count, total) = stage(&last, kind, "total")?;
            let mut sum = 0;
            for part in ["queue", "plan", "backing", "commit"] {
                let (of_stage, mean) = stage(&last, kind, part)?;
                ensure!(of_stage == count, "{part} of {kind}: {}", last["latencies"]);
                sum += mean;
            }
            // Two digits of each are kept.
            ensure!(
                sum.abs_diff(total) < total / 20 + 1000,
                "{sum} is not {total}: {}",
                last["latencies"]
            );
        }
    }
    let rate = last["total"]["rates"]["reads_per_s"].as_f64().context("a rate")?;
    ensure!(rate > 1.0 && number(&last, "/total/slots/capacity")? > 0, "{}", last["total"]);
    watch.interrupt()?;
    let said = watch.end()?;
    ensure!(said.is_empty(), "{said}");

    not_measured_before(&device)?;
    wait_for("lent slots", Duration::from_secs(30), || {
        let lent = lent_slots(&report(&device)?)?;
        Ok((lent > 0).then_some(()))
    })?;
    // Not killed, for it would leave its job behind.
    process::signal(load.id(), Signal::SIGINT)?;
    load.wait()?;
    crate::guest::udev::settle()?;
    ensure_idle(&report(&device)?)?;
    device.delete()?;
    Ok(Outcome::Pass)
}

/// Checks the lent slots of a report, and returns how many operations borrow them.
fn lent_slots(report: &Value) -> Result<usize> {
    let mut borrows = 0;
    for lane in report["lanes"].as_array().context("lanes")? {
        let lent = lane["lent"].as_array().context("lent slots")?;
        ensure!(number(lane, "/slots/lent")? == u64::try_from(lent.len())?, "{lane}");
        for slot in lent {
            ensure!(slot["qid"] == lane["qid"] && slot["age_ns"].is_u64(), "{slot}");
            let borrowers = slot["borrowers"].as_array().context("borrowers")?;
            borrows += borrowers.len();
            for borrower in borrowers {
                let op = &borrower["op"];
                ensure!(op["kind"] == "read" || op["kind"] == "write", "{slot}");
                ensure!(op["len"] == 4096 && op["backing"] == 0, "{slot}");
            }
        }
    }
    Ok(borrows)
}

/// A new connection is told of nothing that was before it.
fn not_measured_before(device: &Device) -> Result<()> {
    wait_for_requests(device, 500)?;
    let mut stream = UnixStream::connect(socket(device))?;
    let mut answers = BufReader::new(stream.try_clone()?);
    let mut ask = || -> Result<Value> {
        stream.write_all(b"{\"version\":1,\"command\":\"snapshot\",\"latencies\":true}\n")?;
        let mut line = String::new();
        answers.read_line(&mut line)?;
        Ok(serde_json::from_str::<Value>(&line)?["snapshot"].take())
    };
    let delivered = |snapshot: &Value, kind: &str| -> Result<u64> {
        let lanes = 0..snapshot["lanes"].as_array().map_or(0, Vec::len);
        let pointer = |lane: usize| format!("/lanes/{lane}/requests/{kind}/requests");
        lanes.map(|lane| number(snapshot, &pointer(lane))).sum()
    };
    let first = ask()?;
    ensure!(first["latencies"] == Value::Array(Vec::new()), "{}", first["latencies"]);
    wait_for_requests(device, 500)?;
    let second = ask()?;
    for kind in ["read", "write"] {
        let (count, _) = stage(&second, kind, "total")?;
        let most = delivered(&second, kind)? - delivered(&first, kind)?;
        ensure!(count > 0 && count <= most, "{count} of {most} {kind}");
    }
    Ok(())
}

fn table(ctx: &Ctx) -> Result<Outcome> {
    let device = Device::add(&["null", "-q", "2", "-n", "6"])?;
    thousand(ctx, &device, "randread")?;
    let argv = [PROGRAM, "stats", "-n", "6", "--interval", "0.2", "--slots"];
    let text = process::run(&argv)?.stdout;
    println!("{text}");
    ensure!(text.starts_with("/dev/ublkb6, "), "{text}");
    for expected in ["QUEUE", "IN-FLIGHT", "total", "since the start: ", "counters: commits "] {
        ensure!(text.contains(expected), "no {expected} in {text}");
    }
    let help = process::run(&[PROGRAM, "stats", "--help"])?.stdout;
    for option in ["--id", "--json", "--watch", "--interval", "--slots"] {
        ensure!(help.contains(option), "no {option} in {help}");
    }
    device.delete()?;
    Ok(Outcome::Pass)
}

/// Fails with one line that has all of `expected`.
fn refused(argv: &[&str], expected: &[&str]) -> Result<()> {
    let printed = process::run_for_code(argv, 1)?;
    let said = printed.stderr.trim_end();
    ensure!(said.lines().count() == 1 && printed.stdout.is_empty(), "{argv:?}: {printed:?}");
    for text in expected {
        ensure!(said.contains(text), "`{text}` is not in: {said}");
    }
    println!("{said}");
    Ok(())
}

fn root_only(_ctx: &Ctx) -> Result<Outcome> {
    let device = Device::add(&["null"])?;
    let metadata = std::fs::metadata(socket(&device))?;
    ensure!(metadata.file_type().is_socket() && metadata.uid() == 0, "{metadata:?}");
    ensure!(metadata.permissions().mode() & 0o777 == 0o600, "{metadata:?}");
    let id = device.id();
    let as_nobody = ["setpriv", "--reuid", "65534", "--clear-groups", PROGRAM, "stats", "-n", &id];
    refused(&as_nobody, &["for root only", "run as root"])?;
    // The server does not go by the modes alone.
    std::fs::set_permissions(socket(&device), std::fs::Permissions::from_mode(0o666))?;
    refused(&as_nobody, &["for root only"])?;
    report(&device)?;
    device.delete()?;
    Ok(Outcome::Pass)
}

fn refusals(_ctx: &Ctx) -> Result<Outcome> {
    super::device::load_driver()?;
    let stats = |id: &str, expected: &[&str]| refused(&[PROGRAM, "stats", "-n", id], expected);
    stats("77", &["there is no ublk device 77"])?;

    let device = Device::add(&["null"])?;
    let id = device.id();
    crate::guest::udev::settle()?;
    let idle: Vec<_> = (0..8).map(|_| UnixStream::connect(socket(&device))).collect();
    wait_for("an idle one to make room", Duration::from_secs(20), || Ok(report(&device).ok()))?;
    drop(idle);
    let mut taken = Vec::new();
    for _ in 0..8 {
        let mut stream = UnixStream::connect(socket(&device))?;
        // The answer is an error, and the connection stays.
        stream.write_all(b"?\n")?;
        stream.read_exact(&mut [0])?;
        taken.push(stream);
    }
    stats(&id, &["8 connections already"])?;
    drop(taken);
    wait_for("room for a connection", Duration::from_secs(30), || Ok(report(&device).ok()))?;

    process::signal(device.pid()?, Signal::SIGSTOP)?;
    let silent = stats(&id, &["does not answer", "5 s"]);
    process::signal(device.pid()?, Signal::SIGCONT)?;
    silent?;

    std::fs::rename(socket(&device), "/run/ublk-target/aside")?;
    stats(&id, &["has no socket in /run/ublk-target", "try again"])?;
    std::fs::rename("/run/ublk-target/aside", socket(&device))?;

    process::signal(device.pid()?, Signal::SIGKILL)?;
    wait_for("the server to end", Duration::from_secs(30), || {
        Ok((!Path::new(&format!("/proc/{}", device.pid()?)).exists()).then_some(()))
    })?;
    stats(&id, &["is dead", &format!("`ublk-target del -n {id}`")])?;
    device.delete()?;
    stats(&id, &["there is no ublk device"])?;

    // What waits for a server must not be thrown away.
    for (on_death, state) in [("wait", "QUIESCED"), ("error", "FAIL_IO")] {
        let device = Device::add(&["null", "--on-death", on_death])?;
        let id = device.id();
        process::signal(device.pid()?, Signal::SIGKILL)?;
        wait_for("the driver to notice", Duration::from_secs(30), || {
            let listed = process::run(&[PROGRAM, "list", "-n", &id])?.stdout;
            Ok(listed.contains(state).then_some(()))
        })?;
        stats(&id, &["waits for the next one", &format!("`ublk-target recover -n {id}`")])?;
        device.delete()?;
    }
    Ok(Outcome::Pass)
}

/// The device goes away while it is watched, and with a client that says nothing: both ends are
/// orderly.
fn watched_to_the_end(_ctx: &Ctx) -> Result<Outcome> {
    for (under_load, deleted) in [(false, true), (true, false)] {
        let device = Device::add(&["null", "-q", "2"])?;
        let load = under_load.then(|| start_load(device.path()?)).transpose()?;
        let mut watch = Watch::start(&device)?;
        let silent = UnixStream::connect(socket(&device))?;
        watch.next()?;
        let gone = format!("device {} is gone", device.id());
        if deleted {
            device.delete()?;
        } else {
            process::signal(device.pid()?, Signal::SIGTERM)?;
            device.wait_until_gone()?;
        }
        let said = watch.end()?;
        ensure!(said.contains(&gone) && said.trim_end().lines().count() == 1, "{said}");
        drop(silent);
        if let Some(mut load) = load {
            load.wait()?;
        }
    }
    Ok(Outcome::Pass)
}

fn sockets(_ctx: &Ctx) -> Result<Outcome> {
    for sent in [None, Some(Signal::SIGTERM), Some(Signal::SIGKILL)] {
        let device = Device::add(&["null", "-n", "12"])?;
        let socket = socket(&device);
        report(&device)?;
        match sent {
            None => device.delete()?,
            Some(Signal::SIGKILL) => {
                process::signal(device.pid()?, Signal::SIGKILL)?;
                device.delete()?;
            }
            Some(sent) => {
                process::signal(device.pid()?, sent)?;
                device.wait_until_gone()?;
            }
        }
        ensure!(!socket.exists(), "the socket is left after {sent:?}");
        // A listener that is closed leaves its name, like a server that is killed.
        drop(UnixListener::bind(&socket)?);
    }
    // `del` of a device that does not exist cleans up as well.
    let socket = Path::new("/run/ublk-target/12.sock");
    ensure!(socket.exists());
    process::run_for_code(&[PROGRAM, "del", "-n", "12"], 1)?;
    ensure!(!socket.exists(), "the stale socket is left");
    Ok(Outcome::Pass)
}

//! Supervisors: of servers that die in each way, of those that never come up again, and their own
//! death.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;

use super::{
    RUN_DIR, await_device, await_new_server, await_nothing, end, exclusively, kill_server, look,
    processes, recover, refused,
};
use crate::config::DEFAULT;
use crate::guest::ublk::device::{
    Description, Device, PROGRAM, file_on_drive, fresh_drive, start_load, text, wait_for_requests,
};
use crate::guest::{Ctx, FIGURE, Outcome, TestCase, fio, process, wait_for};

pub const TESTS: &[TestCase] = &[
    TestCase::guest("death_supervisor_gives_up_on_a_crash_loop", DEFAULT, crash_loop).seconds(240),
    TestCase::guest("death_supervisor_passes_signals_on", DEFAULT, terminated).seconds(180),
    TestCase::guest("death_supervisor_is_told_while_its_server_waits", DEFAULT, told_amid_recovery),
    TestCase::guest("death_stopped_server_goes_on", DEFAULT, stopped).seconds(240),
    TestCase::guest("death_supervisor_recovers_from_an_oom_kill", DEFAULT, out_of_memory)
        .allow_in_log(&["Out of memory: Killed process", "oom_reaper"]),
    TestCase::guest("death_killed_supervisor_is_replaced", DEFAULT, supervisor_killed),
    TestCase::guest("death_device_whose_processes_are_all_dead_is_recovered", DEFAULT, all_killed),
];

/// Servers of the device that can be tried within this time all fail.
const CRASH_LOOP: Duration = Duration::from_secs(90);

fn supervised(arguments: &[&str]) -> Result<Device> {
    let device = Device::add(&[arguments, &["--supervise"]].concat())?;
    let described = &device.described;
    ensure!(described.supervisor.is_some() && described.on_death == "reissue", "{device:?}");
    Ok(device)
}

fn supervisor(device: &Device) -> Result<u32> {
    device.described.supervisor.context("a supervised device has a supervisor")
}

/// Reads a block past the page cache.
fn read_a_block(device: &Device) -> Result<()> {
    let input = format!("if={}", device.path()?);
    let argv = ["dd", &input, "of=/dev/null", "bs=4k", "count=1", "iflag=direct", "status=none"];
    process::run(&argv).map(drop)
}

/// Two devices: one's backing is taken away, the other one's state file is destroyed.
fn crash_loop(ctx: &Ctx) -> Result<Outcome> {
    let (mount, file) = file_on_drive(ctx, "drive1", 64)?;
    let drive = fresh_drive("drive0")?;
    let drive = drive.path();
    let mut one = supervised(&["loop", "-f", text(&file)?])?;
    let other = supervised(&["loop", "-f", text(&drive)?])?;
    let away = file.with_extension("away");
    fs::rename(&file, &away)?;
    let record = format!("{RUN_DIR}/{}.json", other.id());
    fs::write(&record, "{\"version\": ")?;
    let began = Instant::now();
    for device in [&one, &other] {
        process::signal(device.pid()?, Signal::SIGKILL)?;
    }
    for device in [&one, &other] {
        let pid = supervisor(device)?;
        wait_for("the supervisor to give up", CRASH_LOOP, || {
            Ok((!processes()?.iter().any(|(found, _)| *found == pid)).then_some(()))
        })?;
        println!("{FIGURE}given up after {:.1} s", began.elapsed().as_secs_f64());
    }

    let seen = look(&one)?;
    println!("{:?}", seen.given_up);
    ensure!(
        seen.state == "QUIESCED" && seen.pid.is_none() && seen.supervisor.is_none(),
        "{seen:?}"
    );
    let why = seen.given_up.context("it does not say that the supervisor has given up")?;
    ensure!(why.contains("does not exist"), "{why}");
    let log = fs::read_to_string(format!("/var/log/ublk-target/{}.log", one.id()))?;
    let attempts = log.matches("recovering device").count();
    // A server that has lived for a second is not counted among those that failed. This one has on a
    // busy machine.
    ensure!(matches!(attempts, 9 | 10) && log.contains("given up"), "{attempts} attempts: {log}");
    let said = refused(&one)?;
    ensure!(said.contains("does not exist"), "{said}");
    ensure!(look(&one)?.given_up.is_some(), "a refusal has forgotten it");
    fs::rename(&away, &file)?;
    recover(&mut one, &["--supervise"])?;
    let now = look(&one)?;
    ensure!(now.given_up.is_none() && now.supervisor.is_some(), "{now:?}");
    read_a_block(&one)?;
    let old = one.pid()?;
    process::signal(old, Signal::SIGKILL)?;
    await_new_server(&mut one, old)?;
    read_a_block(&one)?;

    // Nobody can write down there that the other one is given up.
    let seen = look(&other)?;
    ensure!(
        seen.state == "QUIESCED" && seen.pid.is_none() && seen.supervisor.is_none(),
        "{seen:?}"
    );
    ensure!(fs::read_to_string(&record)? == "{\"version\": ", "the file was touched");
    let said = refused(&other)?;
    let expected = ["is corrupt", &format!("del -n {}", other.id())];
    ensure!(expected.iter().all(|part| said.contains(part)), "{said}");
    other.delete()?;
    end(one)?;
    mount.unmount()?;
    Ok(Outcome::Pass)
}

/// SIGTERM to either of them ends both in order, under load and without.
fn terminated(_ctx: &Ctx) -> Result<Outcome> {
    let drive = fresh_drive("drive0")?;
    let path = drive.path();
    for (to_supervisor, loaded) in [(false, false), (true, false), (false, true), (true, true)] {
        let device = supervised(&["loop", "-f", text(&path)?])?;
        let load = if loaded { Some(start_load(device.path()?)?) } else { None };
        if loaded {
            wait_for_requests(&device, 500)?;
        }
        let told = if to_supervisor { supervisor(&device)? } else { device.pid()? };
        process::signal(told, Signal::SIGTERM)?;
        let log = format!("/var/log/ublk-target/{}.log", device.id());
        device.wait_until_gone()?;
        await_nothing()?;
        if let Some(mut load) = load {
            ensure!(!load.wait()?.success(), "fio must see its device go");
        }
        let said = fs::read_to_string(&log)?;
        ensure!(!said.contains("ERROR") && !said.contains("recovering"), "{said}");
        fs::remove_file(log)?;
    }
    Ok(Outcome::Pass)
}

/// A supervisor whose new server waits for a backing ends at once when it is told to, and so does
/// that server; the device is left to be recovered.
fn told_amid_recovery(_ctx: &Ctx) -> Result<Outcome> {
    let drive = fresh_drive("drive0")?;
    let path = drive.path();
    let device = supervised(&["loop", "-f", text(&path)?])?;
    let supervisor = supervisor(&device)?;
    let server = device.pid()?;
    process::signal(supervisor, Signal::SIGSTOP)?;
    process::signal(server, Signal::SIGKILL)?;
    let held = wait_for("the backing", Duration::from_secs(10), || Ok(exclusively(&path).ok()))?;
    process::signal(supervisor, Signal::SIGCONT)?;
    wait_for("a new server", Duration::from_secs(20), || {
        Ok(processes()?.iter().any(|(pid, _)| ![supervisor, server].contains(pid)).then_some(()))
    })?;
    process::signal(supervisor, Signal::SIGTERM)?;
    let began = Instant::now();
    wait_for("their end", Duration::from_secs(10), || Ok(processes()?.is_empty().then_some(())))
        .with_context(|| format!("{:?}", processes()))?;
    println!("ended after {:?}", began.elapsed());
    let state = look(&device)?.state;
    ensure!(state == "QUIESCED", "{state}");
    drop(held);
    process::run(&[PROGRAM, "recover", "-n", &device.id()])?;
    read_a_block(&device)?;
    device.delete()?;
    Ok(Outcome::Pass)
}

/// I/O waits for a server that does not run, and goes on with it.
fn stopped(ctx: &Ctx) -> Result<Outcome> {
    let drive = fresh_drive("drive0")?;
    let path = drive.path();
    let device = supervised(&["loop", "-f", text(&path)?])?;
    let filename = format!("filename={}", device.path()?);
    let options = [
        &filename,
        "rw=randwrite",
        "bs=4k",
        "size=64m",
        "iodepth=64",
        "ioengine=io_uring",
        "direct=1",
        "verify=crc32c",
        "verify_fatal=1",
    ];
    let load = fio::start(ctx, "load", &options)?;
    wait_for_requests(&device, 500)?;
    let pid = device.pid()?;
    process::signal(pid, Signal::SIGSTOP)?;
    let pause = Duration::from_secs(if ctx.long { 30 } else { 3 });
    thread::sleep(pause);
    let now = look(&device)?;
    ensure!(now == device.described, "{now:?}, and was {:?}", device.described);
    process::signal(pid, Signal::SIGCONT)?;
    let report = load.finish()?;
    println!(
        "{FIGURE}stopped for {} s, the longest request took {} ms",
        pause.as_secs(),
        report.longest_request.as_millis()
    );
    ensure!(report.longest_request + Duration::from_millis(500) >= pause, "{report:?}");
    ensure!(look(&device)?.pid == Some(pid), "the server is another one");
    end(device)?;
    Ok(Outcome::Pass)
}

fn oom_score(pid: u32) -> Result<String> {
    Ok(fs::read_to_string(format!("/proc/{pid}/oom_score_adj"))?.trim().to_owned())
}

fn out_of_memory(_ctx: &Ctx) -> Result<Outcome> {
    let drive = fresh_drive("drive0")?;
    let path = drive.path();
    let mut device = supervised(&["loop", "-f", text(&path)?])?;
    let pid = device.pid()?;
    ensure!(oom_score(pid)? == "-1000", "{}", oom_score(pid)?);
    fs::write(format!("/proc/{pid}/oom_score_adj"), "1000")?;
    // As if memory had run out: the kernel chooses.
    fs::write("/proc/sysrq-trigger", "f")?;
    await_new_server(&mut device, pid)?;
    read_a_block(&device)?;
    let log = process::run(&["dmesg"])?.stdout;
    ensure!(log.contains(&format!("Killed process {pid} (ublk-target)")), "{log}");
    let new = device.pid()?;
    ensure!(oom_score(new)? == "-1000", "{}", oom_score(new)?);
    end(device)?;
    Ok(Outcome::Pass)
}

fn supervisor_killed(_ctx: &Ctx) -> Result<Outcome> {
    let drive = fresh_drive("drive0")?;
    let path = drive.path();
    let mut device = supervised(&["loop", "-f", text(&path)?])?;
    for _ in 0..3 {
        let (server, old) = (device.pid()?, supervisor(&device)?);
        process::signal(old, Signal::SIGKILL)?;
        let is_new = |now: &Description| now.supervisor.is_some_and(|pid| pid != old);
        device.described = await_device(&device, "a new supervisor", is_new)?;
        ensure!(device.pid()? == server, "the server is another one: {device:?}");
        // It is one that works.
        process::signal(server, Signal::SIGKILL)?;
        await_new_server(&mut device, server)?;
        read_a_block(&device)?;
        ensure!(supervisor(&device)? != old, "{device:?}");
    }
    ensure!(processes()?.len() == 2, "{:?}", processes()?);
    end(device)?;
    Ok(Outcome::Pass)
}

fn all_killed(_ctx: &Ctx) -> Result<Outcome> {
    let (one, other) = (fresh_drive("drive0")?.path(), fresh_drive("drive1")?.path());
    let mut one = supervised(&["loop", "-f", text(&one)?])?;
    let mut other = supervised(&["loop", "-f", text(&other)?])?;
    let alive = Device::add(&["null", "--on-death", "wait"])?;
    let dead = |device: &Device| -> Result<()> {
        // The supervisor first, or it would be the faster one.
        process::signal(supervisor(device)?, Signal::SIGKILL)?;
        kill_server(device)?;
        let seen = look(device)?;
        ensure!(seen.pid.is_none() && seen.supervisor.is_none(), "{seen:?}");
        Ok(())
    };
    dead(&one)?;
    recover(&mut one, &[])?;
    read_a_block(&one)?;
    ensure!(look(&one)?.supervisor.is_none(), "nobody has asked for a supervisor");
    kill_server(&one)?;
    dead(&other)?;

    let printed = process::run(&[PROGRAM, "recover", "--all", "--supervise"])?;
    ensure!(printed.stdout.lines().count() == 2, "{printed:?}");
    for device in [&mut one, &mut other] {
        device.described = look(device)?;
        ensure!(device.described.state == "LIVE", "{device:?}");
        read_a_block(device)?;
        let old = device.pid()?;
        process::signal(old, Signal::SIGKILL)?;
        await_new_server(device, old)?;
        read_a_block(device)?;
    }
    ensure!(look(&alive)? == alive.described, "{:?}", look(&alive)?);
    // There is nothing to be recovered.
    let printed = process::run(&[PROGRAM, "recover", "--all"])?;
    ensure!(printed.stdout.is_empty() && printed.stderr.is_empty(), "{printed:?}");
    for device in [alive, one, other] {
        device.delete()?;
    }
    await_nothing()?;
    Ok(Outcome::Pass)
}

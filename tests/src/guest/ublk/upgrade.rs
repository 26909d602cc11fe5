//! Another program takes a device over while it is used.

use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rustix::process::{PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

use super::device::{Device, PROGRAM, fresh_drive, fresh_drives, text};
use super::limits::Group;
use super::remains;
use crate::config::DEFAULT;
use crate::guest::drives::Drive;
use crate::guest::fio::{self, Running};
use crate::guest::prober::{Prober, distribution, longest};
use crate::guest::{Ctx, FIGURE, Outcome, TestCase, process, wait_for};

pub const TESTS: &[TestCase] = &[
    TestCase::guest("upgrades_under_load_lose_nothing", DEFAULT, under_load).seconds(900),
    TestCase::guest("upgrades_of_every_kind_of_device", DEFAULT, kinds).seconds(300),
    TestCase::guest("an_upgrade_that_fails_leaves_a_server", DEFAULT, failing).seconds(300),
    TestCase::guest("an_upgrade_that_is_killed_leaves_a_server", DEFAULT, killed).seconds(900),
    TestCase::guest("a_device_that_was_made_to_wait_is_served_again", DEFAULT, made_to_wait)
        .seconds(180),
    TestCase::guest("upgrades_that_cannot_be_are_refused", DEFAULT, refused),
    TestCase::guest("whoever_asks_for_an_upgrade_is_told_what_came_of_it", DEFAULT, told)
        .seconds(180),
];

/// Copies of the program, where servers of each other see them.
pub fn programs(ctx: &Ctx) -> Result<[PathBuf; 2]> {
    let own = process::run(&["sh", "-c", &format!("readlink -f $(command -v {PROGRAM})")])?.stdout;
    let copy = |name: &str| -> Result<PathBuf> {
        let path = ctx.directory().join(name).join(PROGRAM);
        std::fs::create_dir_all(path.parent().context("a parent")?)?;
        std::fs::copy(own.trim(), &path)?;
        Ok(path)
    };
    Ok([copy("one")?, copy("two")?])
}

/// Writes for so many seconds at the least, then verifies what was written by crc32c.
fn load(ctx: &Ctx, device: &Device, seconds: u32) -> Result<Running> {
    let (file, size) = (format!("filename={}", device.path()?), format!("size={}m", 8 * seconds));
    let options = [
        &file,
        &size,
        "offset=1m",
        "rw=randwrite",
        "bs=4k",
        "rate_iops=2000",
        "iodepth=64",
        "ioengine=io_uring",
        "direct=1",
        "verify=crc32c",
        "verify_fatal=1",
    ];
    fio::start(ctx, "load", &options)
}

fn upgrade(device: &Device, program: &Path) -> Result<String> {
    let argv = [PROGRAM, "upgrade", "-n", &device.id(), "--program", text(program)?];
    Ok(process::run(&argv)?.stdout)
}

fn served_by(device: &Device) -> Result<(u32, PathBuf)> {
    let listed = process::run(&[PROGRAM, "list", "-n", &device.id(), "--json"])?.stdout;
    let listed: serde_json::Value = serde_json::from_str(&listed)?;
    ensure!(listed["state"] == "LIVE", "{listed}");
    let pid = u32::try_from(listed["pid"].as_u64().context("a server")?)?;
    Ok((pid, std::fs::read_link(format!("/proc/{pid}/exe"))?))
}

fn await_server(device: &Device) -> Result<(u32, PathBuf)> {
    wait_for("a server", Duration::from_secs(30), || Ok(served_by(device).ok()))
}

fn under_load(ctx: &Ctx) -> Result<Outcome> {
    let drive = fresh_drive("drive0")?;
    let programs = programs(ctx)?;
    let upgrades = if ctx.long { 50 } else { 6 };
    let options = ["--on-death", "wait", "-q", "2"];
    let device = Device::add_loop(&drive.path(), &options)?;
    let (pid, _) = served_by(&device)?;
    let running = load(ctx, &device, upgrades)?;
    let prober = Prober::start(device.path()?, 0)?;
    let mut spans = Vec::new();
    for number in 0..upgrades {
        let program = &programs[number as usize % 2];
        let began = Instant::now();
        let said = upgrade(&device, program)?;
        spans.push((began, Instant::now()));
        ensure!(said.contains("served by"), "{said}");
        // The process stays the same.
        ensure!(served_by(&device)? == (pid, program.clone()), "{said}");
    }
    let report = running.finish()?;
    let reads = prober.end()?;
    let mut stalls: Vec<_> = spans.iter().map(|(from, to)| longest(&reads, *from, *to)).collect();
    let mut whole: Vec<_> = spans.iter().map(|(from, to)| *to - *from).collect();
    println!(
        "{FIGURE}{upgrades} upgrades under load: no error in {} writes",
        report.write.requests
    );
    println!("{FIGURE}longest I/O during an upgrade: {}", distribution(&mut stalls));
    println!("{FIGURE}the command: {}", distribution(&mut whole));
    ensure!(report.read.requests > 0, "nothing was verified");
    device.delete()?;
    Ok(Outcome::Pass)
}

fn kinds(ctx: &Ctx) -> Result<Outcome> {
    let drives = fresh_drives(2)?;
    let paths: Vec<_> = drives.iter().map(Drive::path).collect();
    let (one, two) = (text(&paths[0])?, text(&paths[1])?);
    let programs = programs(ctx)?;
    for target in [
        &["loop", "-f", one, "--lend", "slot"][..],
        &["loop", "-f", one, "--lend", "copy"],
        &["loop", "-f", one, "--lend", "user-copy"],
        &["loop", "-f", one, "--passthru"],
        &["loop", "-f", one, "--poll"],
        &["loop", "-f", one, "--lend", "slot", "--io-lane"],
        &["stripe", "-f", one, "-f", two],
        &["linear", "-f", one, "-f", two],
        &["fault", "--rule", "delay=1ms", "loop", "-f", one],
    ] {
        let device = Device::add(&[target, &["--on-death", "reissue"]].concat())?;
        let running = load(ctx, &device, if ctx.long { 3 } else { 1 })?;
        for program in &programs {
            upgrade(&device, program).with_context(|| target.join(" "))?;
            ensure!(served_by(&device)?.1 == *program, "{target:?}");
        }
        running.finish().with_context(|| target.join(" "))?;
        device.delete()?;
    }
    Ok(Outcome::Pass)
}

fn failing(ctx: &Ctx) -> Result<Outcome> {
    let drive = fresh_drive("drive0")?;
    let [good, _] = programs(ctx)?;
    let script = |name: &str, text: &str| -> Result<PathBuf> {
        let path = ctx.directory().join(name);
        std::fs::write(&path, text)?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755))?;
        Ok(path)
    };
    // What is found out before anything changes.
    let early = [
        ("fails", "#!/bin/sh\necho 'no such thing' >&2\nexit 2\n", "no such thing; nothing has"),
        ("empty", "", "nothing has changed"),
        ("lost", "#!/nowhere\n", "nothing has changed"),
        ("other", "#!/bin/sh\nexit 0\n", "it is another program; nothing has changed"),
    ];
    // What is found out too late: it dies as the server. It is where servers find it, too.
    let late = PathBuf::from("/usr/local/bin/late-of-a-test");
    std::fs::copy(
        script("late", "#!/bin/sh\n[ \"$1\" = check-state ] && echo \"can serve device $3\"\n")?,
        &late,
    )?;
    for options in [&[][..], &["--supervise"]] {
        let options = [&["--on-death", "reissue"], options].concat();
        let device = Device::add_loop(&drive.path(), &options)?;
        let running = load(ctx, &device, 4)?;
        let (pid, own) = served_by(&device)?;
        for (name, text, expected) in early {
            let program = script(name, text)?;
            let argv = [PROGRAM, "upgrade", "-n", &device.id(), "--program"];
            let path = program.to_str().context("UTF-8")?;
            let refused = process::run_for_code(&[&argv[..], &[path]].concat(), 1)?;
            ensure!(refused.stderr.contains(expected), "{}", refused.stderr);
            ensure!(refused.stderr.lines().count() == 1, "{}", refused.stderr);
            ensure!(served_by(&device)? == (pid, own.clone()), "{name}");
        }
        let argv = [PROGRAM, "upgrade", "-n", &device.id(), "--program", text(&late)?];
        let refused = process::run_for_code(&argv, 1)?;
        ensure!(refused.stderr.contains("could not take over"), "{}", refused.stderr);
        let (after, program) = served_by(&device)?;
        ensure!(after != pid && program == own, "{}", program.display());
        upgrade(&device, &good)?;
        ensure!(served_by(&device)?.1 == good, "after a failed one");
        running.finish()?;
        device.delete()?;
    }
    std::fs::remove_file(&late)?;
    Ok(Outcome::Pass)
}

/// The server, or the command, is killed at some instant of the upgrade.
fn killed(ctx: &Ctx) -> Result<Outcome> {
    let drive = fresh_drive("drive0")?;
    let programs = programs(ctx)?;
    let kills = if ctx.long { 40 } else { 8 };
    let device = Device::add_loop(&drive.path(), &["--on-death", "reissue", "-q", "2"])?;
    let running = load(ctx, &device, kills)?;
    let mut ended = [0; 2];
    for number in 0..kills {
        let program = &programs[number as usize % 2];
        // One whose command was killed may be at its upgrade still.
        let (server, _) = await_server(&device)?;
        let mut command = Command::new(PROGRAM)
            .args(["upgrade", "-n", &device.id(), "--program", text(program)?])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        let is_server = number % 2 == 0;
        // Steps of 25 ms over what an upgrade takes.
        std::thread::sleep(Duration::from_millis(u64::from(number * 25 % 500)));
        let victim = if is_server { server } else { command.id() };
        // The command may be over.
        let _ = kill(Pid::from_raw(i32::try_from(victim)?), Signal::SIGKILL);
        if command.wait()?.success() && is_server {
            remains::recover_if_dead()?;
        }
        // Without the command, the server goes on with what it has begun.
        let (_, by) = await_server(&device)?;
        ended[usize::from(by == *program)] += 1;
    }
    let report = running.finish()?;
    println!(
        "{FIGURE}{kills} kills: {} times by the old program, {} times by the new one; {} writes verified",
        ended[0], ended[1], report.write.requests
    );
    device.delete()?;
    Ok(Outcome::Pass)
}

/// As a late process of an earlier upgrade would do: the driver holds I/O back from a live server.
fn made_to_wait(ctx: &Ctx) -> Result<Outcome> {
    let drive = fresh_drive("drive0")?;
    let device = Device::add_loop(&drive.path(), &["--on-death", "wait", "-q", "2"])?;
    let (pid, _) = served_by(&device)?;
    // Once idle, so that all fetches are taken back, and then under load.
    let quiesce = format!("{PROGRAM} quiesce-device -n {} --server $$", device.id());
    for _ in 0..2 {
        process::run(&["sh", "-c", &format!("{quiesce}; exit $?")])?;
        let mut block = crate::guest::direct::Aligned::new(4096, 0);
        let read = crate::guest::direct::open(device.path()?)?;
        std::os::unix::fs::FileExt::read_exact_at(&read, block.bytes(), 0)?;
    }
    let running = load(ctx, &device, 3)?;
    for _ in 0..3 {
        super::device::wait_for_requests(&device, 500)?;
        process::run(&["sh", "-c", &format!("{quiesce}; exit $?")])?;
    }
    running.finish()?;
    // The driver may learn late that the server has let go of the device.
    let held = its_char_device(pid, &device)?;
    process::run(&["sh", "-c", &format!("{quiesce}; exit $?")])?;
    let log = format!("/var/log/ublk-target/{}.log", device.id());
    let says = format!("waiting for guest-tests ({})", std::process::id());
    wait_for("the server to wait", Duration::from_secs(30), || {
        Ok(std::fs::read_to_string(&log)?.contains(&says).then_some(()))
    })?;
    drop(held);
    let mut block = crate::guest::direct::Aligned::new(4096, 0);
    let read = crate::guest::direct::open(device.path()?)?;
    std::os::unix::fs::FileExt::read_exact_at(&read, block.bytes(), 0)?;
    drop(read);
    ensure!(served_by(&device)?.0 == pid, "the same server");
    device.delete()?;
    Ok(Outcome::Pass)
}

/// The descriptor by which a server has the character device of its device.
fn its_char_device(pid: u32, device: &Device) -> Result<OwnedFd> {
    let path = PathBuf::from(format!("/dev/ublkc{}", device.id()));
    let mut descriptors = std::fs::read_dir(format!("/proc/{pid}/fd"))?.flatten();
    let its = descriptors
        .find(|it| std::fs::read_link(it.path()).is_ok_and(|file| file == path))
        .context("the server has no character device open")?;
    let number: i32 = its.file_name().to_str().context("a number")?.parse()?;
    let process = rustix::process::Pid::from_raw(i32::try_from(pid)?).context("a process")?;
    let process = pidfd_open(process, PidfdFlags::empty())?;
    Ok(pidfd_getfd(process, number, PidfdGetfdFlags::empty())?)
}

fn refused(ctx: &Ctx) -> Result<Outcome> {
    let drive = fresh_drive("drive0")?;
    let programs = programs(ctx)?;
    for (on_death, expected) in [("fail", "its I/O would fail"), ("error", "its I/O would fail")] {
        let device = Device::add_loop(&drive.path(), &["--on-death", on_death])?;
        let argv = [PROGRAM, "upgrade", "-n", &device.id(), "--program", text(&programs[0])?];
        let refused = process::run_for_code(&argv, 1)?;
        ensure!(refused.stderr.contains(expected), "{}", refused.stderr);
        device.delete()?;
    }
    let refused = process::run_for_code(&[PROGRAM, "upgrade", "-n", "77"], 1)?;
    ensure!(refused.stderr.contains("there is no ublk device 77"), "{}", refused.stderr);
    Ok(Outcome::Pass)
}

/// A server that can start no process cannot stop its deliveries, and says so. One that was stopped while
/// somebody asked, and gave up, does nothing when it goes on.
fn told(ctx: &Ctx) -> Result<Outcome> {
    let drive = fresh_drive("drive0")?;
    let [_, other] = programs(ctx)?;
    let device = Device::add_loop(&drive.path(), &["--on-death", "wait"])?;
    let (pid, own) = served_by(&device)?;
    // The log has what servers of earlier devices of this id have said, too.
    let log = format!("/var/log/ublk-target/{}.log", device.id());
    let handed_over = || -> Result<usize> {
        Ok(std::fs::read_to_string(&log)?.matches("handing over to").count())
    };
    let before = handed_over()?;
    let group = Group::new("no-more-processes", "pids")?;
    // It has two threads at the least.
    group.set("pids.max", "1")?;
    group.take(pid)?;
    let argv = [PROGRAM, "upgrade", "-n", &device.id(), "--program", text(&other)?];
    let began = Instant::now();
    let refused = process::run_for_code(&argv, 1)?.stderr;
    ensure!(refused.contains("still serves the device"), "{refused}");
    ensure!(began.elapsed() < Duration::from_secs(30), "{:?}", began.elapsed());
    group.release(pid)?;
    ensure!(served_by(&device)? == (pid, own.clone()), "all stays as it was");

    process::signal(pid, Signal::SIGSTOP)?;
    let file = std::fs::metadata(&own)?;
    let request = serde_json::json!({
        "version": 1, "command": "upgrade", "program": own, "file": [file.dev(), file.ino()],
        "descriptor": -1,
    });
    let mut asked = UnixStream::connect(format!("/run/ublk-target/{}.sock", device.id()))?;
    writeln!(asked, "{request}")?;
    drop(asked);
    process::signal(pid, Signal::SIGCONT)?;
    // It answers in the order in which it was asked.
    process::run(&[PROGRAM, "stats", "-n", &device.id(), "--json"])?;
    ensure!(served_by(&device)? == (pid, own), "nobody waited for that any more");
    ensure!(handed_over()? == before + 1, "the second one was begun");
    device.delete()?;
    Ok(Outcome::Pass)
}

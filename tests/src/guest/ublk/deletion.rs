//! `del` and `list` of devices in every state, and of what dead servers have left.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;

use super::device::{Device, Mount, PROGRAM, load_driver, text};
use super::remains;
use super::steps::{Blow, ID};
use crate::config::DEFAULT;
use crate::guest::{Ctx, FIGURE, Outcome, TestCase, process, wait_for};

pub const TESTS: &[TestCase] = &[
    TestCase::guest("del_works_on_devices_in_every_state", DEFAULT, every_state).seconds(300),
    TestCase::guest("del_wins_over_recovery", DEFAULT, recovery).seconds(300),
    TestCase::guest("del_force_takes_devices_from_their_users", DEFAULT, force).seconds(300),
    TestCase::guest("del_waits_for_no_late_request", DEFAULT, asked_too_late),
    TestCase::guest("del_force_kills_servers_that_do_not_end", DEFAULT, suspended).seconds(300),
    TestCase::guest("leftovers_are_named_and_cleaned", DEFAULT, leftovers).seconds(300),
    TestCase::guest("del_knows_processes_without_a_role_file", DEFAULT, without_role).seconds(180),
    TestCase::guest("no_process_inherits_what_keeps_a_device", DEFAULT, inheritance),
];

/// Deletes the device, after which nothing is left, and says how long that has taken.
fn del(what: &str, more: &[&str]) -> Result<Duration> {
    println!("{}", process::run(&[PROGRAM, "list"])?.stdout);
    let began = Instant::now();
    let printed = process::run(&[&[PROGRAM, "del", "-n", ID], more].concat())?;
    let took = began.elapsed();
    println!("{FIGURE}{what}: {:.1} s", took.as_secs_f64());
    print!("{}", printed.stderr);
    remains::ensure_none().context(what.to_owned())?;
    Ok(took)
}

/// Lets a suspended process go on as soon as something is gone.
fn go_on_without(pid: u32, path: &str) -> Result<Child> {
    let script = format!("while [ -e {path} ]; do sleep 0.02; done; kill -CONT {pid}");
    Ok(Command::new("sh").args(["-c", &script]).spawn()?)
}

fn every_state(ctx: &Ctx) -> Result<Outcome> {
    load_driver()?;
    let add = |more: &[&str]| process::run(&[&[PROGRAM, "add", "null", "-n", ID], more].concat());
    let pid = || -> Result<u32> {
        let devices = remains::devices()?;
        devices.first().and_then(|device| device.pid).context("a server")
    };
    for more in [&[][..], &["--on-death", "wait"], &["--on-death", "error"], &["--supervise"]] {
        add(more)?;
        del(&format!("live {more:?}"), &[])?;
    }
    for (on_death, state) in
        [("fail", "DEAD"), ("wait", "QUIESCED"), ("reissue", "QUIESCED"), ("error", "FAIL_IO")]
    {
        add(&["--on-death", on_death])?;
        process::signal(pid()?, Signal::SIGKILL)?;
        remains::wait_for_state(state)?;
        del(&format!("its server dead, --on-death {on_death}"), &[])?;
    }
    // Nobody has it and nobody has started it.
    let add_directly = ["add", "null", "-n", ID, "--role", "server"];
    for step in ["added", "opened", "lanes-up", "recorded", "listening"] {
        let blow = Blow::new(ctx, step, "self", "SIGKILL")?;
        ensure!(!blow.run(&add_directly)?.status.success());
        blow.ensure_fallen()?;
        del(&format!("half-added, its server dead ({step})"), &[])?;
    }
    for step in ["added", "opened", "lanes-up", "recorded", "listening"] {
        let blow = Blow::new(ctx, step, "self", "SIGSTOP")?;
        let mut adding = blow.spawn(&["add", "null", "-n", ID])?;
        let server = remains::wait_suspended("--role server")?;
        let mut going_on = go_on_without(server.pid, &format!("/sys/class/ublk-char/ublkc{ID}"))?;
        del(&format!("half-added, its server alive ({step})"), &[])?;
        going_on.wait()?;
        ensure!(!adding.wait()?.success(), "an add whose device was deleted must fail");
    }
    for command in ["stop", "remove"] {
        add(&[])?;
        let pid = pid()?;
        crate::guest::udev::settle()?;
        process::signal(pid, Signal::SIGSTOP)?;
        process::run(&[PROGRAM, "stop-device", "-n", ID, "--command", command])?;
        // The server goes on when `del` has found the device and says that it waits.
        let mut deleting = Command::new(PROGRAM)
            .args(["del", "-n", ID])
            .stderr(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()?;
        let mut said = BufReader::new(deleting.stderr.take().context("its standard error")?);
        let mut line = String::new();
        said.read_line(&mut line)?;
        process::signal(pid, Signal::SIGCONT)?;
        ensure!(line.contains("waiting for"), "{line}");
        ensure!(deleting.wait()?.success(), "half-deleted by {command}: {line}");
        remains::ensure_none().context(command)?;
    }
    Ok(Outcome::Pass)
}

/// Neither a `recover` that waits nor a supervisor that tries again and again keeps a device.
fn recovery(ctx: &Ctx) -> Result<Outcome> {
    let kill_server = |device: &Device| -> Result<()> {
        process::signal(device.pid()?, Signal::SIGKILL)?;
        remains::wait_for_state("QUIESCED")
    };
    // Somebody has the character device, so that nobody can recover it.
    let device = Device::add(&["null", "-n", ID, "--on-death", "wait"])?;
    kill_server(&device)?;
    let held = wait_for("the character device", Duration::from_secs(10), || {
        let path = format!("/dev/ublkc{ID}");
        Ok(File::options().read(true).write(true).open(path).ok())
    })?;
    let mut recovering =
        Command::new(PROGRAM).args(["recover", "-n", ID]).stderr(Stdio::null()).spawn()?;
    remains::find("recover -n 7 --role server")?;
    let deleting = Command::new(PROGRAM)
        .args(["del", "-n", ID])
        .stderr(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()?;
    ensure!(!recovering.wait()?.success(), "a stopped device cannot be recovered");
    std::thread::sleep(Duration::from_secs(3));
    drop(held);
    let output = deleting.wait_with_output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{said}");
    ensure!(said.contains(&format!("guest-tests ({})", std::process::id())), "{said}");
    remains::ensure_none()?;
    drop(device);

    for step in ["claimed", "lanes-up", "listening"] {
        let device = Device::add(&["null", "-n", ID, "--on-death", "reissue"])?;
        kill_server(&device)?;
        let blow = Blow::new(ctx, step, "self", "SIGSTOP")?;
        let mut recovering = blow.spawn(&["recover", "-n", ID])?;
        let server = remains::wait_suspended("--role server")?;
        // A device without a disk cannot be recovered.
        let mut going_on = go_on_without(server.pid, &format!("/sys/block/ublkb{ID}"))?;
        del(&format!("half-recovered ({step})"), &[])?;
        going_on.wait()?;
        ensure!(!recovering.wait()?.success());
        drop(device);
    }

    // No server can live without its backing.
    let file = ctx.directory().join("backing");
    File::create(&file)?.set_len(1 << 20)?;
    let device = Device::add(&["loop", "-f", text(&file)?, "-n", ID, "--supervise"])?;
    fs::remove_file(&file)?;
    kill_server(&device)?;
    std::thread::sleep(Duration::from_millis(if ctx.long { 4000 } else { 1500 }));
    ensure!(remains::find("--role supervisor")?.pid > 0);
    let took = del("a supervisor that keeps trying", &[])?;
    ensure!(took < Duration::from_secs(10), "{took:?}");
    drop(device);
    Ok(Outcome::Pass)
}

fn force(ctx: &Ctx) -> Result<Outcome> {
    let device = Device::add(&["null", "-n", ID, "--supervise"])?;
    let held = File::open(device.path()?)?;
    let refused = process::run_for_code(&[PROGRAM, "del", "-n", ID], 1)?.stderr;
    ensure!(refused.contains("--force") && refused.contains("guest-tests"), "{refused}");
    let said = process::run(&[PROGRAM, "del", "-n", ID, "--force"])?.stderr;
    ensure!(said.contains("id 7 stays in use while it is open by guest-tests"), "{said}");
    ensure!(!Path::new(device.path()?).exists() && remains::files().is_empty());
    ensure!(remains::processes().is_empty(), "{:?}", remains::processes());
    let mut buffer = [0; 512];
    let read = std::os::unix::fs::FileExt::read_at(&held, &mut buffer, 0);
    ensure!(!matches!(read, Ok(1..)), "it is gone");
    drop(held);
    remains::wait_for_none()?;
    drop(device);

    let backing = ctx.directory().join("backing");
    File::create(&backing)?.set_len(64 << 20)?;
    let device = Device::add(&["loop", "-f", text(&backing)?, "-n", ID])?;
    process::run(&["mkfs.ext4", "-q", "-F", device.path()?])?;
    let mount = Mount::new(ctx, device.path()?, "mnt")?;
    fs::write(mount.point().join("file"), "data")?;
    let said = process::run(&[PROGRAM, "del", "-n", ID, "--force"])?.stderr;
    ensure!(said.contains("id 7 stays in use while it is mounted on"), "{said}");
    ensure!(remains::processes().is_empty(), "{:?}", remains::processes());
    mount.unmount()?;
    wait_for("the id", Duration::from_secs(10), || {
        Ok(remains::devices()?.is_empty().then_some(()))
    })?;
    remains::ensure_none()?;
    drop(device);
    Device::add(&["null", "-n", ID])?.delete()?;
    Ok(Outcome::Pass)
}

/// A server that does not run is named, and killed by `--force` only, with I/O outstanding, too.
fn suspended(ctx: &Ctx) -> Result<Outcome> {
    for more in [&[][..], &["--supervise"]] {
        let device = Device::add(&[&["null", "-n", ID], more].concat())?;
        crate::guest::udev::settle()?;
        let pid = device.pid()?;
        process::signal(pid, Signal::SIGSTOP)?;
        // A reader that waits, as for a drive that does not answer.
        let mut reader = Command::new("dd")
            .args([&format!("if={}", device.path()?), "of=/dev/null", "iflag=direct", "count=1"])
            .stderr(Stdio::null())
            .spawn()?;
        wait_for("a request", Duration::from_secs(10), || {
            let inflight = device.attribute("inflight")?;
            Ok((inflight.split_whitespace().next() != Some("0")).then_some(()))
        })?;
        let took = del(&format!("suspended, with I/O outstanding {more:?}"), &["--force"])?;
        ensure!((5..25).contains(&took.as_secs()), "{took:?}");
        ensure!(!reader.wait()?.success(), "its device is gone");
        drop(device);
    }
    // Half-deleted, and nobody can be told it from sysfs any more.
    let device = Device::add(&["null", "-n", ID])?;
    crate::guest::udev::settle()?;
    let pid = device.pid()?;
    process::signal(pid, Signal::SIGSTOP)?;
    process::run(&[PROGRAM, "stop-device", "-n", ID, "--command", "remove"])?;
    let listed = process::run(&[PROGRAM, "list"])?.stdout;
    ensure!(listed.contains("DEAD"), "{listed}");
    if ctx.long {
        let refused = process::run_for_code(&[PROGRAM, "del", "--all"], 1)?.stderr;
        let expected = format!("the server ({pid}, which a signal has suspended) to end");
        ensure!(refused.contains(&expected), "{refused}");
    }
    del("half-deleted, its server suspended", &["--force"])?;
    drop(device);
    Ok(Outcome::Pass)
}

/// What was asked of a server that was suspended is not waited for when it goes on, at its end.
fn asked_too_late(_ctx: &Ctx) -> Result<Outcome> {
    let device = Device::add(&["null", "-n", ID, "--on-death", "wait"])?;
    crate::guest::udev::settle()?;
    let pid = device.pid()?;
    process::signal(pid, Signal::SIGSTOP)?;
    let said = process::run_for_code(&[PROGRAM, "upgrade", "-n", ID], 1)?.stderr;
    let expected = format!("ublk-target ({pid}, which a signal has suspended), does not answer");
    ensure!(said.contains(&expected), "{said}");
    process::run(&[PROGRAM, "stop-device", "-n", ID])?;
    let began = Instant::now();
    process::signal(pid, Signal::SIGCONT)?;
    device.wait_until_gone()?;
    let took = began.elapsed();
    println!("{FIGURE}the end of a server that was asked too late: {:.1} s", took.as_secs_f64());
    ensure!(took < Duration::from_secs(7), "{took:?}");
    Ok(Outcome::Pass)
}

fn leftovers(ctx: &Ctx) -> Result<Outcome> {
    load_driver()?;
    let run = Path::new(remains::RUN_DIRECTORY);
    fs::create_dir_all(run)?;
    let litter = || -> Result<[std::path::PathBuf; 4]> {
        let left = ["77.json", "77.json.00000000beef", "78.json.00000000cafe", "79.sock"]
            .map(|it| run.join(it));
        fs::write(&left[0], "{}")?;
        fs::write(&left[1], "{")?;
        fs::write(&left[2], "{")?;
        drop(UnixListener::bind(&left[3])?);
        Ok(left)
    };
    let device = Device::add(&["null", "-n", "3"])?;
    let own: BTreeSet<_> = remains::files().into_iter().collect();
    ensure!(own.len() == 2, "{own:?}");
    let left = litter()?;
    let printed = process::run(&[PROGRAM, "list"])?;
    for file in &left {
        let note = format!("ublk-target: note: removed {}, which", file.display());
        ensure!(
            printed.stderr.lines().filter(|line| line.starts_with(&note)).count() == 1,
            "{printed:?}"
        );
    }
    ensure!(printed.stderr.lines().count() == left.len(), "{printed:?}");
    ensure!(remains::files().into_iter().collect::<BTreeSet<_>>() == own);
    device.delete()?;
    litter()?;
    process::run(&[PROGRAM, "del", "--all"])?;
    remains::ensure_none()?;

    // Those of a device that is just being added are not left over.
    for (step, files) in [("half-recorded", 1), ("recorded", 1), ("listening", 2)] {
        let blow = Blow::new(ctx, step, "self", "SIGSTOP")?;
        let mut adding = blow.spawn(&["add", "null", "-n", ID])?;
        let server = remains::wait_suspended("--role server")?;
        let printed = process::run(&[PROGRAM, "list"])?;
        ensure!(printed.stderr.is_empty(), "{printed:?}");
        ensure!(remains::files().len() == files, "{step}: {:?}", remains::files());
        process::signal(server.pid, Signal::SIGCONT)?;
        ensure!(adding.wait()?.success());
        process::run(&[PROGRAM, "del", "-n", ID])?;
    }

    // A supervisor that does not notice that its device is gone.
    let device = Device::add(&["null", "-n", ID, "--supervise"])?;
    let supervisor = device.described.supervisor.context("supervised")?;
    crate::guest::udev::settle()?;
    process::signal(supervisor, Signal::SIGSTOP)?;
    process::run(&[PROGRAM, "stop-device", "-n", ID])?;
    wait_for("the device to be gone", Duration::from_secs(10), || {
        Ok(remains::devices()?.is_empty().then_some(()))
    })?;
    std::thread::sleep(Duration::from_secs(5));
    let printed = process::run(&[PROGRAM, "list"])?.stderr;
    let note = format!("note: the supervisor ({supervisor}, which a signal has suspended) has no");
    ensure!(printed.contains(&note), "{printed}");
    let began = Instant::now();
    process::run(&[PROGRAM, "del", "--all", "--force"])?;
    println!("{FIGURE}a suspended supervisor: {:.1} s", began.elapsed().as_secs_f64());
    remains::ensure_none()?;
    drop(device);
    Ok(Outcome::Pass)
}

/// Each process has a role file. Processes of earlier versions have none, and are recognised too.
fn without_role(_ctx: &Ctx) -> Result<Outcome> {
    load_driver()?;
    let roles = || -> Result<Vec<String>> {
        let read = |path: std::path::PathBuf| -> Result<String> {
            let told: serde_json::Value = serde_json::from_str(&fs::read_to_string(path)?)?;
            Ok(told["role"].as_str().context("a role")?.to_owned())
        };
        let mut roles: Vec<_> =
            remains::role_files().into_iter().map(read).collect::<Result<_>>()?;
        roles.sort();
        Ok(roles)
    };
    for (more, expected) in
        [(&[][..], &["server"][..]), (&["--supervise"], &["server", "supervisor"])]
    {
        let device = Device::add(&[&["null", "-n", ID], more].concat())?;
        ensure!(roles()? == expected, "{more:?}: {:?}", roles()?);
        for file in remains::role_files() {
            fs::remove_file(file)?;
        }
        let printed = process::run(&[PROGRAM, "list"])?;
        ensure!(printed.stderr.is_empty(), "{printed:?}");
        ensure!(remains::devices()?[0].supervisor == device.described.supervisor);
        del(&format!("without role files {more:?}"), &[])?;
        drop(device);
    }
    Ok(Outcome::Pass)
}

/// A ring or a character device that lived on in another process would keep a dead server's device
/// from being recovered, or deleted.
fn inheritance(ctx: &Ctx) -> Result<Outcome> {
    let drive = super::device::fresh_drive("drive0")?;
    load_driver()?;
    let blow = Blow::later(ctx, "command-sent", "self", "SIGSTOP")?;
    let backing = drive.path();
    let argv =
        blow.argv(&["add", "loop", "-f", text(&backing)?, "-n", ID, "--supervise", "-q", "2"]);
    process::run(&argv)?;
    let devices = remains::devices()?;
    let device = devices.first().context("a device")?;
    let (server, supervisor) = (device.pid.context("live")?, device.supervisor.context("live")?);
    let of_server = open_files(server)?;
    ensure!(of_server.iter().any(|file| file.starts_with("/dev/ublkc")), "{of_server:?}");
    for other in open_files(supervisor)? {
        ensure!(!other.starts_with("/dev/ublkc"), "the supervisor has {other}");
    }
    blow.arm()?;
    process::signal(server, Signal::SIGTERM)?;
    let helper = remains::wait_suspended("stop-device")?;
    let of_helper = open_files(helper.pid)?;
    process::signal(helper.pid, Signal::SIGCONT)?;
    let rings = of_helper.iter().filter(|file| file.contains("io_uring")).count();
    ensure!(rings == 1, "the helper has other rings than its own: {of_helper:?}");
    ensure!(!of_helper.iter().any(|file| file.starts_with("/dev/ublkc")), "{of_helper:?}");
    remains::wait_for_none()?;
    println!(
        "{FIGURE}{} descriptors of the server, {} of its helper",
        of_server.len(),
        of_helper.len()
    );
    Ok(Outcome::Pass)
}

/// What a process has open. All of it but the three standard files is closed at exec.
fn open_files(pid: u32) -> Result<Vec<String>> {
    const CLOEXEC: u32 = 0o2_000_000;
    let mut found = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
        let entry = entry?;
        let number = entry.file_name().to_string_lossy().into_owned();
        let target = fs::read_link(entry.path())?.to_string_lossy().into_owned();
        let info = fs::read_to_string(format!("/proc/{pid}/fdinfo/{number}"))?;
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
        let flags = u32::from_str_radix(flags.context("flags")?.trim(), 8)?;
        ensure!(flags & CLOEXEC != 0 || number.parse::<u32>()? < 3, "{pid}: {number} ({target})");
        found.push(target);
    }
    Ok(found)
}

//! What callers and other users leave to a server, and what they put in its way.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;

use super::{Background, PATIENCE, drive_name};
use crate::config::DEFAULT;
use crate::guest::ublk::device::{Device, PROGRAM, file_on_drive, load_driver, text};
use crate::guest::ublk::remains;
use crate::guest::ublk::steps::ID;
use crate::guest::{Ctx, Outcome, TestCase, process, wait_for};

pub const TESTS: &[TestCase] = &[
    TestCase::guest("a_server_keeps_nothing_of_its_caller", DEFAULT, inherited),
    TestCase::guest("a_server_has_files_of_its_own_alone", DEFAULT, files).seconds(180),
    TestCase::guest("hang_up_opens_the_log_again", DEFAULT, hang_up).seconds(180),
    TestCase::guest("a_device_is_recovered_without_a_log", DEFAULT, without_log).seconds(180),
    TestCase::guest("names_of_others_command_no_terminal", DEFAULT, names),
    TestCase::guest("nobody_poses_as_a_process_of_ours", DEFAULT, posing).seconds(180),
    TestCase::guest("a_replaced_program_stops_in_order", DEFAULT, replaced).seconds(180),
    TestCase::guest("what_cannot_be_seen_is_not_taken_for_absent", DEFAULT, blind),
];

/// Its descriptors, and limits that would end it.
fn inherited(ctx: &Ctx) -> Result<Outcome> {
    load_driver()?;
    let lock = ctx.directory().join("lock");
    let (mount, backing) = file_on_drive(ctx, "drive0", 64)?;
    let open = ctx.directory().join("open");
    fs::create_dir(&open)?;
    process::run(&["mount", "-t", "tmpfs", "tmpfs", text(&open)?])?;
    for supervise in [&[][..], &["--supervise"]] {
        // The caller has a lock, a file on another file system, and a limit of 1 MiB for files.
        let script = format!(
            "exec 7>{0}/file; ulimit -f 1024; cd {2}; flock {1} {PROGRAM} add loop -f {3} -n {ID} {4}",
            text(&open)?,
            text(&lock)?,
            text(mount.point())?,
            drive_name(&backing)?,
            supervise.join(" ")
        );
        process::run(&["sh", "-c", &script])?;
        process::run(&["flock", "-n", text(&lock)?, "true"])?;
        process::run(&["umount", text(&open)?])?;
        let write = ["bs=64k", "count=1", "seek=500", "oflag=direct", "status=none"];
        let device = format!("of=/dev/ublkb{ID}");
        process::run(&[&["dd", "if=/dev/zero", &device], &write[..]].concat())?;
        process::run(&[PROGRAM, "del", "-n", ID])?;
        process::run(&["mount", "-t", "tmpfs", "tmpfs", text(&open)?])?;
    }
    process::run(&["umount", text(&open)?])?;
    mount.unmount()?;
    remains::ensure_none()?;
    Ok(Outcome::Pass)
}

/// Whatever the umask, and whatever others have put there.
fn files(ctx: &Ctx) -> Result<Outcome> {
    const DIRECTORIES: [&str; 2] = ["/run/ublk-target", "/var/log/ublk-target"];
    load_driver()?;
    for directory in DIRECTORIES {
        if Path::new(directory).exists() {
            fs::remove_dir_all(directory)?;
        }
    }
    let mode = |path: &str| -> Result<u32> { Ok(fs::metadata(path)?.mode() & 0o7777) };
    let add = |expected: i32| {
        let script = format!("umask 0; exec {PROGRAM} add null -n {ID} --supervise");
        process::run_for_code(&["sh", "-c", &script], expected)
    };
    add(0)?;
    for directory in DIRECTORIES {
        ensure!(mode(directory)? == 0o755, "{directory}: {:o}", mode(directory)?);
        for file in fs::read_dir(directory)? {
            let path = file?.path();
            let mode = mode(text(&path)?)?;
            ensure!(mode & 0o022 == 0, "{}: {mode:o}", path.display());
        }
    }
    process::run(&[PROGRAM, "del", "-n", ID])?;

    // What a user has planted while a folder could be written.
    let secret = ctx.directory().join("secret");
    fs::write(&secret, "secret")?;
    for directory in DIRECTORIES {
        fs::set_permissions(directory, fs::Permissions::from_mode(0o777))?;
    }
    let log = format!("/var/log/ublk-target/{ID}.log");
    fs::remove_file(&log)?;
    symlink(&secret, &log)?;
    symlink(&secret, format!("/run/ublk-target/{ID}.json"))?;
    add(0)?;
    ensure!(fs::read(&secret)? == b"secret", "a link was followed");
    for directory in DIRECTORIES {
        ensure!(mode(directory)? == 0o755, "{directory} can be written by others");
    }
    process::run(&[PROGRAM, "del", "-n", ID])?;
    fs::remove_file(&log)?;

    // A directory of somebody else.
    std::os::unix::fs::chown(DIRECTORIES[0], Some(65534), None)?;
    let refused = add(1)?.stderr;
    ensure!(refused.contains("belongs to another user"), "{refused}");
    std::os::unix::fs::chown(DIRECTORIES[0], Some(0), None)?;
    remains::ensure_none()?;
    Ok(Outcome::Pass)
}

/// What a hook of logrotate does, to the server and to its supervisor.
fn hang_up(_ctx: &Ctx) -> Result<Outcome> {
    for more in [&[][..], &["--supervise"]] {
        let device = Device::add(&[&["null", "-n", ID], more].concat())?;
        let (server, supervisor) = (device.pid()?, device.described.supervisor);
        let log = format!("/var/log/ublk-target/{ID}.log");
        for pid in supervisor.into_iter().chain([server]) {
            let moved = format!("{log}.moved");
            fs::rename(&log, &moved)?;
            process::signal(pid, Signal::SIGHUP)?;
            wait_for("the log", PATIENCE, || {
                let text = fs::read_to_string(&log).unwrap_or_default();
                Ok(text.contains("open again").then_some(()))
            })?;
            let text = fs::read_to_string(&log)?;
            ensure!(!text.contains('\x1b'), "colours in a file: {text:?}");
            fs::remove_file(&moved)?;
        }
        ensure!(device.pid()? == server && Path::new(device.path()?).exists());
        device.delete()?;
    }
    Ok(Outcome::Pass)
}

/// Where logs belong nothing can be written: early in the boot, or for good.
fn without_log(_ctx: &Ctx) -> Result<Outcome> {
    const LOGS: &str = "/var/log/ublk-target";
    load_driver()?;
    if Path::new(LOGS).exists() {
        fs::remove_dir_all(LOGS)?;
    }
    fs::write(LOGS, "")?;
    for more in [&[][..], &["--supervise"]] {
        let on_death = ["--on-death", "wait"];
        process::run(&[&[PROGRAM, "add", "null", "-n", ID], &on_death[..]].concat())?;
        let fallback = format!("/run/ublk-target/{ID}.log");
        ensure!(fs::read_to_string(&fallback)?.contains("cannot log to"), "no log");
        let server = remains::devices()?.first().and_then(|it| it.pid).context("a server")?;
        process::signal(server, Signal::SIGKILL)?;
        remains::wait_for_state("QUIESCED")?;
        process::run(&[&[PROGRAM, "recover", "-n", ID], more].concat())?;
        process::run(&[PROGRAM, "del", "-n", ID])?;
        ensure!(!Path::new(&fallback).exists(), "{fallback} is left");
    }
    fs::remove_file(LOGS)?;
    remains::ensure_none()?;
    Ok(Outcome::Pass)
}

/// Of a process that uses a device, and of a file.
fn names(ctx: &Ctx) -> Result<Outcome> {
    let device = Device::add(&["null", "-n", ID])?;
    let evil = ctx.directory().join("a\x1b[31m\x07");
    fs::copy("/bin/sleep", &evil)?;
    let open = format!("exec 7<{} && exec \"$0\" 1000", device.path()?);
    let open = Background::start(&["sh", "-c", &open, text(&evil)?])?;
    let exe = format!("/proc/{}/exe", open.0.id());
    wait_for("the device to be open", PATIENCE, || {
        Ok(fs::read_link(&exe)?.ends_with("a\x1b[31m\x07").then_some(()))
    })?;
    let missing = format!("{}-missing", text(&evil)?);
    let said = [
        process::run_for_code(&[PROGRAM, "del", "-n", ID], 1)?.stderr,
        process::run_for_code(&[PROGRAM, "add", "loop", "-f", &missing], 1)?.stderr,
    ];
    for said in said {
        ensure!(said.contains("\\u{1b}[31m"), "{said:?}");
        ensure!(!said.contains('\x1b') && !said.contains('\x07'), "{said:?}");
    }
    drop(open);
    device.delete()?;
    Ok(Outcome::Pass)
}

/// A process of another user that calls itself ours, and does not end when it is told.
fn posing(ctx: &Ctx) -> Result<Outcome> {
    let device = Device::add(&["null", "-n", ID, "--on-death", "wait"])?;
    let pose = ctx.directory().join(PROGRAM);
    fs::copy("/bin/sh", &pose)?;
    fs::set_permissions(&pose, fs::Permissions::from_mode(0o755))?;
    fs::set_permissions(ctx.directory(), fs::Permissions::from_mode(0o755))?;
    // A shell of that name, whose script is called as our command is.
    let fifo = ctx.directory().join("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::from_bits_truncate(0o644))?;
    let script = "trap '' TERM HUP INT; while :; do read line < fifo; done";
    fs::write(ctx.directory().join("supervise"), script)?;
    let start =
        format!("cd {} && exec ./{PROGRAM} supervise -n {ID} --server 1", text(ctx.directory())?);
    let user = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"];
    let posing = Background::start(&[&user[..], &["sh", "-c", &start]].concat())?;
    let name = format!("/proc/{}/comm", posing.0.id());
    wait_for("its name", PATIENCE, || {
        Ok((fs::read_to_string(&name)?.trim() == PROGRAM).then_some(()))
    })?;
    let printed = process::run(&[PROGRAM, "list"])?;
    ensure!(printed.stderr.is_empty(), "{printed:?}");
    device.delete()?;
    process::run(&[PROGRAM, "del", "--all", "--force"])?;
    ensure!(Path::new(&name).exists(), "it was killed");
    drop(posing);
    Ok(Outcome::Pass)
}

/// As a package manager replaces it; and a file that others have put in the place of the old one is not
/// run.
fn replaced(ctx: &Ctx) -> Result<Outcome> {
    load_driver()?;
    let own = process::run(&["sh", "-c", &format!("command -v {PROGRAM}")])?.stdout;
    let copy = ctx.directory().join(PROGRAM);
    let planted = ctx.directory().join(format!("{PROGRAM} (deleted)"));
    let ran = ctx.directory().join("ran");
    fs::write(&planted, format!("#!/bin/sh\ntouch {}\n", text(&ran)?))?;
    fs::set_permissions(&planted, fs::Permissions::from_mode(0o755))?;
    let config = ctx.directory().join("serve.toml");
    let device = |id: &str| format!("[[device]]\nid = {id}\ntarget = \"null\"\nsize = \"1M\"\n");
    for kind in ["add", "supervised", "serve"] {
        fs::copy(own.trim(), &copy)?;
        let program = text(&copy)?;
        let mut fleet = None;
        match kind {
            "add" => drop(process::run(&[program, "add", "null", "-n", ID])?),
            "supervised" => {
                drop(process::run(&[program, "add", "null", "-n", ID, "--supervise"])?);
            }
            _ => {
                fs::write(&config, device(ID) + &device("8"))?;
                fleet =
                    Some(Command::new(program).args(["serve", "--config"]).arg(&config).spawn()?);
            }
        }
        let listed = wait_for("the device", PATIENCE, || {
            let devices = remains::devices()?;
            Ok(devices.into_iter().find(|it| it.state == "LIVE" && it.pid.is_some()))
        })?;
        let server = listed.pid.context("a server")?;
        let new = ctx.directory().join("new");
        fs::copy(own.trim(), &new)?;
        fs::rename(&new, &copy)?;
        let link = fs::read_link(format!("/proc/{server}/exe"))?;
        ensure!(text(&link)?.ends_with("(deleted)"), "{}", link.display());
        if let Some(fleet) = &fleet {
            // A reload takes a device away.
            fs::write(&config, device(ID))?;
            process::signal(fleet.id(), Signal::SIGHUP)?;
            wait_for(
                "the reload",
                PATIENCE,
                || Ok((remains::devices()?.len() == 1).then_some(())),
            )?;
        }
        process::signal(server, Signal::SIGTERM)?;
        if let Some(mut fleet) = fleet {
            let status = fleet.wait()?;
            ensure!(status.success(), "{status}");
        }
        wait_for("the end", PATIENCE, || {
            Ok((!Path::new(&format!("/proc/{server}")).exists()).then_some(()))
        })?;
        remains::wait_for_none()?;
        ensure!(!ran.exists(), "{kind}: a file of others was run");
    }
    Ok(Outcome::Pass)
}

/// Too few open files are raised, or told; without `/proc` nobody knows who uses a device.
fn blind(_ctx: &Ctx) -> Result<Outcome> {
    let device = Device::add(&["null", "-n", ID])?;
    let few = |more: &str| format!("ulimit -n 5; {more} {PROGRAM} list --json");
    let listed = process::run(&["sh", "-c", &few("")])?.stdout;
    ensure!(listed.contains("LIVE"), "{listed}");
    // Who may not raise it is told.
    let as_other = few("setpriv --bounding-set -sys_resource --inh-caps -sys_resource");
    let refused = process::run_for_code(&["sh", "-c", &as_other], 1)?.stderr;
    ensure!(refused.contains("ulimit -n"), "{refused}");
    for (mount, command) in [("/proc", "del -n"), ("/proc", "list -n"), ("/sys", "del -n")] {
        let script = format!("umount -l {mount}; {PROGRAM} {command} {ID}");
        let argv = ["unshare", "-m", "sh", "-c", &script];
        let refused = process::run_for_code(&argv, 1)?.stderr;
        ensure!(refused.contains(&format!("{mount} is not mounted here")), "{refused}");
    }
    process::run(&[PROGRAM, "list", "-n", ID])?;
    device.delete()?;
    Ok(Outcome::Pass)
}

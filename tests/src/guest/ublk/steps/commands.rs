//! Each named step of each command.

use std::io::Read;
use std::process::Output;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{ADDING, Blow, DELETING, ENDING, ID, RECOVERING, ROLE, Storm, verify};
use crate::guest::ublk::device::{Device, PROGRAM, text};
use crate::guest::ublk::remains;
use crate::guest::{Ctx, Outcome, process, wait_for};

/// Steps after which other things are to be taken back. The short run goes through these only where
/// what is hit matters less, or was hit by another test.
const TELLING: [&str; 6] = ["added", "lanes-up", "recorded", "start-sent", "live", "announced"];

pub fn is_of_this_run(ctx: &Ctx, step: &str) -> bool {
    ctx.long || TELLING.contains(&step) || step.ends_with("-it") || step == "supervising"
}

/// What is in the foreground differs only in who cleans up.
fn is_in_foreground(ctx: &Ctx, step: &str) -> bool {
    ctx.long || matches!(step, "added" | "announced")
}

/// Without and with a supervisor; in the short run one after the other.
pub fn in_turn(ctx: &Ctx, turn: usize) -> impl Iterator<Item = &'static [&'static str]> {
    let modes: [&[&str]; 2] = [&[], &["--supervise"]];
    let long = ctx.long;
    modes.into_iter().enumerate().filter(move |(n, _)| long || turn % 2 == *n).map(|(_, it)| it)
}

/// The arguments of an add.
fn arguments<'a>(backing: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    [&["add", "loop", "-f", backing, "-n", ID], more].concat()
}

/// Runs an add that is hit. In the foreground it may go on after all, and is then deleted.
fn run(blow: &Blow, arguments: &[&str]) -> Result<Output> {
    if !arguments.contains(&"--foreground") {
        return blow.run(arguments);
    }
    let mut child = blow.spawn(arguments)?;
    let mut byte = [0];
    let has_spoken = child.stdout.as_mut().context("piped")?.read(&mut byte)? > 0;
    if has_spoken && blow.has_fallen() {
        println!("in the foreground: {}", process::run(&[PROGRAM, "list"])?.stdout);
    }
    if has_spoken {
        delete_if_there()?;
    }
    Ok(child.wait_with_output()?)
}

/// Deletes a device that may be about to end.
pub fn delete_if_there() -> Result<()> {
    let deleted = process::run(&[PROGRAM, "del", "-n", ID]);
    let is_gone = |error: &anyhow::Error| error.to_string().contains("there is no ublk device 7");
    match deleted {
        Err(error) if !is_gone(&error) => Err(error),
        Ok(_) | Err(_) => Ok(()),
    }
}

pub fn said(output: &Output) -> String {
    format!("{}: {}", output.status, String::from_utf8_lossy(&output.stderr))
}

/// The server is killed at each step; so is the command that waits for it.
pub fn add(ctx: &Ctx) -> Result<Outcome> {
    let mut storm = Storm::new()?;
    let backing = storm.backing();
    let backing = text(&backing)?;
    for step in ROLE.into_iter().chain(ADDING) {
        for more in [&[][..], &["--on-death", "reissue", "--foreground"]] {
            if !more.is_empty() && !is_in_foreground(ctx, step) {
                continue;
            }
            storm.blow(&format!("{step}: the server is killed {more:?}"));
            let blow = Blow::new(ctx, step, "self", "SIGKILL")?;
            let output = run(&blow, &arguments(backing, more))?;
            blow.ensure_fallen()?;
            let is_told = step == "announced";
            ensure!(output.status.success() == (is_told && more.is_empty()), "{}", said(&output));
            if more.is_empty() && !is_told {
                // The command has taken it back.
                remains::ensure_none()?;
            }
            storm.clean_up()?;
        }
    }
    let steps = ADDING.into_iter().chain(["started-it", "heard-it"]);
    for step in steps.filter(|step| is_of_this_run(ctx, step)) {
        storm.blow(&format!("{step}: the command is killed"));
        let whom = if step.ends_with("-it") { "self" } else { "parent" };
        let blow = Blow::new(ctx, step, whom, "SIGKILL")?;
        let output = blow.run(&arguments(backing, &[]))?;
        blow.ensure_fallen()?;
        // It is killed while the server speaks to it, so that it may or may not have heard.
        let is_close = matches!(step, "live" | "announced" | "heard-it");
        ensure!(is_close || !output.status.success(), "{}", said(&output));
        settle(is_close)?;
        storm.clean_up()?;
    }
    Ok(storm.figure("kills"))
}

/// Waits until a server whose command was killed has taken its device back, or serves it.
fn settle(may_serve: bool) -> Result<()> {
    wait_for("a device or none", Duration::from_secs(20), || {
        let devices = remains::devices()?;
        let serves = devices.iter().any(|device| device.state == "LIVE" && device.pid.is_some());
        let is_gone = devices.is_empty() && remains::processes().is_empty();
        Ok((is_gone || may_serve && serves).then_some(()))
    })
}

/// A server that is killed is replaced, or the add fails and leaves nothing; so it is with a
/// supervisor.
pub fn supervised_add(ctx: &Ctx) -> Result<Outcome> {
    let mut storm = Storm::new()?;
    let backing = storm.backing();
    let backing = text(&backing)?;
    for step in ROLE.into_iter().chain(ADDING) {
        for more in [&["--supervise"][..], &["--supervise", "--foreground"]] {
            let is_foreground = more.len() > 1;
            // The first one to say what it is is the supervisor. In the foreground nobody cleans up after it.
            let is_role = ROLE.contains(&step);
            let is_of_this_run = is_role || is_of_this_run(ctx, step);
            if !is_of_this_run || is_foreground && (is_role || !is_in_foreground(ctx, step)) {
                continue;
            }
            storm.blow(&format!("{step}: the server is killed {more:?}"));
            let blow = Blow::new(ctx, step, "self", "SIGKILL")?;
            let output = run(&blow, &arguments(backing, more))?;
            blow.ensure_fallen()?;
            let is_told = step == "announced";
            ensure!(output.status.success() == is_told, "{}", said(&output));
            if is_told && !is_foreground {
                replaced()?;
            } else {
                remains::ensure_none()?;
            }
            storm.clean_up()?;
        }
    }
    let own = ["supervisor-started-it", "supervisor-heard-it", "supervising"];
    for step in ADDING.into_iter().chain(own).filter(|step| is_of_this_run(ctx, step)) {
        storm.blow(&format!("{step}: the supervisor is killed"));
        let whom = if own.contains(&step) { "self" } else { "parent" };
        let blow = Blow::new(ctx, step, whom, "SIGKILL")?;
        let output = blow.run(&arguments(backing, &["--supervise"]))?;
        blow.ensure_fallen()?;
        let is_close = matches!(step, "live" | "announced" | "supervisor-heard-it");
        let is_told = step == "supervising";
        ensure!(is_close || output.status.success() == is_told, "{}", said(&output));
        if is_told {
            wait_for("another supervisor", Duration::from_secs(10), || {
                let devices = remains::devices()?;
                Ok(devices.iter().any(|device| device.supervisor.is_some()).then_some(()))
            })?;
        }
        settle(is_close || is_told)?;
        storm.clean_up()?;
    }
    Ok(storm.figure("kills"))
}

/// Waits for another server, which works.
fn replaced() -> Result<()> {
    let device = wait_for("another server", Duration::from_secs(20), || {
        let mut devices = remains::devices()?.into_iter();
        Ok(devices.find(|device| device.state == "LIVE" && device.pid.is_some()))
    })?;
    ensure!(device.supervisor.is_some(), "{device:?}");
    verify(&device)
}

/// Each attempt to recover is killed; the next one succeeds, and the data is the same.
pub fn recover(ctx: &Ctx) -> Result<Outcome> {
    let mut storm = Storm::new()?;
    let device = Device::add_loop(&storm.backing(), &["-n", ID, "--on-death", "reissue"])?;
    verify(&device.described)?;
    for step in ROLE.into_iter().chain(RECOVERING) {
        for whom in ["self", "parent"] {
            if whom == "parent" && !is_of_this_run(ctx, step) {
                continue;
            }
            storm.blow(&format!("{step}: {whom} of a server that recovers is killed"));
            orphan()?;
            let blow = Blow::new(ctx, step, whom, "SIGKILL")?;
            let output = blow.run(&["recover", "-n", ID])?;
            blow.ensure_fallen()?;
            let is_close = matches!(step, "live" | "announced");
            ensure!(is_close || !output.status.success(), "{}", said(&output));
            process::run(&[PROGRAM, "list"])?;
            if whom == "parent" {
                // The device is what matters, not who asked.
                wait_for("the server", Duration::from_secs(20), || {
                    let devices = remains::devices()?;
                    Ok(devices.iter().any(|it| it.state == "LIVE").then_some(()))
                })?;
            } else {
                process::run(&[PROGRAM, "recover", "-n", ID])?;
            }
            let read = process::run(&[
                "cmp",
                "-n",
                "4096",
                "-i",
                "0:12288",
                "/tmp/pattern",
                device.path()?,
            ]);
            read.context("the data is other")?;
        }
    }
    // And once not recovered but deleted.
    orphan()?;
    let blow = Blow::new(ctx, "claimed", "self", "SIGKILL")?;
    blow.run(&["recover", "-n", ID])?;
    device.delete()?;
    remains::ensure_none()?;
    storm.add_again()?;
    Ok(storm.figure("kills"))
}

/// With a supervisor, the device is there whoever is killed, and has a server in the end.
pub fn supervised_recover(ctx: &Ctx) -> Result<Outcome> {
    let mut storm = Storm::new()?;
    let backing = storm.backing();
    let add = arguments(text(&backing)?, &["--on-death", "reissue"]);
    for step in ["supervisor-started-it", "supervisor-heard-it", "supervising"] {
        for whom in ["self", "parent"] {
            storm.blow(&format!("{step}: {whom} of a supervisor that recovers is killed"));
            process::run(&[&[PROGRAM], &add[..]].concat())?;
            orphan()?;
            let blow = Blow::new(ctx, step, whom, "SIGKILL")?;
            blow.run(&["recover", "-n", ID, "--supervise"])?;
            blow.ensure_fallen()?;
            let device = wait_for("the server", Duration::from_secs(20), || {
                let device = remains::devices()?.into_iter().next();
                let device = device.context("the device was deleted")?;
                let is_left =
                    !remains::processes().iter().any(|it| it.arguments.contains("recover"));
                if device.state == "QUIESCED" && is_left {
                    process::run(&[PROGRAM, "recover", "-n", ID])?;
                }
                Ok(Some(device).filter(|it| it.state == "LIVE" && it.pid.is_some()))
            })?;
            verify(&device)?;
            storm.clean_up()?;
        }
    }
    Ok(storm.figure("kills"))
}

/// Kills the server of the device.
pub fn orphan() -> Result<()> {
    let devices = remains::devices()?;
    let pid = devices.first().and_then(|device| device.pid).context("a server")?;
    kill(Pid::from_raw(i32::try_from(pid)?), Signal::SIGKILL)?;
    wait_for("the device to be quiesced", Duration::from_secs(20), || {
        let devices = remains::devices()?;
        Ok((devices.first().context("a device")?.state == "QUIESCED").then_some(()))
    })
}

/// The server, and the process that stops the device for it, are killed while it ends.
pub fn end(ctx: &Ctx) -> Result<Outcome> {
    let mut storm = Storm::new()?;
    let backing = storm.backing();
    let backing = text(&backing)?;
    let steps = ENDING.into_iter().map(|step| (step, "self"));
    let steps = steps.chain([("command-sent", "self"), ("command-sent", "parent")]);
    // Of the process that stops the device.
    let steps = steps.chain(ROLE.map(|step| (step, "self")));
    for (turn, (step, whom)) in steps.enumerate() {
        for more in in_turn(ctx, turn) {
            storm.blow(&format!("{step}: {whom} is killed while the server ends {more:?}"));
            let blow = Blow::later(ctx, step, whom, "SIGKILL")?;
            let argv = arguments(backing, more);
            process::run(&blow.argv(&argv))?;
            let devices = remains::devices()?;
            let pid = devices.first().and_then(|device| device.pid).context("a server")?;
            blow.arm()?;
            kill(Pid::from_raw(i32::try_from(pid)?), Signal::SIGTERM)?;
            wait_for("the server to end", Duration::from_secs(40), || {
                Ok((!remains::processes().iter().any(|it| it.pid == pid)).then_some(()))
            })?;
            blow.ensure_fallen()?;
            storm.clean_up()?;
        }
    }
    Ok(storm.figure("kills"))
}

/// `del` and its helper are killed, and the server that it waits for.
pub fn del(ctx: &Ctx) -> Result<Outcome> {
    let mut storm = Storm::new()?;
    let backing = storm.backing();
    let backing = text(&backing)?;
    let own = DELETING.into_iter().map(|step| (step, "self"));
    let helpers = [("command-sent", "self"), ("command-sent", "parent"), (ROLE[1], "self")];
    for (turn, (step, whom)) in own.chain(helpers).enumerate() {
        for more in in_turn(ctx, turn) {
            storm.blow(&format!("{step}: {whom} is killed, of `del` {more:?}"));
            process::run(&[&[PROGRAM], &arguments(backing, more)[..]].concat())?;
            let blow = Blow::new(ctx, step, whom, "SIGKILL")?;
            let output = blow.run(&["del", "-n", ID])?;
            blow.ensure_fallen()?;
            ensure!(!output.status.success(), "{}", said(&output));
            storm.clean_up()?;
        }
    }
    for step in &ENDING[1..] {
        storm.blow(&format!("{step}: the server is killed during `del`"));
        let blow = Blow::later(ctx, step, "self", "SIGKILL")?;
        let argv = arguments(backing, &["--supervise"]);
        process::run(&blow.argv(&argv))?;
        blow.arm()?;
        process::run(&[PROGRAM, "del", "-n", ID])?;
        blow.ensure_fallen()?;
        remains::ensure_none()?;
        storm.add_again()?;
    }
    Ok(storm.figure("kills"))
}

/// A server that is told to end before its device is announced leaves nothing, and the command
/// fails.
pub fn signals(ctx: &Ctx) -> Result<Outcome> {
    const ENDINGS: [&str; 2] = ["SIGTERM", "SIGINT"];
    let mut storm = Storm::new()?;
    let backing = storm.backing();
    let backing = text(&backing)?;
    let modes = [&[][..], &["--supervise"], &["--foreground"], &["--supervise", "--foreground"]];
    for (turn, step) in ADDING.iter().enumerate() {
        for (mode, more) in modes.into_iter().enumerate() {
            for (number, signal) in ENDINGS.iter().enumerate() {
                // One signal for each step and mode, all of them in turn; in the short run one mode.
                let is_its_turn = number == (turn + mode) % ENDINGS.len()
                    && (ctx.long || mode == turn % modes.len());
                // To the server, and to its supervisor or the command.
                for whom in ["self", "parent"] {
                    let is_nobodys = whom == "parent" && more == ["--foreground"];
                    if is_nobodys || !is_its_turn {
                        continue;
                    }
                    storm.blow(&format!("{step}: {signal} to {whom} {more:?}"));
                    let blow = Blow::new(ctx, step, whom, signal)?;
                    let output = run(&blow, &arguments(backing, more))?;
                    blow.ensure_fallen()?;
                    // From then on it may have been heard.
                    let is_passed_on = whom == "parent" && more.contains(&"--supervise");
                    let is_close = matches!(*step, "live" | "announced");
                    ensure!(
                        is_close || is_passed_on || !output.status.success(),
                        "{}",
                        said(&output)
                    );
                    settle(is_close)?;
                    delete_if_there()?;
                    remains::ensure_none()?;
                }
            }
        }
    }
    storm.add_again()?;
    Ok(storm.figure("signals"))
}

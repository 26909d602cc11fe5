//! Servers that end in ways of their own, and what comes after them.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;

use super::Background;
use crate::config::DEFAULT;
use crate::guest::ublk::device::{Device, PROGRAM, fresh_drive, load_driver, text};
use crate::guest::ublk::remains;
use crate::guest::ublk::steps::ID;
use crate::guest::{Ctx, Outcome, TestCase, process, wait_for};

pub const TESTS: &[TestCase] = &[
    TestCase::guest("a_lane_that_panics_ends_its_server", DEFAULT, panics).seconds(180),
    TestCase::guest("a_supervisor_waits_for_what_is_lacking", DEFAULT, lacking).seconds(240),
];

/// In a lane of its own, in one with an I/O lane, and in one that a fleet shares: no I/O hangs, and the
/// device fares as after any death.
fn panics(ctx: &Ctx) -> Result<Outcome> {
    let fault = "UBLK_TARGET_FAULT=panic=3000";
    let read = format!("dd if=/dev/ublkb{ID} of=/dev/null bs=4k count=6000 iflag=direct");
    load_driver()?;
    let drive = fresh_drive("drive0")?;
    let drive = text(&drive.path())?.to_owned();
    let own = ["env", fault, PROGRAM, "add", "loop", "-f", &drive, "-n", ID];
    for more in [&[][..], &["--lend", "slot", "--io-lane"]] {
        process::run(&[&own[..], more].concat())?;
        ensure!(process::run(&["sh", "-c", &read]).is_err(), "the read must fail");
        remains::wait_for_state("DEAD")?;
        process::run(&[PROGRAM, "del", "-n", ID])?;
        process::run(&[&own[..], more, &["--on-death", "reissue"]].concat())?;
        let mut reader = Background::start(&["sh", "-c", &read])?;
        remains::wait_for_state("QUIESCED")?;
        // Recovered without the fault, it goes on.
        process::run(&[PROGRAM, "recover", "-n", ID])?;
        ensure!(reader.0.wait()?.success());
        process::run(&[PROGRAM, "del", "-n", ID])?;
    }
    let config = ctx.directory().join("serve.toml");
    let device = |id: &str, more: &str| {
        format!("[[device]]\nid = {id}\ntarget = \"null\"\nsize = \"1G\"\n{more}\n")
    };
    fs::write(&config, device(ID, "on-death = \"reissue\"") + &device("8", ""))?;
    let mut fleet =
        Command::new("env").args([fault, PROGRAM, "serve", "--config"]).arg(&config).spawn()?;
    remains::wait_for_state("LIVE")?;
    let mut reader = Background::start(&["sh", "-c", &read])?;
    ensure!(!fleet.wait()?.success());
    remains::wait_for_state("QUIESCED")?;
    remains::wait_for_state("DEAD")?;
    process::run(&[PROGRAM, "recover", "-n", ID])?;
    ensure!(reader.0.wait()?.success());
    process::run(&[PROGRAM, "del", "--all"])?;
    remains::ensure_none()?;
    Ok(Outcome::Pass)
}

/// With no room for its state: longer than a supervisor tries where a server fails for good.
fn lacking(ctx: &Ctx) -> Result<Outcome> {
    const RUN: &str = "/run/ublk-target";
    load_driver()?;
    fs::create_dir_all(RUN)?;
    process::run(&["mount", "-t", "tmpfs", "-o", "size=64k,mode=755", "tmpfs", RUN])?;
    let mut device = Device::add(&["null", "-n", ID, "--supervise"])?;
    let filler = Path::new(RUN).join("filler");
    // The supervisor and the next server see other mounts than this one by now, and the same files.
    let _ = fs::write(&filler, vec![0; 1 << 20]);
    let log = format!("/var/log/ublk-target/{ID}.log");
    process::signal(device.pid()?, Signal::SIGKILL)?;
    let tries = if ctx.long { 25 } else { 12 };
    wait_for("the attempts", Duration::from_secs(120), || {
        let text = fs::read_to_string(&log)?;
        Ok((text.matches(": recovering device").count() > tries).then_some(()))
    })
    .with_context(|| fs::read_to_string(&log).unwrap_or_default())?;
    let text = fs::read_to_string(&log)?;
    ensure!(text.contains("ENOSPC") && !text.contains("given up"), "{text}");
    fs::remove_file(&filler)?;
    let live = wait_for("a live device", Duration::from_secs(60), || {
        let devices = remains::devices()?;
        Ok(devices.into_iter().find(|it| it.state == "LIVE" && it.pid.is_some()))
    })?;
    ensure!(live.trouble.is_none() && live.supervisor == device.described.supervisor, "{live:?}");
    device.described = live;
    device.delete()?;
    process::run(&["umount", RUN])?;
    Ok(Outcome::Pass)
}

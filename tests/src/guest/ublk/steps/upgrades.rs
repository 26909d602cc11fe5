//! Each named step of an upgrade.

use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::commands::{in_turn, is_of_this_run, orphan, said};
use super::{Blow, ID, RECOVERING, ROLE, Storm, UPGRADING, verify};
use crate::guest::ublk::device::{Description, PROGRAM, text};
use crate::guest::ublk::{remains, upgrade};
use crate::guest::{Ctx, Outcome, process, wait_for};

/// Who is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Victim {
    Server,
    /// The process that has the driver hold I/O back.
    Helper,
    Command,
}

/// The device, once it is served.
fn served() -> Result<Description> {
    wait_for("a server", Duration::from_secs(30), || {
        let mut devices = remains::devices()?.into_iter();
        Ok(devices.find(|device| device.state == "LIVE" && device.pid.is_some()))
    })
}

/// Whoever is killed at whatever step: the device is served by one of the two programs, with what
/// was written before, and can be upgraded.
pub fn upgrade(ctx: &Ctx) -> Result<Outcome> {
    let mut storm = Storm::new()?;
    let backing = storm.backing();
    let backing = text(&backing)?;
    let programs = upgrade::programs(ctx)?;
    let [one, two] = [text(&programs[0])?, text(&programs[1])?];
    let servers = UPGRADING.into_iter().chain(ROLE).chain(RECOVERING);
    let servers = servers.map(|step| (step, "self", Victim::Server));
    let helpers = [
        ("quiescing", "self", Victim::Helper),
        ("quiesce-sent", "self", Victim::Helper),
        ("quiescing", "parent", Victim::Server),
        ("quiesce-sent", "parent", Victim::Server),
    ];
    let commands = ["upgrade-checked", "upgrade-sent"].map(|step| (step, "self", Victim::Command));
    let all = helpers.into_iter().chain(commands);
    let all = servers
        .filter(|(step, ..)| {
            [&UPGRADING[..], &ROLE].concat().contains(step) || is_of_this_run(ctx, step)
        })
        .chain(all);
    for (turn, (step, whom, victim)) in all.enumerate() {
        for more in in_turn(ctx, turn) {
            storm.blow(&format!("{step}: {whom}, the {victim:?}, is killed {more:?}"));
            let blow = Blow::later(ctx, step, whom, "SIGKILL")?;
            let add = ["add", "loop", "-f", backing, "-n", ID, "--on-death", "reissue"];
            let add = [&add, more].concat();
            let is_command = victim == Victim::Command;
            process::run(&if is_command {
                [&[PROGRAM], &add[..]].concat()
            } else {
                blow.argv(&add)
            })?;
            verify(&served()?)?;
            blow.arm()?;
            let arguments = ["upgrade", "-n", ID, "--program", one];
            if is_command {
                let output = blow.run(&arguments)?;
                ensure!(!output.status.success(), "{}", said(&output));
            } else {
                // Which of the two serves afterwards is what it says; the device is what matters.
                let output = std::process::Command::new(PROGRAM).args(arguments).output()?;
                println!("{}", said(&output));
            }
            blow.ensure_fallen()?;
            if more.is_empty() && matches!(step, "start-sent" | "live" | "announced") {
                // The command may have seen it live, and be gone.
                remains::recover_if_dead()?;
            }
            let device = served()?;
            verify(&device).with_context(|| format!("{device:?}"))?;
            ensure!(more.is_empty() || device.supervisor.is_some(), "{device:?}");
            process::run(&[PROGRAM, "upgrade", "-n", ID, "--program", two])?;
            let pid = served()?.pid.context("a server")?;
            let program = std::fs::read_link(format!("/proc/{pid}/exe"))?;
            ensure!(program == programs[1], "{}", program.display());
            // What dies now is recovered as ever.
            if more.is_empty() {
                orphan()?;
                process::run(&[PROGRAM, "recover", "-n", ID])?;
                verify(&served()?)?;
            }
            storm.clean_up()?;
        }
    }
    Ok(storm.figure("kills"))
}

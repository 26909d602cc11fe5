//! `recover`.

use std::collections::BTreeSet;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::ExitCode;

use ublk_target::control::error::{AnnounceError, RecoverError};
use ublk_target::control::recoverable;
use ublk_target::control::recovery;
use ublk_target::device::description::device_ids;
use ublk_target::device::paths::RUN_DIR;
use ublk_target::device::standing::{Order, sorted};
use ublk_target::device::state_file::recorded_ids;
use uring_ext::control::Control;

use super::Recover;
use super::device::Life;
use super::processes::{self, announce, announce_late, own};
use super::terminal::say;

/// Starts a new server for devices whose server is dead.
pub fn recover(args: &Recover, verbose: u8) -> anyhow::Result<ExitCode> {
    let Some(id) = args.which.id() else { return recover_all(args) };
    if args.which.positional().is_some() {
        // Other commands find the device of a process by its `-n ID`.
        let mut same = own();
        same.args(["recover", "-n", &id.to_string()]);
        same.args((0..verbose).map(|_| "-v")).args(options(&args.life));
        return Err(same.exec().into());
    }
    processes::live(&args.life, Some(id), verbose, |life| Ok(serve(id, life)?))
}

/// Recovers a device and serves it.
pub fn serve(id: u32, life: &Life) -> Result<(), RecoverError> {
    let mut progress = |what: &str| say!("{what} …");
    let helpers = processes::helpers(life);
    let on_live = |description: &_, choice: &_| {
        announce(life, description, Some(choice)).inspect_err(|error| {
            // If the caller is gone, the log is open already.
            if !matches!(error, AnnounceError::Abandoned) {
                announce_late(life, description);
            }
        })
    };
    recovery::recover(id, life.supervisor, life.next, &helpers, &mut progress, on_live)
}

/// Recovers each device in its own process. A device stacked on others comes after these.
fn recover_all(args: &Recover) -> anyhow::Result<ExitCode> {
    if args.life.foreground {
        anyhow::bail!("--foreground serves one device; give it with -n");
    }
    let control = Control::open()?;
    let mut code = ExitCode::SUCCESS;
    let recorded = recorded_ids(Path::new(RUN_DIR));
    // Those of other programs are not ours to recover.
    let mut waiting = BTreeSet::new();
    for id in device_ids().into_iter().filter(|id| recorded.contains(id)) {
        match recoverable::check(&control, id) {
            Ok(_) => {
                waiting.insert(id);
            }
            Err(
                RecoverError::Served { .. }
                | RecoverError::NoDevice(_)
                | RecoverError::NotRecoverable(_)
                | RecoverError::NotStarted(_),
            ) => {}
            Err(error) => {
                say!("{error}");
                code = ExitCode::FAILURE;
            }
        }
    }
    for id in sorted(&waiting, Order::LowerFirst) {
        let mut one = own();
        one.args(["recover", "-n", &id.to_string()]);
        one.args(options(&args.life));
        if !one.status()?.success() {
            code = ExitCode::FAILURE;
        }
    }
    Ok(code)
}

/// The user's options, for another process.
fn options(life: &Life) -> impl Iterator<Item = &'static str> {
    let Life { supervise, foreground, json, .. } = *life;
    let all = [(supervise, "--supervise"), (foreground, "--foreground"), (json, "--json")];
    all.into_iter().filter_map(|(is_given, option)| is_given.then_some(option))
}

//! `upgrade`.

use std::fmt::Display;
use std::fs;
use std::io::Read;
use std::ops::ControlFlow;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Child, ExitCode, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context;
use rustix::fs::{OFlags, fcntl_setfl};
use ublk_target::config::on_death::OnDeath;
use ublk_target::device::description::{self, Description, device_ids};
use ublk_target::device::paths::{self, RUN_DIR};
use ublk_target::device::program::Program;
use ublk_target::device::state_file::{StateFile, recorded_ids};
use ublk_target::os::kernel;
use ublk_target::os::process::Watch;
use ublk_target::os::steps::step;
use ublk_target::os::wait::{Wait, Words};
use ublk_target::socket::client::Client;
use uring_ext::control::Control;
use uring_ext::feature::{Features, QUIESCE};

use super::Upgrade;
use super::terminal::{print_line, say};

/// The longest wait for the new server; outstanding I/O must end first.
const PATIENCE: Duration = Duration::from_secs(60);

/// Upgrades devices to another program.
pub fn upgrade(args: &Upgrade) -> anyhow::Result<ExitCode> {
    let program = match &args.program {
        Some(program) => Program::open(program)?,
        None => Program::open(&std::env::current_exe().context("cannot find this program")?)?,
    };
    let control = Control::open()?;
    if let Some(id) = args.which.id() {
        one(&control, id, &program)?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut code = ExitCode::SUCCESS;
    let recorded = recorded_ids(Path::new(RUN_DIR));
    for id in device_ids().into_iter().filter(|id| recorded.contains(id)) {
        if let Err(error) = one(&control, id, &program) {
            say!("{error:#}");
            code = ExitCode::FAILURE;
        }
    }
    Ok(code)
}

fn one(control: &Control, id: u32, program: &Program) -> anyhow::Result<()> {
    let info = match control.info(id) {
        Err(error) if description::is_missing(&error) => {
            anyhow::bail!("there is no ublk device {id}")
        }
        info => info?,
    };
    let device = paths::block_path(id);
    let on_death = OnDeath::of_flags(info.flags);
    if !on_death.keeps_io() {
        anyhow::bail!(
            "{} was added with `--on-death {on_death}`: its I/O would fail instead of waiting; only \
             devices with `wait` or `reissue` can be upgraded",
            device.display()
        );
    }
    if !Features(info.flags).has(QUIESCE) {
        anyhow::bail!(
            "upgrading needs the ublk feature QUIESCE (Linux {} or newer), but {} was added \
             without it (this kernel: {})",
            QUIESCE.since,
            device.display(),
            kernel::release().unwrap_or_default()
        );
    }
    let pid = u32::try_from(info.ublksrv_pid).unwrap_or(0);
    // The one to fall back to, even if its file is replaced meanwhile. A dead server has none.
    let old = Program::of_process(pid);
    check(program, id)?;
    let before = StateFile::read(Path::new(RUN_DIR), id)?;
    let server = Watch::on(pid);
    step("upgrade-checked");
    let began = Instant::now();
    let asked = Client::connect(id).and_then(|mut client| client.upgrade(program));
    let has_answered = match asked {
        // It is dead, or dies now: the device gets the new program as its next server.
        Err(_) if server.has_ended(Duration::from_millis(500)) => false,
        asked => {
            asked?;
            true
        }
    };
    step("upgrade-sent");
    let old = old.or_else(|| Program::open(&before.program).ok());
    let programs: Vec<_> = std::iter::once(program).chain(&old).collect();
    let (record, next) =
        await_next(control, id, before.incarnation, &server, has_answered, began, &programs)?;
    let is_new = next.map_or_else(
        || record.program == program.path(),
        |next| (next.dev(), next.ino()) == program.identity(),
    );
    if !is_new {
        anyhow::bail!(
            "{} could not take over; {} is served by {} again; see {}",
            program.path().display(),
            device.display(),
            record.program.display(),
            paths::log_path(id).display()
        );
    }
    print_line(format_args!(
        "{}: served by {} (I/O waited for less than {:.0?})",
        device.display(),
        program.path().display(),
        began.elapsed()
    ))?;
    Ok(())
}

/// The longest wait until a program says whether it can serve a device.
const PATIENCE_TO_CHECK: Duration = Duration::from_secs(30);

/// Whether the program starts, and understands the device and its backings.
fn check(program: &Program, id: u32) -> anyhow::Result<()> {
    let path = program.path().display();
    let checking = program
        .command()
        .args(["check-state", "-n", &id.to_string()])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("{path} cannot be started; nothing has changed"))?;
    let Some(Checked { status, out, err }) = ended(checking, PATIENCE_TO_CHECK, &path.to_string())?
    else {
        let waited = PATIENCE_TO_CHECK.as_secs();
        anyhow::bail!(
            "{path} did not say within {waited} s whether it can serve device {id}; nothing has changed"
        );
    };
    if status.success() && out.trim_end() == can_serve(id) {
        return Ok(());
    }
    let said = err.lines().next().map(str::trim).filter(|line| !line.is_empty());
    let said = match said {
        Some(line) => line.to_owned(),
        None if status.success() => "it is another program".to_owned(),
        None => status.to_string(),
    };
    anyhow::bail!("{path} cannot serve device {id}: {said}; nothing has changed");
}

/// The output of a program that can serve a device. An exit code of 0 is not enough, since any
/// program may have it.
pub fn can_serve(id: u32) -> String {
    format!("can serve device {id}")
}

/// The result of a program.
struct Checked {
    status: ExitStatus,
    out: String,
    err: String,
}

/// Waits for the end of a program, and kills it after `patience`. Its output until then comes with
/// its status. Its children may still have its pipes open.
fn ended(mut child: Child, patience: Duration, path: &str) -> anyhow::Result<Option<Checked>> {
    let watch = Watch::on(child.id());
    let tell = |what: &dyn Display, _| say!("waiting for {what} …");
    let mut wait = Wait::at_most(patience).reporting_once(Duration::from_secs(2), tell);
    let what = Words(|| format!("{path} to check the device"));
    let has_ended = wait.until_or(watch.fd(), || match watch.has_ended(Duration::ZERO) {
        true => ControlFlow::Break(()),
        false => ControlFlow::Continue(&what),
    });
    if has_ended.is_err() {
        // It may have ended now.
        let _ = child.kill();
        child.wait()?;
        return Ok(None);
    }
    let out = child.stdout.take().map_or_else(|| Ok(String::new()), said_so_far)?;
    let err = child.stderr.take().map_or_else(|| Ok(String::new()), said_so_far)?;
    Ok(Some(Checked { status: child.wait()?, out, err }))
}

fn said_so_far(pipe: impl Read + AsFd) -> anyhow::Result<String> {
    fcntl_setfl(&pipe, OFlags::NONBLOCK)?;
    let mut said = Vec::new();
    // No more is there where that fails.
    let _ = pipe.take(64 << 10).read_to_end(&mut said);
    Ok(String::from_utf8_lossy(&said).into_owned())
}

/// Waits until the device has its next server. Returns its state file, and the file of its program
/// unless another pid namespace hides the server. If the present server dies meanwhile, one of the
/// programs recovers the device.
fn await_next(
    control: &Control,
    id: u32,
    before: u32,
    server: &Watch,
    has_answered: bool,
    began: Instant,
    programs: &[&Program],
) -> anyhow::Result<(StateFile, Option<fs::Metadata>)> {
    let is_hidden = server.fd().is_none() && has_answered;
    let mut programs = programs.iter();
    let mut attempt = || {
        let next = next_server(control, id, before, is_hidden)?;
        // One that cannot be seen, in another pid namespace, has answered, and may live.
        if next.is_none() && !is_hidden && server.has_ended(Duration::ZERO) {
            recover_by(id, programs.next())?;
        }
        Ok(next)
    };
    let tell = |what: &dyn Display, _| say!("waiting for {what} …");
    let words = Duration::from_secs(2);
    // Nobody tells when a server is live.
    let mut wait = Wait::at_most(PATIENCE).since(began).every(Duration::from_millis(2));
    wait = wait.reporting(words, words, tell);
    let what = Words(|| format!("the outstanding I/O of device {id}"));
    let found = wait.until_or(server.fd(), || match attempt() {
        Ok(None) => ControlFlow::Continue(&what),
        Ok(Some(next)) => ControlFlow::Break(Ok(next)),
        Err(error) => ControlFlow::Break(Err(error)),
    });
    found.unwrap_or_else(|unmet| {
        Err(anyhow::anyhow!(
            "device {id} has had no new server for {} s, probably because I/O is outstanding on \
             its backings; the upgrade continues when that ends",
            unmet.waited.as_secs()
        ))
    })
}

/// The next server of a device, if it is there: what it has written down, and the file of its program.
fn next_server(
    control: &Control,
    id: u32,
    before: u32,
    is_hidden: bool,
) -> anyhow::Result<Option<(StateFile, Option<fs::Metadata>)>> {
    let Ok(record) = StateFile::read(Path::new(RUN_DIR), id) else { return Ok(None) };
    let described = Description::of(control, id)?;
    // What the record has is its id in its own pid namespace.
    let next = described.pid.filter(|_| described.state == "LIVE");
    // It may be dead again before the driver knows.
    let next = next.and_then(|pid| fs::metadata(format!("/proc/{pid}/exe")).ok());
    let is_there = next.is_some() || is_hidden && described.state == "LIVE";
    Ok((is_there && record.incarnation != before).then_some((record, next)))
}

/// Has a program recover a device whose server has died.
fn recover_by(id: u32, program: Option<&&Program>) -> anyhow::Result<()> {
    let Some(program) = program else {
        anyhow::bail!(
            "the server of device {id} has died, and no other program could recover it; \
             `ublk-target recover -n {id}` tries again"
        );
    };
    say!("the server of device {id} has died: recovering it");
    let recovered =
        program.command().args(["recover", "-n", &id.to_string()]).stdout(Stdio::null()).status();
    // A supervisor may have been faster; then the state shows it.
    if let Err(error) = recovered {
        say!("{}: {error}", program.path().display());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    fn start(script: &str) -> Child {
        let mut shell = Command::new("sh");
        shell.args(["-c", script]).stdin(Stdio::null()).stdout(Stdio::null());
        shell.stderr(Stdio::piped()).spawn().unwrap()
    }

    #[test]
    fn a_program_that_is_asked_cannot_hold_the_command_up() {
        let minute = Duration::from_secs(60);
        // A process that it leaves has its standard error open.
        let left = start("sleep 60 & echo $! >&2; exit 3");
        let began = Instant::now();
        let Checked { status, err, .. } = ended(left, minute, "it").unwrap().unwrap();
        assert!(began.elapsed() < minute / 2);
        assert_eq!(status.code(), Some(3));
        let pid = err.trim().parse().unwrap();
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::SIGKILL).unwrap();
        let endless = start("exec sleep 60");
        assert!(ended(endless, Duration::from_millis(10), "it").unwrap().is_none());
        assert!(began.elapsed() < minute / 2);
    }
}

//! The processes of one command: the one that the user waits for, the server, its supervisor, and
//! helpers for operations that these must not do themselves.
//!
//! The command starts itself again in another role, with a pipe as standard output, and waits for
//! the line that the server prints when the device is live. Errors reach the user on standard
//! error, which the server keeps until then; afterwards it logs to a file.

use std::io::{self, BufRead, BufReader, IsTerminal, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};

use anyhow::Context;
use clap::ValueEnum;
use clap::builder::PossibleValue;
use nix::poll::PollTimeout;
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, dup2_stderr, dup2_stdout, setsid};
use sd_notify::NotifyState;
use ublk_target::config::lend::Choice;
use ublk_target::control::deletion::{self, Deletion};
use ublk_target::control::error::{AnnounceError, ServerError, SetupError};
use ublk_target::control::helpers::Helpers;
use ublk_target::control::supervisor::{End, NotRecovered, Policy, supervise};
use ublk_target::device::description::{self, Description};
use ublk_target::device::mark::Nonce;
use ublk_target::device::paths::RUN_DIR;
use ublk_target::device::program::Program;
use ublk_target::device::role_file;
use ublk_target::device::state_file::{self, StateFile};
use ublk_target::os::inherited;
use ublk_target::os::memory::OomWatch;
use ublk_target::os::steps::step;
use ublk_target::os::wakeups::{Hangup, Wake, Wakeups};
use uring_ext::control::Control;

use super::device::{Life, Role};
use super::logging::{self, To};
use super::role;
use super::terminal::say;

/// Acts by the role of this process: serves, supervises a server, or starts one of these and waits
/// until the device is live. `device` is its device, if known.
pub fn live(
    life: &Life,
    device: Option<u32>,
    verbose: u8,
    serve: impl FnOnce(&Life) -> Result<(), ServerError>,
) -> anyhow::Result<ExitCode> {
    let role = match (life.role, life.foreground, life.supervise) {
        (Some(role), _, _) => role,
        (None, true, true) => Role::Supervisor,
        (None, true, false) => Role::Server,
        (None, false, supervise) => {
            let role = if supervise { Role::Supervisor } else { Role::Server };
            let nonce = Nonce::own().to_string();
            return start(own().args(arguments()).args(["--role", name(role), "--nonce", &nonce]));
        }
    };
    let is_in_background = !life.foreground && life.role.is_some();
    logging::start(verbose, "info", if is_in_background { To::UserFirst } else { To::Terminal });
    inherited::shed();
    if let Some(nonce) = life.nonce {
        nonce.adopt();
    }
    if let Some(program) = &life.program {
        state_file::adopt_program(program);
    }
    let _file = role::say(role, device, life);
    if is_in_background && !life.next {
        setsid().context("cannot leave the session")?;
    }
    match role {
        Role::Server => match serve(life) {
            Ok(()) => Ok(ExitCode::SUCCESS),
            Err(error) if error.is_passing() && life.supervisor.is_some() => {
                say!("{error}");
                Ok(ExitCode::from(LACKING))
            }
            Err(error) => Err(error.into()),
        },
        Role::Supervisor => supervise_new(life),
    }
}

/// Exit code of a server, for its supervisor, after a temporary shortage (`EX_TEMPFAIL` of
/// `sysexits.h`).
const LACKING: u8 = 75;

const fn name(role: Role) -> &'static str {
    match role {
        Role::Server => "server",
        Role::Supervisor => "supervisor",
    }
}

/// This program, even if its file was replaced, or its path differs in another mount namespace.
pub fn own() -> Command {
    let mut command = Command::new("/proc/self/exe");
    command.arg0(env!("CARGO_PKG_NAME"));
    command
}

/// The user's arguments, without the role.
fn arguments() -> Vec<std::ffi::OsString> {
    let mut arguments: Vec<_> = std::env::args_os().skip(1).collect();
    for own in ["--role", "--nonce"] {
        if let Some(at) = arguments.iter().position(|argument| argument == own) {
            arguments.drain(at..(at + 2).min(arguments.len()));
        }
    }
    arguments
}

/// Starts a process and waits until its device is live, or it has ended.
fn start(command: &mut Command) -> anyhow::Result<ExitCode> {
    match wait_for_line(command.stdin(Stdio::null()), None)? {
        Ok((_, line)) => {
            let mut out = io::stdout();
            let printed = out.write_all(line.as_bytes()).and_then(|()| out.flush());
            if let Err(error) = printed {
                // As if the server could not have told this command.
                let fate = if take_back() { "deleted again" } else { "still served" };
                anyhow::bail!("cannot print the live device: {error}; it is {fate}");
            }
            Ok(ExitCode::SUCCESS)
        }
        Err(ended) => {
            take_back();
            has_failed(&ended)
        }
    }
}

/// Exit code when the server failed. The server has reported why; if it could not, this reports how
/// it ended.
fn has_failed(ended: &Ended) -> anyhow::Result<ExitCode> {
    if let Some(shortage) = &ended.shortage {
        anyhow::bail!("the kernel has killed the server: {shortage}");
    }
    let status = ended.status;
    match status.code().and_then(|code| u8::try_from(code).ok()) {
        Some(LACKING) => Ok(ExitCode::FAILURE),
        Some(code) if code > 0 => Ok(ExitCode::from(code)),
        _ => anyhow::bail!("the server ended before its device was live ({status})"),
    }
}

/// A process that has ended before it printed a line.
struct Ended {
    status: ExitStatus,
    /// The memory that it lacked, if the out-of-memory killer killed it.
    shortage: Option<String>,
    /// Its standard error, if that was a pipe.
    said: String,
    /// The last signal passed on to it.
    told: Option<Signal>,
}

/// Starts a process, and waits for a line from it or for its end. Signals are passed on to it. If
/// its standard error is a pipe, the text until then is passed on, too.
fn wait_for_line(
    command: &mut Command,
    wakeups: Option<&Wakeups>,
) -> anyhow::Result<Result<(Child, String), Ended>> {
    let oom_watch = OomWatch::start();
    let mut server = command.stdout(Stdio::piped()).spawn().context("cannot start the server")?;
    step(if wakeups.is_some() { "supervisor-started-it" } else { "started-it" });
    let (mut line, mut told) = (String::new(), None);
    if let Some(out) = server.stdout.take() {
        while let Some(Wake::Signal(signal)) =
            wakeups.map(|wakeups| wakeups.wait_or(out.as_fd(), PollTimeout::NONE))
        {
            told = Some(signal);
            // It can only fail if the server has ended.
            let _ = kill(Pid::from_raw(i32::try_from(server.id())?), signal);
        }
        BufReader::new(out).read_line(&mut line).context("cannot read the server's answer")?;
    }
    step(if wakeups.is_some() { "supervisor-heard-it" } else { "heard-it" });
    let mut said = Vec::new();
    if let Some(mut error) = server.stderr.take() {
        // By now it has ended, or logs elsewhere.
        error.read_to_end(&mut said).context("cannot read the server's errors")?;
        // There is nobody else to be told.
        let _ = io::stderr().write_all(&said);
    }
    if line.ends_with('\n') {
        return Ok(Ok((server, line)));
    }
    let status = server.wait().context("cannot wait for the server")?;
    let is_killed = status.signal() == Some(Signal::SIGKILL as i32);
    let shortage = if is_killed { oom_watch.shortage() } else { None };
    Ok(Err(Ended { status, shortage, said: String::from_utf8_lossy(&said).into_owned(), told }))
}

/// Deletes an unannounced device that the server of this command has added, and returns whether
/// there was one. A recovered device has another mark.
fn take_back() -> bool {
    role_file::sweep(Path::new(RUN_DIR));
    let Ok(control) = Control::open() else { return false };
    let is_its =
        |id: &u32| control.info(*id).is_ok_and(|info| Nonce::of(&info) == Some(Nonce::own()));
    let mut has_taken = false;
    for id in description::device_ids().into_iter().filter(is_its) {
        has_taken = true;
        let progress = &mut |what: &str| say!("{what}");
        let mut deletion =
            Deletion { control: &control, force: false, helper: &delete_by, progress };
        if let Err(error) = deletion.delete(id) {
            log::error!("{error}");
        }
    }
    has_taken
}

/// Starts a server, and supervises it.
fn supervise_new(life: &Life) -> anyhow::Result<ExitCode> {
    // Before the server is there, so that no signal is lost.
    let wakeups = wakeups(life.foreground)?;
    let pid = std::process::id().to_string();
    let mut command = own();
    if life.foreground {
        // Its own group: this process passes the terminal's signals on.
        command.process_group(0);
    }
    let nonce = Nonce::own().to_string();
    command.args(arguments()).args(["--role", "server", "--supervisor", &pid, "--nonce", &nonce]);
    if !life.json {
        command.arg("--json");
    }
    let (server, line) = match wait_for_line(command.stdin(Stdio::null()), Some(&wakeups))? {
        Ok(started) => started,
        Err(ended) => {
            take_back();
            return has_failed(&ended);
        }
    };
    let description: Description =
        serde_json::from_str(&line).context("the server's answer is not valid")?;
    if let Err(error) = announce(life, &description, None) {
        if take_back() {
            return Err(error.into());
        }
        // The device existed before the recovery, so it stays even if the caller is gone.
        log::warn!("recovered, but: {error}");
    }
    step("supervising");
    watch(description.id, server.id(), life.foreground, &wakeups)
}

/// Supervises a device that has a server.
pub fn supervise_device(id: u32, server: u32, verbose: u8) -> anyhow::Result<ExitCode> {
    logging::start(verbose, "info", To::File);
    inherited::shed();
    let _file = role::say_of_device(role_file::Role::Supervisor, Some(id));
    setsid().context("cannot leave the session")?;
    std::env::set_current_dir("/")?;
    if let (_, Some(problem)) = logging::to_file_of(id)? {
        log::warn!("{problem}");
    }
    let wakeups = wakeups(false)?;
    watch(id, server, false, &wakeups)
}

fn wakeups(foreground: bool) -> anyhow::Result<Wakeups> {
    let hangup = if ends_with_terminal(foreground) { Hangup::Ends } else { Hangup::IsApart };
    Wakeups::new(hangup).map_err(|errno| anyhow::anyhow!("cannot wait for signals: {errno}"))
}

/// Whether the process belongs to a terminal; then SIGHUP means the end of the terminal.
fn ends_with_terminal(foreground: bool) -> bool {
    foreground && io::stderr().is_terminal()
}

/// Reopens the log on SIGHUP. A process in the foreground keeps its standard error.
fn reopen_log(foreground: bool, id: u32) {
    if !foreground {
        logging::reopen(id);
    }
}

fn watch(id: u32, server: u32, foreground: bool, wakeups: &Wakeups) -> anyhow::Result<ExitCode> {
    log::info!("supervising the server ({server}) of device {id}");
    let recover = |id: u32| {
        reap();
        recover_under(id, foreground, wakeups)
    };
    let reopen = || reopen_log(foreground, id);
    let end = supervise(id, server, Policy::default(), wakeups, &recover, &reopen)?;
    match end {
        End::Stopped => Ok(ExitCode::SUCCESS),
        End::GivenUp(_) => Ok(ExitCode::FAILURE),
    }
}

/// Reaps servers that have died.
fn reap() {
    use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
    while let Ok(status) = waitpid(None, Some(WaitPidFlag::WNOHANG)) {
        if status == WaitStatus::StillAlive {
            break;
        }
        log::warn!("{status:?}");
    }
}

/// Starts a server that recovers a device, with this process as its supervisor. It runs the program
/// of the last server, which may be newer, or else this program.
fn recover_under(id: u32, foreground: bool, wakeups: &Wakeups) -> Result<u32, NotRecovered> {
    let last = StateFile::read(Path::new(RUN_DIR), id).ok().map(|record| record.program);
    let last = last.and_then(|path| match Program::open(&path) {
        Ok(program) => Some(program),
        Err(error) => {
            log::info!("{error}: using this program instead");
            None
        }
    });
    let programs = last.as_ref().map(Program::command).into_iter().chain([own()]);
    let mut result = Err(NotRecovered::Failed("no program".to_owned()));
    for program in programs {
        result = recover_with(program, id, foreground, wakeups);
        if !matches!(result, Err(NotRecovered::Failed(_) | NotRecovered::Lacking(_))) {
            break;
        }
    }
    result
}

fn recover_with(
    mut command: Command,
    id: u32,
    foreground: bool,
    wakeups: &Wakeups,
) -> Result<u32, NotRecovered> {
    let (id, pid) = (id.to_string(), std::process::id().to_string());
    command.args(["recover", "-n", &id, "--role", "server", "--supervisor", &pid, "--json"]);
    if foreground {
        command.arg("--foreground");
    } else {
        command.stderr(Stdio::piped());
    }
    // Processes or descriptors have run out for now.
    let heard = wait_for_line(command.stdin(Stdio::null()), Some(wakeups))
        .map_err(|error| NotRecovered::Lacking(format!("{error:#}")))?;
    let Ended { status, shortage, said, told } = match heard {
        Ok((server, _)) => return Ok(server.id()),
        Err(ended) => ended,
    };
    if let Some(signal) = told {
        return Err(NotRecovered::Signal(signal));
    }
    if let Some(shortage) = shortage {
        return Err(NotRecovered::Lacking(shortage));
    }
    let why = match said.trim_end().lines().last() {
        Some(last) if status.code().is_some() => {
            last.strip_prefix("ublk-target: ").unwrap_or(last).to_owned()
        }
        _ => format!("a server that should recover it ended ({status})"),
    };
    if status.code() == Some(LACKING.into()) {
        return Err(NotRecovered::Lacking(why));
    }
    Err(NotRecovered::Failed(why))
}

/// The operations that a server leaves to other processes.
///
/// `life` has the options of this process.
pub fn helpers(life: &Life) -> Helpers<'_> {
    Helpers {
        stop: Box::new(|id| delete_by(id, deletion::Command::Stop)),
        supervise: Box::new(move |id| {
            let own = std::process::id().to_string();
            prepare(&["supervise", "-n", &id.to_string(), "--server", &own]).spawn()
        }),
        quiesce: Box::new(quiesce_by),
        become_next: Box::new(|id, program, supervisor| {
            let mut command = program.command();
            command.args(["recover", "-n", &id.to_string(), "--role", "server", "--next"]);
            // The server's mounts need not have it.
            command.arg("--program").arg(program.path());
            if let Some(pid) = supervisor {
                command.args(["--supervisor", &pid.to_string()]);
            }
            command.args(life.foreground.then_some("--foreground"));
            command.exec()
        }),
        reopen_log: if ends_with_terminal(life.foreground) {
            None
        } else {
            Some(Box::new(|id| reopen_log(life.foreground, id)))
        },
    }
}

/// Starts a process that quiesces a device of the calling process.
pub fn quiesce_by(id: u32) -> io::Result<Child> {
    let own = std::process::id().to_string();
    let mut helper = prepare(&["quiesce-device", "-n", &id.to_string(), "--server", &own]);
    helper.process_group(0).spawn()
}

/// Starts a process that gives the driver a command that may take long.
pub fn delete_by(id: u32, command: deletion::Command) -> io::Result<Child> {
    let command = command.to_possible_value();
    let command = command.as_ref().map_or("stop", PossibleValue::get_name);
    let mut helper = prepare(&["stop-device", "-n", &id.to_string(), "--command", command]);
    // Its own group: the terminal's signals are for others.
    helper.process_group(0).spawn()
}

fn prepare(arguments: &[&str]) -> Command {
    let mut command = own();
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null());
    command
}

/// Announces the live device to the user. A process in the background then logs to its file.
pub fn announce(
    life: &Life,
    description: &Description,
    choice: Option<&Choice>,
) -> Result<(), AnnounceError> {
    if let Some(choice) = choice.filter(|choice| choice.is_fallback) {
        say!("note: lend mode {}: {}", choice.mode, choice.reason);
    }
    let line = if life.json {
        serde_json::to_string(description).map_err(|_| AnnounceError::Abandoned)?
    } else {
        description.device.display().to_string()
    };
    if life.foreground || life.role.is_none() {
        // For `Type=notify` units; without systemd it does nothing. A supervisor does it for its
        // server.
        let notified = life.role.is_none().then(|| sd_notify::notify(&[NotifyState::Ready]));
        if let Some(Err(error)) = notified {
            log::warn!("cannot tell the service manager: {error}");
        }
        return say(&mut io::stdout().lock(), &line);
    }
    // It would keep the caller's directory busy.
    let away = std::env::set_current_dir("/");
    let logged = away.and_then(|()| logging::to_file_of(description.id));
    let (mut user, problem) =
        logged.map_err(|error| SetupError::of_io("cannot leave the terminal", &error))?;
    if let Some(problem) = problem {
        // Standard error is the log by now, if there is any.
        log::warn!("{problem}");
    }
    log::set_max_level(log::LevelFilter::Trace);
    log::info!("serving {line}");
    say(&mut user, &line)
}

/// Announces a live device at least to the waiting command, if [`announce`] could not, and closes
/// the pipe to it.
pub fn announce_late(life: &Life, description: &Description) {
    if life.foreground || life.role.is_none() {
        return;
    }
    let line = if life.json {
        serde_json::to_string(description).unwrap_or_default()
    } else {
        description.device.display().to_string()
    };
    // The waiting command may be gone.
    let _ = say(&mut io::stdout().lock(), &line);
    // Standard input is the null device, and this takes no descriptor.
    let _ = dup2_stdout(io::stdin()).and_then(|()| dup2_stderr(io::stdin()));
}

fn say(user: &mut impl Write, line: &str) -> Result<(), AnnounceError> {
    writeln!(user, "{line}").and_then(|()| user.flush()).map_err(|_| AnnounceError::Abandoned)
}

//! `vm run` and `vm shell`: one program, or a terminal, in a fresh guest.

use std::io::{IsTerminal, Read};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};
use std::os::fd::AsFd;

use crate::cleanup::{self, RunDir, fail};
use crate::config::VmConfig;
use crate::image::{self, Image};
use crate::payload::{self, Set};
use crate::proto::{ExitState, Frame, Job, ToGuest, WindowSize};
use crate::vm::{JobResult, Sink, Vm, pass_on};
use crate::{paths, ui};

/// A day: programs that the user runs end when they end.
const NO_TIMEOUT: Duration = Duration::from_secs(24 * 3600);
/// How often the size of the terminal is looked at.
const SIZE_INTERVAL_MS: u16 = 500;

/// Makes all that a boot needs, the image and these programs, with more of them on the payload
/// disk; the directory holds that disk.
///
/// # Errors
/// When the image or the programs cannot be made.
pub fn prepare(set: &Set, more: &[PathBuf]) -> Result<(Image, RunDir, PathBuf)> {
    let (image, mut programs) = image_and_programs(set)?;
    programs.extend_from_slice(more);
    let directory = RunDir::create(&paths::cache()?.join("run"))?;
    let disk = directory.path().join("payload.img");
    payload::make_disk(&programs, &disk)?;
    Ok((image, directory, disk))
}

/// Makes the image and these programs. Where there is no image yet, both at the same time: the
/// image waits for a network and disks, and much of it is done by one thread.
///
/// # Errors
/// As [`prepare()`]. Where both are made at the same time and one fails, the program ends.
fn image_and_programs(set: &Set) -> Result<(Image, Vec<PathBuf>)> {
    if let Some(image) = image::present_image()? {
        return Ok((image, payload::build(set)?));
    }
    side_by_side(image::ensure_image, || payload::build(set))
}

/// Does one thing in a thread of its own, and another one in this thread. If one of them fails, the
/// program ends, with the child processes of both: what the other one does is of no use then.
fn side_by_side<A: Send, B>(
    one: impl FnOnce() -> Result<A> + Send,
    other: impl FnOnce() -> Result<B>,
) -> Result<(A, B)> {
    std::thread::scope(|scope| {
        // It lives as long as the children that it starts, as `cleanup::command` demands.
        let one = std::thread::Builder::new()
            .name("beside".into())
            .spawn_scoped(scope, || one().unwrap_or_else(|error| fail(&error)))?;
        let other = other().unwrap_or_else(|error| fail(&error));
        let one = one.join().map_err(|_| anyhow!("a thread panicked"))?;
        Ok((one, other))
    })
}

fn boot(config: &VmConfig, set: &Set) -> Result<(Vm, RunDir)> {
    let (image, directory, disk) = prepare(set, &[])?;
    ui::status("booting the guest");
    let mut vm = Vm::boot(config, &image, &disk)?;
    if !config.icount {
        vm.watch_silence(Some(config.silence_timeout));
    }
    ui::clear();
    Ok((vm, directory))
}

/// Boots, runs one program with its output passed on, powers off, and returns
/// the program's exit code.
///
/// # Errors
/// When the guest cannot be booted or goes down.
pub fn run(
    config: &VmConfig,
    set: &Set,
    argv: Vec<String>,
    timeout: Option<Duration>,
) -> Result<ExitCode> {
    let (mut vm, _directory) = boot(config, set)?;
    let job = Job { argv, ..Job::default() };
    let result = vm.run(&job, timeout.unwrap_or(NO_TIMEOUT), &mut pass_on)?;
    vm.power_off()?;
    if let Some(report) = &result.timed_out {
        ui::note(&format!("ran over its time and was killed; it was at:\n{}", report.trim_end()));
    }
    Ok(exit_code(&result))
}

fn exit_code(result: &JobResult) -> ExitCode {
    let code = match result.state {
        _ if result.timed_out.is_some() => 124,
        ExitState::Code(code) => code & 0xff,
        ExitState::Signal(signal) => 128 + signal,
    };
    ExitCode::from(u8::try_from(code).unwrap_or(1))
}

/// Boots and gives the user a shell; leaving it switches the guest off.
///
/// # Errors
/// When there is no terminal, or the guest cannot be booted or goes down.
pub fn shell(config: &VmConfig, set: &Set) -> Result<ExitCode> {
    anyhow::ensure!(
        std::io::stdin().is_terminal() && std::io::stdout().is_terminal(),
        "a shell needs a terminal; use `vm run -- COMMAND` without one"
    );
    let (mut vm, _directory) = boot(config, set)?;
    ui::note(&format!("kernel {}; leave with `exit`, which powers off", vm.kernel()));
    let terminal = std::env::var("TERM").unwrap_or_else(|_| "vt100".into());
    let job = Job {
        // Not a login shell: its profile would take the programs out of PATH.
        argv: ["/bin/bash", "-i"].map(String::from).to_vec(),
        env: vec![("TERM".into(), terminal)],
        terminal: Some(window_size()),
    };
    let raw = RawTerminal::enter()?;
    let sink = vm.sink();
    // Ends with the process: it may be waiting for a key.
    std::thread::Builder::new().name("keyboard".into()).spawn(move || type_in(&sink))?;
    let result = vm.run(&job, NO_TIMEOUT, &mut pass_on);
    drop(raw);
    let result = result?;
    vm.power_off()?;
    Ok(exit_code(&result))
}

/// The size of the user's terminal; the usual one where there is none.
pub fn window_size() -> WindowSize {
    let size = rustix::termios::tcgetwinsize(std::io::stdout());
    let size = size.ok().filter(|size| size.ws_row > 0 && size.ws_col > 0);
    size.map_or(WindowSize { rows: 24, columns: 80 }, |size| WindowSize {
        rows: size.ws_row,
        columns: size.ws_col,
    })
}

/// Sends what the user types, and each new size of the terminal.
fn type_in(sink: &Sink) {
    let stdin = std::io::stdin();
    let mut size = window_size();
    let mut buffer = [0; 4096];
    loop {
        let mut fds = [PollFd::new(stdin.as_fd(), PollFlags::POLLIN)];
        let ready = poll(&mut fds, PollTimeout::from(SIZE_INTERVAL_MS)).unwrap_or(0) > 0;
        if ready {
            match stdin.lock().read(&mut buffer) {
                Ok(0) | Err(_) => return,
                Ok(count) => {
                    if sink.send(&Frame::Stdin(buffer[..count].to_vec())).is_err() {
                        return;
                    }
                }
            }
        }
        let now = window_size();
        if now != size {
            size = now;
            if let Ok(frame) = Frame::message(&ToGuest::Resize(size)) {
                let _ = sink.send(&frame);
            }
        }
    }
}

/// The user's terminal, handing every key on; put back when dropped.
struct RawTerminal(Termios);

impl RawTerminal {
    fn enter() -> Result<Self> {
        let saved = tcgetattr(std::io::stdin()).context("read the terminal's settings")?;
        cleanup::remember_terminal(Some(saved.clone()));
        let mut raw = saved.clone();
        cfmakeraw(&mut raw);
        tcsetattr(std::io::stdin(), SetArg::TCSANOW, &raw).context("set up the terminal")?;
        Ok(Self(saved))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        let _ = tcsetattr(std::io::stdin(), SetArg::TCSANOW, &self.0);
        cleanup::remember_terminal(None);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;
    use std::path::Path;
    use std::process::{Command, Stdio};
    use std::time::Instant;

    use nix::sys::signal::Signal;

    use super::*;
    use crate::cleanup::Group;

    /// Says, in the process that a test starts, which side is to fail and where the other one is to
    /// write the process that it waits for.
    const FAILS: &str = "UBLK_VM_TEST_FAILS";
    const WAITS: &str = "UBLK_VM_TEST_WAITS";

    #[test]
    fn both_sides_are_done() {
        let (one, other) = side_by_side(|| Ok(1), || Ok("two")).unwrap();
        assert_eq!((one, other), (1, "two"));
    }

    /// The process that is written down there, if it has been written.
    fn written(file: &Path) -> Option<String> {
        std::fs::read_to_string(file).ok().filter(|text| text.ends_with('\n'))
    }

    fn wait_for_ever(file: &Path) -> Result<()> {
        let mut shell = cleanup::command("sh", Signal::SIGTERM);
        shell.args(["-c", "echo $$ > \"$0\"; exec sleep 1000"]).arg(file);
        Group::spawn(&mut shell, Signal::SIGTERM)?.wait()?;
        Ok(())
    }

    fn fail_while_the_other_waits(file: &Path) -> Result<()> {
        while written(file).is_none() {
            std::thread::yield_now();
        }
        anyhow::bail!("no mirror")
    }

    #[test]
    fn a_failure_ends_the_other_side() {
        // The program ends, so it has to be another process.
        if let (Ok(fails), Ok(file)) = (std::env::var(FAILS), std::env::var(WAITS)) {
            let file = Path::new(&file);
            let failing = || fail_while_the_other_waits(file);
            let waiting = || wait_for_ever(file);
            let done = match fails.as_str() {
                "one" => side_by_side(failing, waiting),
                _ => side_by_side(waiting, failing),
            };
            panic!("{done:?}");
        }
        for fails in ["one", "other"] {
            let scratch = tempfile::tempdir().unwrap();
            let file = scratch.path().join("process");
            let began = Instant::now();
            let output = Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "shell::tests::a_failure_ends_the_other_side", "--nocapture"])
                .env(FAILS, fails)
                .env(WAITS, &file)
                .stdin(Stdio::null())
                .output()
                .unwrap();
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            assert_eq!(output.status.code(), Some(1), "{:?}: {said}", output.status.signal());
            assert!(said.contains("error: no mirror"), "{said}");
            let process = written(&file).unwrap();
            assert!(!Path::new("/proc").join(process.trim()).exists(), "{process} is left");
            assert!(began.elapsed() < Duration::from_secs(100), "it was waited for");
        }
    }
}

//! The server in the background.
//!
//! `add` starts itself again with a pipe as standard output and waits for the line that the
//! server prints when the device is live. Errors reach the user on standard error, which the
//! server keeps until then; afterwards it logs to a file.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};

use anyhow::Context;
use nix::unistd::{dup2_stderr, dup2_stdout, setsid};

/// Starts the server and waits until its device is live, or it has ended.
pub fn start_server() -> anyhow::Result<ExitCode> {
    let program = std::env::current_exe().context("cannot find this program")?;
    let mut server = Command::new(program)
        .args(std::env::args_os().skip(1))
        .arg("--daemon")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start the server")?;
    let mut line = String::new();
    if let Some(out) = server.stdout.take() {
        BufReader::new(out).read_line(&mut line).context("cannot hear from the server")?;
    }
    if line.ends_with('\n') {
        print!("{line}");
        return Ok(ExitCode::SUCCESS);
    }
    let status = server.wait().context("cannot wait for the server")?;
    // The server has said why; if it could not, say how it ended.
    match status.code().and_then(|code| u8::try_from(code).ok()) {
        Some(code) if code > 0 => Ok(ExitCode::from(code)),
        _ => anyhow::bail!("the server ended before its device was live ({status})"),
    }
}

/// Starts a process that stops a device.
pub fn start_stopper(id: u32) -> std::io::Result<Child> {
    // Its own group: the terminal's signals are for the server.
    Command::new(std::env::current_exe()?)
        .args(["stop-device", "-n", &id.to_string()])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .process_group(0)
        .spawn()
}

/// Leaves the session of the terminal, so that its signals do not reach the server.
pub fn leave_session() -> anyhow::Result<()> {
    setsid().context("cannot leave the session")?;
    Ok(())
}

/// Sends standard output and error to a log file and leaves the working directory, which the
/// server would keep busy. Returns what was standard output.
pub fn log_to(path: &Path) -> std::io::Result<File> {
    if let Some(directory) = path.parent() {
        std::fs::create_dir_all(directory)?;
    }
    let log = OpenOptions::new().create(true).append(true).open(path)?;
    std::env::set_current_dir("/")?;
    let user = File::from(std::io::stdout().as_fd().try_clone_to_owned()?);
    dup2_stdout(&log)?;
    dup2_stderr(&log)?;
    Ok(user)
}

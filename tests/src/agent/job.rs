//! Runs a program in a control group of its own, so that all it ever started
//! can be found and killed, daemons included.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, ensure};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::pty::{Winsize, openpty};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use super::Host;
use crate::proto::{ExitState, Frame, Job, ToHost, WindowSize};

/// Where the control groups of jobs are.
pub const CGROUPS: &str = "/sys/fs/cgroup";
/// How they are called, before the number.
pub const CGROUP_PREFIX: &str = "job-";

const PATH: &str = "/payload:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin";
/// Enters the control group given first, then becomes the program.
const ENTER: &str = r#"echo $$ > "$0"/cgroup.procs && exec "$@""#;

static NUMBER: AtomicU32 = AtomicU32::new(0);

/// The program that runs now.
#[derive(Debug)]
pub struct Running {
    cgroup: PathBuf,
    leader: Pid,
    terminal: Option<File>,
}

impl Running {
    /// Passes on what the user typed.
    pub fn type_in(&self, bytes: &[u8]) {
        if let Some(mut terminal) = self.terminal.as_ref() {
            let _ = terminal.write_all(bytes);
        }
    }

    /// Sends SIGINT to the program's process group.
    pub fn interrupt(&self) {
        let _ = killpg(self.leader, Signal::SIGINT);
    }

    /// Gives the terminal a new size; the kernel tells the program.
    pub fn resize(&self, size: WindowSize) {
        if let Some(terminal) = self.terminal.as_ref() {
            let size = rustix::termios::Winsize {
                ws_row: size.rows,
                ws_col: size.columns,
                ws_xpixel: 0,
                ws_ypixel: 0,
            };
            let _ = rustix::termios::tcsetwinsize(terminal, size);
        }
    }
}

/// Does something with the running program, if there is one.
pub fn with(running: &Mutex<Option<Running>>, action: impl FnOnce(&Running)) {
    if let Some(job) = running.lock().unwrap_or_else(PoisonError::into_inner).as_ref() {
        action(job);
    }
}

/// Starts a job; a thread sends its output and end to the host.
pub fn start(job: &Job, host: &Host, running: &Arc<Mutex<Option<Running>>>) -> Result<()> {
    let mut current = running.lock().unwrap_or_else(PoisonError::into_inner);
    ensure!(current.is_none(), "a program is running already");
    ensure!(!job.argv.is_empty(), "no program given");
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let cgroup = Path::new(CGROUPS).join(format!("{CGROUP_PREFIX}{number}"));
    fs::create_dir(&cgroup).with_context(|| format!("make {}", cgroup.display()))?;
    let (mut child, sources, terminal) = match job.terminal {
        Some(size) => spawn_on_terminal(job, &cgroup, size)?,
        None => spawn_on_pipes(job, &cgroup)?,
    };
    let (ended, end) = nix::unistd::pipe()?;
    *current =
        Some(Running { cgroup, leader: Pid::from_raw(i32::try_from(child.id())?), terminal });
    drop(current);

    let forward = {
        let host = host.clone();
        std::thread::spawn(move || forward_all(&host, &sources, &ended))
    };
    let host = host.clone();
    let running = Arc::clone(running);
    std::thread::Builder::new().name("job".into()).spawn(move || {
        let status = child.wait();
        drop(end); // wakes the forwarder, which sends the rest
        let _ = forward.join();
        *running.lock().unwrap_or_else(PoisonError::into_inner) = None;
        host.send(&match status {
            Ok(status) => ToHost::Exited {
                state: status.signal().map_or_else(
                    || ExitState::Code(status.code().unwrap_or(-1)),
                    ExitState::Signal,
                ),
            },
            Err(error) => ToHost::Failed { reason: format!("wait for the program: {error}") },
        });
    })?;
    Ok(())
}

type Spawned = (Child, Vec<(OwnedFd, Kind)>, Option<File>);

#[derive(Debug, Clone, Copy)]
enum Kind {
    Stdout,
    Stderr,
}

fn base_command(wrapper: &[&str], job: &Job, cgroup: &Path) -> Command {
    let mut argv = wrapper.to_vec();
    argv.extend(["/bin/sh", "-c", ENTER]);
    let mut command = Command::new(argv[0]);
    command.args(&argv[1..]).arg(cgroup).args(&job.argv);
    command.env_clear().env("PATH", PATH).env("HOME", "/root").env("LANG", "C.UTF-8");
    command.envs(job.env.iter().map(|(key, value)| (key, value)));
    command.current_dir("/tmp");
    command
}

fn spawn_on_pipes(job: &Job, cgroup: &Path) -> Result<Spawned> {
    let mut child = base_command(&[], job, cgroup)
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let stdout = child.stdout.take().context("standard output")?.into();
    let stderr = child.stderr.take().context("standard error")?.into();
    Ok((child, vec![(stdout, Kind::Stdout), (stderr, Kind::Stderr)], None))
}

fn spawn_on_terminal(job: &Job, cgroup: &Path, size: WindowSize) -> Result<Spawned> {
    let size = Winsize { ws_row: size.rows, ws_col: size.columns, ws_xpixel: 0, ws_ypixel: 0 };
    let pty = openpty(Some(&size), None).context("open a terminal")?;
    // A session of its own with the terminal as the controlling one, which
    // makes Ctrl-C and job control work.
    let child = base_command(&["setsid", "--ctty"], job, cgroup)
        .stdin(Stdio::from(pty.slave.try_clone()?))
        .stdout(Stdio::from(pty.slave.try_clone()?))
        .stderr(Stdio::from(pty.slave))
        .spawn()?;
    let terminal = File::from(pty.master.try_clone()?);
    Ok((child, vec![(pty.master, Kind::Stdout)], Some(terminal)))
}

/// Sends output to the host as it comes, until the program has ended and what
/// it wrote is read. A daemon it left may hold the pipes open for ever.
fn forward_all(host: &Host, sources: &[(OwnedFd, Kind)], ended: &OwnedFd) {
    for (fd, _) in sources {
        let flags = fcntl(fd, FcntlArg::F_GETFL).map_or(OFlag::empty(), OFlag::from_bits_retain);
        let _ = fcntl(fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK));
    }
    let mut open: Vec<bool> = vec![true; sources.len()];
    loop {
        let mut fds = vec![PollFd::new(ended.as_fd(), PollFlags::POLLIN)];
        let listed: Vec<usize> = (0..sources.len()).filter(|&n| open[n]).collect();
        fds.extend(listed.iter().map(|&n| PollFd::new(sources[n].0.as_fd(), PollFlags::POLLIN)));
        if poll(&mut fds, PollTimeout::NONE).is_err_and(|errno| errno != nix::errno::Errno::EINTR) {
            return;
        }
        let over = fds[0].any().unwrap_or(false);
        for n in listed {
            open[n] = forward_available(host, &sources[n].0, sources[n].1);
        }
        if over {
            return;
        }
    }
}

/// Sends what there is now; says whether more can come.
fn forward_available(host: &Host, fd: &OwnedFd, kind: Kind) -> bool {
    let mut buffer = [0; 32 << 10];
    loop {
        match nix::unistd::read(fd, &mut buffer) {
            Ok(0) => return false,
            Ok(count) => {
                let bytes = buffer[..count].to_vec();
                host.send_frame(&match kind {
                    Kind::Stdout => Frame::Stdout(bytes),
                    Kind::Stderr => Frame::Stderr(bytes),
                });
            }
            Err(nix::errno::Errno::EINTR) => {}
            Err(nix::errno::Errno::EAGAIN) => return true,
            Err(_) => return false, // EIO: the terminal's last user is gone
        }
    }
}

/// Ends the running program and all that it started. What it hangs on is
/// reported first, for afterwards nobody can tell.
pub fn kill(host: &Host, running: &Mutex<Option<Running>>) {
    let cgroup = match running.lock().unwrap_or_else(PoisonError::into_inner).as_ref() {
        Some(job) => job.cgroup.clone(),
        None => return, // it has ended meanwhile, and said so
    };
    // Puts the stacks of all blocked tasks into the kernel log.
    let _ = fs::write("/proc/sysrq-trigger", "w");
    host.send(&ToHost::HangReport { text: describe_processes(&cgroup) });
    if let Err(error) = fs::write(cgroup.join("cgroup.kill"), "1") {
        eprintln!("vm-agent: kill {}: {error}", cgroup.display());
    }
}

/// Processes of a control group.
pub fn processes(cgroup: &Path) -> Vec<u32> {
    let mut text = String::new();
    let _ = File::open(cgroup.join("cgroup.procs")).and_then(|mut f| f.read_to_string(&mut text));
    text.lines().filter_map(|line| line.parse().ok()).collect()
}

/// A process as one line: id, name, arguments.
pub fn describe(pid: u32) -> String {
    let read = |file: &str| fs::read(format!("/proc/{pid}/{file}")).unwrap_or_default();
    let name = String::from_utf8_lossy(&read("comm")).trim().to_owned();
    let arguments = String::from_utf8_lossy(&read("cmdline")).replace('\0', " ");
    format!("process {pid} ({name}): {}", arguments.trim())
}

fn describe_processes(cgroup: &Path) -> String {
    let mut text = String::new();
    for pid in processes(cgroup) {
        text.push_str(&describe(pid));
        text.push('\n');
        let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
        for task in tasks {
            let read = |file: &str| fs::read_to_string(task.path().join(file)).unwrap_or_default();
            let status = read("status");
            let state = status.lines().find_map(|line| line.strip_prefix("State:"));
            let (tid, name) = (task.file_name(), read("comm"));
            let state = state.unwrap_or("?").trim();
            text.push_str(&format!(
                "  thread {} ({}) {state}\n",
                tid.to_string_lossy(),
                name.trim()
            ));
            for line in read("stack").lines().take(12) {
                text.push_str(&format!("    {}\n", line.trim_start_matches("[<0>] ")));
            }
        }
    }
    text
}

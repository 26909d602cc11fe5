//! Nothing stays behind: child processes and temporary directories go away
//! when their owner is dropped, when the harness gets a signal, and (the
//! processes at once, the directories at the next start) when it is killed.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::{Signal, killpg};
use nix::sys::termios::{SetArg, Termios, tcsetattr};
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::Pid;

struct Registry {
    /// Process groups, and the signal that ends each.
    groups: Vec<(Pid, Signal)>,
    directories: Vec<PathBuf>,
    terminal: Option<Termios>,
    on_stop: Option<fn()>,
}

static REGISTRY: Mutex<Registry> = Mutex::new(Registry {
    groups: Vec::new(),
    directories: Vec::new(),
    terminal: None,
    on_stop: None,
});
static STOPPING: AtomicBool = AtomicBool::new(false);

fn registry() -> MutexGuard<'static, Registry> {
    REGISTRY.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The signals by which a user or the system ends a program.
const SIGNALS: [Signal; 3] = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP];

/// Makes SIGINT, SIGTERM and SIGHUP end the program in order. They are caught and not blocked:
/// programs inherit what is blocked, and would not hear of their end.
///
/// # Errors
/// When the signals cannot be caught or the thread cannot be started.
pub fn handle_signals() -> Result<()> {
    let (mut wakened, waker) = UnixStream::pair().context("make a pair of sockets")?;
    let heard = Arc::new(AtomicUsize::new(0));
    for signal in SIGNALS {
        let number = signal as i32;
        let catch = || -> io::Result<()> {
            // In this order: who is woken finds the number.
            let value = usize::try_from(number).map_err(io::Error::other)?;
            signal_hook::flag::register_usize(number, Arc::clone(&heard), value)?;
            signal_hook::low_level::pipe::register(number, waker.try_clone()?)?;
            Ok(())
        };
        catch().with_context(|| format!("catch {signal}"))?;
    }
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        let woken = wakened.read_exact(&mut [0]);
        let number = heard.load(Ordering::SeqCst);
        let signal =
            SIGNALS.into_iter().find(|signal| usize::try_from(*signal as i32) == Ok(number));
        if let (Ok(()), Some(signal)) = (woken, signal) {
            stop(signal);
        }
    })?;
    Ok(())
}

fn stop(signal: Signal) -> ! {
    end(&format!("ended by {signal}"), 128 + signal as i32)
}

/// Ends the program as a signal does, because of an error that other threads do not hear of: they
/// may be waiting for children of their own.
pub fn fail(error: &anyhow::Error) -> ! {
    end(&format!("error: {error:#}"), 1)
}

fn end(last_word: &str, code: i32) -> ! {
    end_children();
    // `eprintln` would panic if whoever read it was ended by the same signal.
    let _ = writeln!(io::stderr(), "{last_word}");
    std::process::exit(code)
}

/// Ends all child processes, undoes what is to be undone, and removes directories. Returns to the
/// first thread only.
fn end_children() {
    if STOPPING.swap(true, Ordering::SeqCst) {
        park_for_ever();
    }
    let groups = {
        let mut registry = registry();
        if let Some(terminal) = registry.terminal.take() {
            let _ = tcsetattr(io::stdin(), SetArg::TCSANOW, &terminal);
        }
        for (group, end) in &registry.groups {
            let _ = killpg(*group, *end);
        }
        registry.groups.clone()
    };
    // Those that were asked politely have something to clean up themselves.
    let deadline = Instant::now() + Duration::from_secs(15);
    for (group, _) in groups {
        while Instant::now() < deadline && leader_runs(group) {
            std::thread::sleep(Duration::from_millis(20));
        }
        let _ = killpg(group, Signal::SIGKILL);
    }
    crate::ui::end_status();
    let on_stop = registry().on_stop.take();
    if let Some(action) = on_stop {
        action();
    }
    for directory in std::mem::take(&mut registry().directories) {
        let _ = fs::remove_dir_all(directory);
    }
}

/// The thread that stops the program ends this one too.
fn park_for_ever() -> ! {
    loop {
        std::thread::park();
    }
}

fn leader_runs(pid: Pid) -> bool {
    let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT | WaitPidFlag::WNOHANG;
    matches!(waitid(Id::Pid(pid), flags), Ok(nix::sys::wait::WaitStatus::StillAlive))
}

/// Remembers the terminal's settings, to be put back if a signal ends the
/// program; `None` forgets them.
pub fn remember_terminal(settings: Option<Termios>) {
    registry().terminal = settings;
}

/// Has something done when a signal ends the program, after the end of all child processes and
/// before directories are removed; `None` forgets it.
pub fn on_stop(action: Option<fn()>) {
    registry().on_stop = action;
}

/// A directory that is removed if the program ends early.
pub fn remember_directory(path: &Path) {
    registry().directories.push(path.to_owned());
}

/// The directory is kept, or has gone.
pub fn forget_directory(path: &Path) {
    registry().directories.retain(|other| other != path);
}

/// A command for `program` which the kernel ends with `end` if the harness
/// dies. The thread that spawns it must live as long as the child is to: the
/// parent-death signal goes by threads.
pub fn command(program: impl AsRef<OsStr>, end: Signal) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", end.as_str().trim_start_matches("SIG"), "--"]).arg(program);
    command
}

/// A child process in a process group of its own, killed with all its
/// descendants when dropped.
#[derive(Debug)]
pub struct Group {
    child: Child,
    group: Pid,
    ended: Option<ExitStatus>,
}

impl Group {
    /// Starts `command`. If a signal ends the harness, `end` is sent to the
    /// group first.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn spawn(command: &mut Command, end: Signal) -> Result<Self> {
        command.process_group(0);
        let mut registry = registry();
        if STOPPING.load(Ordering::SeqCst) {
            // Nobody would end it any more.
            drop(registry);
            park_for_ever();
        }
        let child = command
            .spawn()
            .with_context(|| format!("start {}", command.get_program().to_string_lossy()))?;
        let group = Pid::from_raw(i32::try_from(child.id())?);
        registry.groups.push((group, end));
        Ok(Self { child, group, ended: None })
    }

    /// The child, for its pipes.
    pub fn child(&mut self) -> &mut Child {
        &mut self.child
    }

    /// Waits for the child's end. While a signal ends the harness this does
    /// not return: what the end of the child means is then not the question.
    ///
    /// # Errors
    /// When the child cannot be waited for.
    pub fn wait(&mut self) -> Result<ExitStatus> {
        if let Some(status) = self.ended {
            return Ok(status);
        }
        // Without reaping, so that the id stays ours until it is taken off
        // the list under its lock.
        loop {
            match waitid(Id::Pid(self.group), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT) {
                Err(Errno::EINTR) => {}
                other => break other.map(drop)?,
            }
        }
        self.reap()
    }

    /// The child's end, if it has come.
    ///
    /// # Errors
    /// When the child cannot be waited for.
    pub fn try_wait(&mut self) -> Result<Option<ExitStatus>> {
        if self.ended.is_none() && leader_runs(self.group) {
            return Ok(None);
        }
        self.reap().map(Some)
    }

    fn reap(&mut self) -> Result<ExitStatus> {
        if let Some(status) = self.ended {
            return Ok(status);
        }
        let status = {
            let mut registry = registry();
            registry.groups.retain(|(group, _)| *group != self.group);
            self.child.wait()?
        };
        self.ended = Some(status);
        if STOPPING.load(Ordering::SeqCst) {
            park_for_ever();
        }
        Ok(status)
    }

    /// Kills the group and waits for the child.
    pub fn kill(&mut self) {
        if self.ended.is_none() {
            let _ = killpg(self.group, Signal::SIGKILL);
            let _ = self.wait();
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A directory for one run, removed with all that is in it. It is locked while
/// its owner lives, so that the next run can tell and remove what a killed one
/// left.
#[derive(Debug)]
pub struct RunDir {
    path: PathBuf,
    _lock: Flock<File>,
}

impl RunDir {
    /// Makes a directory below `parent`, and removes dead ones there.
    ///
    /// # Errors
    /// When a directory or lock file cannot be made.
    pub fn create(parent: &Path) -> Result<Self> {
        fs::create_dir_all(parent).with_context(|| format!("make {}", parent.display()))?;
        // Held while a directory exists that is not locked yet.
        let _making = lock_file(&parent.join("lock"))?;
        sweep(parent);
        let path = tempfile::Builder::new().prefix("run-").tempdir_in(parent)?.keep();
        let directory = File::open(&path)?;
        let lock = Flock::lock(directory, FlockArg::LockExclusiveNonblock)
            .map_err(|(_, errno)| errno)
            .with_context(|| format!("lock {}", path.display()))?;
        remember_directory(&path);
        Ok(Self { path, _lock: lock })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for RunDir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.path);
        forget_directory(&self.path);
    }
}

/// Takes an exclusive lock on a file, which is made if need be.
///
/// # Errors
/// When the file cannot be made or locked.
pub fn lock_file(path: &Path) -> Result<Flock<File>> {
    let file = File::create(path).with_context(|| format!("make {}", path.display()))?;
    Flock::lock(file, FlockArg::LockExclusive)
        .map_err(|(_, errno)| errno)
        .with_context(|| format!("lock {}", path.display()))
}

/// Removes the run directories whose owner is gone.
fn sweep(parent: &Path) {
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        if !entry.file_name().to_string_lossy().starts_with("run-") {
            continue;
        }
        if let Ok(directory) = File::open(entry.path()) {
            if Flock::lock(directory, FlockArg::LockExclusiveNonblock).is_ok() {
                let _ = fs::remove_dir_all(entry.path());
            }
        }
    }
}

#[cfg(test)]
mod tests;

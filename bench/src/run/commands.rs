//! Runs programs, and handles signals meanwhile.

use std::fs::File;
use std::io::{BufRead, Read, Seek, SeekFrom};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use rustix::process::{PidfdFlags, pidfd_open};

/// The signals by which a user or the system ends a program.
const SIGNALS: [Signal; 3] = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP];
/// The time limit of a program that makes or removes something.
const LIMIT: Duration = Duration::from_secs(60);
/// How often to check on a program that nothing else watches.
const OFTEN: Duration = Duration::from_millis(500);
/// How often to check a condition that no event announces.
const INTERVAL: Duration = Duration::from_millis(5);

/// A signal arrived.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("interrupted by {0}")]
pub struct Interrupted(pub Signal);

/// Runs programs.
#[derive(Debug)]
pub struct Commands {
    /// The number of the last signal; 0 if there was none.
    heard: Arc<AtomicUsize>,
    /// Readable once a signal has arrived, and never empty again.
    wakened: UnixStream,
    waker: UnixStream,
}

/// What happens to a started program when this one ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum OnExit {
    /// It continues: it must not stop half-way.
    Continue,
    /// It is killed.
    Kill,
}

impl Commands {
    /// Runs programs and does not handle signals yet.
    pub fn new() -> Result<Self> {
        let (wakened, waker) = UnixStream::pair().context("make a pair of sockets")?;
        waker.set_nonblocking(true)?;
        Ok(Self { heard: Arc::default(), wakened, waker })
    }

    /// Handles signals from now on. They are caught, not blocked, since the programs that are
    /// started, including servers, would inherit blocked signals.
    pub fn hear_signals(&self) -> Result<()> {
        for signal in SIGNALS {
            let number = signal as i32;
            let value = usize::try_from(number)?;
            let hear = || -> std::io::Result<()> {
                // In this order, so that a woken thread finds the number.
                signal_hook::flag::register_usize(number, Arc::clone(&self.heard), value)?;
                signal_hook::low_level::pipe::register(number, self.waker.try_clone()?)?;
                Ok(())
            };
            hear().with_context(|| format!("catch {signal}"))?;
        }
        Ok(())
    }

    /// Fails if a signal has arrived.
    pub fn check(&self) -> Result<(), Interrupted> {
        match i32::try_from(self.heard.load(Ordering::SeqCst)).unwrap_or(0) {
            0 => Ok(()),
            number => Err(Interrupted(Signal::try_from(number).unwrap_or(Signal::SIGTERM))),
        }
    }

    /// Waits until a file is ready, the first signal arrives, or time is over. Fails if one had
    /// arrived before.
    fn wait_for(&self, file: BorrowedFd<'_>, timeout: PollTimeout) -> Result<bool> {
        if self.check().is_ok() {
            // A signal that arrives only now is not missed.
            return self.wait_for_either(file, timeout);
        }
        is_ready(&mut [PollFd::new(file, PollFlags::POLLIN)], timeout)
    }

    /// Waits until a file is ready, a signal has arrived, or time is over.
    fn wait_for_either(&self, file: BorrowedFd<'_>, timeout: PollTimeout) -> Result<bool> {
        let fds = [file, self.wakened.as_fd()];
        is_ready(&mut fds.map(|fd| PollFd::new(fd, PollFlags::POLLIN)), timeout)
    }

    /// Runs a program that makes or removes something: signals do not interrupt it. It has to
    /// succeed. Returns its output.
    pub fn run(&self, argv: &[&str]) -> Result<String> {
        self.start(argv, OnExit::Continue)?.finish(self, OFTEN, Some(LIMIT), &mut || {})
    }

    /// The same for a program that cleans up when it is killed.
    pub fn run_bound(&self, argv: &[&str]) -> Result<String> {
        self.start(argv, OnExit::Kill)?.finish(self, OFTEN, Some(LIMIT), &mut || {})
    }

    /// Runs a load, and calls `tick` this often. A signal or the end of this process kills it.
    pub fn watch(&self, argv: &[&str], every: Duration, tick: &mut dyn FnMut()) -> Result<String> {
        self.check()?;
        self.start(argv, OnExit::Kill)?.finish(self, every, None, tick)
    }

    fn start(&self, argv: &[&str], on_exit: OnExit) -> Result<Running> {
        let bound = ["setpriv", "--pdeathsig", "KILL"];
        let argv = if on_exit == OnExit::Kill { [&bound, argv].concat() } else { argv.to_vec() };
        let (name, arguments) = argv.split_first().context("no program given")?;
        let program = find(name).with_context(|| format!("{name} is missing"))?;
        // Files: a pipe would have to be emptied, and a server could keep it open.
        let (out, err) = (tempfile::tempfile()?, tempfile::tempfile()?);
        let mut command = Command::new(program);
        command.args(arguments).stdin(Stdio::null());
        command.stdout(out.try_clone()?).stderr(err.try_clone()?);
        // So that the terminal sends its signals only to this process.
        command.process_group(0);
        let child = command.spawn().with_context(|| format!("start {name}"))?;
        let shown = if on_exit == OnExit::Kill { argv[bound.len()] } else { argv[0] };
        let name = Path::new(shown).file_name().unwrap_or_default().to_string_lossy().into_owned();
        Ok(Running { child, out, err, name })
    }

    /// Reads a line from the user.
    pub fn read_line(&self) -> Result<String> {
        let stdin = std::io::stdin();
        while !self.wait_for_either(stdin.as_fd(), PollTimeout::NONE)? {
            self.check()?;
        }
        let mut line = String::new();
        stdin.lock().read_line(&mut line)?;
        Ok(line)
    }
}

/// Polls files. Returns whether the first is ready. A signal ends the wait, and the caller checks
/// for it.
fn is_ready(fds: &mut [PollFd<'_>], timeout: PollTimeout) -> Result<bool> {
    match poll(fds, timeout) {
        Ok(_) | Err(Errno::EINTR) => Ok(fds[0].any().unwrap_or(false)),
        Err(errno) => Err(errno).context("wait"),
    }
}

/// A running program.
struct Running {
    child: Child,
    out: File,
    err: File,
    /// Its name.
    name: String,
}

impl Running {
    /// Waits for its end. With a limit, it is killed after that. Without one, a signal kills it.
    fn finish(
        mut self,
        commands: &Commands,
        every: Duration,
        limit: Option<Duration>,
        tick: &mut dyn FnMut(),
    ) -> Result<String> {
        let pid = Pid::from_raw(i32::try_from(self.child.id())?);
        let pidfd = pidfd_open(rustix::process::Pid::from_child(&self.child), PidfdFlags::empty())?;
        let began = Instant::now();
        let status = loop {
            tick();
            if let Some(status) = self.child.try_wait()? {
                break status;
            }
            let stop = match limit {
                None => commands.check().map_err(anyhow::Error::new),
                Some(limit) if began.elapsed() > limit => {
                    Err(anyhow::anyhow!("{} took more than {} s", self.name, limit.as_secs()))
                }
                Some(_) => Ok(()),
            };
            if let Err(error) = stop {
                let _ = killpg(pid, Signal::SIGKILL);
                self.child.wait()?;
                return Err(error);
            }
            commands.wait_for(pidfd.as_fd(), PollTimeout::try_from(every)?)?;
        };
        self.output(status)
    }

    fn output(mut self, status: ExitStatus) -> Result<String> {
        let read = |file: &mut File| -> Result<String> {
            file.seek(SeekFrom::Start(0))?;
            let mut bytes = Vec::new();
            file.read_to_end(&mut bytes)?;
            Ok(String::from_utf8_lossy(&bytes).into_owned())
        };
        let out = read(&mut self.out)?;
        if status.success() {
            return Ok(out);
        }
        let err = read(&mut self.err)?;
        let said =
            [&err, &out].map(|text| last_words(text)).into_iter().find(|said| !said.is_empty());
        let name = &self.name;
        match (said, status.signal()) {
            (Some(said), _) if said.starts_with(&format!("{name}:")) => bail!("{said}"),
            (Some(said), _) => bail!("{name}: {said}"),
            (None, Some(signal)) => bail!("{name} was ended by signal {signal}"),
            (None, None) => bail!("{name} failed without a word ({status})"),
        }
    }
}

/// The last lines of a program's output, in one line: the very last may only say that it failed.
fn last_words(text: &str) -> String {
    let lines: Vec<_> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    lines[lines.len().saturating_sub(3)..].join("; ")
}

/// Finds a program. A path is used as it is; a name is looked up as for root.
pub fn find(name: &str) -> Option<PathBuf> {
    if name.contains('/') {
        return Some(PathBuf::from(name)).filter(|path| path.is_file());
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let usual = ["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from);
    let directories = std::env::split_paths(&path).chain(usual);
    directories.map(|directory| directory.join(name)).find(|path| path.is_file())
}

/// Waits until a condition holds. Returns whether it does.
pub fn wait_until(limit: Duration, mut is_so: impl FnMut() -> bool) -> bool {
    let began = Instant::now();
    loop {
        if is_so() {
            return true;
        }
        if began.elapsed() > limit {
            return false;
        }
        std::thread::sleep(INTERVAL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    /// Simulates a signal; a real one would reach all tests.
    fn hear(commands: &Commands, signal: Signal) {
        commands.heard.store(usize::try_from(signal as i32).unwrap(), Ordering::SeqCst);
        (&commands.waker).write_all(&[0]).unwrap();
    }

    #[test]
    fn failures_are_one_line_of_what_was_said_last() {
        let commands = Commands::new().unwrap();
        assert_eq!(commands.run(&["echo", "hi"]).unwrap(), "hi\n");
        let said = |script| commands.run(&["sh", "-c", script]).unwrap_err().to_string();
        assert_eq!(said("echo 1 >&2; echo no disk >&2; echo >&2; exit 3"), "sh: 1; no disk");
        assert_eq!(said("echo out; exit 3"), "sh: out");
        assert_eq!(said("echo sh: itself >&2; exit 3"), "sh: itself");
        assert_eq!(said("seq 1 9; exit 3"), "sh: 7; 8; 9");
        assert!(said("exit 3").contains("without a word"));
        assert!(said("kill -9 $$").contains("signal 9"));
        let error = commands.run(&["no-such-program"]).unwrap_err().to_string();
        assert_eq!(error, "no-such-program is missing");
    }

    #[test]
    fn programs_can_be_ended_by_signals() {
        // The parent of the tests may have blocked some signals.
        let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
        let before = status.lines().find(|line| line.starts_with("SigBlk")).unwrap();
        let commands = Commands::new().unwrap();
        let blocked = commands.run(&["grep", "SigBlk", "/proc/self/status"]).unwrap();
        assert_eq!(blocked.trim_end(), before);
        let bound = commands.run_bound(&["grep", "SigBlk", "/proc/self/status"]).unwrap();
        assert_eq!(bound, blocked);
    }

    #[test]
    fn signals_end_loads_and_wait_for_the_rest() {
        let commands = Commands::new().unwrap();
        let mut ticks = 0;
        let began = Instant::now();
        let ended = commands.watch(&["sleep", "60"], Duration::from_millis(10), &mut || {
            ticks += 1;
            if ticks == 2 {
                hear(&commands, Signal::SIGTERM);
            }
        });
        let error = ended.unwrap_err();
        let interrupted = error.downcast_ref::<Interrupted>();
        assert_eq!(interrupted, Some(&Interrupted(Signal::SIGTERM)));
        assert!(began.elapsed() < Duration::from_secs(30));
        // To remove something, programs run nevertheless.
        assert_eq!(commands.run(&["echo", "removed"]).unwrap(), "removed\n");
        assert!(commands.watch(&["true"], OFTEN, &mut || {}).is_err());
    }

    #[test]
    fn a_signal_that_comes_before_an_answer_is_awaited_is_heard() {
        let commands = Commands::new().unwrap();
        let (silent, _other_end) = UnixStream::pair().unwrap();
        hear(&commands, Signal::SIGINT);
        // If it missed the signal, it would wait for ever.
        assert!(!commands.wait_for_either(silent.as_fd(), PollTimeout::NONE).unwrap());
        assert!(commands.check().is_err());
    }

    #[test]
    fn waiting_ends_when_it_is_so_or_too_late() {
        let mut count = 0;
        assert!(wait_until(Duration::from_secs(60), || {
            count += 1;
            count == 3
        }));
        assert!(!wait_until(Duration::ZERO, || false));
    }
}

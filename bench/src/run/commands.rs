//! Runs programs, and hears of signals meanwhile.

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

/// Those by which a user or the system ends a program.
const SIGNALS: [Signal; 3] = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP];
/// How long a program may take that makes or removes something.
const LIMIT: Duration = Duration::from_secs(60);
/// How often a program is looked after that nobody else watches.
const OFTEN: Duration = Duration::from_millis(500);
/// How often a condition is looked at that nothing announces.
const INTERVAL: Duration = Duration::from_millis(5);

/// A signal has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("interrupted by {0}")]
pub struct Interrupted(pub Signal);

/// Runs programs.
#[derive(Debug)]
pub struct Commands {
    /// The number of the signal that came last, 0 before.
    heard: Arc<AtomicUsize>,
    /// Something can be read once a signal has come, and ever after.
    wakened: UnixStream,
    waker: UnixStream,
}

/// What becomes of a program when this one ends, in order or not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Bond {
    /// It goes on: it must not stop half-way.
    Loose,
    /// It is killed.
    Firm,
}

impl Commands {
    /// Runs programs and hears of no signals yet.
    pub fn new() -> Result<Self> {
        let (wakened, waker) = UnixStream::pair().context("make a pair of sockets")?;
        waker.set_nonblocking(true)?;
        Ok(Self { heard: Arc::default(), wakened, waker })
    }

    /// From now on signals are heard here only. They are caught and not blocked, for programs inherit
    /// what is blocked, servers among them.
    pub fn hear_signals(&self) -> Result<()> {
        for signal in SIGNALS {
            let number = signal as i32;
            let value = usize::try_from(number)?;
            let hear = || -> std::io::Result<()> {
                // In this order: who is woken finds the number.
                signal_hook::flag::register_usize(number, Arc::clone(&self.heard), value)?;
                signal_hook::low_level::pipe::register(number, self.waker.try_clone()?)?;
                Ok(())
            };
            hear().with_context(|| format!("catch {signal}"))?;
        }
        Ok(())
    }

    /// Fails if a signal has come.
    pub fn check(&self) -> Result<(), Interrupted> {
        match i32::try_from(self.heard.load(Ordering::SeqCst)).unwrap_or(0) {
            0 => Ok(()),
            number => Err(Interrupted(Signal::try_from(number).unwrap_or(Signal::SIGTERM))),
        }
    }

    /// Waits until a file is ready, a signal comes that has not come before, or time is over.
    fn wait_for(&self, file: BorrowedFd<'_>, timeout: PollTimeout) -> Result<bool> {
        if self.check().is_ok() {
            // It may come only now, and is not missed.
            return self.wait_for_either(file, timeout);
        }
        is_ready(&mut [PollFd::new(file, PollFlags::POLLIN)], timeout)
    }

    /// Waits until a file is ready, a signal comes or has come, or time is over.
    fn wait_for_either(&self, file: BorrowedFd<'_>, timeout: PollTimeout) -> Result<bool> {
        let fds = [file, self.wakened.as_fd()];
        is_ready(&mut fds.map(|fd| PollFd::new(fd, PollFlags::POLLIN)), timeout)
    }

    /// Runs a program that makes or removes something: signals wait for its end. It has to succeed;
    /// what it printed is returned.
    pub fn run(&self, argv: &[&str]) -> Result<String> {
        self.start(argv, Bond::Loose)?.finish(self, OFTEN, Some(LIMIT), &mut || {})
    }

    /// The same for a program that cleans up by itself when it is killed.
    pub fn run_bound(&self, argv: &[&str]) -> Result<String> {
        self.start(argv, Bond::Firm)?.finish(self, OFTEN, Some(LIMIT), &mut || {})
    }

    /// Runs a load, and calls `tick` this often. A signal kills it, and so does the end of this
    /// process.
    pub fn watch(&self, argv: &[&str], every: Duration, tick: &mut dyn FnMut()) -> Result<String> {
        self.check()?;
        self.start(argv, Bond::Firm)?.finish(self, every, None, tick)
    }

    fn start(&self, argv: &[&str], bond: Bond) -> Result<Running> {
        let bound = ["setpriv", "--pdeathsig", "KILL"];
        let argv = if bond == Bond::Firm { [&bound, argv].concat() } else { argv.to_vec() };
        let (name, arguments) = argv.split_first().context("no program given")?;
        let program = find(name).with_context(|| format!("{name} is missing"))?;
        // Files, so that nobody has to empty a pipe, and no server keeps one open.
        let (out, err) = (tempfile::tempfile()?, tempfile::tempfile()?);
        let mut command = Command::new(program);
        command.args(arguments).stdin(Stdio::null());
        command.stdout(out.try_clone()?).stderr(err.try_clone()?);
        // The terminal sends its signals to us only.
        command.process_group(0);
        let child = command.spawn().with_context(|| format!("start {name}"))?;
        let shown = if bond == Bond::Firm { argv[bound.len()] } else { argv[0] };
        let name = Path::new(shown).file_name().unwrap_or_default().to_string_lossy().into_owned();
        Ok(Running { child, out, err, name })
    }

    /// Waits for a line that the user types.
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

/// Polls files; whether the first is ready. A signal ends it, and whoever called looks at that.
fn is_ready(fds: &mut [PollFd<'_>], timeout: PollTimeout) -> Result<bool> {
    match poll(fds, timeout) {
        Ok(_) | Err(Errno::EINTR) => Ok(fds[0].any().unwrap_or(false)),
        Err(errno) => Err(errno).context("wait"),
    }
}

/// A program that runs.
struct Running {
    child: Child,
    out: File,
    err: File,
    /// The program.
    name: String,
}

impl Running {
    /// With a limit it is let run to its end, and killed beyond; without one it is killed by a signal
    /// that we hear.
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

/// The last lines of what a program said, in one: the very last may say nothing but that it failed.
fn last_words(text: &str) -> String {
    let lines: Vec<_> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    lines[lines.len().saturating_sub(3)..].join("; ")
}

/// Where a program is: paths are taken as they are, names are looked for as root's would be.
pub fn find(name: &str) -> Option<PathBuf> {
    if name.contains('/') {
        return Some(PathBuf::from(name)).filter(|path| path.is_file());
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let usual = ["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from);
    let directories = std::env::split_paths(&path).chain(usual);
    directories.map(|directory| directory.join(name)).find(|path| path.is_file())
}

/// Waits until something is so.
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

    /// As if a signal had come; a real one would be heard by all tests.
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
        // Whoever runs the tests may have blocked some, which is no business of ours.
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
        // Where something has to be removed, programs run all the same.
        assert_eq!(commands.run(&["echo", "removed"]).unwrap(), "removed\n");
        assert!(commands.watch(&["true"], OFTEN, &mut || {}).is_err());
    }

    #[test]
    fn a_signal_that_comes_before_an_answer_is_awaited_is_heard() {
        let commands = Commands::new().unwrap();
        let (silent, _other_end) = UnixStream::pair().unwrap();
        hear(&commands, Signal::SIGINT);
        // Without an end it would wait for ever.
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

//! Each system call of a command and of all that it starts, through strace.
//!
//! A command is run once to count the calls, then again and again: in each run the processes that
//! come to the N-th call of a name are killed before it is carried out. strace counts for each
//! thread, so the command, its server and its lanes are hit at their own N-th call each.
//!
//! Calls that change nothing outside of their process are left out: a process that is killed at one
//! of them leaves the same as one that is killed at the next call that does change something.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::commands::{delete_if_there, orphan};
use super::{ID, Storm, verify};
use crate::guest::ublk::device::{PROGRAM, text};
use crate::guest::ublk::remains;
use crate::guest::{Ctx, Outcome, process, wait_for};

/// Calls that nobody but the process itself notices.
const UNNOTICED: [&str; 42] = [
    "access",
    "arch_prctl",
    "brk",
    "clock_nanosleep",
    "dup",
    "epoll_wait",
    "fstat",
    "futex",
    "getcwd",
    "getdents64",
    "geteuid",
    "getpid",
    "getppid",
    "getrandom",
    "gettid",
    "getuid",
    "lseek",
    "madvise",
    "mmap",
    "mprotect",
    "mremap",
    "munmap",
    "newfstatat",
    "poll",
    "ppoll",
    "pread64",
    "prlimit64",
    "read",
    "readlink",
    "readlinkat",
    "restart_syscall",
    "rseq",
    "rt_sigaction",
    "rt_sigprocmask",
    "rt_sigreturn",
    "sched_getaffinity",
    "set_robust_list",
    "set_tid_address",
    "sigaltstack",
    "statx",
    "uname",
    "sched_yield",
];
/// Calls that matter only for what they are about.
const OPENING: [&str; 2] = ["close", "openat"];
/// Where files are only read.
const READ_ONLY: [&str; 5] = ["/etc/", "/lib", "/proc/", "/sys/", "/usr/"];
/// Of a call that is made more often than this, every eighth is hit after so many: those of lanes
/// that serve.
const EACH: u32 = 24;
/// Kills of each command in the short run, spread over all calls.
const SHORT: usize = 2;

/// A command, and what goes before and after it.
struct Traced<'a> {
    arguments: &'a [&'a str],
    before: &'a dyn Fn() -> Result<()>,
    after: &'a dyn Fn() -> Result<()>,
}

/// Kills the processes of each command at their system calls.
pub fn storm(ctx: &Ctx) -> Result<Outcome> {
    let mut storm = Storm::new()?;
    let backing = storm.backing();
    let backing = text(&backing)?;
    let add = ["add", "loop", "-f", backing, "-n", ID];
    let supervised = [&add[..], &["--supervise"]].concat();
    let outliving = [&add[..], &["--on-death", "reissue"]].concat();
    let run = |arguments: &[&str]| process::run(&[&[PROGRAM], arguments].concat()).map(drop);
    let nothing = || Ok(());
    let delete = || {
        delete_if_there()?;
        remains::ensure_none()?;
        run(&add)?;
        verify(remains::devices()?.first().context("a device")?)?;
        run(&["del", "-n", ID])?;
        remains::ensure_none()
    };
    let recover = || {
        let devices = remains::devices()?;
        if devices.first().context("the device")?.pid.is_none() {
            run(&["recover", "-n", ID])?;
        }
        verify(remains::devices()?.first().context("the device")?)?;
        orphan()
    };
    for arguments in [&add[..], &supervised] {
        let traced = Traced { arguments, before: &nothing, after: &delete };
        each_call(ctx, &mut storm, &traced)?;
    }
    run(&outliving)?;
    orphan()?;
    let traced = Traced { arguments: &["recover", "-n", ID], before: &nothing, after: &recover };
    each_call(ctx, &mut storm, &traced)?;
    run(&["del", "-n", ID])?;
    remains::ensure_none()?;
    let traced =
        Traced { arguments: &["del", "-n", ID], before: &|| run(&supervised), after: &delete };
    each_call(ctx, &mut storm, &traced)?;
    Ok(storm.figure("kills at system calls"))
}

fn each_call(ctx: &Ctx, storm: &mut Storm, traced: &Traced<'_>) -> Result<()> {
    let log = ctx.directory().join("calls");
    (traced.before)()?;
    strace(traced, &["-y", "-o", text(&log)?])?;
    settle()?;
    end_tracers()?;
    (traced.after)()?;
    let all = calls(&fs::read_to_string(&log)?);
    ensure!(!all.is_empty(), "strace has seen nothing");
    let stride = if ctx.long { 1 } else { all.len().div_ceil(SHORT).max(1) };
    for (name, number) in all.iter().step_by(stride) {
        storm.blow(&format!("{:?}: {name} {number}", traced.arguments));
        (traced.before)()?;
        let only = format!("trace={name}");
        let inject = format!("inject={name}:signal=SIGKILL:when={number}");
        strace(traced, &["-o", "/dev/null", "-e", &only, "-e", &inject])?;
        settle()?;
        // Or they would kill what comes to that call later.
        end_tracers()?;
        settle()?;
        (traced.after)()?;
    }
    println!("{:?}: {} calls", traced.arguments, all.len());
    Ok(())
}

/// Runs a command, however it ends. The tracer stays with what the command has started.
fn strace(traced: &Traced<'_>, options: &[&str]) -> Result<()> {
    let said = File::create("/tmp/said")?;
    let mut child = Command::new("strace")
        .args(["-f", "-D", "-qqq"])
        .args(options)
        .arg(PROGRAM)
        .args(traced.arguments)
        .stdin(Stdio::null())
        .stdout(said.try_clone()?)
        .stderr(said)
        .spawn()?;
    let ended = wait_for("the command", Duration::from_secs(60), || Ok(child.try_wait()?));
    ended.with_context(|| fs::read_to_string("/tmp/said").unwrap_or_default()).map(drop)
}

/// What is traced goes on.
fn end_tracers() -> Result<()> {
    wait_for("the tracers to end", Duration::from_secs(10), || {
        let tracers = remains::pids_of("strace");
        for pid in &tracers {
            // It can only fail because it has ended.
            let _ = kill(Pid::from_raw(i32::try_from(*pid)?), Signal::SIGKILL);
        }
        Ok(tracers.is_empty().then_some(()))
    })
}

/// Waits until what the command has left is served, gone, or dead.
fn settle() -> Result<()> {
    wait_for("a device or none", Duration::from_secs(30), || {
        let processes = remains::processes();
        let devices = remains::devices()?;
        let is_served = devices.iter().any(|it| it.state == "LIVE" && it.pid.is_some());
        Ok((processes.is_empty() || is_served).then_some(()))
    })
    .with_context(|| format!("{:?}", remains::processes()))
}

/// The calls that are to be hit: their names, and which of that name they were in some thread.
fn calls(log: &str) -> BTreeSet<(String, u32)> {
    let mut each: BTreeMap<(&str, &str), u32> = BTreeMap::new();
    let mut all = BTreeSet::new();
    for line in log.lines() {
        let Some((thread, rest)) = line.split_once(' ') else { continue };
        let Some((name, arguments)) = rest.trim_start().split_once('(') else { continue };
        let is_name = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
        if name.is_empty() || !name.bytes().all(is_name) {
            continue;
        }
        let number = each.entry((thread, name)).or_default();
        *number += 1;
        if !is_unnoticed(name, arguments) && (*number <= EACH || *number % 8 == 0) {
            all.insert((name.to_owned(), *number));
        }
    }
    all
}

fn is_unnoticed(name: &str, arguments: &str) -> bool {
    // A path is written in quotes, and that of an open file in angle brackets.
    let is_at =
        |place: &&str| ["\"", "<"].iter().any(|it| arguments.contains(&format!("{it}{place}")));
    UNNOTICED.contains(&name) || OPENING.contains(&name) && READ_ONLY.iter().any(is_at)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_counted_for_each_thread_and_chosen_by_what_they_change() {
        let log = "17 openat(AT_FDCWD</>, \"x\", O_RDONLY) = 3\n17 read(3</x>, <unfinished ...>\n\
                   18 openat(AT_FDCWD</>, \"(y)\") = 3\n17 <... read resumed>) = 0\n\
                   17 close(3</sys/block>) = 0\n17 close(4</dev/ublkc0>) = 0\n\
                   17    openat(AT_FDCWD</>, \"/etc/z\") = 4\n18 +++ exited with 0 +++\n\
                   17 openat(AT_FDCWD</>, \"/run/a\", O_CREAT) = 5\n";
        let expected = [("close", 2), ("openat", 1), ("openat", 3)];
        let expected = expected.map(|(name, number)| (name.to_owned(), number));
        assert_eq!(calls(log), expected.into());
    }
}

//! Processes of this program: what each is, and which device it is about.
//!
//! A process is one of ours if root runs it, in this user namespace, and it has our name: other users
//! can name theirs as they like. It serves a device if it has that one's character device open, by
//! its number. Of processes that have none open only those of this pid namespace count. Each says what it
//! is in a file ([`role_file`](crate::device::role_file)), or by its command line. What a state file says of
//! a process is believed only as far as these agree.

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::time::Duration;

use nix::sys::signal::Signal;

use crate::backing::usage;
use crate::device::mark::Nonce;
use crate::device::paths::RUN_DIR;
pub use crate::device::role_file::Role;
use crate::device::role_file::{RoleFiles, Told};
use crate::device::state_file::StateFile;
use crate::os::process::PidFd;
use crate::os::procfs::process_name;
use crate::os::procfs::{self, is_alive};

/// A process of this program.
#[derive(Debug)]
pub struct Process {
    /// Process id.
    pub pid: u32,
    /// What it is.
    pub role: Role,
    /// The device that it serves, or was told to see to; none where it serves many.
    pub device: Option<u32>,
    /// Process id of its supervisor.
    pub supervisor: Option<u32>,
    /// What it marks the device with that it adds, where another process knows that.
    pub nonce: Option<Nonce>,
    /// When it was started, since the machine was.
    pub started: Duration,
    pidfd: PidFd,
}

impl Process {
    /// The process `pid`, if it lives and is of this program.
    #[must_use]
    pub fn find(pid: u32) -> Option<Self> {
        Self::find_with(pid, &RoleFiles::read(Path::new(RUN_DIR)))
    }

    fn find_with(pid: u32, files: &RoleFiles) -> Option<Self> {
        // What is read from here on is about this process: the descriptor tells it from a later
        // one of the same id.
        let pidfd = PidFd::open(pid).ok()?;
        if !is_ours(pid) {
            return None;
        }
        let told = files.of(pid).or_else(|| told_by_command_line(pid))?;
        let served = usage::served_by(pid);
        let is_near = is_in_same("pid", pid);
        if served.is_empty() && !is_near {
            return None;
        }
        let one = || served.first().copied().or(told.device);
        let process = Self {
            pid,
            role: told.role,
            device: if told.role == Role::Fleet { None } else { one() },
            // Another namespace's ids are not those of this one.
            supervisor: told.supervisor.filter(|_| is_near),
            nonce: told.nonce,
            started: procfs::stat(pid)?.started,
            pidfd,
        };
        (!process.has_ended()).then_some(process)
    }

    /// One for a test, which lives as long as the calling process.
    #[cfg(test)]
    pub(crate) fn made_up(
        pid: u32,
        role: Role,
        device: Option<u32>,
        supervisor: Option<u32>,
    ) -> Self {
        let pidfd = PidFd::open(std::process::id()).unwrap();
        Self { pid, role, device, supervisor, nonce: None, started: Duration::ZERO, pidfd }
    }

    /// Whether it has ended.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.pidfd.has_ended(Duration::ZERO)
    }

    /// Sends a signal to this process and no other. One that has ended needs none.
    pub fn tell(&self, signal: Signal) {
        self.pidfd.tell(signal);
    }
}

/// Can be read when the process has ended.
impl AsFd for Process {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

impl fmt::Display for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let role = match self.role {
            Role::Command => "the command",
            Role::Server => "the server",
            Role::Fleet => "the server of several devices",
            Role::Supervisor => "the supervisor",
            Role::Helper => "the helper",
        };
        write!(f, "{role} ({}", self.pid)?;
        if let Some(why) = procfs::held_up(self.pid) {
            write!(f, ", which {why}")?;
        }
        f.write_str(")")
    }
}

/// What a process is by its command line, which has no role file: a server of a version up to 0.1.0, which
/// writes none; and one of this version that has not come to that, or had no room for it. A device that an
/// earlier version serves is recovered, upgraded and deleted by this one.
fn told_by_command_line(pid: u32) -> Option<Told> {
    let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let words = line.split(|byte| *byte == 0).filter(|word| !word.is_empty());
    let arguments: Vec<_> = words.map(|it| String::from_utf8_lossy(it).into_owned()).collect();
    Some(told_by_arguments(&arguments))
}

fn told_by_arguments(arguments: &[String]) -> Told {
    let value = |names: &[&str]| value_of(arguments, names);
    let has = |name: &str| arguments.iter().any(|argument| argument == name);
    let command = arguments.iter().skip(1).find(|argument| !argument.starts_with('-'));
    let command = command.map_or("", String::as_str);
    let role = match (command, value(&["--role"])) {
        ("supervise", _) | (_, Some("supervisor")) => Role::Supervisor,
        ("stop-device", _) => Role::Helper,
        ("serve", _) => Role::Fleet,
        (_, Some("server")) => Role::Server,
        ("add" | "recover", _) if has("--foreground") => {
            if has("--supervise") {
                Role::Supervisor
            } else {
                Role::Server
            }
        }
        _ => Role::Command,
    };
    // The device that `add` is told need not be the one that it adds: it may be somebody else's.
    let device = if command == "add" { None } else { value(&["-n", "--id"]) };
    Told {
        role,
        device: device.and_then(|id| id.parse().ok()),
        supervisor: value(&["--supervisor"]).and_then(|pid| pid.parse().ok()),
        nonce: value(&["--nonce"]).and_then(|nonce| nonce.parse().ok()),
    }
}

/// The value of an option, given as one word or two.
fn value_of<'a>(arguments: &'a [String], names: &[&str]) -> Option<&'a str> {
    arguments.iter().enumerate().find_map(|(at, argument)| {
        let rest = names.iter().find_map(|name| argument.strip_prefix(name))?;
        match rest.strip_prefix('=') {
            Some(value) => Some(value),
            None if rest.is_empty() => arguments.get(at + 1).map(String::as_str),
            // -n3, but no --idle.
            None => (!argument.starts_with("--")).then_some(rest),
        }
    })
}

/// Whether a process is alive, of this program, and run by the user and in the user namespace of the
/// calling one: root's.
#[must_use]
pub fn is_ours(pid: u32) -> bool {
    is_alive(pid)
        && process_name(pid) == env!("CARGO_PKG_NAME")
        && procfs::is_of_user(pid, nix::unistd::geteuid().as_raw())
        && is_in_same("user", pid)
}

/// Whether a process is in the calling one's namespace of a kind.
fn is_in_same(kind: &str, pid: u32) -> bool {
    let of = |process: &str| fs::read_link(format!("/proc/{process}/ns/{kind}")).ok();
    // A kernel without such namespaces has none to tell apart.
    of("self").is_none_or(|own| of(&pid.to_string()) == Some(own))
}

/// All processes of this program but the calling one, in the order of their ids.
#[must_use]
pub fn all() -> Vec<Process> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    let pids = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let pids: BTreeSet<u32> = pids.filter(|pid| *pid != std::process::id()).collect();
    // One that says later what it is, is known by its command line.
    let files = RoleFiles::read(Path::new(RUN_DIR));
    pids.into_iter().filter_map(|pid| Process::find_with(pid, &files)).collect()
}

/// The processes that see to a device: its server and supervisor, and those that recover or stop it.
/// `adder` is the mark of the one that has added it.
#[must_use]
pub fn of_device(id: u32, adder: Option<Nonce>) -> Vec<Process> {
    let mut found = all();
    let pids = pids_of_device(&found, id, adder);
    found.retain(|process| pids.contains(&process.pid));
    found
}

/// As [`of_device`], the ids of those among processes that were `found` already.
#[must_use]
pub fn pids_of_device(found: &[Process], id: u32, adder: Option<Nonce>) -> BTreeSet<u32> {
    let record = StateFile::read(Path::new(RUN_DIR), id).ok();
    let known: Vec<u32> =
        record.iter().flat_map(|record| [Some(record.pid), record.supervisor]).flatten().collect();
    let is_about_it = |process: &Process| {
        let has_added_it = adder.is_some() && process.nonce == adder;
        process.device == Some(id) || known.contains(&process.pid) || has_added_it
    };
    let supervisors: Vec<u32> =
        found.iter().filter(|it| is_about_it(it)).filter_map(|it| it.supervisor).collect();
    let is_one = |process: &&Process| {
        let is_another_ones = process.device.is_some_and(|device| device != id);
        let is_it = is_about_it(process) || supervisors.contains(&process.pid);
        process.role != Role::Command && is_it && !is_another_ones
    };
    found.iter().filter(is_one).map(|process| process.pid).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::os::procfs;

    #[test]
    fn arguments_tell_what_a_process_is() {
        use Role::{Command, Fleet, Helper, Server, Supervisor};
        let table = [
            ("add null", Command, None, None),
            ("add null -n 3 --role server", Server, None, None),
            ("-v add loop -f add --role supervisor --supervise", Supervisor, None, None),
            ("add null --role server --supervisor 77 --json", Server, None, Some(77)),
            ("add null --foreground", Server, None, None),
            ("add null --foreground --supervise", Supervisor, None, None),
            ("recover -n 3", Command, Some(3), None),
            ("recover -n3 --role server", Server, Some(3), None),
            ("recover --id=3 --foreground", Server, Some(3), None),
            ("recover -n=3 --role=server --supervisor 8", Server, Some(3), Some(8)),
            ("supervise -n 4 --server 5", Supervisor, Some(4), None),
            ("stop-device -n 4", Helper, Some(4), None),
            ("serve --config 4.toml", Fleet, None, None),
            ("-v serve --config=/etc/x", Fleet, None, None),
            ("del -n 3", Command, Some(3), None),
            ("list --json", Command, None, None),
        ];
        for (line, role, device, supervisor) in table {
            let line = format!("ublk-target {line}");
            let arguments: Vec<_> = line.split(' ').map(str::to_owned).collect();
            assert_eq!(
                told_by_arguments(&arguments),
                Told { role, device, supervisor, nonce: None },
                "{line}"
            );
        }
    }

    #[test]
    fn other_programs_are_not_ours() {
        // Neither this test nor the first process.
        assert!(Process::find(std::process::id()).is_none());
        assert!(Process::find(1).is_none());
        assert!(
            procfs::stat(std::process::id()).unwrap().started
                <= procfs::now() + Duration::from_millis(20)
        );
    }
}

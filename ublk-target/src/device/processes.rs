//! Processes of this program: the role of each, and its device.
//!
//! A process is one of ours if root runs it, in this user namespace, and it has our name; other
//! users can name their processes freely. It serves a device if it has that device's character
//! device open, identified by its number. Processes without an open character device count only in
//! this pid namespace. Each process says its role in a file
//! ([`role_file`](crate::device::role_file)), or else by its command line. The process ids in a
//! state file are used only if they agree with this.

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
use crate::device::role_file::{RoleFiles, RoleRecord};
use crate::device::state_file::StateFile;
use crate::os::process::PidFd;
use crate::os::procfs::process_name;
use crate::os::procfs::{self, is_alive};

/// A process of this program.
#[derive(Debug)]
pub struct Process {
    /// Process id.
    pub pid: u32,
    /// Its role.
    pub role: Role,
    /// The device that it serves or is responsible for; none if it serves many.
    pub device: Option<u32>,
    /// Process id of its supervisor.
    pub supervisor: Option<u32>,
    /// Its mark on the device that it adds, if another process knows it.
    pub nonce: Option<Nonce>,
    /// Its start time, since boot.
    pub started: Duration,
    pidfd: PidFd,
}

impl Process {
    /// The process `pid`, if it is alive and of this program.
    #[must_use]
    pub fn find(pid: u32) -> Option<Self> {
        Self::find_with(pid, &RoleFiles::read(Path::new(RUN_DIR)))
    }

    fn find_with(pid: u32, files: &RoleFiles) -> Option<Self> {
        // From here on, all reads are of this process: the descriptor distinguishes it from a later
        // one of the same id.
        let pidfd = PidFd::open(pid).ok()?;
        if !is_ours(pid) {
            return None;
        }
        let record = files.of(pid).or_else(|| record_of_command_line(pid))?;
        let served = usage::served_by(pid);
        let is_near = is_in_same("pid", pid);
        if served.is_empty() && !is_near {
            return None;
        }
        let one = || served.first().copied().or(record.device);
        let process = Self {
            pid,
            role: record.role,
            device: if record.role == Role::Fleet { None } else { one() },
            // The ids of another pid namespace are not ids of this one.
            supervisor: record.supervisor.filter(|_| is_near),
            nonce: record.nonce,
            started: procfs::stat(pid)?.started,
            pidfd,
        };
        (!process.has_ended()).then_some(process)
    }

    /// A process for a test. It does not end.
    #[cfg(test)]
    pub(crate) fn made_up(
        pid: u32,
        role: Role,
        device: Option<u32>,
        supervisor: Option<u32>,
    ) -> Self {
        let pidfd = PidFd::made_up();
        Self { pid, role, device, supervisor, nonce: None, started: Duration::ZERO, pidfd }
    }

    /// Whether it has ended.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.pidfd.has_ended(Duration::ZERO)
    }

    /// Sends a signal to this process and no other. Does nothing if it has ended.
    pub fn tell(&self, signal: Signal) {
        self.pidfd.tell(signal);
    }
}

/// A descriptor that is readable when the process has ended.
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

/// The role of a process without a role file, by its command line: a server of a version up to
/// 0.1.0, which writes none; or a process of this version that has not written it yet, or had no
/// room for it. So this version can recover, upgrade and delete devices of an earlier one.
fn record_of_command_line(pid: u32) -> Option<RoleRecord> {
    let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let words = line.split(|byte| *byte == 0).filter(|word| !word.is_empty());
    let arguments: Vec<_> = words.map(|it| String::from_utf8_lossy(it).into_owned()).collect();
    Some(record_of_arguments(&arguments))
}

fn record_of_arguments(arguments: &[String]) -> RoleRecord {
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
    // The id on the command line of `add` may belong to another device: the driver may refuse it.
    let device = if command == "add" { None } else { value(&["-n", "--id"]) };
    RoleRecord {
        role,
        device: device.and_then(|id| id.parse().ok()),
        supervisor: value(&["--supervisor"]).and_then(|pid| pid.parse().ok()),
        nonce: value(&["--nonce"]).and_then(|nonce| nonce.parse().ok()),
    }
}

/// The value of an option, in one word or two.
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

/// Whether a process is alive, of this program, and run by the user and in the user namespace of
/// the calling one: root's.
#[must_use]
pub fn is_ours(pid: u32) -> bool {
    is_alive(pid)
        && process_name(pid) == env!("CARGO_PKG_NAME")
        && procfs::is_of_user(pid, nix::unistd::geteuid().as_raw())
        && is_in_same("user", pid)
}

/// Whether a process is in the calling one's namespace of this kind.
fn is_in_same(kind: &str, pid: u32) -> bool {
    let of = |process: &str| fs::read_link(format!("/proc/{process}/ns/{kind}")).ok();
    // A kernel without such namespaces has nothing to compare.
    of("self").is_none_or(|own| of(&pid.to_string()) == Some(own))
}

/// All processes of this program except the calling one, in the order of their ids.
#[must_use]
pub fn all() -> Vec<Process> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    let pids = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let pids: BTreeSet<u32> = pids.filter(|pid| *pid != std::process::id()).collect();
    // A process that writes its role file later is recognised by its command line.
    let files = RoleFiles::read(Path::new(RUN_DIR));
    pids.into_iter().filter_map(|pid| Process::find_with(pid, &files)).collect()
}

/// The processes of a device: its server and supervisor, and those that recover or stop it. `adder`
/// is the mark of the process that has added it.
#[must_use]
pub fn of_device(id: u32, adder: Option<Nonce>) -> Vec<Process> {
    let mut found = all();
    let pids = pids_of_device(&found, id, adder);
    found.retain(|process| pids.contains(&process.pid));
    found
}

/// Like [`of_device`], among the processes in `found`.
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
                record_of_arguments(&arguments),
                RoleRecord { role, device, supervisor, nonce: None },
                "{line}"
            );
        }
    }

    #[test]
    fn other_programs_are_not_ours() {
        // Neither this test nor process 1 is one of ours.
        assert!(Process::find(std::process::id()).is_none());
        assert!(Process::find(1).is_none());
        assert!(
            procfs::stat(std::process::id()).unwrap().started
                <= procfs::now() + Duration::from_millis(20)
        );
    }
}

//! Processes and mounts in `/proc` (proc(5)).

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::os::text::printable;

/// Fields of `/proc/PID/stat`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stat {
    /// Its state: `R` runs, `S` sleeps, `T` is suspended, `Z` has ended, and others.
    pub state: char,
    /// Its start time, since the boot of the machine.
    pub started: Duration,
}

/// The state of a process; `None` if it does not exist.
#[must_use]
pub fn stat(pid: u32) -> Option<Stat> {
    stat_of(&pid.to_string())
}

/// As [`stat`], of a process by its name in `/proc`, which may be `self`.
pub(crate) fn stat_of(process: &str) -> Option<Stat> {
    parse_stat(&fs::read_to_string(format!("/proc/{process}/stat")).ok()?)
}

/// The id of a process in its own pid namespace, by its name in `/proc`, which may be `self`.
pub(crate) fn own_pid_of(process: &str) -> Option<u32> {
    let own = numbers_of(process, "NSpid:").last().copied();
    // A kernel without such namespaces has one id for each.
    own.or_else(|| numbers_of(process, "Pid:").first().copied())
}

fn parse_stat(stat: &str) -> Option<Stat> {
    // A name may have blanks and brackets of its own. What follows it begins with the third field.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    let state = fields.next()?.chars().next()?;
    let ticks: u64 = fields.nth(18)?.parse().ok()?;
    // The kernel's USER_HZ is 100 on every architecture that ublk is used on.
    Some(Stat { state, started: Duration::from_millis(ticks.saturating_mul(10)) })
}

/// Whether a process exists and is no zombie.
#[must_use]
pub fn is_alive(pid: u32) -> bool {
    stat(pid).is_some_and(|stat| !matches!(stat.state, 'Z' | 'X'))
}

/// How long the machine has run.
#[must_use]
pub fn now() -> Duration {
    let uptime = fs::read_to_string("/proc/uptime").unwrap_or_default();
    let seconds = uptime.split(' ').next().and_then(|seconds| seconds.parse().ok());
    Duration::from_secs_f64(seconds.unwrap_or(0.0))
}

pub(crate) fn processes() -> impl Iterator<Item = u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

/// The name of a process, `?` if it is gone.
#[must_use]
pub fn process_name(pid: u32) -> String {
    fs::read_to_string(format!("/proc/{pid}/comm"))
        .map_or_else(|_| "?".to_owned(), |name| printable(name.trim()))
}

/// Why a process does not run until somebody resumes it: words that follow "which".
#[must_use]
pub fn held_up(pid: u32) -> Option<&'static str> {
    match stat(pid)?.state {
        'T' => return Some("a signal has suspended"),
        't' => return Some("a debugger has stopped"),
        _ => {}
    }
    let groups = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    is_frozen(Path::new("/sys/fs/cgroup"), &groups).then_some("its control group has frozen")
}

/// Whether the version 2 control group in `/proc/PID/cgroup` is frozen.
fn is_frozen(top: &Path, groups: &str) -> bool {
    let path = groups.lines().find_map(|line| line.strip_prefix("0::/"));
    let events =
        path.and_then(|path| fs::read_to_string(top.join(path).join("cgroup.events")).ok());
    events.is_some_and(|events| events.lines().any(|line| line == "frozen 1"))
}

/// Whether a process runs as root.
pub(crate) fn is_roots(pid: u32) -> bool {
    is_of_user(pid, 0)
}

/// Whether all user ids of a process are this one. Ids of another user namespace appear as mapped
/// into that of the calling process.
#[must_use]
pub fn is_of_user(pid: u32, uid: u32) -> bool {
    let ids = numbers_of(&pid.to_string(), "Uid:");
    !ids.is_empty() && ids.iter().all(|id| *id == uid)
}

pub(crate) fn parent_of(pid: u32) -> Option<u32> {
    numbers_of(&pid.to_string(), "PPid:").first().copied()
}

/// The numbers in a line of `/proc/PID/status`.
fn numbers_of(process: &str, field: &str) -> Vec<u32> {
    let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix(field)).unwrap_or_default();
    line.split_whitespace().filter_map(|number| number.parse().ok()).collect()
}

/// Major and minor of a device number.
#[must_use]
pub fn split_devt(devt: u64) -> (u32, u32) {
    (libc::major(devt), libc::minor(devt))
}

/// A mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// The device number; major 0 for file systems without a device, or with several (btrfs).
    pub devt: (u32, u32),
    /// The mount point.
    pub point: PathBuf,
    /// The source, as given to mount(2).
    pub source: PathBuf,
}

impl Mount {
    /// Whether this mounts one of these block devices. `root` is the root directory of its
    /// namespace.
    pub(crate) fn is_of(&self, numbers: &[(u32, u32)], root: &Path) -> bool {
        if numbers.contains(&self.devt) {
            return true;
        }
        let Ok(source) = self.source.strip_prefix("/") else { return false };
        let node = fs::metadata(root.join(source));
        self.devt.0 == 0
            && node.is_ok_and(|node| {
                node.file_type().is_block_device() && numbers.contains(&split_devt(node.rdev()))
            })
    }
}

/// The mounts in a process's mount namespace, in mount order. `process` is a process id, or `self`.
#[must_use]
pub fn mounts(process: &str) -> Vec<Mount> {
    parse_mounts(&fs::read_to_string(format!("/proc/{process}/mountinfo")).unwrap_or_default())
}

fn parse_mounts(mountinfo: &str) -> Vec<Mount> {
    let parse = |line: &str| {
        let mut fields = line.split(' ');
        let devt = parse_devt(fields.nth(2)?)?;
        let point = PathBuf::from(unescape(fields.nth(1)?));
        // Any number of options and tags; then the type, and the source.
        let source = fields.skip_while(|field| *field != "-").nth(2).unwrap_or_default();
        Some(Mount { devt, point, source: PathBuf::from(unescape(source)) })
    };
    mountinfo.lines().filter_map(parse).collect()
}

/// Decodes the octal escapes of blanks and backslashes.
pub(crate) fn unescape(field: &str) -> String {
    [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")]
        .iter()
        .fold(field.to_owned(), |text, (escape, character)| text.replace(escape, character))
}

/// Reads `MAJOR:MINOR`.
#[must_use]
pub fn parse_devt(text: &str) -> Option<(u32, u32)> {
    let (major, minor) = text.trim().split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_described_whatever_its_name() {
        let rest = "1 1 1 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 250 9 9";
        for name in ["sh", "a) Z 9 (b", "x y"] {
            let read = parse_stat(&format!("77 ({name}) T {rest}\n"));
            assert_eq!(
                read,
                Some(Stat { state: 'T', started: Duration::from_millis(2500) }),
                "{name}"
            );
        }
        for wrong in ["", "77 (sh", "77 (sh) S 1 2 3", "77 (sh)"] {
            assert_eq!(parse_stat(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn what_holds_a_process_up_is_told() {
        let suspended = std::process::Command::new("sleep").arg("60").spawn();
        let mut suspended = suspended.unwrap();
        let pid = suspended.id();
        assert_eq!(held_up(pid), None);
        let id = nix::unistd::Pid::from_raw(i32::try_from(pid).unwrap());
        nix::sys::signal::kill(id, nix::sys::signal::Signal::SIGSTOP).unwrap();
        let began = std::time::Instant::now();
        while held_up(pid).is_none() && began.elapsed().as_secs() < 10 {
            std::thread::yield_now();
        }
        let told = held_up(pid);
        suspended.kill().unwrap();
        suspended.wait().unwrap();
        assert_eq!(told, Some("a signal has suspended"));

        let top = tempfile::tempdir().unwrap();
        fs::create_dir(top.path().join("ice")).unwrap();
        let set = |text| fs::write(top.path().join("ice/cgroup.events"), text).unwrap();
        set("populated 1\nfrozen 1\n");
        assert!(is_frozen(top.path(), "1:name=systemd:/x\n0::/ice\n"));
        assert!(!is_frozen(top.path(), "0::/\n"));
        set("populated 1\nfrozen 0\n");
        assert!(!is_frozen(top.path(), "0::/ice\n"));
    }

    #[test]
    fn mounts_are_found() {
        let mountinfo = "22 1 259:0 / / rw,relatime shared:1 - ext4 /dev/root rw\n\
                         30 22 259:3 / /mnt/a\\040b rw - xfs /dev/nvme1n1p1 rw\n\
                         31 22 0:20 / /proc rw - proc proc rw\n";
        let found = parse_mounts(mountinfo);
        let found: Vec<_> = found
            .iter()
            .map(|m| (m.devt, m.point.to_str().unwrap(), m.source.to_str().unwrap()))
            .collect();
        let expected = [
            ((259, 0), "/", "/dev/root"),
            ((259, 3), "/mnt/a b", "/dev/nvme1n1p1"),
            ((0, 20), "/proc", "proc"),
        ];
        assert_eq!(found, expected);
        assert!(parse_mounts("garbage\n\n").is_empty());
    }

    #[test]
    fn processes_are_told_alive_from_dead() {
        assert!(is_alive(std::process::id()));
        assert!(!is_alive(u32::MAX));
    }
}

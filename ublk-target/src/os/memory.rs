//! Memory limits of a server other than the machine's: that of its control group and that of locked
//! memory.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};
use ublk_engine::units::Bytes;
use uring_ext::Errno;

/// Memory in bytes that adding a device needs besides its buffers: the program, which is locked in
/// memory, stacks, rings and tables, and the command that waits for the server. Measured; less is
/// not enough.
pub(crate) const PROGRAM: u64 = 13 << 19;
/// `CAP_IPC_LOCK`: no limit of locked memory.
const CAP_IPC_LOCK: u32 = 14;

/// A limit that leaves too little memory, though the machine has enough.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Shortage {
    /// The limit of a control group (`memory.max`).
    Group {
        /// The limit's file.
        file: PathBuf,
        /// The limit.
        limit: Bytes,
        /// The free part, with the page cache counted as free.
        left: Bytes,
    },
    /// The limit of locked memory.
    Locked {
        /// The limit.
        limit: Bytes,
    },
}

impl fmt::Display for Shortage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Group { file, limit, left } => write!(
                f,
                "its control group is limited to {limit} ({}), and {left} are left; raise that limit",
                file.display()
            ),
            Self::Locked { limit } => write!(
                f,
                "it may lock {limit} (RLIMIT_MEMLOCK, `ulimit -l`); raise that limit, or give it \
                 CAP_IPC_LOCK"
            ),
        }
    }
}

/// The limit that `needed` bytes exceed; `locked` of them are locked.
pub fn shortage(needed: u64, locked: u64) -> Option<Shortage> {
    let locked_limit = locked_limit().filter(|limit| *limit < locked);
    let of_lock = locked_limit.map(|limit| Shortage::Locked { limit: Bytes(limit) });
    of_lock.or_else(|| tightest_group().filter(|group| is_less(group, needed)))
}

/// The limit that may be the reason why the kernel refused memory; `None` without a limit.
pub fn suspect(errno: Errno) -> Option<Shortage> {
    match errno {
        // Locked memory beyond its limit is ENOMEM, or EAGAIN where a mapping is locked at once.
        Errno::ENOMEM | Errno::EAGAIN => {
            let locked = locked_limit().map(|limit| Shortage::Locked { limit: Bytes(limit) });
            locked.or_else(tightest_group)
        }
        // Pages that cannot be had as they are pinned.
        Errno::EFAULT => tightest_group(),
        _ => None,
    }
}

fn is_less(shortage: &Shortage, needed: u64) -> bool {
    match shortage {
        Shortage::Group { left, .. } => left.0 < needed,
        Shortage::Locked { limit } => limit.0 < needed,
    }
}

/// How much memory this process may lock; `None` for no limit.
fn locked_limit() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    if has_capability(&status, CAP_IPC_LOCK) {
        return None;
    }
    let (limit, _) = getrlimit(Resource::RLIMIT_MEMLOCK).ok()?;
    (limit != RLIM_INFINITY).then_some(limit)
}

fn has_capability(status: &str, number: u32) -> bool {
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let bits = effective.and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok());
    bits.is_some_and(|bits| bits & (1 << number) != 0)
}

/// The control group of this process, or an ancestor of it, that leaves the least memory.
fn tightest_group() -> Option<Shortage> {
    tightest_of(Path::new(ROOT), &own_group()?)
}

/// Where control groups of version 2 are mounted.
const ROOT: &str = "/sys/fs/cgroup";

/// The control group of this process.
fn own_group() -> Option<String> {
    let own = fs::read_to_string("/proc/self/cgroup").ok()?;
    own.lines().find_map(|line| line.strip_prefix("0::")).map(str::to_owned)
}

/// How many processes of this process's control group the out-of-memory killer has killed.
fn oom_kills() -> u64 {
    let group = own_group().unwrap_or_default();
    let events = Path::new(ROOT).join(group.trim_start_matches('/')).join("memory.events");
    let events = fs::read_to_string(events).unwrap_or_default();
    let kills = events.lines().find_map(|line| line.strip_prefix("oom_kill "));
    kills.and_then(|kills| kills.trim().parse().ok()).unwrap_or(0)
}

/// Detects that the out-of-memory killer has killed a server of this process, which then could not
/// report the shortage.
#[derive(Clone, Copy, Debug)]
pub struct OomWatch {
    kills: u64,
}

impl OomWatch {
    /// Call it before the server starts.
    #[must_use]
    pub fn start() -> Self {
        Self { kills: oom_kills() }
    }

    /// The needed and the available memory, in words, if a process of the control group has been
    /// killed since.
    #[must_use]
    pub fn shortage(self) -> Option<String> {
        let shortage = (oom_kills() > self.kills).then(tightest_group)??;
        Some(format!(
            "the server needs {} of memory besides its buffers, but {shortage}",
            Bytes(PROGRAM)
        ))
    }
}

/// `root` is the mount point of the control groups.
fn tightest_of(root: &Path, group: &str) -> Option<Shortage> {
    let group = Path::new(group.trim_start_matches('/'));
    let groups = group.ancestors().map(|group| root.join(group));
    let left = groups.filter_map(|directory| {
        let number = |name: &str| {
            let text = fs::read_to_string(directory.join(name)).ok()?;
            text.trim().parse::<u64>().ok()
        };
        // No limit is the word `max`, which is no number.
        let limit = number("memory.max")?;
        let used = number("memory.current").unwrap_or(0);
        let stat = fs::read_to_string(directory.join("memory.stat")).unwrap_or_default();
        let cached = ["active_file ", "inactive_file "].map(|name| {
            let value = stat.lines().find_map(|line| line.strip_prefix(name));
            value.and_then(|value| value.trim().parse::<u64>().ok()).unwrap_or(0)
        });
        let kept = used.saturating_sub(cached[0].saturating_add(cached[1]));
        let left = limit.saturating_sub(kept);
        let file = directory.join("memory.max");
        Some(Shortage::Group { file, limit: Bytes(limit), left: Bytes(left) })
    });
    left.min_by_key(|shortage| match shortage {
        Shortage::Group { left, .. } => left.0,
        Shortage::Locked { limit } => limit.0,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tightest_group_counts() {
        let root = tempfile::tempdir_in(".").unwrap();
        let (upper, lower) = (root.path().join("a"), root.path().join("a/b"));
        fs::create_dir_all(&lower).unwrap();
        let write = |directory: &Path, name: &str, text: &str| {
            fs::write(directory.join(name), text).unwrap();
        };
        assert_eq!(tightest_of(root.path(), "/a/b"), None);
        write(&lower, "memory.max", "max\n");
        assert_eq!(tightest_of(root.path(), "/a/b"), None);
        write(&upper, "memory.max", "4194304\n");
        write(&upper, "memory.current", "3145728\n");
        write(&upper, "memory.stat", "anon 1\nactive_file 1048576\ninactive_file 524288\n");
        let left = |group: &str| match tightest_of(root.path(), group) {
            Some(Shortage::Group { file, limit, left }) => Some((file, limit.0, left.0)),
            Some(Shortage::Locked { .. }) | None => None,
        };
        let of_upper = Some((upper.join("memory.max"), 4 << 20, 5 << 19));
        assert_eq!((left("/a/b"), left("/a"), left("/")), (of_upper.clone(), of_upper, None));
        write(&lower, "memory.max", "2097152\n");
        assert_eq!(left("/a/b"), Some((lower.join("memory.max"), 2 << 20, 2 << 20)));
        let said = tightest_of(root.path(), "/a/b").unwrap().to_string();
        assert!(said.contains("memory.max") && said.contains("2 MiB"), "{said}");
    }

    #[test]
    fn capabilities_are_read() {
        let status = "Name:\tx\nCapEff:\t0000000000204000\nCapBnd:\tff\n";
        assert!(has_capability(status, 14) && has_capability(status, 21));
        assert!(!has_capability(status, 15) && !has_capability("", 14));
    }
}

//! What a test leaves behind: found by comparing with a baseline, named, and
//! removed so that the next test starts clean.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::{helper, job};
use crate::guest::udev;
use crate::proto::ToHost;

/// Time that one helper gets.
const HELPER_LIMIT: Duration = Duration::from_secs(20);
/// Time for killed processes to vanish and removed devices to go.
const SETTLE_LIMIT: Duration = Duration::from_secs(20);

/// Where the server keeps the state of its devices.
const RUN_DIRECTORY: &str = "/run/ublk-target";

/// One thing that is there.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Thing {
    /// A mount point, and what is mounted.
    Mount(String, String),
    /// A device-mapper device.
    Mapper(String),
    /// A loop device with a file behind it.
    Loop(String),
    /// Any other block device.
    Block(String),
    /// An entry of `/sys/class/ublk-char`.
    UblkChar(String),
    /// A node `/dev/ublk*`.
    UblkNode(String),
    /// A file of the server's state.
    State(PathBuf),
    /// A process that a job started.
    Process(u32, String),
}

impl std::fmt::Display for Thing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Mount(point, source) => write!(f, "mount: {source} on {point}"),
            Self::Mapper(name) => write!(f, "dm device: {name}"),
            Self::Loop(name) => write!(f, "loop device: {name}"),
            Self::Block(name) => write!(f, "block device: {name}"),
            Self::UblkChar(name) => write!(f, "ublk device: {name}"),
            Self::UblkNode(name) => write!(f, "device node: /dev/{name}"),
            Self::State(path) => write!(f, "state file: {}", path.display()),
            Self::Process(_, text) => write!(f, "{text}"),
        }
    }
}

/// All that tests are watched for.
#[derive(Debug, Default)]
pub struct State(BTreeSet<Thing>);

impl State {
    /// What is there now.
    pub fn now() -> Self {
        let mut things = BTreeSet::new();
        things.extend(mounts(&fs::read_to_string("/proc/self/mountinfo").unwrap_or_default()));
        things.extend(block_devices(Path::new("/sys/block")));
        things.extend(names("/sys/class/ublk-char").map(Thing::UblkChar));
        let nodes = names("/dev")
            .filter(|name| name.starts_with("ublk") && name.as_str() != "ublk-control");
        things.extend(nodes.map(Thing::UblkNode));
        things.extend(files_below(Path::new(RUN_DIRECTORY)).into_iter().map(Thing::State));
        for (_, pid) in job_processes() {
            things.insert(Thing::Process(pid, job::describe(pid)));
        }
        Self(things)
    }

    fn beyond(&self, baseline: &Self) -> Vec<Thing> {
        self.0.difference(&baseline.0).cloned().collect()
    }
}

fn names(directory: impl AsRef<Path>) -> impl Iterator<Item = String> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned())
}

fn files_below(directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() && !path.is_symlink() {
            found.extend(files_below(&path));
        } else {
            found.push(path);
        }
    }
    found
}

fn mounts(mountinfo: &str) -> Vec<Thing> {
    let mut found = Vec::new();
    for line in mountinfo.lines() {
        let point = line.split(' ').nth(4);
        let source = line.split_once(" - ").and_then(|(_, rest)| rest.split(' ').nth(1));
        if let (Some(point), Some(source)) = (point, source) {
            found.push(Thing::Mount(point.to_owned(), source.to_owned()));
        }
    }
    found
}

fn block_devices(directory: &Path) -> Vec<Thing> {
    let mut found = Vec::new();
    for name in names(directory) {
        let path = directory.join(&name);
        if let Ok(mapper) = fs::read_to_string(path.join("dm/name")) {
            found.push(Thing::Mapper(mapper.trim().to_owned()));
        } else if name.starts_with("loop") {
            // The driver makes idle ones when it is loaded.
            if path.join("loop/backing_file").exists() {
                found.push(Thing::Loop(name));
            }
        } else {
            found.push(Thing::Block(name));
        }
    }
    found
}

/// Processes of all jobs, with the control group of each.
fn job_processes() -> Vec<(PathBuf, u32)> {
    let mut found = Vec::new();
    for name in names(job::CGROUPS).filter(|name| name.starts_with(job::CGROUP_PREFIX)) {
        let cgroup = Path::new(job::CGROUPS).join(name);
        found.extend(job::processes(&cgroup).into_iter().map(|pid| (cgroup.clone(), pid)));
    }
    found
}

/// Compares with the baseline and removes what is more.
pub fn find_and_remove(baseline: &State) -> ToHost {
    // Device nodes go a moment after their devices.
    let _ = udev::settle();
    let found = State::now().beyond(baseline);
    let mut problems = Vec::new();
    if !found.is_empty() {
        problems = remove(&found);
    }
    let mut stuck = State::now().beyond(baseline);
    let deadline = Instant::now() + SETTLE_LIMIT;
    while !stuck.is_empty() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(50));
        stuck = State::now().beyond(baseline);
    }
    remove_empty_cgroups();
    let mut stuck: Vec<String> = stuck.iter().map(Thing::to_string).collect();
    if !stuck.is_empty() {
        stuck.append(&mut problems);
    }
    ToHost::Leaks { found: found.iter().map(Thing::to_string).collect(), stuck }
}

/// Takes away from the top: users of file systems, file systems, stacked
/// devices, ublk devices, and their servers last.
fn remove(found: &[Thing]) -> Vec<String> {
    let mut problems = Vec::new();
    let mut attempt = |argv: &[&str]| {
        if let Err(error) = helper(argv, HELPER_LIMIT) {
            problems.push(format!("{error:#}"));
        }
    };
    for thing in found {
        if let Thing::Process(pid, text) = thing {
            if !text.contains("(ublk") {
                attempt(&["kill", "-KILL", &pid.to_string()]);
            }
        }
    }
    // Sorted by mount point, so that backwards is innermost first.
    for thing in found.iter().rev() {
        if let Thing::Mount(point, _) = thing {
            attempt(&["umount", point]);
        }
    }
    for thing in found {
        if let Thing::Mapper(name) = thing {
            attempt(&["dmsetup", "remove", "--retry", name]);
        } else if let Thing::Loop(name) = thing {
            attempt(&["losetup", "-d", &format!("/dev/{name}")]);
        }
    }
    let is_ublk = |t: &Thing| matches!(t, Thing::UblkChar(_) | Thing::UblkNode(_));
    if found.iter().any(is_ublk) && Path::new("/payload/ublk-target").exists() {
        attempt(&["/payload/ublk-target", "del", "--all"]);
    }
    for thing in found {
        if let Thing::State(path) = thing {
            attempt(&["rm", "-f", &path.to_string_lossy()]);
        }
        if let Thing::Process(pid, _) = thing {
            if Path::new(&format!("/proc/{pid}")).exists() {
                attempt(&["kill", "-KILL", &pid.to_string()]);
            }
        }
    }
    problems
}

fn remove_empty_cgroups() {
    for name in names(job::CGROUPS).filter(|name| name.starts_with(job::CGROUP_PREFIX)) {
        let _ = fs::remove_dir(Path::new(job::CGROUPS).join(name)); // fails while in use
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_are_read_from_mountinfo() {
        let text = "25 1 259:1 / / rw,relatime - ext4 /dev/root rw\n\
             40 25 0:30 / /run rw shared:5 master:1 - tmpfs run rw,mode=755\n";
        assert_eq!(
            mounts(text),
            [
                Thing::Mount("/".into(), "/dev/root".into()),
                Thing::Mount("/run".into(), "run".into())
            ]
        );
    }

    #[test]
    fn idle_loop_devices_are_not_leaks() {
        let sys = tempfile::tempdir().unwrap();
        for path in ["loop0", "loop1/loop", "dm-0/dm", "nvme0n1"] {
            fs::create_dir_all(sys.path().join(path)).unwrap();
        }
        fs::write(sys.path().join("loop1/loop/backing_file"), "/x\n").unwrap();
        fs::write(sys.path().join("dm-0/dm/name"), "stripe\n").unwrap();
        let mut found = block_devices(sys.path());
        found.sort();
        assert_eq!(
            found,
            [
                Thing::Mapper("stripe".into()),
                Thing::Loop("loop1".into()),
                Thing::Block("nvme0n1".into())
            ]
        );
    }

    #[test]
    fn only_what_is_beyond_the_baseline_is_a_leak() {
        let old = State([Thing::Block("nvme0n1".into())].into());
        let new = State([Thing::Block("nvme0n1".into()), Thing::Mapper("a".into())].into());
        assert_eq!(new.beyond(&old), [Thing::Mapper("a".into())]);
        assert!(old.beyond(&new).is_empty());
    }
}

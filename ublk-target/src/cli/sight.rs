//! Checks that a command can see devices, processes and mounts. It would take unreadable things for
//! absent.

use std::path::Path;

use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Most open descriptors of a command.
const FILES: u64 = 64;

/// A required mount, a path in it, and the command that mounts it.
const MOUNTS: [(&str, &str, &str); 2] = [
    ("/proc", "/proc/self/stat", "mount -t proc proc /proc"),
    ("/sys", "/sys/class", "mount -t sysfs sysfs /sys"),
];

/// Raises the limit of open files if it is too small.
///
/// # Errors
/// What the command cannot see, and what to do.
pub fn check() -> anyhow::Result<()> {
    // It can only fail for a resource that there is not.
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap_or((FILES, FILES));
    if soft < FILES {
        let raised = setrlimit(Resource::RLIMIT_NOFILE, FILES, hard.max(FILES));
        anyhow::ensure!(
            raised.is_ok(),
            "{soft} open files (`ulimit -n`) are too few: {FILES} are needed"
        );
    }
    for (mount, witness, command) in MOUNTS {
        anyhow::ensure!(
            Path::new(witness).exists(),
            "{mount} is not mounted here, or not that of this namespace: without it nobody sees which \
             devices there are and who uses them; `{command}`"
        );
    }
    Ok(())
}

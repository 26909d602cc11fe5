//! The backing: its description, and whether it may be used.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use ublk_engine::units::Bytes;
use ublk_target::backing::sysfs::SysfsDevice;
use ublk_target::backing::{Backing, BackingProblem, Opening};
use ublk_target::os::procfs::split_devt;

use crate::results;

/// The minimum size.
const LEAST: Bytes = Bytes(64 << 20);
const MIB: u64 = 1 << 20;

/// A backing that was checked and may be used.
#[derive(Debug, Clone)]
pub struct CheckedBacking {
    /// Its canonical path.
    pub path: String,
    /// Whether it is a block device, not a file.
    pub is_block: bool,
    /// Its description in results.
    pub described: results::Backing,
}

/// Checks a backing. It must not be in use, and must have `span` bytes if that is given; otherwise
/// `default` or the whole backing is used.
pub fn examine(
    path: &Path,
    span: Option<Bytes>,
    default: Bytes,
    write: bool,
) -> Result<CheckedBacking> {
    let backing = Backing::open(path, Opening::ALONE)?;
    let canonical = backing.path();
    let meta = canonical.metadata()?;
    ensure!(
        !backing.route().is_namespace() && !meta.file_type().is_char_device(),
        "{} takes commands only; give the block device of the namespace",
        path.display()
    );
    ensure!(
        !write || !backing.limits().read_only,
        "{} is read-only; measure it with --read-only",
        path.display()
    );
    let size = backing.size();
    ensure!(size >= LEAST, "{} has {size}, and at least {LEAST} are needed", path.display());
    let span = match span {
        None => default.min(size),
        Some(span) if span > size => {
            bail!("{} has {size}, less than --span {span}", path.display())
        }
        Some(span) => span,
    };
    ensure!(span >= Bytes(16 * MIB), "--span {span} is too little; use at least 16 MiB");
    let is_block = meta.file_type().is_block_device();
    let sysfs = is_block.then(|| split_devt(meta.rdev()));
    let sysfs = sysfs.and_then(|(major, minor)| SysfsDevice::find(Path::new("/sys"), major, minor));
    let attribute = |name| sysfs.as_ref().and_then(|device| device.attribute_of_disk(name));
    let described = results::Backing {
        path: path.display().to_string(),
        kind: kind(canonical, is_block).to_owned(),
        model: attribute("device/model").filter(|model| !model.is_empty()),
        size_bytes: size.0,
        logical_block_bytes: backing.limits().logical_block,
        span_bytes: span.0 / MIB * MIB,
        scheduler: attribute("queue/scheduler").and_then(|all| active_scheduler(&all)),
        poll_queues: if backing.can_poll() { poll_queues() } else { 0 },
    };
    let text = canonical.to_str().with_context(|| format!("{} is not UTF-8", path.display()))?;
    ensure!(
        !text.contains(char::is_whitespace),
        "{text} has blanks in its name, which device-mapper does not take; name it otherwise"
    );
    Ok(CheckedBacking { path: text.to_owned(), is_block, described })
}

/// Whether a backing is refused because it is in use.
pub fn is_in_use(path: &Path) -> bool {
    let opened = Backing::open(path, Opening::ALONE);
    opened.is_err_and(|error| matches!(error.problem, BackingProblem::InUse(_)))
}

fn kind(canonical: &Path, is_block: bool) -> &'static str {
    let name = canonical.file_name().unwrap_or_default().to_string_lossy();
    match (is_block, name.starts_with("nvme")) {
        (true, true) => "nvme",
        (true, false) => "block",
        (false, _) => "file",
    }
}

/// `[none] mq-deadline` is `none`.
fn active_scheduler(all: &str) -> Option<String> {
    let (active, _) = all.split_once('[')?.1.split_once(']')?;
    Some(active.to_owned())
}

/// At least one, since the driver reports that it can poll.
fn poll_queues() -> u32 {
    let number = fs::read_to_string("/sys/module/nvme/parameters/poll_queues").unwrap_or_default();
    number.trim().parse().unwrap_or(1).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEFAULT: Bytes = Bytes(1 << 30);

    fn file(bytes: u64) -> (tempfile::TempDir, std::path::PathBuf) {
        // Not in /tmp, which may not support direct I/O.
        let directory = tempfile::tempdir_in(".").unwrap();
        let path = directory.path().join("disk");
        fs::File::create(&path).unwrap().set_len(bytes).unwrap();
        (directory, path)
    }

    #[test]
    fn a_file_is_described() {
        let (_directory, path) = file(100 * MIB);
        let checked = examine(&path, None, DEFAULT, true).unwrap();
        let described = &checked.described;
        assert_eq!((described.kind.as_str(), checked.is_block), ("file", false));
        assert_eq!((described.size_bytes, described.span_bytes), (100 * MIB, 100 * MIB));
        let span = Some(Bytes(17 * MIB + 4096));
        let checked = examine(&path, span, DEFAULT, false).unwrap();
        assert_eq!(checked.described.span_bytes, 17 * MIB);
        let held = Backing::open(&path, Opening::ALONE).unwrap();
        assert!(is_in_use(&path));
        let error = examine(&path, None, DEFAULT, true).unwrap_err().to_string();
        assert!(error.contains("is in use"), "{error}");
        drop(held);
        assert!(!is_in_use(&path));
    }

    #[test]
    fn what_cannot_be_measured_is_refused() {
        let (directory, path) = file(LEAST.0);
        let refused = |path: &Path, span: Option<u64>| {
            examine(path, span.map(Bytes), DEFAULT, true).unwrap_err().to_string()
        };
        assert!(refused(&path, Some(65 * MIB)).contains("less than --span 65 MiB"));
        assert!(refused(&path, Some(1)).contains("too little"));
        assert!(refused(&directory.path().join("none"), None).contains("does not exist"));
        fs::File::options().write(true).open(&path).unwrap().set_len(LEAST.0 - 512).unwrap();
        assert!(refused(&path, None).contains("at least 64 MiB are needed"));
    }

    #[test]
    fn attributes_are_read() {
        assert_eq!(active_scheduler("mq-deadline [none] bfq").as_deref(), Some("none"));
        assert_eq!(active_scheduler("none"), None);
        assert_eq!(kind(Path::new("/dev/nvme0n1p2"), true), "nvme");
        assert_eq!(kind(Path::new("/dev/sda"), true), "block");
    }
}

//! File systems on a device: made, filled, unmounted, checked, compared.

use std::path::Path;

use anyhow::{Result, ensure};

use super::device::{Device, Mount, file_on_drive, fresh_drive, text};
use crate::config::DEFAULT;
use crate::guest::{Ctx, Outcome, TestCase, process};

pub const TESTS: &[TestCase] = &[
    TestCase::guest("ext4_on_nvme_fused", DEFAULT, |ctx| on_nvme(ctx, EXT4, "fused")).seconds(600),
    TestCase::guest("ext4_on_nvme_copy", DEFAULT, |ctx| on_nvme(ctx, EXT4, "copy")).seconds(600),
    TestCase::guest("xfs_on_nvme_fused", DEFAULT, |ctx| on_nvme(ctx, XFS, "fused")).seconds(600),
    TestCase::guest("xfs_on_nvme_copy", DEFAULT, |ctx| on_nvme(ctx, XFS, "copy")).seconds(600),
    TestCase::guest("ext4_on_a_file_fused", DEFAULT, |ctx| on_file(ctx, EXT4)).seconds(600),
    TestCase::guest("xfs_on_a_file_fused", DEFAULT, |ctx| on_file(ctx, XFS)).seconds(600),
];

/// How a file system is made and checked.
#[derive(Clone, Copy)]
struct Kind {
    make: &'static [&'static str],
    check: &'static [&'static str],
}

const EXT4: Kind = Kind { make: &["mkfs.ext4", "-q", "-F"], check: &["e2fsck", "-f", "-n"] };
const XFS: Kind = Kind { make: &["mkfs.xfs", "-q", "-f"], check: &["xfs_repair", "-n"] };

fn on_nvme(ctx: &Ctx, kind: Kind, lend: &str) -> Result<Outcome> {
    let drive = fresh_drive("drive0")?;
    fill_and_check(ctx, kind, &drive.path(), lend)
}

fn on_file(ctx: &Ctx, kind: Kind) -> Result<Outcome> {
    let (mount, file) = file_on_drive(ctx, "drive1", 512)?;
    let outcome = fill_and_check(ctx, kind, &file, "fused")?;
    mount.unmount()?;
    Ok(outcome)
}

fn fill_and_check(ctx: &Ctx, kind: Kind, backing: &Path, lend: &str) -> Result<Outcome> {
    let device = Device::add_loop(backing, &["--lend", lend])?;
    let path = device.path()?;
    process::run(&[kind.make, &[path]].concat())?;
    let mount = Mount::new(ctx, path, "fs")?;
    let tree = mount.point().join("tree");
    // A real tree: many small files, some large, links and directories.
    process::run(&["cp", "-a", "/usr/share", text(&tree)?])?;
    let digest = |root: &str| {
        let script =
            "cd \"$1\" && find . -type f -print0 | sort -z | xargs -0 sha256sum | sha256sum";
        process::run(&["sh", "-c", script, "digest", root]).map(|printed| printed.stdout)
    };
    let original = digest("/usr/share")?;
    mount.unmount()?;
    process::run(&[kind.check, &[path]].concat())?;

    // Mounted again, so that what is read comes from the device.
    let mount = Mount::new(ctx, path, "fs")?;
    std::fs::write("/proc/sys/vm/drop_caches", "3")?;
    let copy = digest(text(&tree)?)?;
    ensure!(original == copy, "the tree differs: {original} {copy}");
    process::run(&["fstrim", text(mount.point())?])?;
    mount.unmount()?;
    process::run(&[kind.check, &[path]].concat())?;
    device.delete()?;
    Ok(Outcome::Pass)
}

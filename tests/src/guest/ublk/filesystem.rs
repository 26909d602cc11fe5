//! File systems on a device: made, filled, unmounted, checked, compared.

use anyhow::{Context, Result, ensure};

use super::device::{Device, Mount, file_on_drive, fresh_drive, fresh_drives, text};
use crate::config::{DEFAULT, STACKS};
use crate::guest::drives::Drive;
use crate::guest::{Ctx, Outcome, TestCase, process};

pub const TESTS: &[TestCase] = &[
    TestCase::guest("ext4_on_nvme_fused", DEFAULT, |ctx| on_nvme(ctx, EXT4, "fused")).seconds(600),
    TestCase::guest("ext4_on_nvme_copy", DEFAULT, |ctx| on_nvme(ctx, EXT4, "copy")).seconds(600),
    TestCase::guest("xfs_on_nvme_fused", DEFAULT, |ctx| on_nvme(ctx, XFS, "fused")).seconds(600),
    TestCase::guest("xfs_on_nvme_copy", DEFAULT, |ctx| on_nvme(ctx, XFS, "copy")).seconds(600),
    TestCase::guest("ext4_on_a_file_fused", DEFAULT, |ctx| on_file(ctx, EXT4)).seconds(600),
    TestCase::guest("xfs_on_a_file_fused", DEFAULT, |ctx| on_file(ctx, XFS)).seconds(600),
    over_many("ext4_on_a_stripe_over_4_drives", |ctx| on_stripe(ctx, EXT4, "fused")),
    over_many("xfs_on_a_stripe_over_4_drives", |ctx| on_stripe(ctx, XFS, "slot")),
    over_many("ext4_on_linear_over_3_drives", |ctx| on_linear(ctx, EXT4, "slot")),
    over_many("xfs_on_linear_over_3_drives", |ctx| on_linear(ctx, XFS, "copy")),
];

const fn over_many(name: &'static str, run: fn(&Ctx) -> Result<Outcome>) -> TestCase {
    TestCase::guest(name, STACKS, run).seconds(600)
}

/// How a file system is made and checked.
#[derive(Clone, Copy)]
pub struct Kind {
    /// Arguments before the device.
    pub make: &'static [&'static str],
    pub check: &'static [&'static str],
}

pub const EXT4: Kind = Kind { make: &["mkfs.ext4", "-q", "-F"], check: &["e2fsck", "-f", "-n"] };
pub const XFS: Kind = Kind { make: &["mkfs.xfs", "-q", "-f"], check: &["xfs_repair", "-n"] };

fn on_nvme(ctx: &Ctx, kind: Kind, lend: &str) -> Result<Outcome> {
    let drive = fresh_drive("drive0")?;
    fill_and_check(ctx, kind, Device::add_loop(&drive.path(), &["--lend", lend])?)
}

fn on_file(ctx: &Ctx, kind: Kind) -> Result<Outcome> {
    let (mount, file) = file_on_drive(ctx, "drive1", 512)?;
    let device = Device::add_loop(&file, &["--lend", "fused"])?;
    let outcome = fill_and_check(ctx, kind, device)?;
    mount.unmount()?;
    Ok(outcome)
}

fn on_stripe(ctx: &Ctx, kind: Kind, lend: &str) -> Result<Outcome> {
    let drives = fresh_drives(4)?;
    let paths: Vec<_> = drives.iter().map(Drive::path).collect();
    let mut arguments = vec!["stripe", "--chunk", "32K", "--lend", lend];
    for path in &paths {
        arguments.extend(["-f", text(path)?]);
    }
    on_all_of(ctx, kind, &arguments, &drives)
}

/// Many extents, drive after drive, so that any large part of the file system is on all of them.
fn on_linear(ctx: &Ctx, kind: Kind, lend: &str) -> Result<Outcome> {
    let drives = fresh_drives(3)?;
    let mut extents = Vec::new();
    for piece in 0..48 {
        for drive in &drives {
            // Apart, and at no multiple of anything but the sector.
            let start = 1536 + piece * (3 << 20);
            extents.push(format!("{},{start},2560K", text(&drive.path())?));
        }
    }
    let mut arguments = vec!["linear", "--lend", lend];
    extents.iter().for_each(|extent| arguments.extend(["-f", extent]));
    on_all_of(ctx, kind, &arguments, &drives)
}

/// A device of which every drive has its share of the writes.
fn on_all_of(ctx: &Ctx, kind: Kind, arguments: &[&str], drives: &[Drive]) -> Result<Outcome> {
    let written = |drive: &Drive| -> Result<u64> {
        let stat = drive.attribute("stat")?;
        let field = stat.split_whitespace().nth(6).context("sectors written")?;
        Ok(field.parse::<u64>()? * 512)
    };
    let before = drives.iter().map(written).collect::<Result<Vec<_>>>()?;
    let outcome = fill_and_check(ctx, kind, Device::add(arguments)?)?;
    for (drive, before) in drives.iter().zip(before) {
        let bytes = written(drive)? - before;
        println!("{}: {bytes} bytes written", drive.name);
        ensure!(bytes >= 1 << 20, "{} got {bytes} bytes only", drive.name);
    }
    Ok(outcome)
}

fn fill_and_check(ctx: &Ctx, kind: Kind, device: Device) -> Result<Outcome> {
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
    device.stop_and_count()?.ensure_none(&["failed", "stale", "unexpected"])?;
    Ok(Outcome::Pass)
}

//! Backings that change, come and go, or are chosen by others.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;

use super::{Background, PATIENCE, drive_name};
use crate::config::DEFAULT;
use crate::guest::losetup::{Caching, KernelLoop};
use crate::guest::ublk::device::{Device, PROGRAM, file_on_drive, fresh_drive, load_driver, text};
use crate::guest::ublk::remains;
use crate::guest::ublk::steps::ID;
use crate::guest::{Ctx, Outcome, TestCase, process, wait_for};

pub const TESTS: &[TestCase] = &[
    TestCase::guest("backings_that_have_changed_are_noticed", DEFAULT, changed).seconds(180),
    TestCase::guest("a_shared_file_keeps_its_blocks", DEFAULT, reflink).seconds(180),
    TestCase::guest("others_choose_no_backing_and_block_none", DEFAULT, others_files).seconds(180),
    TestCase::guest("a_file_system_without_zeroes_punches_holes", DEFAULT, holes),
    TestCase::guest("an_unplugged_drive_is_not_a_full_one", DEFAULT, unplugged).seconds(180),
];

/// A drive whose write cache is on by now: a device that was added without one gets no flushes.
fn changed(_ctx: &Ctx) -> Result<Outcome> {
    let drive = fresh_drive("drive0")?;
    let cache = format!("/sys/class/block/{}/queue/write_cache", drive_name(&drive.path())?);
    let set = |mode: &str| fs::write(&cache, mode).with_context(|| mode.to_owned());
    ensure!(fs::read_to_string(&cache)?.trim() == "write back", "the drive has a cache");
    for (first, then, is_recovered) in
        [("write through", "write back", false), ("write back", "write through", true)]
    {
        set(first)?;
        let device = Device::add_loop(&drive.path(), &["-n", ID, "--on-death", "wait"])?;
        set(then)?;
        if !is_recovered {
            let refused = process::run_for_code(&[PROGRAM, "upgrade", "-n", ID], 1)?.stderr;
            ensure!(
                refused.contains("write cache") && refused.contains("nothing has"),
                "{refused}"
            );
        }
        process::signal(device.pid()?, Signal::SIGKILL)?;
        remains::wait_for_state("QUIESCED")?;
        let recover = [PROGRAM, "recover", "-n", ID];
        if !is_recovered {
            let refused = process::run_for_code(&recover, 1)?.stderr;
            ensure!(refused.contains("volatile write cache"), "{refused}");
            set(first)?;
        }
        process::run(&recover)?;
        process::run(&[PROGRAM, "del", "-n", ID])?;
        device.was_deleted();
    }
    set("write back")?;
    remains::ensure_none()?;
    Ok(Outcome::Pass)
}

/// XFS wants whole blocks of direct I/O once blocks of a file are shared.
fn reflink(ctx: &Ctx) -> Result<Outcome> {
    let drive = fresh_drive("drive0")?;
    process::run(&["mkfs.xfs", "-q", "-f", text(&drive.path())?])?;
    let point = ctx.directory().join("xfs");
    fs::create_dir(&point)?;
    process::run(&["mount", text(&drive.path())?, text(&point)?])?;
    let image = point.join("img");
    let random = format!("if=/dev/urandom of={} bs=1M count=16 status=none", text(&image)?);
    process::run(&["sh", "-c", &format!("dd {random}")])?;
    let mut device = Device::add_loop(&image, &["-n", ID, "--on-death", "reissue"])?;
    let block = |device: &Device| device.attribute("queue/logical_block_size");
    ensure!(block(&device)? == "512" && !device.described.page_cache);
    let snapshot = point.join("snap");
    process::run(&["cp", "--reflink=always", text(&image)?, text(&snapshot)?])?;
    process::run(&[PROGRAM, "upgrade", "-n", ID])?;
    let listed = process::run(&[PROGRAM, "list", "-n", ID, "--json"])?.stdout;
    device.described = serde_json::from_str(&listed)?;
    ensure!(device.described.page_cache, "{listed}");
    // Blocks of 512 bytes are written, and what is around them stays.
    let before = fs::read(&snapshot)?;
    for sector in [1_usize, 9, 4097] {
        let argv = format!(
            "head -c 512 /dev/zero | dd of={} bs=512 count=1 seek={sector} oflag=direct status=none",
            device.path()?
        );
        process::run(&["sh", "-c", &argv])?;
    }
    process::run(&["blockdev", "--flushbufs", device.path()?])?;
    let mut expected = before.clone();
    for sector in [1_usize, 9, 4097] {
        expected[sector * 512..][..512].fill(0);
    }
    let mut after = vec![0; expected.len()];
    File::open(device.path()?)?.read_exact_at(&mut after, 0)?;
    ensure!(after == expected, "the device has something else");
    ensure!(fs::read(&snapshot)? == before, "the copy has changed");
    process::signal(device.pid()?, Signal::SIGKILL)?;
    remains::wait_for_state("QUIESCED")?;
    process::run(&[PROGRAM, "recover", "-n", ID])?;
    process::run(&[PROGRAM, "del", "-n", ID])?;
    device.was_deleted();
    // For a device of one's own that shall have such blocks, as a partition table is made for them.
    let table = format!("echo 'label: gpt' | sfdisk -q --wipe always {}", text(&snapshot)?);
    process::run(&["sh", "-c", &table])?;
    let said = process::run(&[PROGRAM, "add", "loop", "-f", text(&snapshot)?, "-n", ID])?.stderr;
    ensure!(said.contains("use --block-size 512"), "{said}");
    process::run(&[PROGRAM, "del", "-n", ID])?;
    let other = Device::add_loop(&snapshot, &["-n", ID, "--block-size", "512"])?;
    ensure!(block(&other)? == "512" && other.described.page_cache);
    other.delete()?;
    process::run(&["umount", text(&point)?])?;
    Ok(Outcome::Pass)
}

/// Links in a user's folder, and locks of somebody who may only read.
fn others_files(ctx: &Ctx) -> Result<Outcome> {
    load_driver()?;
    let (mount, secret) = file_on_drive(ctx, "drive0", 16)?;
    fs::set_permissions(&secret, fs::Permissions::from_mode(0o644))?;
    let home = mount.point().join("home");
    fs::create_dir(&home)?;
    std::os::unix::fs::chown(&home, Some(65534), Some(65534))?;
    let link = home.join("disk.img");
    symlink(&secret, &link)?;
    std::os::unix::fs::lchown(&link, Some(65534), Some(65534))?;
    let refused = process::run_for_code(&[PROGRAM, "add", "loop", "-f", text(&link)?], 1)?.stderr;
    ensure!(refused.contains("which user 65534 can change"), "{refused}");

    let ready = ctx.directory().join("ready");
    let lock = |user: &str| -> Result<Background> {
        let script = format!(
            "exec 9<{} && flock -s 9 && echo > {} && exec sleep 1000",
            text(&secret)?,
            text(&ready)?
        );
        let _ = fs::remove_file(&ready);
        let user = ["setpriv", "--reuid", user, "--regid", "0", "--clear-groups", "sh", "-c"];
        fs::set_permissions(ctx.directory(), fs::Permissions::from_mode(0o777))?;
        let locked = Background::start(&[&user[..], &[&script]].concat())?;
        wait_for("the lock", PATIENCE, || Ok(ready.exists().then_some(())))?;
        Ok(locked)
    };
    let locking = lock("65534")?;
    let add = [PROGRAM, "add", "loop", "-f", text(&secret)?, "-n", ID];
    let said = process::run(&add)?.stderr;
    ensure!(said.contains("of another user has locked the file"), "{said}");
    process::run(&[PROGRAM, "del", "-n", ID])?;
    drop(locking);
    let locking = lock("0")?;
    let refused = process::run_for_code(&add, 1)?.stderr;
    ensure!(refused.contains("locked by "), "{refused}");
    drop(locking);

    fs::set_permissions(ctx.directory(), fs::Permissions::from_mode(0o755))?;
    // Another name of a file that a loop device of the kernel has.
    let name = mount.point().join("name");
    fs::hard_link(&secret, &name)?;
    let kernel_loop = KernelLoop::attach(&name, Caching::Buffered)?;
    let refused = process::run_for_code(&add, 1)?.stderr;
    ensure!(refused.contains("attached to /dev/loop"), "{refused}");
    kernel_loop.detach()?;
    mount.unmount()?;
    remains::ensure_none()?;
    Ok(Outcome::Pass)
}

/// tmpfs punches holes, and zeroes no ranges.
fn holes(ctx: &Ctx) -> Result<Outcome> {
    let point = ctx.directory().join("memory");
    fs::create_dir(&point)?;
    process::run(&["mount", "-t", "tmpfs", "tmpfs", text(&point)?])?;
    let image = point.join("img");
    File::create(&image)?.set_len(16 << 20)?;
    let blocks = || -> Result<u64> { Ok(fs::metadata(&image)?.blocks()) };
    let errors = || -> Result<usize> {
        Ok(process::run(&["dmesg"])?.stdout.matches(&format!("ublkb{ID}")).count())
    };
    let before = errors()?;
    let device = Device::add_loop(&image, &["-n", ID])?;
    ensure!(
        fs::metadata(&image)?.len() == 16 << 20 && blocks()? == 0,
        "probing has left something"
    );
    let fill = format!("dd if=/dev/urandom of={} bs=1M oflag=direct status=none", device.path()?);
    for command in [["blkdiscard", "-z"], ["blkdiscard", "-f"]] {
        // It ends with the device.
        process::run_for_code(&["sh", "-c", &fill], 1)?;
        ensure!(blocks()? >= (16 << 20) / 512);
        process::run(&[&command[..], &[device.path()?]].concat())?;
        ensure!(blocks()? == 0, "{command:?} has left {} blocks", blocks()?);
        let mut bytes = vec![1; 1 << 20];
        File::open(device.path()?)?.read_exact_at(&mut bytes, 3 << 20)?;
        ensure!(bytes.iter().all(|byte| *byte == 0), "{command:?}");
    }
    ensure!(errors()? == before, "{}", process::run(&["dmesg"])?.stdout);
    device.delete()?;
    process::run(&["umount", text(&point)?])?;
    Ok(Outcome::Pass)
}

/// To multipath and file systems a full disk is something else than a missing one.
fn unplugged(_ctx: &Ctx) -> Result<Outcome> {
    let drive = fresh_drive("drive1")?;
    let name = drive_name(&drive.path())?;
    let device = Device::add_loop(&drive.path(), &["-n", ID])?;
    crate::guest::udev::settle()?;
    let pci = fs::canonicalize(format!("/sys/block/{name}/device/device"))?;
    fs::write(pci.join("remove"), "1")?;
    for direction in [
        format!("dd if=/dev/zero of={} bs=4k count=4 oflag=direct", device.path()?),
        format!("dd if={} of=/dev/null bs=4k count=4 iflag=direct", device.path()?),
    ] {
        let said = process::run_for_code(&["sh", "-c", &direction], 1)?.stderr;
        ensure!(!said.contains("No space left"), "{said}");
        ensure!(said.contains("Input/output error") || said.contains("No such device"), "{said}");
    }
    device.delete()?;
    fs::write("/sys/bus/pci/rescan", "1")?;
    wait_for("the drive", PATIENCE, || Ok(fresh_drive("drive1").ok()))?;
    Ok(Outcome::Pass)
}

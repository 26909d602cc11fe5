//! Other pid and mount namespaces, and who uses a device from there.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;

use super::{Background, CustomExclusive, PATIENCE};
use crate::config::DEFAULT;
use crate::guest::losetup::{Caching, KernelLoop};
use crate::guest::ublk::device::{Device, PROGRAM, fresh_drive, load_driver, text};
use crate::guest::ublk::remains;
use crate::guest::ublk::steps::ID;
use crate::guest::{Ctx, Outcome, TestCase, process, wait_for};

pub const TESTS: &[TestCase] = &[
    TestCase::guest("an_add_in_another_pid_namespace_takes_nothing_away", DEFAULT, pid_namespaces),
    TestCase::guest("commands_work_across_pid_namespaces", DEFAULT, commands).seconds(180),
    TestCase::guest("del_names_all_users", DEFAULT, users).seconds(180),
    TestCase::guest("a_server_pins_no_mounts", DEFAULT, mounts).seconds(180),
];

/// Process ids are local to a namespace: 2 is the server there, and another process here.
fn pid_namespaces(ctx: &Ctx) -> Result<Outcome> {
    load_driver()?;
    let drive = fresh_drive("drive0")?;
    let ready = ctx.directory().join("ready");
    let script = format!(
        "{PROGRAM} add loop -f {} -n {ID} && touch {} && exec sleep 1000",
        text(&drive.path())?,
        text(&ready)?
    );
    let elsewhere = ["unshare", "-pf", "--kill-child", "--mount-proc", "sh", "-c"];
    let first = Background::start(&[&elsewhere[..], &[&script]].concat())?;
    wait_for("the first device", PATIENCE, || Ok(ready.exists().then_some(())))?;
    let device = PathBuf::from(format!("/dev/ublkb{ID}"));
    let fails = format!("{PROGRAM} add loop -f /nope -n 8; {PROGRAM} add null -n {ID}; true");
    let said = process::run(&[&elsewhere[..], &[&fails]].concat())?.stderr;
    ensure!(said.contains("/nope") && said.contains("taken"), "{said}");
    let config = ctx.directory().join("serve.toml");
    fs::write(&config, format!("[[device]]\nid = {ID}\ntarget = \"null\"\nsize = \"1M\"\n"))?;
    let serve = format!("{PROGRAM} serve --config {}; test $? = 1", text(&config)?);
    process::run(&[&elsewhere[..], &[&serve]].concat())?;
    let read = File::open(&device)?.read_at(&mut [0; 512], 0)?;
    ensure!(read == 512, "the first device answers no more");
    process::run(&[PROGRAM, "del", "-n", ID])?;
    drop(first);
    remains::wait_for_none()?;
    Ok(Outcome::Pass)
}

/// From inside on a server outside, and the other way round, where the client's process id is 0.
fn commands(ctx: &Ctx) -> Result<Outcome> {
    let device = Device::add(&["null", "-n", ID, "--on-death", "wait"])?;
    let elsewhere = |argv: &[&str]| {
        process::run(&[&["unshare", "-pf", "--mount-proc", PROGRAM][..], argv].concat())
    };
    elsewhere(&["stats", "-n", ID, "--interval", "0.2"])?;
    elsewhere(&["resize", "-n", ID, "--size", "300G"])?;
    elsewhere(&["list"])?;
    let refused = process::run_for_code(
        &["unshare", "-pf", "--mount-proc", PROGRAM, "add", "null", "-n", ID],
        1,
    );
    ensure!(refused?.stderr.contains("taken"));
    ensure!(Path::new(device.path()?).exists());
    elsewhere(&["del", "-n", ID])?;
    device.wait_until_gone()?;

    let ready = ctx.directory().join("ready");
    let script = format!(
        "{PROGRAM} add null -n {ID} --on-death reissue && touch {} && exec sleep 1000",
        text(&ready)?
    );
    let inside = ["unshare", "-pf", "--kill-child", "--mount-proc", "sh", "-c", &script];
    let inside = Background::start(&inside)?;
    wait_for("the device", PATIENCE, || Ok(ready.exists().then_some(())))?;
    process::run(&[PROGRAM, "stats", "-n", ID, "--interval", "0.2"])?;
    process::run(&[PROGRAM, "resize", "-n", ID, "--size", "300G"])?;
    process::run(&[PROGRAM, "upgrade", "-n", ID])?;
    process::run(&[PROGRAM, "del", "-n", ID])?;
    drop(inside);
    remains::wait_for_none()?;

    // With the /proc of the namespace outside, where the server has another number.
    let script = format!("{PROGRAM} add null -n {ID} && exec sleep 1000");
    let inside = Background::start(&["unshare", "-pf", "--kill-child", "sh", "-c", &script])?;
    let device = PathBuf::from(format!("/dev/ublkb{ID}"));
    wait_for("the device", PATIENCE, || Ok(device.exists().then_some(())))?;
    let log = fs::read_to_string(format!("/var/log/ublk-target/{ID}.log"))?;
    ensure!(!log.contains("cannot leave the mount namespace"), "{log}");
    process::run(&[PROGRAM, "del", "-n", ID])?;
    drop(inside);
    remains::wait_for_none()?;

    // Where the driver's node is something else.
    let script = format!("mount --bind /dev/zero /dev/ublk-control && exec {PROGRAM} list");
    let refused = process::run_for_code(&["unshare", "-m", "sh", "-c", &script], 1)?.stderr;
    ensure!(
        refused.contains("/dev/ublk-control is missing here, or is something else"),
        "{refused}"
    );
    Ok(Outcome::Pass)
}

/// Those in another mount namespace, a loop device of the kernel on a partition, and the kernel itself:
/// the answer comes at once, and names them.
fn users(ctx: &Ctx) -> Result<Outcome> {
    let drive = fresh_drive("drive0")?;
    let device = Device::add_loop(&drive.path(), &["-n", ID])?;
    let refused = |expected: &str| -> Result<()> {
        let began = std::time::Instant::now();
        let said = process::run_for_code(&[PROGRAM, "del", "-n", ID], 1)?.stderr;
        ensure!(said.contains("is in use") && said.contains(expected), "{said}");
        ensure!(began.elapsed() < Duration::from_secs(10), "{:?}: {said}", began.elapsed());
        Ok(())
    };
    process::run(&["mkfs.ext4", "-q", "-F", device.path()?])?;
    let point = ctx.directory().join("elsewhere");
    fs::create_dir(&point)?;
    let script = format!("mount {} {} && exec sleep 1000", device.path()?, text(&point)?);
    let elsewhere = Background::start(&["unshare", "-m", "sh", "-c", &script])?;
    wait_for("the mount", PATIENCE, || {
        let mounts = fs::read_to_string(format!("/proc/{}/mounts", elsewhere.0.id()))?;
        Ok(mounts.contains(device.path()?).then_some(()))
    })?;
    refused(&format!("mounted on {} among the mounts of", point.display()))?;
    drop(elsewhere);
    // The namespace goes with its last process.
    wait_for("the device to be free", PATIENCE, || {
        Ok(File::options().read(true).custom_exclusive().open(device.path()?).ok())
    })?;

    let script = format!("echo 'start=2048, size=65536' | sfdisk -q {}", device.path()?);
    process::run(&["sh", "-c", &script])?;
    crate::guest::udev::settle()?;
    let partition = PathBuf::from(format!("{}p1", device.path()?));
    let kernel_loop = KernelLoop::attach(&partition, Caching::Direct)?;
    refused(&format!("attached to {}", kernel_loop.path().display()))?;
    kernel_loop.detach()?;
    crate::guest::udev::settle()?;
    device.delete()?;
    Ok(Outcome::Pass)
}

/// Whatever is mounted when a server starts, or when the next one does, can be unmounted; its own
/// device, too, though nobody serves that any more when the last server dies.
fn mounts(ctx: &Ctx) -> Result<Outcome> {
    let drive = fresh_drive("drive0")?;
    let other = fresh_drive("drive1")?;
    let at = |name: &str| -> Result<String> {
        let path = ctx.directory().join(name);
        fs::create_dir_all(&path)?;
        Ok(text(&path)?.to_owned())
    };
    let (other_fs, overlay, memory, own) =
        (at("other")?, at("overlay")?, at("memory")?, at("own")?);
    for name in ["lower", "upper", "work"] {
        fs::create_dir_all(ctx.directory().join("memory").join(name))?;
    }
    process::run(&["modprobe", "btrfs"])?;
    process::run(&["mkfs.btrfs", "-q", "-f", text(&other.path())?])?;
    let mount_all = || -> Result<()> {
        process::run(&["mount", text(&other.path())?, &other_fs])?;
        process::run(&["mount", "-t", "tmpfs", "tmpfs", &memory])?;
        for name in ["lower", "upper", "work"] {
            fs::create_dir_all(Path::new(&memory).join(name))?;
        }
        let options =
            format!("lowerdir={memory}/lower,upperdir={memory}/upper,workdir={memory}/work");
        process::run(&["mount", "-t", "overlay", "overlay", "-o", &options, &overlay])?;
        Ok(())
    };
    let unmount_all = || -> Result<()> {
        for point in [&overlay, &memory, &other_fs] {
            process::run(&["umount", point])?;
        }
        // Nobody has it any more: it can be claimed.
        process::run(&["wipefs", text(&other.path())?])?;
        let claimed = File::options()
            .read(true)
            .custom_exclusive()
            .open(other.path())
            .context("the drive is pinned");
        claimed.map(drop)
    };
    for more in [&[][..], &["--supervise"]] {
        mount_all()?;
        let device = Device::add_loop(&drive.path(), &[&["-n", ID], more].concat())?;
        unmount_all()?;
        device.delete()?;
    }
    // Its own file system is there when the next server starts.
    let mut device = Device::add_loop(&drive.path(), &["-n", ID, "--on-death", "wait"])?;
    process::run(&["mkfs.btrfs", "-q", "-f", device.path()?])?;
    process::run(&["mount", device.path()?, &own])?;
    let kill_server = |device: &Device| -> Result<()> {
        process::signal(device.pid()?, Signal::SIGKILL)?;
        remains::wait_for_state("QUIESCED")
    };
    let recover = |device: &mut Device| -> Result<()> {
        let printed = process::run(&[PROGRAM, "recover", "-n", ID, "--json"])?.stdout;
        device.described = serde_json::from_str(&printed)?;
        Ok(())
    };
    kill_server(&device)?;
    recover(&mut device)?;
    process::run(&["umount", &own])?;
    kill_server(&device)?;
    recover(&mut device)?;
    device.delete()?;
    Ok(Outcome::Pass)
}

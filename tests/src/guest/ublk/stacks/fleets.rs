//! Devices of a process on each other, which are refused: what the lower ones do would wait for what the
//! upper ones hold. And what is served instead: processes on each other.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::slice;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::super::device::{Device, Mount, PROGRAM, fresh_drive, fresh_drives, load_driver, text};
use super::super::fleet::{Fleet, ids, listed, load, section, write};
use crate::guest::dm::Mapper;
use crate::guest::losetup::{Caching, KernelLoop};
use crate::guest::{Ctx, Outcome, fio, process, udev, wait_for};

/// Much longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(60);
/// Of the device at the bottom.
const BOTTOM: u32 = 0;

/// A program that is killed with its handle, and not waited for: it may hang for ever.
struct Background {
    child: Child,
    what: String,
}

impl Background {
    fn start(argv: &[&str]) -> Result<Self> {
        let child = Command::new(argv[0]).args(&argv[1..]).stdin(Stdio::null()).spawn()?;
        Ok(Self { child, what: argv.join(" ") })
    }

    fn finish(mut self) -> Result<()> {
        let what = format!("`{}` to end", self.what);
        let status = wait_for(&what, PATIENCE, || Ok(self.child.try_wait()?))?;
        ensure!(status.success(), "`{}`: {status}", self.what);
        Ok(())
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        let _ = self.child.kill();
    }
}

fn zero_out(device: &Path, length: &str) -> Result<Background> {
    // By `fallocate`, many requests at once.
    Background::start(&["blkdiscard", "-f", "-z", "-o", "0", "-l", length, text(device)?])
}

fn verified(ctx: &Ctx, device: &Path) -> Result<()> {
    let options = load(text(device)?, "4m");
    let report = fio::run(ctx, &options.iter().map(String::as_str).collect::<Vec<_>>())?;
    ensure!(report.write.requests > 0, "{report:?}");
    Ok(())
}

fn node(id: u32) -> PathBuf {
    PathBuf::from(format!("/dev/ublkb{id}"))
}

/// A device of a fleet on another one of it: through nothing, a partition, device mapper, a file, a loop
/// device of the kernel, a server of one device, and a fleet that serves one which stands there.
/// By another process each is served.
pub(super) fn refused(ctx: &Ctx) -> Result<Outcome> {
    let drives = fresh_drives(2)?;
    let bottom = section(BOTTOM, &drives[0].path(), "")?;
    let fleet = Fleet::start(ctx.directory(), &write(ctx, slice::from_ref(&bottom))?)?;
    let script = "printf '2048,65536\\n,65536\\n,65536\\n,\\n' | sfdisk -q ";
    process::run(&["sh", "-c", &format!("{script}{}", text(&node(BOTTOM))?)])?;
    udev::settle()?;
    let part = |number| PathBuf::from(format!("/dev/ublkb{BOTTOM}p{number}"));
    let mapper =
        Mapper::create("fleet-linear", &[format!("0 57344 linear {} 1025", text(&part(2))?)])?;
    process::run(&["mkfs.ext4", "-q", "-F", text(&part(4))?])?;
    let mount = Mount::new(ctx, text(&part(4))?, "on-fleet")?;
    let files = ["one", "two", "three"].map(|name| mount.point().join(name));
    for file in &files {
        File::create(file)?.set_len(32 << 20)?;
    }
    let kernel_loop = KernelLoop::attach(&files[1], Caching::Direct)?;
    let alone = Device::add_loop(&part(3), &["-n", "5"])?;
    let directory = ctx.directory().join("other");
    fs::create_dir(&directory)?;
    let config = directory.join("fleet.toml");
    let others = [section(7, &drives[1].path(), "")?, section(6, &files[2], "")?];
    fs::write(&config, others.concat())?;
    let other = Fleet::start(&directory, &config)?;
    let there = ids()?;

    let line = format!("device 1 would wait for device {BOTTOM} of the same process");
    let mut refused = 0;
    let on =
        [part(1), mapper.path(), files[0].clone(), kernel_loop.path().to_owned(), node(5), node(7)];
    for backing in &on {
        write(ctx, &[bottom.clone(), section(1, backing, "")?])?;
        fleet.reload("nothing has changed")?;
        refused += 1;
        let said = fleet.said()?;
        ensure!(said.matches(&line).count() == refused, "{}: {said}", backing.display());
        ensure!(ids()? == there, "{:?}", ids()?);
        let device = Device::add_loop(backing, &["-n", "1"])?;
        verified(ctx, &node(1))?;
        zero_out(&node(1), "8M")?.finish()?;
        process::run(&["cmp", "-n", "8388608", "/dev/zero", text(&node(1))?])?;
        device.delete()?;
    }
    // The other one serves what stands on neither.
    write(ctx, &[bottom, "[[device]]\nid = 1\ntarget = \"null\"\nsize = \"1M\"\n".to_owned()])?;
    fleet.reload("2 devices")?;
    other.stop()?;
    alone.delete()?;
    kernel_loop.detach()?;
    mapper.remove()?;
    mount.unmount()?;
    fleet.end()?;
    Ok(Outcome::Pass)
}

/// Devices that wait for a server, which one process must not serve together.
pub(super) fn refused_again(ctx: &Ctx) -> Result<Outcome> {
    load_driver()?;
    let drive = fresh_drive("drive0")?.path();
    let bottom = section(BOTTOM, &drive, "on-death = \"wait\"")?;
    let top = section(1, &node(BOTTOM), "on-death = \"wait\"")?;
    let line = format!("device 1 would wait for device {BOTTOM} of the same process");
    let state_of = |id| -> Result<String> {
        let device = listed()?.into_iter().find(|device| device.id == id);
        Ok(device.context("it is there")?.state)
    };

    let kill_lower = || -> Result<()> {
        process::run(&["kill", "-KILL", &served_by(BOTTOM)?.to_string()])?;
        wait_for("the end of the lower server", PATIENCE, || {
            Ok((state_of(BOTTOM)? == "QUIESCED").then_some(()))
        })
    };

    // The lower one comes back to the process that serves the upper one.
    process::run(&[PROGRAM, "add", "loop", "-f", text(&drive)?, "-n", "0", "--on-death", "wait"])?;
    let fleet = Fleet::start(ctx.directory(), &write(ctx, slice::from_ref(&top))?)?;
    kill_lower()?;
    write(ctx, &[top.clone(), bottom.clone()])?;
    fleet.reload("nothing has changed")?;
    ensure!(fleet.said()?.contains(&line), "{}", fleet.said()?);
    ensure!(state_of(BOTTOM)? == "QUIESCED" && state_of(1)? == "LIVE", "{:?}", listed()?);
    process::run(&[PROGRAM, "recover", "-n", "0"])?;
    verified(ctx, &node(1))?;
    fleet.kill()?;

    // Both wait: the lower one is served, and the upper one left for another process.
    kill_lower()?;
    let fleet = Fleet::start_with(ctx.directory(), &write(ctx, &[top, bottom])?, 1)?;
    ensure!(fleet.said()?.matches(&line).count() == 2, "{}", fleet.said()?);
    ensure!(state_of(BOTTOM)? == "LIVE" && state_of(1)? == "QUIESCED", "{:?}", listed()?);
    process::run(&[PROGRAM, "recover", "-n", "1"])?;
    verified(ctx, &node(1))?;
    // The upper one goes first, whatever its id.
    process::run(&[PROGRAM, "del", "--all"])?;
    ensure!(ids()?.is_empty(), "{:?}", ids()?);
    fleet.end()?;
    Ok(Outcome::Pass)
}

/// Both servers are killed while operations of the upper device are under way, which the kernel's workers
/// hold. The upper process ends when the lower device serves its operations again.
pub(super) fn killed(ctx: &Ctx) -> Result<Outcome> {
    let drive = fresh_drive("drive0")?.path();
    let bottom = section(BOTTOM, &drive, "on-death = \"reissue\"")?;
    let config = write(ctx, &[bottom])?;
    let mut fleet = Fleet::start(ctx.directory(), &config)?;
    let device = Device::add_loop(&node(BOTTOM), &["-n", "1", "--on-death", "reissue"])?;
    let mut server = device.pid()?;
    for _ in 0..2 {
        let zeroing = zero_out(&node(1), "64M")?;
        let what = "operations of the upper device";
        wait_for(what, PATIENCE, || Ok(has_workers(server)?.then_some(())))?;
        process::run(&["kill", "-KILL", &server.to_string()])?;
        fleet.kill()?;
        fleet = Fleet::start(ctx.directory(), &config)?;
        process::run(&[PROGRAM, "recover", "-n", "1"])?;
        zeroing.finish()?;
        verified(ctx, &node(1))?;
        server = served_by(1)?;
    }
    device.delete()?;
    fleet.end()?;
    Ok(Outcome::Pass)
}

fn served_by(id: u32) -> Result<u32> {
    let device = listed()?.into_iter().find(|device| device.id == id);
    device.and_then(|device| device.pid).context("a live device has a server")
}

/// Whether the kernel has workers for a process.
fn has_workers(pid: u32) -> Result<bool> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task"))?.flatten();
    let mut names = tasks.filter_map(|task| fs::read_to_string(task.path().join("comm")).ok());
    Ok(names.any(|name| name.starts_with("iou-wrk")))
}

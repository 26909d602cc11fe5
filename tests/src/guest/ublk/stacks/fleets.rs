//! Devices of one fleet on each other, with one lane: what the lower ones do must not wait for what the
//! upper ones hold.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::super::device::{Device, Mount, PROGRAM, fresh_drive, text};
use super::super::fleet::{Fleet, ids, listed, load, section, write};
use crate::guest::dm::Mapper;
use crate::guest::losetup::{Caching, KernelLoop};
use crate::guest::{Ctx, Outcome, fio, process, udev, wait_for};

/// Much longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(60);
/// Of the device at the bottom: `del --all` goes by number, and those on top have to go first.
const BOTTOM: u32 = 90;

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

fn zero_out(device: &Path) -> Result<Background> {
    // By `fallocate`, many requests at once.
    Background::start(&["blkdiscard", "-f", "-z", "-o", "0", "-l", "64M", text(device)?])
}

fn verified(ctx: &Ctx, device: &Path) -> Result<()> {
    let options = load(text(device)?, "16m");
    let report = fio::run(ctx, &options.iter().map(String::as_str).collect::<Vec<_>>())?;
    ensure!(report.write.requests > 0, "{report:?}");
    Ok(())
}

fn reader(ctx: &Ctx, device: &str) -> Result<fio::Running> {
    let name = format!("filename={device}");
    let options = ["rw=randread", "bs=4k", "iodepth=8", "ioengine=io_uring", "direct=1"];
    let more = ["size=64m", "time_based", "runtime=600", name.as_str()];
    fio::start(ctx, "reader", &[&options[..], &more].concat())
}

fn node(id: u32) -> PathBuf {
    PathBuf::from(format!("/dev/ublkb{id}"))
}

/// Serves the devices of a new file, so many lanes of which are shared.
fn reload(ctx: &Ctx, fleet: &Fleet, sections: &[String], lanes: usize) -> Result<()> {
    write(ctx, &[&["lanes = 1\n".to_owned()], sections].concat())?;
    fleet.reload(&format!("{} devices, {lanes} lanes", sections.len()))?;
    // The main one, and the one that answers.
    ensure!(fleet.threads()? == lanes + 2, "{} threads", fleet.threads()?);
    udev::settle()
}

/// One device on another.
pub(super) fn two(ctx: &Ctx) -> Result<Outcome> {
    let drive = fresh_drive("drive0")?.path();
    let bottom = section(BOTTOM, &drive, "")?;
    let config = write(ctx, &["lanes = 1\n".to_owned(), bottom.clone()])?;
    let fleet = Fleet::start(ctx.directory(), &config)?;
    let sections = [bottom, section(1, &node(BOTTOM), "")?];
    reload(ctx, &fleet, &sections, 2)?;
    let reads = reader(ctx, text(&node(BOTTOM))?)?;
    verified(ctx, &node(1))?;
    for _ in 0..4 {
        zero_out(&node(1))?.finish()?;
    }
    process::run(&["cmp", "-n", "67108864", "/dev/zero", text(&node(1))?])?;
    verified(ctx, &node(1))?;
    ensure!(reads.end()?.read.requests > 0, "nothing was read meanwhile");
    process::run(&[PROGRAM, "del", "--all"])?;
    ensure!(ids()?.is_empty(), "{:?}", ids()?);
    fleet.end()?;
    Ok(Outcome::Pass)
}

/// On a partition, on device mapper on a partition, on a file, on a kernel loop device over a file, and
/// one on top of these.
pub(super) fn many(ctx: &Ctx) -> Result<Outcome> {
    let drive = fresh_drive("drive0")?.path();
    let bottom = section(BOTTOM, &drive, "")?;
    let config = write(ctx, &["lanes = 1\n".to_owned(), bottom.clone()])?;
    let fleet = Fleet::start(ctx.directory(), &config)?;
    let script = "printf '2048,196608\\n,196608\\n,\\n' | sfdisk -q ";
    process::run(&["sh", "-c", &format!("{script}{}", text(&node(BOTTOM))?)])?;
    udev::settle()?;
    let part = |number| PathBuf::from(format!("/dev/ublkb{BOTTOM}p{number}"));
    let table = format!("0 180224 linear {} 1025", text(&part(2))?);
    let mapper = Mapper::create("fleet-linear", &[table])?;
    process::run(&["mkfs.ext4", "-q", "-F", text(&part(3))?])?;
    let mount = Mount::new(ctx, text(&part(3))?, "on-fleet")?;
    let files = ["one", "two"].map(|name| mount.point().join(name));
    for file in &files {
        File::create(file)?.set_len(96 << 20)?;
    }
    let kernel_loop = KernelLoop::attach(&files[1], Caching::Direct)?;
    let mut sections = vec![
        bottom,
        section(11, &part(1), "")?,
        section(12, &mapper.path(), "lend = \"slot\"")?,
        section(13, &files[0], "lend = \"copy\"")?,
        section(14, kernel_loop.path(), "")?,
    ];
    reload(ctx, &fleet, &sections, 2)?;
    sections.push(section(1, &node(11), "")?);
    reload(ctx, &fleet, &sections, 3)?;
    let reads = reader(ctx, text(&node(BOTTOM))?)?;
    let on_top = [1, 12, 13, 14];
    for device in on_top {
        verified(ctx, &node(device))?;
    }
    for _ in 0..2 {
        let all: Result<Vec<_>> = on_top.iter().map(|id| zero_out(&node(*id))).collect();
        all?.into_iter().try_for_each(Background::finish)?;
    }
    for device in on_top {
        verified(ctx, &node(device))?;
    }
    ensure!(reads.end()?.read.requests > 0, "nothing was read meanwhile");
    for id in on_top {
        process::run(&[PROGRAM, "del", "-n", &id.to_string()])?;
    }
    kernel_loop.detach()?;
    mapper.remove()?;
    mount.unmount()?;
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
        let zeroing = zero_out(&node(1))?;
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

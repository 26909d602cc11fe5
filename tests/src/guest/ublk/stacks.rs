//! Devices on devices, three and more deep: ours on ours, and dm-linear, dm-crypt and the kernel's
//! loop driver above and below ours. Each stack is loaded while memory is short, where a server
//! that needs memory to free memory would hang.

mod fleets;
mod load;
mod stages;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::device::{Device, Mount, PROGRAM, fresh_drives, text};
use super::filesystem::{EXT4, Kind, XFS};
use crate::config::STACKS;
use crate::guest::dm::Mapper;
use crate::guest::drives::Drive;
use crate::guest::losetup::{Caching, KernelLoop};
use crate::guest::udev::QuietUdev;
use crate::guest::{Ctx, FIGURE, Outcome, TestCase, process, wait_for};

pub const TESTS: &[TestCase] = &[
    stack("stack_of_our_stripe_on_our_loops", ours_on_ours),
    stack("stack_of_our_stripe_on_dm_crypt_on_our_loops", crypt),
    stack("stack_of_our_loop_on_dm_linear_on_our_linear_on_dm_linear", linear),
    stack("stack_of_our_loop_on_a_kernel_loop_on_our_stripe", direct_kernel_loop),
    stack("stack_of_our_loop_on_a_buffered_kernel_loop_on_our_stripe", buffered_kernel_loop),
    fleet("a_stack_within_a_fleet_is_refused", fleets::refused),
    fleet("a_stack_is_not_taken_over_by_one_fleet", fleets::refused_again),
    fleet("stack_of_a_server_on_a_fleet_survives_the_death_of_both", fleets::killed),
    TestCase::guest("a_device_that_would_stand_on_itself_is_refused", STACKS, circle),
];

const fn stack(name: &'static str, run: fn(&Ctx) -> Result<Outcome>) -> TestCase {
    TestCase::guest(name, STACKS, run).seconds(900)
}

/// What hangs here hangs for ever.
const fn fleet(name: &'static str, run: fn(&Ctx) -> Result<Outcome>) -> TestCase {
    TestCase::guest(name, STACKS, run).seconds(300)
}

/// No request and no fsync takes longer than this, and no task sleeps for longer in the kernel.
const STALL: Duration = Duration::from_secs(5);

/// Of the device on top, so that all requests of the load come to it, instead of waiting for a tag.
const DEPTH: &str = "512";

/// Layers from the bottom up, taken down from the top.
#[derive(Default)]
struct Stack {
    layers: Vec<Layer>,
}

enum Layer {
    Ours(Box<Device>),
    Mapper(Mapper),
    Loop(KernelLoop),
    Mount(Mount),
}

impl Stack {
    /// Adds a device of ours: `arguments` follow `ublk-target add`, then come the backings.
    fn ours(&mut self, arguments: &[&str], backings: &[&Path]) -> Result<PathBuf> {
        let mut arguments = arguments.to_vec();
        for backing in backings {
            arguments.extend(["-f", text(backing)?]);
        }
        let device = Device::add(&arguments)?;
        let path = device.described.device.clone();
        self.layers.push(Layer::Ours(Box::new(device)));
        Ok(path)
    }

    /// Adds a device of device-mapper with one target: what follows `0 SECTORS` in its table.
    fn mapper(&mut self, name: &str, sectors: u64, target: &str) -> Result<PathBuf> {
        let mapper = Mapper::create(name, &[format!("0 {sectors} {target}")])?;
        let path = mapper.path();
        self.layers.push(Layer::Mapper(mapper));
        Ok(path)
    }

    fn dm_linear(&mut self, name: &str, on: &Path, first: u64, sectors: u64) -> Result<PathBuf> {
        self.mapper(name, sectors, &format!("linear {} {first}", text(on)?))
    }

    fn dm_crypt(&mut self, name: &str, on: &Path) -> Result<PathBuf> {
        let key = "0123456789abcdef".repeat(8); // two of 256 bits, as XTS has them
        let target = format!("crypt aes-xts-plain64 {key} 0 {} 0 1 allow_discards", text(on)?);
        self.mapper(name, sectors(on)?, &target)
    }

    fn mount(&mut self, ctx: &Ctx, device: &Path, name: &str) -> Result<PathBuf> {
        let mount = Mount::new(ctx, text(device)?, name)?;
        let point = mount.point().to_owned();
        self.layers.push(Layer::Mount(mount));
        Ok(point)
    }

    fn kernel_loop(&mut self, file: &Path, caching: Caching) -> Result<PathBuf> {
        let device = KernelLoop::attach(file, caching)?;
        let path = device.path().to_owned();
        self.layers.push(Layer::Loop(device));
        Ok(path)
    }

    fn servers(&self) -> impl Iterator<Item = &Device> {
        self.layers.iter().filter_map(|layer| match layer {
            Layer::Ours(device) => Some(&**device),
            Layer::Mapper(_) | Layer::Loop(_) | Layer::Mount(_) => None,
        })
    }

    /// Takes down the top layer. A server has to have done all that it was asked for.
    fn pop(&mut self) -> Result<()> {
        match self.layers.pop().context("no layer is left")? {
            Layer::Mount(mount) => mount.unmount(),
            Layer::Loop(device) => device.detach(),
            Layer::Mapper(mapper) => mapper.remove(),
            Layer::Ours(device) => {
                let name = device.described.device.clone();
                let counters = device.stop_and_count()?;
                println!("{}: {counters:?}", name.display());
                counters.ensure_none(&TROUBLE)?;
                ensure!(counters.get("commits") == counters.get("requests"), "{counters:?}");
                ensure!(counters.get("requests") > 0, "nothing came to {}", name.display());
                Ok(())
            }
        }
    }

    fn take_down(mut self) -> Result<()> {
        while !self.layers.is_empty() {
            self.pop()?;
        }
        Ok(())
    }
}

impl Drop for Stack {
    fn drop(&mut self) {
        // In this order also for a test that has failed, or the lower layers would be in use.
        while let Some(layer) = self.layers.pop() {
            drop(layer);
        }
    }
}

/// What no shortage of memory excuses; retries and copies for lack of it are allowed.
const TROUBLE: [&str; 9] = [
    "failed",
    "refused unknown",
    "refused malformed",
    "failed unregistrations",
    "timed out",
    "cancelled",
    "lost ops",
    "stale",
    "unexpected",
];

/// Size of a block device in sectors of 512 bytes.
fn sectors(device: &Path) -> Result<u64> {
    let printed = process::run(&["blockdev", "--getsz", text(device)?])?.stdout;
    printed.trim().parse().context(printed)
}

/// Says so if the guest's kernel lacks a module.
fn without(module: &str) -> Option<Outcome> {
    let loaded = process::run(&["modprobe", module]);
    loaded.is_err().then(|| Outcome::Skip(format!("the guest's kernel has no {module}")))
}

fn drives<const N: usize>() -> Result<[PathBuf; N]> {
    let drives = fresh_drives(u32::try_from(N)?)?;
    let paths: Vec<_> = drives.iter().map(Drive::path).collect();
    paths.try_into().ok().context("so many drives")
}

/// Loads the stack below `top`, and takes it down.
fn load(ctx: &Ctx, mut stack: Stack, top: &Path, kind: Kind, stall: Duration) -> Result<Outcome> {
    // One part for checksums on the device, one for a file system.
    const RAW: u64 = 128 << 11;
    let raw = stack.dm_linear("stack-raw", top, 0, RAW)?;
    let files = stack.dm_linear("stack-files", top, RAW, sectors(top)? - RAW)?;
    process::run(&[kind.make, &[text(&files)?]].concat())?;
    let point = stack.mount(ctx, &files, "files")?;
    let figures = load::run(ctx, &raw, &point, &stack.servers().collect::<Vec<_>>(), stall)?;
    stack.pop()?;
    process::run(&[kind.check, &[text(&files)?]].concat())?;
    stack.take_down()?;
    figures.iter().for_each(|line| println!("{FIGURE}{line}"));
    Ok(Outcome::Pass)
}

fn ours_on_ours(ctx: &Ctx) -> Result<Outcome> {
    let mut stack = Stack::default();
    let mut loops = Vec::new();
    for (drive, lend) in drives::<4>()?.iter().zip([
        ["--lend", "fused"].as_slice(),
        &["--lend", "slot"],
        &["--lend", "slot", "--io-lane"],
        &["--lend", "copy", "-d", "32"],
    ]) {
        loops.push(stack.ours(&[&["loop"], lend].concat(), &[drive])?);
    }
    let loops: Vec<_> = loops.iter().map(PathBuf::as_path).collect();
    let top = stack.ours(&["stripe", "--chunk", "16K", "-q", "2", "-d", DEPTH], &loops)?;
    load(ctx, stack, &top, XFS, STALL)
}

/// A table of device mapper leads a device back to itself while it has no server.
fn circle(_: &Ctx) -> Result<Outcome> {
    const NAME: &str = "stack-circle";
    let [drive] = drives()?;
    let sectors = sectors(&drive)?;
    let table = |to: &str| format!("0 {sectors} linear {to} 0");
    let mapper = Mapper::create(NAME, &[table(text(&drive)?)])?;
    let device = Device::add_loop(&mapper.path(), &["-n", "7", "--on-death", "wait"])?;
    // What it read on such a device would never come.
    let quiet = QuietUdev::new()?;
    process::run(&["kill", "-KILL", &device.pid()?.to_string()])?;
    wait_for("the device to wait for a server", STALL, || {
        let listed = process::run(&[PROGRAM, "list", "-n", "7", "--json"])?.stdout;
        Ok(listed.contains("QUIESCED").then_some(()))
    })?;
    let lead_to = |to: &str| -> Result<()> {
        let dmsetup = |arguments: &[&str]| {
            process::run(&[&["dmsetup", "--noudevsync"], arguments].concat()).map(drop)
        };
        dmsetup(&["load", NAME, "--table", &table(to)])?;
        dmsetup(&["suspend", NAME])?;
        dmsetup(&["resume", NAME])
    };
    lead_to(device.path()?)?;
    let refused = process::run_for_code(&[PROGRAM, "recover", "-n", "7"], 1)?;
    ensure!(refused.stderr.contains("device 7 would be stacked on itself"), "{refused:?}");
    ensure!(refused.stderr.trim_end().lines().count() == 1, "{refused:?}");
    lead_to(text(&drive)?)?;
    process::run(&[PROGRAM, "recover", "-n", "7"])?;
    drop(quiet);
    device.delete()?;
    mapper.remove()?;
    Ok(Outcome::Pass)
}

fn crypt(ctx: &Ctx) -> Result<Outcome> {
    if let Some(skipped) = without("dm_crypt") {
        return Ok(skipped);
    }
    // The processor's own instructions, where it has them: without, this measures the cipher.
    let _ = process::run(&["modprobe", "aesni_intel"]);
    let mut stack = Stack::default();
    let [one, two] = drives()?;
    let one = stack.ours(&["loop", "--lend", "fused"], &[&one])?;
    let two = stack.ours(&["loop", "--lend", "slot"], &[&two])?;
    let one = stack.dm_crypt("stack-crypt-1", &one)?;
    let two = stack.dm_crypt("stack-crypt-2", &two)?;
    let top =
        stack.ours(&["stripe", "--chunk", "64K", "--lend", "fused", "-d", DEPTH], &[&one, &two])?;
    load(ctx, stack, &top, EXT4, STALL)
}

/// The dm devices begin at sectors that are no multiple of anything.
fn linear(ctx: &Ctx) -> Result<Outcome> {
    let mut stack = Stack::default();
    let [one, two] = drives()?;
    let one = stack.dm_linear("stack-under-1", &one, 2049, 300 << 11)?;
    let two = stack.dm_linear("stack-under-2", &two, 4095, 600 << 11)?;
    let ours = stack.ours(&["linear", "--lend", "slot"], &[&one, &two])?;
    let over = stack.dm_linear("stack-over", &ours, 1025, sectors(&ours)? - 1025)?;
    let top = stack.ours(&["loop", "--lend", "fused", "-q", "2", "-d", DEPTH], &[&over])?;
    load(ctx, stack, &top, XFS, STALL)
}

fn direct_kernel_loop(ctx: &Ctx) -> Result<Outcome> {
    kernel_loop(ctx, Caching::Direct, STALL)
}

/// The driver's own thread may dirty as much memory as it likes, so requests wait for that to be
/// written: for three seconds and more on a stack without any server, at this load. What must not
/// happen is that the servers below wait for memory that nobody but they can clean.
fn buffered_kernel_loop(ctx: &Ctx) -> Result<Outcome> {
    kernel_loop(ctx, Caching::Buffered, 4 * STALL)
}

/// Above and below: a kernel loop device over a file on a file system on ours.
fn kernel_loop(ctx: &Ctx, caching: Caching, stall: Duration) -> Result<Outcome> {
    if let Some(skipped) = without("loop") {
        return Ok(skipped);
    }
    let mut stack = Stack::default();
    let [one, two] = drives()?;
    let stripe = stack.ours(&["stripe", "--chunk", "64K", "--lend", "fused"], &[&one, &two])?;
    process::run(&["mkfs.ext4", "-q", "-F", text(&stripe)?])?;
    let file = stack.mount(ctx, &stripe, "under")?.join("disk.img");
    std::fs::File::create(&file)?.set_len(768 << 20)?;
    let under = stack.kernel_loop(&file, caching)?;
    let top = stack.ours(&["loop", "--lend", "slot", "-d", DEPTH], &[&under])?;
    load(ctx, stack, &top, EXT4, stall)
}

//! The demonstration itself, the same in a guest and on a host.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::closing::{Shown, closing};
use super::commands::Commands;
use super::device::{self, Device, text};
use super::environment::{DemoTarget, Environment};
use super::figures::{self, Finding};
use super::measure::{self, ROUNDS};
use super::{files, undo};
use crate::numbers::{count, size};
use crate::ui;
use crate::witness::{Counts, Witness};

/// Requests of which the driver's copies are counted.
const COUNTED: u64 = 2048;
/// Size of the file system: the backing may be huge.
const FILE_SYSTEM: &str = "480M";

/// Shows everything. On failure nothing is left of it either.
///
/// # Errors
/// Which step failed, and why, in one line.
pub fn show(target: &DemoTarget) -> Result<()> {
    let mut show = Show { target, commands: Commands::new()?, step: 0, began: Instant::now() };
    let result = show.run();
    if result.is_err() {
        // Before the directory goes, in which something may be mounted.
        undo::all();
    }
    result
}

struct Show<'a> {
    target: &'a DemoTarget,
    commands: Commands,
    step: u32,
    /// When the step began.
    began: Instant,
}

impl Show<'_> {
    fn run(&mut self) -> Result<()> {
        let mut shown = Shown::default();
        let steps: [fn(&mut Self, &mut Shown) -> Result<()>; 3] =
            [Self::on_a_fused_device, Self::speed, Self::copies];
        self.kernel().with_context(|| self.failed())?;
        for step in steps {
            step(self, &mut shown).with_context(|| self.failed())?;
        }
        ui::out("");
        closing(self.target.environment, &shown).iter().for_each(|line| ui::out(line));
        Ok(())
    }

    fn failed(&self) -> String {
        format!("step {} failed", self.step)
    }

    /// Announces a step.
    fn step(&mut self, what: &str) {
        self.step += 1;
        self.began = Instant::now();
        ui::out(&format!("{}. {what}", self.step));
    }

    /// Says what came out of a step, and how long that took since the last word.
    fn ok(&mut self, what: &str) {
        let seconds = self.began.elapsed().as_secs_f64();
        ui::out(&format!("   ok, {what} ({seconds:.1} s)"));
        self.began = Instant::now();
    }

    fn program(&self) -> Result<&str> {
        text(&self.target.program)
    }

    fn kernel(&mut self) -> Result<()> {
        self.step("Ask the kernel what its ublk driver can do");
        if !std::path::Path::new("/dev/ublk-control").exists() {
            self.commands.run_to_the_end("loading the driver", &["modprobe", "ublk_drv"])?;
        }
        let argv = [self.program()?, "features", "--json"];
        let printed = self.commands.run("asking", &argv)?;
        let found: serde_json::Value = serde_json::from_str(&printed).context("its answer")?;
        let kernel = found["kernel"].as_str().unwrap_or("?").to_owned();
        let features = found["features"].as_object().context("its answer has no features")?;
        let here = features.values().filter(|here| here.as_bool() == Some(true)).count();
        if found["features"]["AUTO_BUF_REG"] != true {
            bail!(
                "kernel {kernel} cannot lend buffers by itself (AUTO_BUF_REG, Linux 6.16 or newer)"
            );
        }
        let unknown = found["unknown"].as_array().map_or(0, Vec::len);
        let more = if unknown == 0 { String::new() } else { format!(", and {unknown} unknown") };
        self.ok(&format!(
            "Linux {kernel} has {here} of {} known features, AUTO_BUF_REG among them{more}",
            features.len()
        ));
        Ok(())
    }

    /// From adding the device to checked data.
    fn on_a_fused_device(&mut self, shown: &mut Shown) -> Result<()> {
        let backing = text(&self.target.backing)?;
        self.step(&format!("Serve {backing} as a new block device, in fused mode (no copies)"));
        say(&format!("$ ublk-target {}", device::arguments(backing, "fused").join(" ")));
        let before = self.list()?;
        ensure!(before.is_empty(), "{backing} is served already, by {}", before.join(", "));
        let device = Device::add(&self.commands, self.target, "fused")?;
        say(&device.path);
        let list = self.commands.run("asking", &[self.program()?, "list"])?;
        say("$ ublk-target list");
        list.lines().for_each(say);
        self.ok("the device is live");

        self.file_system(&device.path, shown)?;

        self.step("Write and read at random with checksums: fio, crc32c, 32 requests in flight");
        let (written, read) = measure::verify(&self.commands, &device.path)?;
        ensure!(written > 0 && read >= written, "{written} blocks written, {read} read");
        shown.verified = written;
        self.ok(&format!("{} blocks of 4 KiB written, every checksum right", count(written)));
        device.delete(&self.commands, self.target)
    }

    fn file_system(&mut self, device: &str, shown: &mut Shown) -> Result<()> {
        self.step(&format!("Make an ext4 file system on {device} and mount it"));
        device::settle(&self.commands);
        let make = ["mkfs.ext4", "-q", "-F", device, FILE_SYSTEM];
        self.commands.run("making the file system", &make)?;
        let point = self.commands.path("mount");
        std::fs::create_dir(&point)?;
        let at = text(&point)?;
        self.mount(device, at)?;
        self.ok("mounted");

        let roots = files::ROOTS.map(|root| format!("/{root}")).join(" and ");
        self.step(&format!("Copy real files from {roots}, check, compare"));
        let list = self.commands.path("files");
        let chosen = files::choose(std::path::Path::new("/"), &list)?;
        let list = text(&list)?;
        let copy = "cd / && xargs -0 -a \"$1\" cp -a --parents -t \"$2\" && sync -f \"$2\"";
        self.commands.run("copying", &["sh", "-c", copy, "copy", list, at])?;
        let bytes = size(chosen.bytes);
        self.ok(&format!("{} files, {bytes} copied", count(chosen.files)));

        self.unmount(at)?;
        self.commands.run("checking the file system", &["e2fsck", "-f", "-n", device])?;
        self.ok("unmounted; e2fsck -f -n finds no error");

        // Mounted again, so that what is read comes from the device.
        self.mount(device, at)?;
        let sums = |root: &str| {
            let script = "cd \"$1\" && xargs -0 -a \"$2\" sha256sum";
            self.commands.run("comparing checksums", &["sh", "-c", script, "sums", root, list])
        };
        let (original, copied) = (sums("/")?, sums(at)?);
        if let Some((line, _)) =
            original.lines().zip(copied.lines()).find(|(original, copied)| original != copied)
        {
            bail!("a copy differs from its original (SHA-256 and name): {line}");
        }
        ensure!(original == copied, "checksums are missing");
        self.unmount(at)?;
        shown.files = chosen.files;
        self.ok(&format!("mounted again: all {} SHA-256 sums are equal", count(chosen.files)));
        Ok(())
    }

    /// The devices that serve the backing.
    fn list(&self) -> Result<Vec<String>> {
        let list = self.commands.run("asking", &[self.program()?, "list", "--json"])?;
        let devices = undo::devices_on(&list, &self.target.backing);
        Ok(devices.into_iter().map(|(_, device)| device).collect())
    }

    fn mount(&self, device: &str, at: &str) -> Result<()> {
        undo::remember_mount(Some(std::path::Path::new(at)));
        self.commands.run_to_the_end("mounting", &["mount", "-t", "ext4", device, at]).map(drop)
    }

    fn unmount(&self, at: &str) -> Result<()> {
        self.commands.run_to_the_end("unmounting", &["umount", at])?;
        undo::remember_mount(None);
        Ok(())
    }

    fn speed(&mut self, shown: &mut Shown) -> Result<()> {
        self.step(&format!("Measure with fio: medians of {ROUNDS} rounds, in changing order"));
        shown.speed = measure::measure(&self.commands, self.target)?;
        say(&figures::heading());
        shown.speed.iter().flat_map(Finding::rows).for_each(|row| say(&row));
        self.ok("measured");
        Ok(())
    }

    /// Counts the driver's copies in both modes; the last device is deleted for the user to see.
    fn copies(&mut self, shown: &mut Shown) -> Result<()> {
        self.step(&format!("Count the driver's copies over some {} requests", count(COUNTED)));
        let copy = Device::add(&self.commands, self.target, "copy")?;
        let reason = self.count(&copy, "copy", Counts::ensure_copied)?;
        copy.delete(&self.commands, self.target)?;
        let fused = Device::add(&self.commands, self.target, "fused")?;
        if let Some(reason) = reason {
            say(&format!("not shown: {reason}"));
        } else {
            self.count(&fused, "fused", Counts::ensure_lent)?;
            shown.witnessed = true;
            self.ok("fused mode lent every request's own pages and copied none");
        }

        self.step("Delete the device");
        // Nothing of the demonstration is to be taken for a file system later.
        self.commands.run("wiping", &["wipefs", "-a", "-q", &fused.path])?;
        say(&format!("$ ublk-target {}", fused.del_arguments().join(" ")));
        let path = fused.path.clone();
        fused.delete(&self.commands, self.target)?;
        let left = self.list()?;
        ensure!(left.is_empty(), "still listed: {}", left.join(", "));
        self.ok(&format!("{path} is gone, nothing is left of it"));
        Ok(())
    }

    /// Counts under a load; returns why that cannot be done, where it cannot.
    fn count(
        &self,
        device: &Device,
        lend: &str,
        ensure: impl Fn(&Counts, u64) -> Result<()>,
    ) -> Result<Option<String>> {
        device::settle(&self.commands);
        if std::fs::read_dir("/sys/class/ublk-char")?.count() > 1 {
            return Ok(Some("other ublk devices are there, whose copies would count too".into()));
        }
        match Witness::new() {
            Ok(witness) => undo::remember_witness(witness),
            Err(error) if self.target.environment == Environment::Host => {
                return Ok(Some(format!("this kernel cannot be probed ({error:#})")));
            }
            Err(error) => return Err(error),
        }
        measure::requests(&self.commands, &device.path, COUNTED)?;
        let counts = undo::with_witness(Witness::counts).context("the counters are gone")?;
        undo::forget_witness();
        std::thread::sleep(Duration::from_millis(100));
        let counts = counts?;
        ensure(&counts, COUNTED).with_context(|| format!("in {lend} mode"))?;
        let (copies, loans) = (counts.copies.total(), counts.loans.total());
        let line =
            format!("{lend:<6} {:>6} copies, {:>6} buffers lent", count(copies), count(loans));
        say(&line);
        Ok(None)
    }
}

fn say(line: &str) {
    ui::out(&format!("   {line}"));
}

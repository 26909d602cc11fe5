//! The step storm: processes are killed, or told to end, at each step of add, recover, stop and
//! del. Each time the ordinary commands that follow succeed, and nothing is left.
//!
//! The short run goes through the steps that the program names (`UBLK_TARGET_STEP`), the long one
//! through its system calls, too.

mod calls;
mod commands;
mod upgrades;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::device::{Description, Device, PROGRAM, fresh_drive, load_driver, text};
use super::remains;
use crate::config::DEFAULT;
use crate::guest::drives::Drive;
use crate::guest::{Ctx, FIGURE, Outcome, TestCase, process, wait_for};

pub const TESTS: &[TestCase] = &[
    TestCase::guest("a_kill_at_each_step_of_add_leaves_nothing", DEFAULT, commands::add)
        .seconds(600),
    TestCase::guest("a_kill_at_each_step_of_a_supervised_add", DEFAULT, commands::supervised_add)
        .seconds(600),
    TestCase::guest("a_kill_at_each_step_of_recover", DEFAULT, commands::recover).seconds(600),
    TestCase::guest(
        "a_kill_at_each_step_of_a_supervised_recover",
        DEFAULT,
        commands::supervised_recover,
    )
    .seconds(600),
    TestCase::guest("a_kill_at_each_step_of_the_end", DEFAULT, commands::end).seconds(600),
    TestCase::guest("a_kill_at_each_step_of_del", DEFAULT, commands::del).seconds(600),
    TestCase::guest("a_signal_at_each_step_of_add_is_obeyed", DEFAULT, commands::signals)
        .seconds(900),
    TestCase::guest("a_kill_at_each_step_of_upgrade", DEFAULT, upgrades::upgrade).seconds(600),
    TestCase::guest("a_kill_at_each_system_call", DEFAULT, calls::storm).seconds(5400),
];

/// The id of the device that all of it is about.
pub const ID: &str = "7";

/// Steps of every process that says what it is, before it does anything else.
const ROLE: [&str; 2] = ["role-unlocked", "role-half-written"];
/// Steps of a server that adds a device, in their order.
const ADDING: [&str; 13] = [
    "signals-blocked",
    "planned",
    "added",
    "opened",
    "lane-up",
    "lanes-up",
    "parameters-set",
    "half-recorded",
    "recorded",
    "listening",
    "start-sent",
    "live",
    "announced",
];
/// Steps of a server that recovers one.
const RECOVERING: [&str; 11] = [
    "signals-blocked",
    "claimed",
    "planned",
    "lane-up",
    "lanes-up",
    "half-recorded",
    "recorded",
    "listening",
    "start-sent",
    "live",
    "announced",
];
/// Steps of a server that ends.
const ENDING: [&str; 5] = ["stopping", "stopped", "deleted", "deaf", "forgotten"];
/// Steps of the commands that delete.
const DELETING: [&str; 4] = ["del-found", "del-stopped", "del-removed", "del-cleaned"];

/// Steps of a server that becomes another program, before it recovers its device.
const UPGRADING: [&str; 3] = ["upgrade-asked", "upgrade-quiesced", "upgrade-let-go"];

/// Something that happens to a process at a step.
pub struct Blow {
    variable: String,
    file: PathBuf,
}

impl Drop for Blow {
    fn drop(&mut self) {
        // It is there if the step was never come to.
        let _ = std::fs::remove_file(&self.file);
    }
}

impl Blow {
    /// `whom` is `self` or `parent`.
    pub fn new(ctx: &Ctx, step: &str, whom: &str, signal: &str) -> Result<Self> {
        let blow = Self::later(ctx, step, whom, signal)?;
        blow.arm()?;
        Ok(blow)
    }

    /// One that does not fall before it is armed.
    ///
    /// Its file is where servers find it, too: /tmp is on none of their mounts.
    pub fn later(_ctx: &Ctx, step: &str, whom: &str, signal: &str) -> Result<Self> {
        let file = Path::new("/dev/step-of-a-test").to_owned();
        // What a step that was never come to has left.
        let _ = std::fs::remove_file(&file);
        let variable = format!("UBLK_TARGET_STEP={step} {whom} {signal} {}", text(&file)?);
        Ok(Self { variable, file })
    }

    pub fn arm(&self) -> Result<()> {
        std::fs::write(&self.file, "")?;
        Ok(())
    }

    pub fn argv<'a>(&'a self, arguments: &[&'a str]) -> Vec<&'a str> {
        [&["env", &self.variable, PROGRAM], arguments].concat()
    }

    /// Runs the program until it ends.
    pub fn run(&self, arguments: &[&str]) -> Result<Output> {
        let argv = self.argv(arguments);
        Ok(Command::new(argv[0]).args(&argv[1..]).stdin(Stdio::null()).output()?)
    }

    pub fn spawn(&self, arguments: &[&str]) -> Result<Child> {
        let argv = self.argv(arguments);
        let mut command = Command::new(argv[0]);
        command.args(&argv[1..]).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        Ok(command.spawn()?)
    }

    /// Whether it has fallen, which it does only once.
    pub fn has_fallen(&self) -> bool {
        !self.file.exists()
    }

    pub fn ensure_fallen(&self) -> Result<()> {
        // The last steps of a server may come after the end of its command.
        let what = format!("the step of {}", self.variable);
        wait_for(&what, Duration::from_secs(5), || Ok(self.has_fallen().then_some(())))
    }
}

/// A storm on one backing.
pub struct Storm {
    drive: Drive,
    began: Instant,
    blows: u32,
}

impl Storm {
    pub fn new() -> Result<Self> {
        load_driver()?;
        Ok(Self { drive: fresh_drive("drive0")?, began: Instant::now(), blows: 0 })
    }

    pub fn backing(&self) -> PathBuf {
        self.drive.path()
    }

    /// Notes what happens now, for whoever reads why it has failed.
    pub fn blow(&mut self, what: &str) {
        self.blows += 1;
        println!("{:.1} s: {what}", self.began.elapsed().as_secs_f64());
    }

    /// After a blow: the device is shown or not, and deleted; then it can be added again.
    pub fn clean_up(&self) -> Result<()> {
        let devices = remains::devices()?;
        println!("{devices:?}");
        if !devices.is_empty() {
            process::run(&[PROGRAM, "del", "-n", ID])?;
        }
        remains::ensure_none()?;
        self.add_again()
    }

    /// The id and the backing are free, and I/O works.
    pub fn add_again(&self) -> Result<()> {
        let device = Device::add_loop(&self.drive.path(), &["-n", ID])?;
        verify(&device.described)?;
        device.delete()?;
        remains::ensure_none()
    }

    pub fn figure(&self, what: &str) -> Outcome {
        let seconds = self.began.elapsed().as_secs_f64();
        println!("{FIGURE}{} {what} in {seconds:.0} s", self.blows);
        Outcome::Pass
    }
}

/// What is written is read, past the page cache.
pub fn verify(device: &Description) -> Result<()> {
    let path = text(&device.device)?;
    let sent = Instant::now().elapsed().as_nanos().to_string() + &"ublk ".repeat(1000);
    let sent = &sent.as_bytes()[..4096];
    let file = Path::new("/tmp/pattern");
    std::fs::write(file, sent)?;
    let (of, from) = (format!("of={path}"), format!("if={path}"));
    let dd = |arguments: &[&str]| {
        process::run(&[&["dd", "bs=4k", "count=1", "status=none"], arguments].concat())
    };
    dd(&["if=/tmp/pattern", &of, "oflag=direct", "seek=3"])?;
    dd(&[&from, "of=/tmp/pattern.read", "iflag=direct", "skip=3"])?;
    ensure!(std::fs::read("/tmp/pattern.read").context("read back")? == sent, "other data");
    Ok(())
}

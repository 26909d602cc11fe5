//! The program as a service manager runs it: in the foreground, supervised, started again.

use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;

use super::death::kill_server;
use super::device::{Description, Device, PROGRAM, fresh_drive, load_driver, text};
use crate::config::DEFAULT;
use crate::guest::direct::{self, Aligned};
use crate::guest::{Ctx, Outcome, TestCase, process, udev, wait_for};

pub const TESTS: &[TestCase] = &[
    TestCase::guest("a_service_is_ready_when_live_and_recovers_its_device", DEFAULT, service)
        .seconds(180),
    TestCase::guest("a_fleet_that_takes_long_to_begin_has_systemd_wait", DEFAULT, slow)
        .seconds(180),
    TestCase::guest("udev_makes_the_devices_that_it_is_told_lean", DEFAULT, lean).seconds(180),
];

/// What is to be installed where devices are to cost less.
const RULES: &str = include_str!("../../../../dist/61-ublk-target-lean.rules");

/// A service manager's socket.
struct Manager {
    socket: UnixDatagram,
    path: PathBuf,
}

impl Manager {
    fn new(ctx: &Ctx) -> Result<Self> {
        let path = ctx.directory().join("notify");
        let socket = UnixDatagram::bind(&path)?;
        socket.set_read_timeout(Some(Duration::from_secs(30)))?;
        Ok(Self { socket, path })
    }

    /// Starts the service as its unit does, and waits until it says that it is ready.
    fn start(&self, arguments: &[&str]) -> Result<Child> {
        let child = Command::new(PROGRAM)
            .arg("add")
            .args(arguments)
            .args(["-n", "5", "--foreground", "--supervise", "--or-recover"])
            .env("NOTIFY_SOCKET", &self.path)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()?;
        let message = self.hear()?;
        ensure!(message.contains("READY=1"), "{message}");
        Ok(child)
    }

    fn hear(&self) -> Result<String> {
        let mut message = [0; 256];
        let len = self.socket.recv(&mut message).context("the service says nothing")?;
        Ok(String::from_utf8_lossy(&message[..len]).into_owned())
    }
}

fn described() -> Result<Description> {
    let listed = process::run(&[PROGRAM, "list", "-n", "5", "--json"])?.stdout;
    Ok(serde_json::from_str(&listed)?)
}

fn service(ctx: &Ctx) -> Result<Outcome> {
    load_driver()?;
    let drive = fresh_drive("drive0")?;
    let manager = Manager::new(ctx)?;
    let path = drive.path();
    let mut supervisor = manager.start(&["loop", "-f", text(&path)?])?;
    let first = described()?;
    ensure!(first.state == "LIVE" && first.supervisor == Some(supervisor.id()), "{first:?}");
    let file = direct::open("/dev/ublkb5")?;
    let mut block = Aligned::new(4096, 0xa5);
    std::os::unix::fs::FileExt::write_all_at(&file, block.bytes(), 0)?;
    // The service manager kills all of it.
    process::signal(supervisor.id(), Signal::SIGKILL)?;
    process::signal(first.pid.context("a server")?, Signal::SIGKILL)?;
    supervisor.wait()?;
    wait_for("the device to be without a server", Duration::from_secs(30), || {
        Ok((described()?.state == "QUIESCED").then_some(()))
    })?;
    // Its user has not noticed when it is started again.
    let mut supervisor = manager.start(&["loop", "-f", text(&path)?])?;
    let second = described()?;
    ensure!(second.state == "LIVE" && second.supervisor == Some(supervisor.id()), "{second:?}");
    block.bytes().fill(0);
    std::os::unix::fs::FileExt::read_exact_at(&file, block.bytes(), 0)?;
    ensure!(block.bytes().iter().all(|byte| *byte == 0xa5), "other data");
    drop(file);
    udev::settle()?;
    // Stopped in order, nothing is left.
    process::signal(supervisor.id(), Signal::SIGTERM)?;
    let status = supervisor.wait()?;
    ensure!(status.success(), "{status}");
    ensure!(!Path::new("/dev/ublkb5").exists(), "the device is left");
    Ok(Outcome::Pass)
}

/// A fleet with a device that cannot be taken over, since somebody has it: systemd is told to wait.
fn slow(ctx: &Ctx) -> Result<Outcome> {
    let stuck = Device::add(&["null", "-n", "1", "--on-death", "wait"])?;
    kill_server(&stuck)?;
    // Its next server waits for 30 s until this is closed.
    let holder = wait_for("the device to be let go of", Duration::from_secs(30), || {
        Ok(std::fs::File::options().read(true).write(true).open("/dev/ublkc1").ok())
    })?;
    let manager = Manager::new(ctx)?;
    manager.socket.set_read_timeout(Some(Duration::from_secs(90)))?;
    let config = ctx.directory().join("serve.toml");
    let device = |id: u32| format!("[[device]]\nid = {id}\ntarget = \"null\"\n");
    std::fs::write(&config, device(0) + &device(1) + "on-death = \"wait\"\n" + &device(2))?;
    let mut fleet = Command::new(PROGRAM)
        .args(["serve", "--config", text(&config)?])
        .env("NOTIFY_SOCKET", &manager.path)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()?;
    let (mut last_extended, mut longest, mut begun) = (None, Duration::ZERO, 0);
    let ready = loop {
        let message = manager.hear()?;
        // What systemd allows from the last message on.
        if let Some((at, allowed)) = last_extended {
            let taken = std::time::Instant::now() - at;
            ensure!(taken < allowed, "{taken:?} of {allowed:?} until {message}");
            longest = longest.max(taken);
        }
        let extended = message.lines().find_map(|line| line.strip_prefix("EXTEND_TIMEOUT_USEC="));
        match extended {
            Some(us) => {
                last_extended =
                    Some((std::time::Instant::now(), Duration::from_micros(us.parse()?)));
                begun += usize::from(message.contains("of 3"));
            }
            None => break message,
        }
    };
    ensure!(ready.contains("READY=1") && ready.contains("2 of 3 devices"), "{ready}");
    // Once each was looked at, and once each was begun.
    ensure!(begun == 6, "told {begun} times");
    ensure!(longest > Duration::from_secs(20), "nothing was waited for: {longest:?}");
    process::signal(fleet.id(), Signal::SIGTERM)?;
    let status = fleet.wait()?;
    ensure!(status.success(), "{status}");
    drop(holder);
    stuck.delete()?;
    Ok(Outcome::Pass)
}

/// Rules of udev for as long as it lives.
struct InstalledRules(PathBuf);

impl InstalledRules {
    fn new(rules: &str) -> Result<Self> {
        let directory = Path::new("/run/udev/rules.d");
        std::fs::create_dir_all(directory)?;
        let installed = Self(directory.join("61-ublk-target-lean.rules"));
        std::fs::write(&installed.0, rules)?;
        udev::reload()?;
        Ok(installed)
    }
}

impl Drop for InstalledRules {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
        let _ = udev::reload();
    }
}

fn lean(_ctx: &Ctx) -> Result<Outcome> {
    const ATTRIBUTES: [&str; 3] = ["queue/nomerges", "queue/wbt_lat_usec", "queue/iostats"];
    load_driver()?;
    let drive = fresh_drive("drive0")?;
    let _rules = InstalledRules::new(&RULES.replace("ublkb3", "ublkb5"))?;
    let attributes = |device: &Device| {
        ATTRIBUTES.map(|name| device.attribute(name)).into_iter().collect::<Result<Vec<_>>>()
    };
    let told = Device::add_loop(&drive.path(), &["-n", "5"])?;
    let other = Device::add(&["null", "--size", "1G", "-n", "6"])?;
    udev::settle()?;
    let (told_has, other_has) = (attributes(&told)?, attributes(&other)?);
    ensure!(told_has == ["2", "0", "0"], "{ATTRIBUTES:?}: {told_has:?}");
    ensure!(other_has[0] == "0" && other_has[1] != "0" && other_has[2] == "1", "{other_has:?}");
    told.delete()?;
    other.delete()?;
    Ok(Outcome::Pass)
}

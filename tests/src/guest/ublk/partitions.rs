//! Partitions are there when a command says that their device is, or are left to others.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use super::death::kill_server;
use super::device::{Device, PROGRAM, fresh_drive, text};
use super::fleet::Fleet;
use crate::config::DEFAULT;
use crate::guest::drives::Drive;
use crate::guest::{Ctx, FIGURE, Outcome, TestCase, process, udev};

pub const TESTS: &[TestCase] = &[
    TestCase::guest("partitions_are_there_when_add_returns", DEFAULT, there).seconds(180),
    TestCase::guest("partitions_are_there_when_a_fleet_is_ready", DEFAULT, of_fleet),
    TestCase::guest("partitions_are_left_to_others", DEFAULT, left).seconds(180),
];

const PARTITIONS: u32 = 4;

/// A drive with a table of partitions.
fn partitioned(serial: &str, label: &str) -> Result<Drive> {
    let drive = fresh_drive(serial)?;
    let path = drive.path();
    let parts = "size=1MiB\n".repeat(PARTITIONS as usize);
    let script = format!("printf 'label: {label}\\n{parts}' | sfdisk -q {}", text(&path)?);
    process::run(&["sh", "-c", &script])?;
    udev::settle()?;
    Ok(drive)
}

/// How many partitions of a device have a node.
fn partitions(device: &Path) -> Result<u32> {
    let nodes = (1..=PARTITIONS).map(|n| PathBuf::from(format!("{}p{n}", device.display())));
    Ok(u32::try_from(nodes.filter(|node| node.exists()).count())?)
}

fn there(_ctx: &Ctx) -> Result<Outcome> {
    for label in ["gpt", "dos"] {
        let drive = partitioned("drive1", label)?;
        let mut longest = std::time::Duration::ZERO;
        for round in 1..=15 {
            // So that the scan has to wait for the server, and with udev as it comes.
            let rule = if round % 3 == 0 { "op=read,count=2,delay=100ms" } else { "op=read,short" };
            let path = drive.path();
            let began = std::time::Instant::now();
            let device = Device::add(&["fault", "--rule", rule, "loop", "-f", text(&path)?])?;
            longest = longest.max(began.elapsed());
            let found = partitions(Path::new(device.path()?))?;
            ensure!(found == PARTITIONS, "{label}, round {round}: {found} partitions");
            udev::settle()?;
            device.delete()?;
        }
        println!(
            "{FIGURE}15 of 15 times all partitions of {label}; `add` took {longest:.0?} at most"
        );
        drive.wipe()?;
    }
    Ok(Outcome::Pass)
}

fn of_fleet(ctx: &Ctx) -> Result<Outcome> {
    let drives = [partitioned("drive1", "gpt")?, partitioned("drive2", "dos")?];
    let config = ctx.directory().join("serve.toml");
    let mut devices = String::new();
    for (id, drive) in drives.iter().enumerate() {
        let file = drive.path().display().to_string();
        devices += &format!("[[device]]\nid = {id}\ntarget = \"loop\"\nfile = \"{file}\"\n");
        devices += "rule = \"op=read,count=2,delay=100ms\"\n";
    }
    let null = "[[device]]\nid = 7\ntarget = \"null\"\nno-part-scan = true\n";
    let have_partitions = || -> Result<()> {
        for id in 0..drives.len() {
            let found = partitions(Path::new(&format!("/dev/ublkb{id}")))?;
            ensure!(found == PARTITIONS, "device {id}: {found} partitions");
        }
        udev::settle()
    };
    for _ in 0..3 {
        fs::write(&config, format!("{devices}{null}"))?;
        let fleet = Fleet::start(ctx.directory(), &config)?;
        have_partitions()?;
        fs::write(&config, null)?;
        fleet.reload("the file was read again: 1 devices")?;
        fs::write(&config, format!("{null}{devices}"))?;
        fleet.reload("the file was read again: 3 devices")?;
        have_partitions()?;
        fleet.end()?;
    }
    drives.iter().try_for_each(Drive::wipe)?;
    Ok(Outcome::Pass)
}

/// With `--no-part-scan`, and after a recovery.
fn left(_ctx: &Ctx) -> Result<Outcome> {
    let drive = partitioned("drive1", "gpt")?;
    let path = drive.path();
    let add = ["loop", "-f", text(&path)?, "--no-part-scan", "--on-death", "wait"];
    let device = Device::add(&add)?;
    udev::settle()?;
    let node = Path::new(device.path()?).to_owned();
    ensure!(partitions(&node)? == 0, "somebody has looked for partitions");
    kill_server(&device)?;
    process::run(&[PROGRAM, "recover", "-n", &device.id()])?;
    let record = format!("/run/ublk-target/{}.json", device.id());
    let record = fs::read_to_string(&record).context(record)?;
    ensure!(record.contains("\"no_part_scan\""), "{record}");
    ensure!(partitions(&node)? == 0, "somebody has looked for partitions");
    process::run(&["blockdev", "--rereadpt", text(&node)?])?;
    udev::settle()?;
    ensure!(partitions(&node)? == PARTITIONS, "they are not found");
    device.delete()?;
    drive.wipe()?;
    Ok(Outcome::Pass)
}

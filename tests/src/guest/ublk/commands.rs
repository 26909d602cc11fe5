//! What the commands print.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use super::device::{Description, Device, PROGRAM, fresh_drive, load_driver};
use crate::config::DEFAULT;
use crate::guest::{Ctx, FIGURE, Outcome, TestCase, process};

pub const TESTS: &[TestCase] = &[
    TestCase::guest("add_prints_the_device", DEFAULT, add_prints),
    TestCase::guest("list_shows_devices", DEFAULT, list),
    TestCase::guest("features_are_shown", DEFAULT, features),
    TestCase::guest("auto_lends_fused_and_says_why", DEFAULT, auto),
    TestCase::guest("help_names_every_option", DEFAULT, help),
];

fn add_prints(_ctx: &Ctx) -> Result<Outcome> {
    load_driver()?;
    let printed = process::run(&[PROGRAM, "add", "null", "-n", "4"])?;
    ensure!(printed.stdout == "/dev/ublkb4\n", "{printed:?}");
    ensure!(printed.stderr.is_empty(), "{printed:?}");
    let log = std::fs::read_to_string("/var/log/ublk-target/4.log")?;
    ensure!(log.contains("serving") && log.contains("/dev/ublkb4"), "{log}");
    process::run(&[PROGRAM, "del", "-n", "4"])?;
    Ok(Outcome::Pass)
}

fn list(_ctx: &Ctx) -> Result<Outcome> {
    let drive = fresh_drive("drive0")?;
    let one = Device::add_loop(&drive.path(), &["-n", "3", "-q", "2", "-d", "64"])?;
    let other = Device::add(&["null", "-n", "11", "--lend", "copy", "--size", "1G"])?;
    let described = Description {
        id: 3,
        device: "/dev/ublkb3".into(),
        state: "LIVE".into(),
        target: "loop".into(),
        base: "loop".into(),
        layers: Vec::new(),
        lend: "fused".into(),
        on_death: "fail".into(),
        pid: one.described.pid,
        supervisor: None,
        given_up: None,
        trouble: None,
        queues: 2,
        depth: 64,
        size_bytes: drive.size_bytes()?,
        page_cache: false,
        backings: vec![drive.path()],
    };
    ensure!(one.described == described, "{:?}", one.described);
    ensure!(std::path::Path::new(&format!("/proc/{}", one.pid()?)).exists());

    let all = process::run(&[PROGRAM, "list", "--json"])?.stdout;
    let all: Vec<Description> = serde_json::from_str(&all)?;
    ensure!(all == [described.clone(), other.described.clone()], "{all:?}");
    let single = process::run(&[PROGRAM, "list", "-n", "3", "--json"])?.stdout;
    let single: Description = serde_json::from_str(&single)?;
    ensure!(single == described, "{single:?}");

    let table = process::run(&[PROGRAM, "list"])?.stdout;
    let lines: Vec<_> = table.lines().collect();
    ensure!(lines.len() == 3 && lines[0].starts_with("ID") && lines[1].contains("LIVE"), "{table}");

    one.delete()?;
    other.delete()?;
    let none = process::run(&[PROGRAM, "list", "--json"])?.stdout;
    ensure!(none.trim() == "[]", "{none}");
    Ok(Outcome::Pass)
}

#[derive(Deserialize)]
struct Features {
    kernel: String,
    bits: String,
    features: BTreeMap<String, bool>,
    unknown: Vec<String>,
    unknown_bits: String,
}

fn features(_ctx: &Ctx) -> Result<Outcome> {
    load_driver()?;
    let printed = process::run(&[PROGRAM, "features", "--json"])?.stdout;
    let found: Features = serde_json::from_str(&printed)?;
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease")?;
    ensure!(found.kernel == release.trim());
    let number = |text: &str| u64::from_str_radix(text.trim_start_matches("0x"), 16);
    let (bits, unknown) = (number(&found.bits)?, number(&found.unknown_bits)?);
    ensure!(
        bits & (1 << 11) != 0 && found.features.get("AUTO_BUF_REG") == Some(&true),
        "{printed}"
    );
    // All that the driver offers is shown, by name or by number.
    let named = found.features.values().filter(|here| **here).count();
    ensure!(bits.count_ones() as usize == named + found.unknown.len(), "{printed}");
    ensure!(unknown.count_ones() as usize == found.unknown.len(), "{printed}");
    let table = process::run(&[PROGRAM, "features"])?.stdout;
    let shows =
        |name: &str| table.lines().any(|line| line.starts_with(name) && line.contains("yes"));
    ensure!(shows("AUTO_BUF_REG") && found.unknown.iter().all(|name| shows(name)), "{table}");
    if !found.unknown.is_empty() {
        println!(
            "{FIGURE}features of this driver that have no name in uring-ext/src/feature.rs: {}",
            found.unknown.join(", ")
        );
    }
    Ok(Outcome::Pass)
}

fn auto(_ctx: &Ctx) -> Result<Outcome> {
    load_driver()?;
    let printed = process::run(&[PROGRAM, "add", "null", "-v", "--json"])?;
    let described: Description = serde_json::from_str(&printed.stdout)?;
    process::run(&[PROGRAM, "del", "-n", &described.id.to_string()])?;
    ensure!(described.lend == "fused", "{described:?}");
    ensure!(printed.stderr.contains("lend mode fused: the kernel registers"), "{}", printed.stderr);
    Ok(Outcome::Pass)
}

fn help(_ctx: &Ctx) -> Result<Outcome> {
    for (command, options) in [
        (
            ["add", "loop"].as_slice(),
            ["--file", "--id", "--queues", "--depth", "--lend", "--foreground", "--json"]
                .as_slice(),
        ),
        (&["add", "null"], &["--size", "--id", "--lend"]),
        (&["del"], &["--id", "--all", "--force"]),
        (&["list"], &["--id", "--json"]),
        (&["features"], &["--json"]),
    ] {
        let argv = [&[PROGRAM], command, &["--help"]].concat();
        let text = process::run(&argv)?.stdout;
        let missing = options.iter().find(|option| !text.contains(**option));
        ensure!(missing.is_none(), "{command:?}: no {missing:?} in\n{text}");
    }
    let version = process::run(&[PROGRAM, "--version"])?.stdout;
    version.strip_prefix("ublk-target ").context(version.clone())?;
    Ok(Outcome::Pass)
}

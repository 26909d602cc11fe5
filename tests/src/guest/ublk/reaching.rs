//! With the kernel as witness: what has to go to every backing of a device does, and what concerns
//! one goes to that one only.

use anyhow::{Result, ensure};

use super::device::{Device, fresh_drives, text};
use crate::config::TRACING;
use crate::guest::drives::Drive;
use crate::guest::udev::QuietUdev;
use crate::guest::{Ctx, Outcome, TestCase, process};
use crate::witness::NvmeCommands;

pub const TESTS: &[TestCase] = &[
    TestCase::guest("commands_reach_the_drives_of_a_stripe", TRACING, stripe).seconds(300),
    TestCase::guest("commands_reach_the_drives_of_linear", TRACING, linear).seconds(300),
];

/// What is asked of a device, the commands that become of it, and the drives that have to get one.
struct Case {
    argv: &'static [&'static str],
    commands: &'static [&'static str],
    drives: &'static [usize],
}

const fn case(
    argv: &'static [&'static str],
    commands: &'static [&'static str],
    drives: &'static [usize],
) -> Case {
    Case { argv, commands, drives }
}

const FLUSH: &[&str] = &["nvme_cmd_flush"];
/// Bit 14 of the control field makes a write durable.
const FUA: &[&str] = &["nvme_cmd_write ", "ctrl=0x4000,"];
const DSM: &[&str] = &["nvme_cmd_dsm"];
const ZEROES: &[&str] = &["nvme_cmd_write_zeroes"];
/// The shell gives the device its name as `$0`.
const WRITE: &str = "dd if=/dev/zero of=$0 bs=4k count=1 oflag=direct,dsync status=none seek=";

/// Chunks of 64 KiB: the first MiB is four of each drive.
fn stripe(_ctx: &Ctx) -> Result<Outcome> {
    let drives = fresh_drives(4)?;
    let cases = [
        case(&["sync"], FLUSH, &[0, 1, 2, 3]),
        case(&["sh", "-c", "WRITE16"], FUA, &[1]),
        case(&["blkdiscard", "-l", "1M"], DSM, &[0, 1, 2, 3]),
        case(&["blkdiscard", "-o", "192K", "-l", "64K"], DSM, &[3]),
        case(&["blkdiscard", "-o", "120K", "-l", "16K"], DSM, &[1, 2]),
        case(&["blkdiscard", "-z", "-l", "1M"], ZEROES, &[0, 1, 2, 3]),
        case(&["blkdiscard", "-z", "-o", "60K", "-l", "8K"], ZEROES, &[0, 1]),
        case(&["blkdiscard", "-z", "-o", "256K", "-l", "4K"], ZEROES, &[0]),
    ];
    let files = drives.iter().map(|drive| Ok(text(&drive.path())?.to_owned()));
    let files = files.collect::<Result<Vec<_>>>()?;
    check_all(&drives, &["stripe", "--chunk", "64K"], &files, &cases)
}

/// Three drives of the four, two MiB, then four, then the rest.
fn linear(_ctx: &Ctx) -> Result<Outcome> {
    let drives = fresh_drives(4)?;
    let cases = [
        case(&["sync"], FLUSH, &[0, 1, 2]),
        case(&["sh", "-c", "WRITE600"], FUA, &[1]),
        case(&["blkdiscard", "-l", "8M"], DSM, &[0, 1, 2]),
        case(&["blkdiscard", "-o", "3M", "-l", "1M"], DSM, &[1]),
        case(&["blkdiscard", "-z", "-l", "8M"], ZEROES, &[0, 1, 2]),
        case(&["blkdiscard", "-z", "-o", "6140K", "-l", "8K"], ZEROES, &[1, 2]),
    ];
    let file = |number: usize, part: &str| -> Result<String> {
        Ok(format!("{}{part}", text(&drives[number].path())?))
    };
    let files = [file(0, ",1M,2M")?, file(1, ",3M,4M")?, file(2, "")?];
    check_all(&drives, &["linear"], &files, &cases)
}

fn check_all(
    drives: &[Drive],
    arguments: &[&str],
    files: &[String],
    cases: &[Case],
) -> Result<Outcome> {
    for lend in ["fused", "slot", "copy"] {
        let mut arguments = [arguments, &["--lend", lend]].concat();
        files.iter().for_each(|file| arguments.extend(["-f", file]));
        let device = Device::add(&arguments)?;
        let quiet = QuietUdev::new()?;
        for case in cases {
            check(&device, drives, case)?;
        }
        drop(quiet);
        device.stop_and_count()?.ensure_none(&["failed", "stale", "unexpected", "copied"])?;
    }
    Ok(Outcome::Pass)
}

/// Each drive that is concerned gets commands of this kind, no other drive does, and none gets a
/// command that nobody asked for.
fn check(device: &Device, drives: &[Drive], case: &Case) -> Result<()> {
    let names: Vec<_> = drives.iter().map(|drive| drive.name.as_str()).collect();
    let recorded = NvmeCommands::record(&names)?;
    let argv: Vec<_> = case.argv.iter().map(|word| word.replace("WRITE", WRITE)).collect();
    let mut argv: Vec<_> = argv.iter().map(String::as_str).collect();
    argv.push(device.path()?);
    process::run(&argv)?;
    let lines = recorded.lines()?;
    let got: Vec<_> = names.iter().map(|name| count(&lines, name, case.commands)).collect();
    println!("{argv:?}: {got:?}");
    for (number, (count, all)) in got.into_iter().enumerate() {
        let concerned = case.drives.contains(&number);
        ensure!(
            (count > 0) == concerned && count == all,
            "drive {number}: {count} of {all} commands for {argv:?}\n{lines:#?}"
        );
    }
    Ok(())
}

/// How many commands a drive got that have all these texts, and how many at all, but for what nobody
/// asked for: udev reads, and the kernel flushes after a synchronous write, durable or not.
fn count(lines: &[String], disk: &str, texts: &[&str]) -> (usize, usize) {
    let disk = format!("disk={disk},");
    let mine = || lines.iter().filter(|line| line.contains(&disk));
    let asked = mine().filter(|line| texts.iter().all(|text| line.contains(text)));
    let unasked = |line: &&String| {
        line.contains("nvme_cmd_read") || (texts == FUA && line.contains(FLUSH[0]))
    };
    (asked.count(), mine().filter(|line| !unasked(line)).count())
}

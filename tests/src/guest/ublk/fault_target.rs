//! The fault target: what it says was injected is what the users of the device have met.

use std::collections::BTreeSet;
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::device::{Counters, Device, PROGRAM, fresh_drive, text};
use super::verify::verify;
use crate::config::DEFAULT;
use crate::guest::direct::{self, Aligned};
use crate::guest::drives::Drive;
use crate::guest::udev::QuietUdev;
use crate::guest::{Ctx, Outcome, TestCase, fio, process};

pub const TESTS: &[TestCase] = &[
    faulty("fault_errors_are_those_that_fio_meets_on_a_loop", |ctx| errors(ctx, 1)),
    faulty("fault_errors_are_those_that_fio_meets_on_a_stripe", |ctx| errors(ctx, 3)),
    faulty("fault_errors_keep_their_names", names),
    faulty("fault_shorts_verify_on_a_loop", |ctx| short(ctx, 1)),
    faulty("fault_shorts_verify_on_a_stripe", |ctx| short(ctx, 3)),
    faulty("fault_delays_are_seen_as_latency", delays),
    faulty("fault_seeds_determine_the_faults", seeds),
    faulty("fault_targets_are_named_and_wrapped", named),
    faulty("fault_rules_that_are_bad_are_refused", refused),
];

const fn faulty(name: &'static str, run: fn(&Ctx) -> Result<Outcome>) -> TestCase {
    TestCase::guest(name, DEFAULT, run).seconds(900)
}

const MODES: [&str; 4] = ["fused", "slot", "user-copy", "copy"];

/// The lend modes that a target of so many drives is tried in; in the short run half of them, and
/// the others with other targets.
fn modes(ctx: &Ctx, width: u32) -> impl Iterator<Item = &'static str> {
    let (long, turn) = (ctx.long, usize::from(width > 1));
    MODES.into_iter().enumerate().filter(move |(n, _)| long || n % 2 == turn).map(|(_, it)| it)
}

/// Where rules apply that must not meet whoever looks for partitions: from 64 MiB on.
const START_MIB: u32 = 64;

/// A device with faults on a loop of one drive, or a stripe of several. Options of the device may
/// follow the lend mode.
fn add(rules: &[&str], more: &[&str], drives: &[Drive], lend: &str) -> Result<Device> {
    let paths: Vec<_> = drives.iter().map(Drive::path).collect();
    let mut arguments = vec!["fault"];
    rules.iter().for_each(|rule| arguments.extend(["--rule", rule]));
    arguments.extend(more);
    match &paths[..] {
        [_] => arguments.push("loop"),
        _ => arguments.extend(["stripe", "-c", "4K"]),
    }
    for path in &paths {
        arguments.extend(["-f", text(path)?]);
    }
    arguments.push("--lend");
    arguments.extend(lend.split(' '));
    let device = Device::add(&arguments)?;
    // So that a request of fio's is a request of the device.
    let nomerges = format!("/sys/block/ublkb{}/queue/nomerges", device.described.id);
    std::fs::write(nomerges, "2")?;
    Ok(device)
}

fn drives(count: u32) -> Result<Vec<Drive>> {
    (0..count).map(|number| fresh_drive(&format!("drive{number}"))).collect()
}

/// Options of fio for 32 MiB behind [`START_MIB`].
fn options(device: &Device, rw: &str, bs: &str, depth: u32) -> Result<Vec<String>> {
    Ok(vec![
        format!("filename={}", device.path()?),
        format!("rw={rw}"),
        format!("bs={bs}"),
        format!("iodepth={depth}"),
        format!("offset={START_MIB}m"),
        "size=32m".to_owned(),
        "ioengine=io_uring".to_owned(),
        "direct=1".to_owned(),
        // Its own clock may be some parts in a thousand off.
        "clocksource=clock_gettime".to_owned(),
    ])
}

fn fio_errors(ctx: &Ctx, device: &Device, rw: &str, bs: &str, depth: u32) -> Result<u64> {
    let mut options = options(device, rw, bs, depth)?;
    options.push("continue_on_error=all".to_owned());
    if depth == 1 && !ctx.long {
        options.push("io_size=8m".to_owned());
    }
    let options: Vec<_> = options.iter().map(String::as_str).collect();
    fio::run_for_errors(ctx, &options)
}

/// A counter as `stats` shows it.
fn shown(device: &Device, name: &str) -> Result<u64> {
    let argv = [PROGRAM, "stats", "-n", &device.id(), "--json", "--interval", "0.1"];
    let stats: Value = serde_json::from_str(&process::run(&argv)?.stdout)?;
    stats["total"]["counters"][name].as_u64().with_context(|| format!("{name} in {stats}"))
}

fn stop(device: Device, udev: QuietUdev) -> Result<Counters> {
    let counters = device.stop_and_count();
    drop(udev);
    let counters = counters?;
    counters.ensure_none(&["retries", "copied", "failed registrations", "stale", "unexpected"])?;
    Ok(counters)
}

fn errors(ctx: &Ctx, width: u32) -> Result<Outcome> {
    let drives = drives(width)?;
    let rules = [
        "op=write,range=64M+32M,p=0.05,error=EIO",
        "op=write,range=64M+32M,p=0.05,error=EILSEQ,delay=1ms",
        "op=read,range=64M+8M,p=0.1,count=50,error=EIO",
    ];
    for lend in modes(ctx, width) {
        let device = add(&rules, &["--seed", "5"], &drives, lend)?;
        let udev = QuietUdev::new()?;
        let mut met = 0;
        for (rw, bs, depth, least) in
            [("randwrite", "4k", 32, 500), ("randwrite", "32k", 8, 50), ("randread", "4k", 16, 50)]
        {
            let errors = fio_errors(ctx, &device, rw, bs, depth)?;
            println!("{lend} {rw} {bs}: {errors} errors");
            ensure!(errors >= least, "{errors} errors of {rw} {bs}");
            met += errors;
        }
        let shown = shown(&device, "planned_errors")?;
        let counters = stop(device, udev)?;
        ensure!(shown == met, "{lend}: fio met {met} errors, stats shows {shown}");
        for name in ["planned errors", "failed"] {
            ensure!(counters.get(name) == met, "{lend}: fio met {met} errors: {counters:?}");
        }
        ensure!((100..met).contains(&counters.get("delays")), "{counters:?}");
    }
    Ok(Outcome::Pass)
}

/// Each of the errors that a rule may name reaches the reader as itself.
fn names(_ctx: &Ctx) -> Result<Outcome> {
    const NAMES: [(&str, i32); 10] = [
        ("EIO", 5),
        ("ENOSPC", 28),
        ("ETIMEDOUT", 110),
        ("ENOLINK", 67),
        ("EREMOTEIO", 121),
        ("EBADE", 52),
        ("ENODATA", 61),
        ("EILSEQ", 84),
        ("ENODEV", 19),
        ("ETIME", 62),
    ];
    let drives = drives(1)?;
    let at =
        |number: usize| (u64::from(START_MIB) << 20) + (u64::try_from(number).unwrap_or(0) << 16);
    let rules: Vec<_> = (0..)
        .zip(NAMES)
        .map(|(number, (name, _))| format!("op=read,range={}+4K,error={name}", at(number)))
        .collect();
    let rules: Vec<_> = rules.iter().map(String::as_str).collect();
    let device = add(&rules, &[], &drives, "fused")?;
    let udev = QuietUdev::new()?;
    let file = direct::open(device.path()?)?;
    let mut buffer = Aligned::new(4096, 0);
    for (number, (name, expected)) in NAMES.into_iter().enumerate() {
        let read = file.read_exact_at(buffer.bytes(), at(number));
        let errno = read.err().and_then(|error| error.raw_os_error());
        ensure!(errno == Some(expected), "{name} became {errno:?}");
        file.read_exact_at(buffer.bytes(), at(number) + 4096)?;
    }
    drop(file);
    let counters = stop(device, udev)?;
    ensure!(counters.get("planned errors") == 10, "{counters:?}");
    Ok(Outcome::Pass)
}

fn short(ctx: &Ctx, width: u32) -> Result<Outcome> {
    let drives = drives(width)?;
    let blocks = [("bsrange=512-64k", 4), ("bs=1m", 8)];
    for lend in modes(ctx, width) {
        let rules = ["p=0.2,short", "p=0.05,short,delay=100us", "op=write,p=0.1,delay=200us"];
        let device = add(&rules, &[], &drives, lend)?;
        let udev = QuietUdev::new()?;
        let done = verify(ctx, device.path()?, &blocks)?;
        let counters = stop(device, udev)?;
        let short = counters.get("planned short");
        println!("{lend}: {done} reads and writes, {short} came short");
        ensure!(short > done / 10 && counters.get("delays") > 0, "{counters:?}");
        ensure!(counters.get("partial") >= short, "{counters:?}");
        counters.ensure_none(&["failed", "planned errors"])?;
    }
    Ok(Outcome::Pass)
}

fn delays(ctx: &Ctx) -> Result<Outcome> {
    const DELAY_NS: u64 = 20_000_000;
    let drives = drives(2)?;
    let all = modes(ctx, 1).chain(["slot --io-lane"]);
    for (lend, width) in all.zip([1, 2, 1, 2, 1]) {
        let rules = ["op=read,range=64M+32M,delay=20ms", "op=flush,delay=20ms"];
        let device = add(&rules, &[], &drives[..width], lend)?;
        let udev = QuietUdev::new()?;
        let run = |rw: &str, depth| -> Result<fio::Report> {
            let mut options = options(&device, rw, "16k", depth)?;
            options.push("io_size=4m".to_owned());
            fio::run(ctx, &options.iter().map(String::as_str).collect::<Vec<_>>())
        };
        let (read, write) = (run("randread", 4)?.read, run("randwrite", 1)?.write);
        println!("{lend}: read {} ns, write {} ns", read.lat_ns.min, write.lat_ns.min);
        ensure!(read.requests == 256 && read.lat_ns.min >= DELAY_NS, "{lend}: {read:?}");
        ensure!(read.lat_ns.min < 10 * DELAY_NS, "{lend}: {read:?}");
        ensure!((1..DELAY_NS).contains(&write.lat_ns.min), "{lend}: {write:?}");
        let began = std::time::Instant::now();
        process::run(&["sync", device.path()?])?;
        process::run(&["blockdev", "--flushbufs", device.path()?])?;
        println!("{lend}: flushed in {:?}", began.elapsed());
        let counters = stop(device, udev)?;
        ensure!(counters.get("delays") >= 256, "{counters:?}");
        counters.ensure_none(&["failed", "cancelled", "planned short"])?;
    }
    // A delay beyond the timeout is cancelled like an operation of the backing.
    let rules = ["op=write,range=64M+4K,delay=60s"];
    let device = add(&rules, &[], &drives[..1], "fused")?;
    device.delete()?;
    let path = drives[0].path();
    let arguments =
        ["fault", "--rule", rules[0], "loop", "-f", text(&path)?, "--io-timeout", "0.3"];
    let device = Device::add(&arguments)?;
    let udev = QuietUdev::new()?;
    let output = format!("of={}", device.path()?);
    let write = ["dd", "if=/dev/zero", &output, "bs=4k", "count=1", "seek=16384", "oflag=direct"];
    let said = process::run_for_code(&write, 1)?.stderr;
    ensure!(said.contains("timed out"), "{said}");
    let counters = stop(device, udev)?;
    ensure!(counters.get("timed out") == 1 && counters.get("delays") == 1, "{counters:?}");
    counters.ensure_none(&["lost ops"])?;
    Ok(Outcome::Pass)
}

/// One request at a time, so that their order is always the same.
fn seeds(ctx: &Ctx) -> Result<Outcome> {
    let drives = drives(1)?;
    let mut met = BTreeSet::new();
    for seed in ["1", "1", "2", "3"] {
        let rules = ["op=write,range=64M+32M,p=0.03,error=EIO"];
        let device = add(&rules, &["--seed", seed], &drives, "fused")?;
        let udev = QuietUdev::new()?;
        met.insert((seed, fio_errors(ctx, &device, "write", "4k", 1)?));
        let _ = stop(device, udev)?;
    }
    println!("{met:?}");
    ensure!(met.len() == 3, "the same seed meets the same: {met:?}");
    let counts: BTreeSet<_> = met.iter().map(|(_, errors)| errors).collect();
    ensure!(counts.len() > 1, "and seeds differ: {met:?}");
    Ok(Outcome::Pass)
}

fn named(_ctx: &Ctx) -> Result<Outcome> {
    let drive = fresh_drive("drive0")?;
    let path = drive.path();
    let wrapped = ["fault", "--rule", "op=discard,error=EIO"];
    let rest = ["fault", "--rule", "count=1,op=discard,error=EIO", "loop", "-f", text(&path)?];
    let device = Device::add(&[&wrapped[..], &rest, &["-q", "2", "-d", "32", "-n", "5"]].concat())?;
    let described = &device.described;
    ensure!(described.target == "fault(fault(loop))", "{described:?}");
    ensure!(described.base == "loop", "{described:?}");
    ensure!(described.layers() == ["fault", "fault-2"], "{described:?}");
    ensure!(described.layers.iter().all(|layer| layer.kind == "fault"), "{described:?}");
    ensure!(described.backings == [path.clone()], "{described:?}");
    ensure!((described.id, described.queues, described.depth) == (5, 2, 32), "{described:?}");
    let table = process::run(&[PROGRAM, "list"])?.stdout;
    ensure!(table.contains("fault(fault(loop))"), "{table}");
    device.delete()?;
    let device = Device::add(&["fault", "--rule", "delay=1ms", "null", "--size", "1G"])?;
    ensure!(device.described.target == "fault(null)", "{:?}", device.described);
    ensure!(device.described.backings.is_empty(), "{:?}", device.described);
    let output = format!("of={}", device.path()?);
    process::run(&["dd", "if=/dev/zero", &output, "bs=64k", "count=32", "oflag=direct"])?;
    device.stop_and_count()?.ensure_none(&["failed", "stale", "unexpected"])?;
    Ok(Outcome::Pass)
}

fn refused(_ctx: &Ctx) -> Result<Outcome> {
    let table = [
        ("error=EIO,short", "exclude each other; use two rules"),
        ("op=read", "it does nothing; add error=NAME, short or delay=TIME"),
        ("error=EAGAIN", "use EIO or ETIMEDOUT"),
        ("p=7,short", "`7` is no probability; give a number"),
        ("delay=5", "`5` is no delay; give a number with ns, us, ms or s"),
    ];
    for (rule, expected) in table {
        let argv = [PROGRAM, "add", "fault", "--rule", rule, "null"];
        let said = process::run_for_code(&argv, 2)?.stderr;
        let is_one_line = said.trim_end().lines().count() == 1;
        ensure!(said.contains(expected) && is_one_line, "{rule}: {said}");
    }
    let help = process::run(&[PROGRAM, "add", "fault", "--help"])?.stdout;
    for part in ["op=", "range=", "p=P", "count=", "error=", "short", "delay=", "--seed", "stripe"]
    {
        ensure!(help.contains(part), "no {part} in\n{help}");
    }
    Ok(Outcome::Pass)
}

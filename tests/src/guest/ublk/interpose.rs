//! Layers come and go while a device is used.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;

use super::death::kill_server;
use super::device::{Description, Device, Mount, PROGRAM, fresh_drive, fresh_drives, text};
use super::filesystem::{EXT4, Kind, XFS};
use super::fleet::{Fleet, load, section, wait_for_writes, write};
use super::remains;
use super::steps::{Blow, ID, Storm, verify};
use crate::config::DEFAULT;
use crate::guest::direct::{self, Aligned};
use crate::guest::dm::Mapper;
use crate::guest::drives::Drive;
use crate::guest::fio::{self, Running};
use crate::guest::prober::distribution;
use crate::guest::{Ctx, FIGURE, Outcome, TestCase, process, wait_for};

pub const TESTS: &[TestCase] = &[
    TestCase::guest("layers_come_and_go_under_load", DEFAULT, under_load).seconds(1800),
    TestCase::guest("layers_come_and_go_under_file_systems", DEFAULT, under_file_systems)
        .seconds(900),
    TestCase::guest("layers_change_with_the_file_of_serve", DEFAULT, reloaded).seconds(180),
    TestCase::guest("layers_stay_through_a_kill_and_an_upgrade", DEFAULT, kept).seconds(180),
    TestCase::guest("a_hung_backing_leaves_the_layers_as_they_were", DEFAULT, hung).seconds(180),
    TestCase::guest("a_kill_at_each_step_of_a_change_of_layers", DEFAULT, killed).seconds(300),
    TestCase::guest("layers_that_cannot_be_are_refused", DEFAULT, refused),
];

/// A layer that meets some requests, and fails none.
const HARMLESS: [&str; 5] = ["fault", "--rule", "p=0.2,short", "--rule", "p=0.05,delay=300us"];

fn attach(id: &str, more: &[&str]) -> Result<Value> {
    let argv = [&[PROGRAM, "interpose", "attach", "-n", id, "--json"], more, &HARMLESS].concat();
    Ok(serde_json::from_str(&process::run(&argv)?.stdout)?)
}

fn detach(id: &str, name: &str) -> Result<Value> {
    let argv = [PROGRAM, "interpose", "detach", "-n", id, name, "--json"];
    Ok(serde_json::from_str(&process::run(&argv)?.stdout)?)
}

/// The names of the layers of a device, the outermost first.
fn names(id: &str) -> Result<Vec<String>> {
    let printed = process::run(&[PROGRAM, "interpose", "list", "-n", id, "--json"])?.stdout;
    let listed: Vec<Value> = serde_json::from_str(&printed)?;
    let name = |layer: &Value| Ok(layer["name"].as_str().context("a name")?.to_owned());
    listed.iter().map(name).collect()
}

/// A load that has begun: fio that has just been started cannot be ended in order.
fn start_load(ctx: &Ctx, name: &str, device: &str) -> Result<Running> {
    let id = device.trim_start_matches("/dev/ublkb").parse()?;
    let mut options = load(device, "16m");
    options.extend(["time_based", "runtime=1200", "offset=1m"].map(str::to_owned));
    let options: Vec<_> = options.iter().map(String::as_str).collect();
    let running = fio::start(ctx, name, &options)?;
    wait_for_writes(id, 50)?;
    Ok(running)
}

/// 1,000 changes in the long run, over all lend modes and kinds of lanes.
fn under_load(ctx: &Ctx) -> Result<Outcome> {
    let drives = fresh_drives(2)?;
    let paths: Vec<_> = drives.iter().map(Drive::path).collect();
    let (one, two) = (text(&paths[0])?, text(&paths[1])?);
    let mut pauses = Vec::new();
    let kinds: [&[&str]; 8] = [
        &["loop", "-f", one],
        &["loop", "-f", one, "--lend", "slot"],
        &["loop", "-f", one, "--lend", "copy"],
        &["loop", "-f", one, "--lend", "user-copy"],
        &["loop", "-f", one, "--poll"],
        &["loop", "-f", one, "--passthru"],
        &["loop", "-f", one, "--lend", "slot", "--io-lane"],
        &["stripe", "-f", one, "-f", two, "--io-timeout", "30"],
    ];
    for (number, kind) in kinds.into_iter().enumerate() {
        let both = ["1", "2"];
        let queues = if ctx.long { &both[..] } else { &both[number % 2..=number % 2] };
        for queues in queues {
            let device = Device::add(&[kind, &["-q", queues]].concat())?;
            let running = start_load(ctx, "load", device.path()?)?;
            let cycles = if ctx.long { 63 } else { 6 };
            change(&device.id(), cycles, &mut pauses).with_context(|| kind.join(" "))?;
            let report = running.end()?;
            ensure!(report.read.requests > 0, "nothing was verified");
            ensure_all_answered(device).with_context(|| kind.join(" "))?;
        }
    }
    Ok(figure("load", &mut pauses))
}

/// The same under file systems: 500 changes in the long run.
fn under_file_systems(ctx: &Ctx) -> Result<Outcome> {
    let path = fresh_drive("drive0")?.path();
    let mut pauses = Vec::new();
    let kinds: [(&Kind, &[&str]); 5] = [
        (&EXT4, &["-q", "2"]),
        (&XFS, &["--lend", "slot"]),
        (&EXT4, &["--lend", "copy"]),
        (&XFS, &["--poll", "-q", "2"]),
        (&EXT4, &["--passthru"]),
    ];
    for (kind, options) in kinds {
        let device = Device::add_loop(&path, options)?;
        process::run(&[kind.make, &[device.path()?]].concat())?;
        let mount = Mount::new(ctx, device.path()?, "files")?;
        let directory = format!("directory={}", mount.point().display());
        let load = [&directory, "rw=randrw", "bs=4k", "size=16m", "direct=1", "fsync=4"];
        let verified = ["iodepth=16", "ioengine=io_uring", "verify=crc32c", "verify_fatal=1"];
        let endless = ["time_based", "runtime=1200"];
        let running = fio::start(ctx, "files", &[&load[..], &verified, &endless].concat())?;
        wait_for_writes(device.described.id, 50)?;
        change(&device.id(), if ctx.long { 25 } else { 3 }, &mut pauses)
            .with_context(|| options.join(" "))?;
        let report = running.end()?;
        ensure!(report.read.requests > 0, "nothing was verified");
        mount.unmount()?;
        process::run(&[kind.check, &[device.path()?]].concat())?;
        ensure_all_answered(device).with_context(|| options.join(" "))?;
    }
    Ok(figure("file systems", &mut pauses))
}

/// Attaches and detaches two layers so many times.
fn change(id: &str, cycles: u32, pauses: &mut Vec<Duration>) -> Result<()> {
    for _ in 0..cycles {
        let attached = [attach(id, &[])?, attach(id, &["--inside", "fault", "--name", "inner"])?];
        ensure!(names(id)? == ["fault", "inner"], "{:?}", names(id)?);
        let detached = [detach(id, "fault")?, detach(id, "inner")?];
        for changed in attached.iter().chain(&detached) {
            let pause = changed["pause_us"].as_u64().context("a pause")?;
            pauses.push(Duration::from_micros(pause));
        }
        ensure!(names(id)?.is_empty(), "{:?}", names(id)?);
    }
    Ok(())
}

/// Stops a device whose layers have changed: each request was answered once, and none failed.
fn ensure_all_answered(device: Device) -> Result<()> {
    let counters = device.stop_and_count()?;
    counters.ensure_none(&["failed", "unexpected", "stale", "cancelled", "lost ops"])?;
    ensure!(counters.get("requests") == counters.get("commits"), "{counters:?}");
    ensure!(counters.get("held back") > 0, "no request was held back: {counters:?}");
    Ok(())
}

fn figure(load: &str, pauses: &mut [Duration]) -> Outcome {
    println!("{FIGURE}layers changed under {load}, the pause {}", distribution(pauses));
    Outcome::Pass
}

/// Two devices of two queues on the lanes of one process.
fn reloaded(ctx: &Ctx) -> Result<Outcome> {
    let drives = fresh_drives(2)?;
    let of = |layers: [&str; 2]| -> Result<Vec<String>> {
        let sections = drives.iter().zip(0..).zip(layers);
        sections.map(|((drive, id), more)| section(id, &drive.path(), more)).collect()
    };
    let options = "queues = 2\n";
    let layer = |name: &str, rule: &str| {
        format!("[[device.layer]]\nkind = \"fault\"\nname = \"{name}\"\nrule = [\"{rule}\"]\n")
    };
    let config = write(ctx, &of([options, options])?)?;
    let fleet = Fleet::start(ctx.directory(), &config)?;
    let (before, loads) = (super::fleet::listed()?, [0, 1].map(|id| format!("/dev/ublkb{id}")));
    let loads = loads.iter().zip(["one", "two"]).map(|(path, name)| start_load(ctx, name, path));
    let loads = loads.collect::<Result<Vec<_>>>()?;
    let both = options.to_owned() + &layer("a", "p=0.2,short") + &layer("b", "p=0.1,delay=1ms");
    let only = options.to_owned() + &layer("b", "p=0.1,delay=1ms");
    let steps: [([&str; 2], [&[&str]; 2]); 4] = [
        ([&both, options], [&["a", "b"], &[]]),
        ([&only, &both], [&["b"], &["a", "b"]]),
        ([options, &both], [&[], &["a", "b"]]),
        ([options, options], [&[], &[]]),
    ];
    for (sections, expected) in steps {
        write(ctx, &of(sections)?)?;
        // Said after all devices have changed.
        fleet.reload("2 devices, ")?;
        for (id, expected) in ["0", "1"].into_iter().zip(expected) {
            ensure!(names(id)? == expected, "device {id}: {:?}", names(id)?);
        }
    }
    // What a command attaches stays while the file says nothing else.
    attach("1", &["--name", "by-hand"])?;
    ensure!(names("1")? == ["by-hand"], "{:?}", names("1")?);
    detach("1", "by-hand")?;
    for load in loads {
        ensure!(load.end()?.read.requests > 0, "nothing was verified");
    }
    ensure!(super::fleet::listed()? == before, "they are the devices of before");
    fleet.end()?;
    Ok(Outcome::Pass)
}

fn kept(ctx: &Ctx) -> Result<Outcome> {
    let drive = fresh_drive("drive0")?;
    let options = ["--on-death", "reissue", "--layer", "--name given fault --rule p=0.1,short"];
    let device = Device::add_loop(&drive.path(), &options)?;
    let id = device.id();
    ensure!(device.described.layers() == ["given"], "{:?}", device.described);
    let running = start_load(ctx, "load", device.path()?)?;
    attach(&id, &["--name", "mine"])?;
    kill_server(&device)?;
    process::run(&[PROGRAM, "recover", "-n", &id])?;
    ensure!(names(&id)? == ["mine", "given"], "recovered: {:?}", names(&id)?);
    detach(&id, "given")?;
    process::run(&[PROGRAM, "upgrade", "-n", &id])?;
    ensure!(names(&id)? == ["mine"], "upgraded: {:?}", names(&id)?);
    detach(&id, "mine")?;
    process::run(&[PROGRAM, "upgrade", "-n", &id])?;
    ensure!(names(&id)?.is_empty(), "upgraded: {:?}", names(&id)?);
    ensure!(running.end()?.read.requests > 0, "nothing was verified");
    device.delete()?;
    Ok(Outcome::Pass)
}

/// A command that works on the layers, and what it says in the end.
fn start(arguments: &[&str]) -> Result<Child> {
    let mut command = Command::new(PROGRAM);
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    Ok(command.spawn()?)
}

/// The backing does not answer; the change is given up, and the device goes on as it was.
fn hung(ctx: &Ctx) -> Result<Outcome> {
    let drive = fresh_drive("drive0")?;
    let sectors = drive.number("size")?;
    let table = format!("0 {sectors} linear {} 0", drive.path().display());
    let mapper = Mapper::create("hanging", &[table])?;
    let device = Device::add_loop(&mapper.path(), &["-q", "2"])?;
    let id = device.id();
    let change = ["interpose", "attach", "-n", &id, "--timeout"];
    let fault = ["fault", "--rule", "short"];
    process::run(&["dmsetup", "suspend", "--nolockfs", "--noflush", "hanging"])?;
    let path = device.path()?.to_owned();
    let write = std::thread::spawn(move || -> Result<()> {
        let mut block = Aligned::new(8192, 7);
        let file = direct::open(&path)?;
        std::os::unix::fs::FileExt::write_all_at(&file, block.bytes(), 1 << 20)?;
        Ok(())
    });
    let in_flight = || -> Result<u64> {
        let stats = [PROGRAM, "stats", "-n", &id, "--json", "--interval", "0.1"];
        let stats: Value = serde_json::from_str(&process::run(&stats)?.stdout)?;
        stats["total"]["in_flight"].as_u64().context("requests in flight")
    };
    wait_for(
        "the write to hang",
        Duration::from_secs(10),
        || Ok((in_flight()? > 0).then_some(())),
    )?;
    let began = Instant::now();
    let given_up = start(&[&change[..], &["2"], &fault].concat())?.wait_with_output()?;
    let (took, said) = (began.elapsed(), String::from_utf8(given_up.stderr)?);
    ensure!(!given_up.status.success() && took < Duration::from_secs(8), "{took:?}: {said}");
    for part in ["a write request of 8192 bytes at 1048576", "s old, waits for", "within 2 s"] {
        ensure!(said.contains(part), "{said}");
    }
    let backing = mapper.path().canonicalize()?;
    ensure!(said.contains(text(&backing)?), "{said}");
    ensure!(names(&id)?.is_empty(), "{:?}", names(&id)?);
    // While one waits, another one is refused, and told which process is at it.
    let start_first = || start(&[&change[..], &["60"], &fault].concat());
    let mut first = start_first()?;
    let second = wait_for("a refusal", Duration::from_secs(20), || {
        // The other one may have come before it.
        if first.try_wait()?.is_some() {
            first = start_first()?;
        }
        let second = start(&[&change[..], &["0.1"], &fault].concat())?.wait_with_output()?;
        let said = String::from_utf8(second.stderr)?;
        Ok(said.contains("is changing the layers").then_some(said))
    })?;
    let pid = first.id();
    ensure!(second.contains(&format!("process {pid} is changing")), "{second}");
    // What the backing is hung for does not stay held back once nobody waits: another one has its turn.
    process::signal(first.id(), Signal::SIGKILL)?;
    first.wait()?;
    let again = wait_for("another change to begin", Duration::from_secs(20), || {
        let said = start(&[&change[..], &["0.1"], &fault].concat())?.wait_with_output()?.stderr;
        Ok(String::from_utf8(said)?.contains("within 0.1 s").then_some(()))
    });
    again.context("after the client had gone")?;
    let first = start_first()?;
    process::run(&["dmsetup", "resume", "hanging"])?;
    let first = first.wait_with_output()?;
    ensure!(first.status.success(), "{}", String::from_utf8_lossy(&first.stderr));
    write.join().map_err(|_| anyhow::anyhow!("the writer has panicked"))??;
    ensure!(names(&id)? == ["fault"], "{:?}", names(&id)?);
    verify(&device.described)?;
    let running = start_load(ctx, "load", device.path()?)?;
    detach(&id, "fault")?;
    ensure!(running.end()?.read.requests > 0, "nothing was verified");
    device.delete()?;
    mapper.remove()?;
    Ok(Outcome::Pass)
}

/// After a kill of the server at each step, its successor has the old layers or the new ones.
fn killed(ctx: &Ctx) -> Result<Outcome> {
    let mut storm = Storm::new()?;
    let (backing, added) = (storm.backing(), ["-n", ID, "--supervise", "-q", "2"]);
    let add = [&["add", "loop", "-f", text(&backing)?], &added[..]].concat();
    let steps: [(&str, &[&str]); 5] = [
        ("held", &[]),
        ("quiet", &[]),
        ("half-recorded", &[]),
        ("layers-recorded", &["fault"]),
        ("layers-changed", &["fault"]),
    ];
    for (step, expected) in steps {
        storm.blow(&format!("{step}: the server is killed"));
        let blow = Blow::later(ctx, step, "self", "SIGKILL")?;
        let output = blow.run(&add)?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let running = start_load(ctx, "load", &format!("/dev/ublkb{ID}"))?;
        let old = remains::devices()?.first().and_then(|device| device.pid);
        blow.arm()?;
        let attached = attach(ID, &[]);
        blow.ensure_fallen()?;
        ensure!(attached.is_err(), "{step}: {attached:?}");
        let device = wait_for("another server", Duration::from_secs(20), || {
            let mut devices = remains::devices()?.into_iter();
            let is_new = |device: &Description| device.pid.is_some() && device.pid != old;
            Ok(devices.find(|device| device.state == "LIVE" && is_new(device)))
        })?;
        ensure!(names(ID)? == expected, "{step}: {:?}", names(ID)?);
        ensure!(device.layers() == expected, "{step}: {device:?}");
        attach(ID, &["--name", "next"])?;
        detach(ID, "next")?;
        ensure!(running.end()?.read.requests > 0, "nothing was verified");
        process::run(&[PROGRAM, "del", "-n", ID])?;
        remains::ensure_none()?;
    }
    Ok(storm.figure("kills"))
}

fn refused(_: &Ctx) -> Result<Outcome> {
    let drive = fresh_drive("drive0")?;
    // Short transfers are whole blocks of the device, not of the drive.
    let layer = ["--block-size", "4096", "--layer", "fault --rule short"];
    let device = Device::add_loop(&drive.path(), &layer)?;
    verify(&device.described)?;
    let id = device.id();
    let long_rule = format!("fault --rule {}", "range=0-4K,short --rule ".repeat(1000));
    let long_rule: Vec<_> = long_rule.trim_end_matches(" --rule ").split(' ').collect();
    let cases: [(&[&str], &str); 6] = [
        (&["attach", "-n", &id, "--name", "fault", "fault", "--rule", "short"], "two layers"),
        (&["attach", "-n", &id, "--inside", "x", "fault", "--rule", "short"], "no layer `x`"),
        (&["detach", "-n", &id, "x"], "no layer `x`; it has `fault`"),
        (&["detach", "-n", "77", "x"], "there is no ublk device 77"),
        (&["list", "-n", "77"], "there is no ublk device 77"),
        (&[&["attach", "-n", &id], &long_rule[..]].concat(), "at most 16384 bytes"),
    ];
    for (arguments, expected) in cases {
        let argv = [&[PROGRAM, "interpose"], arguments].concat();
        let said = process::run_for_code(&argv, 1)?.stderr;
        ensure!(said.contains(expected) && said.trim_end().lines().count() == 1, "{said}");
        ensure!(names(&id)? == ["fault"], "{:?}", names(&id)?);
    }
    ensure!(Path::new(&device.path()?).exists(), "the device is there");
    verify(&device.described)?;
    device.delete()?;
    Ok(Outcome::Pass)
}

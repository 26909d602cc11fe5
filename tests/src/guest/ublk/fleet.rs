//! Many devices in one process: `ublk-target serve`.

mod serving;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::device::{Description, Mount, PROGRAM, fresh_drive, load_driver, text};
use crate::config::DEFAULT;
use crate::guest::{Ctx, FIGURE, Outcome, TestCase, fio, process, wait_for};

pub use serving::{Fleet, ids, listed};

pub const TESTS: &[TestCase] = &[
    TestCase::guest("a_fleet_serves_64_devices_with_few_threads", DEFAULT, many).seconds(300),
    TestCase::guest("a_fleet_is_reloaded_under_load", DEFAULT, reload).seconds(300),
    TestCase::guest("a_killed_fleet_is_taken_over", DEFAULT, killed).seconds(300),
    TestCase::guest("devices_of_a_fleet_are_managed_one_by_one", DEFAULT, managed).seconds(180),
    TestCase::guest("devices_of_a_fleet_lend_in_all_ways", DEFAULT, ways).seconds(180),
    TestCase::guest("a_fleet_with_faults_is_not_begun", DEFAULT, faults),
    TestCase::guest("a_reload_with_a_fault_changes_nothing", DEFAULT, bad_reload).seconds(180),
    TestCase::guest("a_fleet_heeds_a_quiesce_with_io_in_hand", DEFAULT, quiesced).seconds(180),
];

const PATIENCE: Duration = Duration::from_secs(60);

/// A file system on a drive, for backings.
fn backings(ctx: &Ctx) -> Result<Mount> {
    let drive = fresh_drive("drive0")?;
    process::run(&["mkfs.ext4", "-q", "-F", text(&drive.path())?])?;
    Mount::new(ctx, text(&drive.path())?, "backings")
}

fn backing(on: &Mount, number: u32, mib: u64) -> Result<PathBuf> {
    let path = on.point().join(format!("{number}.img"));
    File::options().create(true).append(true).open(&path)?.set_len(mib << 20)?;
    Ok(path)
}

/// A section of the file.
pub(super) fn section(id: u32, file: &Path, more: &str) -> Result<String> {
    Ok(format!("[[device]]\nid = {id}\ntarget = \"loop\"\nfile = \"{}\"\n{more}\n", text(file)?))
}

pub(super) fn write(ctx: &Ctx, sections: &[String]) -> Result<PathBuf> {
    let config = ctx.directory().join("fleet.toml");
    fs::write(&config, sections.concat())?;
    Ok(config)
}

/// A load that verifies what it has written.
pub(super) fn load(device: &str, size: &str) -> Vec<String> {
    let mut options = ["rw=randrw", "bs=4k", "iodepth=16", "ioengine=io_uring", "direct=1"]
        .map(str::to_owned)
        .to_vec();
    options.extend(["verify=crc32c", "verify_fatal=1"].map(str::to_owned));
    options.extend([format!("filename={device}"), format!("size={size}")]);
    options
}

/// One that goes on until it is ended.
fn start_load(ctx: &Ctx, name: &str, device: &str) -> Result<fio::Running> {
    let mut options = load(device, "8m");
    options.extend(["time_based", "runtime=600"].map(str::to_owned));
    let options: Vec<_> = options.iter().map(String::as_str).collect();
    fio::start(ctx, name, &options)
}

fn many(ctx: &Ctx) -> Result<Outcome> {
    const DEVICES: u32 = 64;
    let mount = backings(ctx)?;
    let sections: Result<Vec<_>> =
        (0..DEVICES).map(|id| section(id, &backing(&mount, id, 8)?, "depth = 64")).collect();
    let sections = sections?;
    let one = Fleet::start(ctx.directory(), &write(ctx, &sections[..1])?)?;
    let alone = one.memory_kib("Pss")?;
    one.end()?;
    let fleet = Fleet::start(ctx.directory(), &write(ctx, &sections)?)?;
    let cpus = std::thread::available_parallelism()?.get();
    let threads = fleet.threads()?;
    ensure!(threads <= cpus + 2, "{threads} threads on {cpus} CPUs");
    let each = (fleet.memory_kib("Pss")? - alone) / u64::from(DEVICES - 1);
    println!("{FIGURE}{DEVICES} devices: {threads} threads, {each} KiB for each device more");
    ensure!(each < 4096, "{each} KiB");
    ensure!(ids()? == (0..DEVICES).collect::<Vec<_>>(), "{:?}", ids()?);
    // Several at once, from both ends.
    let loads: Result<Vec<_>> = (0..4)
        .flat_map(|n| [n, DEVICES - 1 - n])
        .map(|id| {
            let options = load(&format!("/dev/ublkb{id}"), "8m");
            let options: Vec<_> = options.iter().map(String::as_str).collect();
            fio::start(ctx, &format!("load{id}"), &options)
        })
        .collect();
    for load in loads? {
        let report = load.finish()?;
        ensure!(report.write.requests > 0, "{report:?}");
    }
    fleet.end()?;
    mount.unmount()?;
    Ok(Outcome::Pass)
}

fn reload(ctx: &Ctx) -> Result<Outcome> {
    let mount = backings(ctx)?;
    let other = fresh_drive("drive1")?;
    let files: Result<Vec<_>> = (0..4).map(|number| backing(&mount, number, 8)).collect();
    let sections: Result<Vec<_>> =
        files?.iter().zip(0..).map(|(file, id)| section(id, file, "")).collect();
    let mut sections = sections?;
    let config = write(ctx, &sections)?;
    let fleet = Fleet::start(ctx.directory(), &config)?;
    let loads = [0, 1].map(|id| start_load(ctx, &format!("load{id}"), &format!("/dev/ublkb{id}")));
    for id in [0, 1] {
        wait_for_writes(id, 100)?;
    }
    // A bad file changes nothing.
    fs::write(&config, format!("{}depht = 3\n", sections.concat()))?;
    fleet.reload("the target loop has no option `depht`")?;
    ensure!(ids()? == [0, 1, 2, 3], "{:?}", ids()?);
    // Nor does one whose new devices cannot be made.
    let missing = section(9, Path::new("/nowhere"), "")?;
    fs::write(&config, [&sections.concat(), missing.as_str()].concat())?;
    fleet.reload("device 9: /nowhere")?;
    ensure!(ids()? == [0, 1, 2, 3], "{:?}", ids()?);
    // 0 and 1 are in use, and stay; 2 changes; 3 goes; 7 and 8 come, one of them on a file system
    // that the server has left.
    let path = other.path();
    sections[1] = section(1, &backing(&mount, 1, 8)?, "depth = 32")?;
    sections[2] = section(2, &backing(&mount, 2, 8)?, "depth = 32")?;
    sections[3] = section(7, &path, "")?;
    sections.push(section(8, &backing(&mount, 8, 8)?, "")?);
    write(ctx, &sections[1..])?;
    for device in ["/dev/ublkb2", "/dev/ublkb3"] {
        crate::guest::udev::settle()?;
        ensure!(Path::new(device).exists(), "{device} is gone");
    }
    fleet.reload("5 devices, ")?;
    wait_for("the new devices", PATIENCE, || Ok((ids()? == [0, 1, 2, 7, 8]).then_some(())))?;
    let depths: Vec<_> = listed()?.iter().map(|device| device.depth).collect();
    ensure!(depths == [128, 128, 32, 128, 128], "{depths:?}");
    let said = fleet.said()?;
    for device in
        ["device 0 is in use and has not changed", "device 1 is in use and has not changed"]
    {
        ensure!(said.contains(device), "{device}: {said}");
    }
    let options = load("/dev/ublkb8", "8m");
    fio::run(ctx, &options.iter().map(String::as_str).collect::<Vec<_>>())?;
    for load in loads {
        let report = load?.end()?;
        ensure!(report.write.requests > 0, "{report:?}");
    }
    fleet.end()?;
    mount.unmount()?;
    Ok(Outcome::Pass)
}

/// A layer with a name of its own.
const LAYER: &str = "[[device.layer]]\nkind = \"fault\"\nname = \"short\"\nrule = \"p=0.1,short\"";

fn killed(ctx: &Ctx) -> Result<Outcome> {
    let mount = backings(ctx)?;
    let sections = [
        section(0, &backing(&mount, 0, 8)?, "on-death = \"reissue\"")?,
        section(1, &backing(&mount, 1, 8)?, &format!("on-death = \"wait\"\n{LAYER}"))?,
        section(2, &backing(&mount, 2, 8)?, "")?,
    ];
    let config = write(ctx, &sections)?;
    let mut fleet = Fleet::start(ctx.directory(), &config)?;
    let load = start_load(ctx, "load", "/dev/ublkb0")?;
    for _ in 0..3 {
        wait_for_writes(0, 200)?;
        fleet.kill()?;
        fleet = Fleet::start(ctx.directory(), &config)?;
        let states: Vec<_> = listed()?.iter().map(|device| device.state.clone()).collect();
        ensure!(states == ["LIVE"; 3], "{states:?}\n{}", fleet.said()?);
        let pids: Vec<_> = listed()?.iter().map(|device| device.pid).collect();
        ensure!(pids == [Some(fleet.pid()); 3], "{pids:?}");
        ensure!(listed()?[1].layers() == ["short"], "{:?}", listed()?[1]);
    }
    let report = load.end()?;
    ensure!(report.write.requests > 0, "{report:?}");
    let options = self::load("/dev/ublkb2", "8m");
    fio::run(ctx, &options.iter().map(String::as_str).collect::<Vec<_>>())?;

    // One that was recovered by hand keeps nobody from the others.
    fleet.kill()?;
    process::run(&[PROGRAM, "recover", "-n", "0"])?;
    let fleet = Fleet::start_with(ctx.directory(), &config, 2)?;
    ensure!(fleet.said()?.contains("the other devices are served"), "{}", fleet.said()?);
    let states: Vec<_> = listed()?.iter().map(|device| device.state.clone()).collect();
    ensure!(states == ["LIVE"; 3], "{states:?}\n{}", fleet.said()?);
    fleet.reload("device 0 cannot be added: device 0 is served by")?;
    // A file that is being saved takes nothing away.
    write(ctx, &[])?;
    fleet.reload("nothing has changed")?;
    ensure!(ids()? == [0, 1, 2], "{:?}", ids()?);
    process::run(&[PROGRAM, "del", "-n", "0"])?;
    fleet.end()?;
    mount.unmount()?;
    Ok(Outcome::Pass)
}

/// Waits until a device has done so many writes more.
pub(super) fn wait_for_writes(id: u32, writes: u64) -> Result<()> {
    let done = || -> Result<u64> {
        let stat = fs::read_to_string(format!("/sys/block/ublkb{id}/stat"))?;
        Ok(stat.split_whitespace().nth(4).context("stat")?.parse()?)
    };
    let goal = done()? + writes;
    wait_for("the load", PATIENCE, || Ok((done()? >= goal).then_some(())))
}

fn managed(ctx: &Ctx) -> Result<Outcome> {
    let mount = backings(ctx)?;
    let files: Result<Vec<_>> = (0..3).map(|number| backing(&mount, number, 8)).collect();
    let files = files?;
    let sections = [
        section(3, &files[0], "queues = 2\ndepth = 16")?,
        section(4, &files[1], "on-death = \"reissue\"")?,
        section(5, &files[2], "lend = \"copy\"")?,
    ];
    let fleet = Fleet::start(ctx.directory(), &write(ctx, &sections)?)?;
    let load = start_load(ctx, "load", "/dev/ublkb4")?;
    for (device, id) in listed()?.iter().zip(3..) {
        ensure!(device.id == id && device.state == "LIVE", "{device:?}");
        ensure!(device.pid == Some(fleet.pid()) && device.target == "loop", "{device:?}");
    }
    let stats = process::run(&[PROGRAM, "stats", "-n", "4", "--interval", "0.5", "--json"])?;
    let stats: serde_json::Value = serde_json::from_str(&stats.stdout)?;
    ensure!(stats["device"] == 4 || stats["id"] == 4, "{stats}");
    // Each on its own: it grows, is not upgraded, and is deleted, and the others do not notice.
    File::options().append(true).open(&files[2])?.set_len(16 << 20)?;
    process::run(&[PROGRAM, "resize", "-n", "5"])?;
    ensure!(listed()?[2].size_bytes == 16 << 20, "{:?}", listed()?[2]);
    let refused = process::run_for_code(&[PROGRAM, "upgrade", "-n", "4"], 1)?;
    ensure!(refused.stderr.contains("ublk-target serve"), "{refused:?}");
    ensure!(refused.stderr.trim_end().lines().count() == 1, "{refused:?}");
    let refused = process::run_for_code(&[PROGRAM, "del", "-n", "4"], 1)?;
    ensure!(refused.stderr.contains("is in use"), "{refused:?}");
    for _ in 0..3 {
        process::run(&[PROGRAM, "del", "-n", "3"])?;
        ensure!(ids()? == [4, 5], "{:?}", ids()?);
        fleet.reload("devices, ")?;
        wait_for("the device", PATIENCE, || Ok((ids()? == [3, 4, 5]).then_some(())))?;
    }
    ensure!(load.end()?.write.requests > 0);
    // Without devices it goes on.
    process::run(&[PROGRAM, "del", "--all"])?;
    ensure!(ids()?.is_empty() && fleet.threads()? > 0, "{:?}", ids()?);
    fleet.reload("3 devices, ")?;
    fleet.end()?;
    mount.unmount()?;
    Ok(Outcome::Pass)
}

/// All lend modes on one lane, faults among them, and devices with lanes of their own beside them.
fn ways(ctx: &Ctx) -> Result<Outcome> {
    let mount = backings(ctx)?;
    let drive = fresh_drive("drive1")?;
    let ways = [
        "",
        "lend = \"slot\"",
        "lend = \"slot\"\nfirst-slot = 100",
        "lend = \"user-copy\"",
        "lend = \"copy\"\nqueues = 2",
        "io-timeout = 5",
        "rule = \"op=write,p=0.2,short\"",
        "[[device.layer]]\nkind = \"fault\"\nrule = \"op=write,p=0.2,short\"\n\
         [[device.layer]]\nkind = \"fault\"\nname = \"slow\"\nrule = \"p=0.1,delay=100us\"",
        "lend = \"slot\"\nio-lane = true",
    ];
    let mut sections = vec!["lanes = 1\n".to_owned()];
    for (id, way) in (0..).zip(ways) {
        sections.push(section(id, &backing(&mount, id, 8)?, way)?);
    }
    sections.push(section(9, &drive.path(), "passthru = true")?);
    let fleet = Fleet::start(ctx.directory(), &write(ctx, &sections)?)?;
    // The main one, the one that answers, the shared lane; two of the I/O lane's device, and one of
    // the drive's.
    ensure!(fleet.threads()? == 6, "{} threads", fleet.threads()?);
    let lends: Vec<_> = listed()?.iter().map(|device| device.lend.clone()).collect();
    let expected =
        ["fused", "slot", "slot", "user-copy", "copy", "fused", "fused", "fused", "slot", "fused"];
    ensure!(lends == expected, "{lends:?}");
    let loads: Result<Vec<_>> = (0..10)
        .map(|id| {
            let options = load(&format!("/dev/ublkb{id}"), "4m");
            let options: Vec<_> = options.iter().map(String::as_str).collect();
            fio::start(ctx, &format!("load{id}"), &options)
        })
        .collect();
    for load in loads? {
        ensure!(load.finish()?.write.requests > 0);
    }
    // Layers alone are a change, too.
    let layers = || -> Result<Vec<_>> {
        let layers = |it: &Description| it.layers.iter().map(|layer| layer.name.clone()).collect();
        Ok(listed()?[6..8].iter().map(layers).collect::<Vec<Vec<String>>>())
    };
    ensure!(layers()? == [&["fault"][..], &["fault", "slow"]], "{:?}", layers()?);
    sections[7] = section(6, &backing(&mount, 6, 8)?, "")?;
    sections[8] = sections[8].replace("slow", "slower");
    write(ctx, &sections)?;
    fleet.reload("10 devices, ")?;
    ensure!(layers()? == [&[][..], &["fault", "slower"]], "{:?}", layers()?);
    fleet.end()?;
    mount.unmount()?;
    Ok(Outcome::Pass)
}

fn faults(ctx: &Ctx) -> Result<Outcome> {
    load_driver()?;
    let mount = backings(ctx)?;
    let good = section(3, &backing(&mount, 0, 8)?, "")?;
    let table: [(String, &[&str]); 5] = [
        (format!("{good}queues = 0\nlend = \"best\"\n"), &["--queues", "best"]),
        (format!("{good}{good}"), &["device 3 is already defined"]),
        (
            [&good, &section(4, Path::new("/nowhere"), "")?, &section(5, Path::new("/etc"), "")?]
                .map(String::as_str)
                .concat(),
            &["device 4: ", "device 5: "],
        ),
        ("lanes = none".to_owned(), &["fleet.toml:1: "]),
        (
            format!("{good}{}", section(4, &backing(&mount, 0, 8)?, "")?),
            &["0.img is already a backing of device 3"],
        ),
    ];
    for (text, expected) in table {
        let config = write(ctx, &[text])?;
        for more in [&[][..], &["--check"]] {
            let argv = [&[PROGRAM, "serve", "--config", self::text(&config)?], more].concat();
            let said = process::run_for_code(&argv, 1)?.stderr;
            let prefix = format!("{PROGRAM}: ");
            let lines: Vec<_> = said.lines().filter(|line| line.starts_with(&prefix)).collect();
            ensure!(lines.len() == expected.len(), "{more:?}: {said}");
            for (line, what) in lines.iter().zip(expected) {
                ensure!(line.contains(what), "{more:?}: {what}: {said}");
            }
            ensure!(ids()?.is_empty(), "{:?}", ids()?);
        }
    }
    // What is served can be looked at meanwhile.
    let config = write(ctx, &[good])?;
    let fleet = Fleet::start(ctx.directory(), &config)?;
    let checked = process::run(&[PROGRAM, "serve", "--check", "--config", self::text(&config)?])?;
    ensure!(checked.stdout.ends_with("fleet.toml: 1 device, no errors\n"), "{checked:?}");
    fleet.end()?;
    mount.unmount()?;
    Ok(Outcome::Pass)
}

/// Existing devices whose new form cannot be made; and two that swap their backings, which can.
fn bad_reload(ctx: &Ctx) -> Result<Outcome> {
    let mount = backings(ctx)?;
    let files: Result<Vec<_>> = (0..3).map(|number| backing(&mount, number, 8)).collect();
    let files = files?;
    let good = [section(0, &files[0], "")?, section(1, &files[1], "")?];
    let config = write(ctx, &good)?;
    let fleet = Fleet::start(ctx.directory(), &config)?;
    let backings_are = |expected: [&PathBuf; 2]| -> Result<()> {
        let listed = listed()?;
        let backings: Vec<_> = listed.iter().flat_map(|device| &device.backings).collect();
        ensure!(backings == expected, "{backings:?}\n{}", fleet.said()?);
        ensure!(listed.iter().all(|device| device.state == "LIVE"), "{listed:?}");
        Ok(())
    };
    // So that a device that was made again would be found out.
    let disk = |id: u32| fs::read_to_string(format!("/sys/block/ublkb{id}/diskseq"));
    let before = [disk(0)?, disk(1)?];
    let mistyped = section(0, Path::new("/mnt/mistyped"), "")?;
    let too_deep = section(0, &files[2], "lend = \"fused\"\nfirst-slot = 16380")?;
    let same_file = section(2, &files[1], "")?;
    let table = [
        ([mistyped, good[1].clone()].concat(), "/mnt/mistyped"),
        ([too_deep, good[1].clone()].concat(), "lower --first-slot"),
        ([good.concat(), same_file].concat(), "fleet.toml"),
    ];
    for (text, expected) in table {
        fs::write(&config, text)?;
        fleet.reload("nothing has changed")?;
        let said = fleet.said()?;
        ensure!(said.contains(expected), "{expected}: {said}");
        backings_are([&files[0], &files[1]])?;
        ensure!([disk(0)?, disk(1)?] == before, "a device was made again\n{said}");
    }
    for device in ["/dev/ublkb0", "/dev/ublkb1"] {
        crate::guest::udev::settle()?;
        ensure!(Path::new(device).exists());
    }
    write(ctx, &[section(0, &files[1], "")?, section(1, &files[0], "")?])?;
    fleet.reload("2 devices, ")?;
    wait_for("the swap", PATIENCE, || Ok((ids()? == [0, 1]).then_some(())))?;
    backings_are([&files[1], &files[0]])?;
    // One of them is in use and keeps its backing: so does the other.
    let held = File::open("/dev/ublkb0")?;
    write(ctx, &good)?;
    fleet.reload("device 1 is restored with its old options")?;
    backings_are([&files[1], &files[0]])?;
    drop(held);
    fleet.end()?;
    mount.unmount()?;
    Ok(Outcome::Pass)
}

/// The driver takes back what is idle, and the tag in hand later comes back to it.
fn quiesced(ctx: &Ctx) -> Result<Outcome> {
    let mount = backings(ctx)?;
    let more = "on-death = \"reissue\"\nrule = \"op=read,range=1M+4096,delay=2000ms\"";
    let sections =
        [section(0, &backing(&mount, 0, 8)?, more)?, section(1, &backing(&mount, 1, 8)?, "")?];
    let fleet = Fleet::start(ctx.directory(), &write(ctx, &sections)?)?;
    let read = |skip: &str| -> Result<Child> {
        let skip = format!("skip={skip}");
        let argv = ["if=/dev/ublkb0", "of=/dev/null", "bs=4k", "count=1", "iflag=direct", &skip];
        Ok(Command::new("dd").args(argv).stderr(Stdio::null()).spawn()?)
    };
    crate::guest::udev::settle()?;
    let mut delayed = read("256")?;
    wait_for("the read", PATIENCE, || {
        let inflight = fs::read_to_string("/sys/block/ublkb0/inflight")?;
        Ok((inflight.split_whitespace().next() == Some("1")).then_some(()))
    })?;
    // As a child of the server would do it: the helper only acts for its parent.
    let quiesce =
        [PROGRAM, "quiesce-device", "-n", "0", "--server", &std::process::id().to_string()];
    process::run(&quiesce)?;
    ensure!(delayed.wait()?.success(), "the read in hand has failed");
    ensure!(read("0")?.wait()?.success(), "the next read has failed");
    let said = fleet.said()?;
    ensure!(
        said.contains("another process has quiesced it") && said.contains("is recovered"),
        "{said}"
    );
    ensure!(ids()? == [0, 1]);
    fleet.end()?;
    mount.unmount()?;
    Ok(Outcome::Pass)
}

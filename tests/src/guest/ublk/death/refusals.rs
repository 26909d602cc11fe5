//! What `recover` refuses: in one line, with nothing changed, and not for longer than its cause is
//! there.

use std::fs::{self, File, Permissions};
use std::os::unix::fs::{FileExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};

use super::{RUN_DIR, await_nothing, end, kill_server, look, recover, refused};
use crate::config::DEFAULT;
use crate::guest::direct::{self, Aligned};
use crate::guest::ublk::device::{Device, PROGRAM, file_on_drive, fresh_drive, load_driver, text};
use crate::guest::{Ctx, Outcome, TestCase, process};

pub const TESTS: &[TestCase] = &[
    TestCase::guest("death_recover_refuses_devices_that_need_none", DEFAULT, without_need),
    TestCase::guest("death_recover_refuses_state_files_that_it_cannot_trust", DEFAULT, state_files),
    TestCase::guest("death_recover_refuses_backings_that_have_changed", DEFAULT, backings),
    TestCase::guest("death_del_frees_the_clients_of_a_lost_device", DEFAULT, lost),
    TestCase::guest("death_recover_all_goes_on_after_a_refusal", DEFAULT, all),
    TestCase::guest("death_devices_on_devices_are_recovered_from_below", DEFAULT, stacked),
    TestCase::guest("death_backings_are_found_by_links_of_other_mounts", DEFAULT, linked),
    TestCase::guest("death_commands_that_cannot_print_say_so", DEFAULT, unprinted),
    TestCase::guest("death_list_and_recover_tell_what_namespaces_hide", DEFAULT, hidden),
];

/// To open a backing on a device that waits for its server would wait, too, and nobody could end that.
fn stacked(_ctx: &Ctx) -> Result<Outcome> {
    let drive = fresh_drive("drive0")?;
    load_driver()?;
    let waiting = |id, backing: &Path| Device::add_loop(backing, &["-n", id, "--on-death", "wait"]);
    let mut lower = waiting("5", &drive.path())?;
    let mut upper = waiting("3", &lower.described.device)?;
    kill_server(&upper)?;
    kill_server(&lower)?;
    let began = Instant::now();
    let said = refused(&upper)?;
    ensure!(said.contains("is stacked on device 5, which has no server"), "{said}");
    ensure!(began.elapsed() < Duration::from_secs(10), "after {:?}", began.elapsed());
    let new = [PROGRAM, "add", "loop", "-n", "9", "-f", lower.path()?];
    let said = process::run_for_code(&new, 1)?.stderr;
    ensure!(said.contains("are on device 5, which has no server"), "{said}");
    // By their ids, the upper one would come first.
    process::run(&[PROGRAM, "recover", "--all"])?;
    (lower.described, upper.described) = (look(&lower)?, look(&upper)?);
    for device in [&upper, &lower] {
        ensure!(device.described.state == "LIVE", "{:?}", device.described);
    }
    direct::open(upper.path()?)?.read_exact_at(Aligned::new(4096, 0).bytes(), 0)?;
    upper.delete()?;
    lower.delete()?;
    await_nothing()?;
    Ok(Outcome::Pass)
}

/// A link may be on a mount that leads to nothing else that the server needs.
fn linked(ctx: &Ctx) -> Result<Outcome> {
    let (mount, file) = file_on_drive(ctx, "drive0", 64)?;
    let drive = fresh_drive("drive1")?;
    let link = file.with_file_name("link");
    std::os::unix::fs::symlink(drive.path(), &link)?;
    let mut device = Device::add_loop(&link, &["--on-death", "wait"])?;
    kill_server(&device)?;
    recover(&mut device, &[])?;
    device.delete()?;
    mount.unmount()?;
    Ok(Outcome::Pass)
}

/// A device of which nobody could be told is not left, unless it was there before.
fn unprinted(_ctx: &Ctx) -> Result<Outcome> {
    load_driver()?;
    let to_full = |command: &str| {
        let line = format!("exec {PROGRAM} {command} > /dev/full");
        Ok::<_, anyhow::Error>(process::run_for_code(&["sh", "-c", &line], 1)?.stderr)
    };
    for more in ["", "--supervise"] {
        let said = to_full(&format!("add null --on-death wait {more}"))?;
        ensure!(
            said.contains("No space left on device") && said.contains("deleted again"),
            "{said}"
        );
        await_nothing()?;
    }
    let device = Device::add(&["null", "--on-death", "wait"])?;
    kill_server(&device)?;
    let said = to_full(&format!("recover -n {}", device.id()))?;
    ensure!(said.contains("still served"), "{said}");
    ensure!(look(&device)?.state == "LIVE", "{:?}", look(&device)?);
    device.delete()?;
    await_nothing()?;
    Ok(Outcome::Pass)
}

/// What a command cannot see is not what is not there.
fn hidden(_ctx: &Ctx) -> Result<Outcome> {
    load_driver()?;
    let device = Device::add(&["null", "-n", "7", "--on-death", "wait"])?;
    let listing = ["unshare", "--user", PROGRAM, "list"];
    let said = process::run_for_code(&listing, 1)?.stderr;
    ensure!(said.contains("device 7: "), "{said}");
    let began = Instant::now();
    let own_pids = ["unshare", "--pid", "--fork", "--mount-proc", PROGRAM];
    let recovering = [&own_pids[..], &["recover", "-n", "7"]].concat();
    let said = process::run_for_code(&recovering, 1)?.stderr;
    ensure!(said.contains("is served by a process of another pid namespace"), "{said}");
    ensure!(began.elapsed() < Duration::from_secs(10), "after {:?}", began.elapsed());
    let upgrading = [&own_pids[..], &["upgrade", "-n", "7"]].concat();
    let said = process::run(&upgrading)?.stderr;
    ensure!(!said.contains("has died"), "{said}");
    device.delete()?;
    await_nothing()?;
    Ok(Outcome::Pass)
}

fn without_need(_ctx: &Ctx) -> Result<Outcome> {
    load_driver()?;
    let said = process::run_for_code(&[PROGRAM, "recover", "-n", "77"], 1)?.stderr;
    ensure!(
        said == "ublk-target: there is no ublk device 77; `ublk-target list` lists the existing ones\n",
        "{said}"
    );
    for on_death in ["fail", "wait", "reissue", "error"] {
        let device = Device::add(&["null", "--on-death", on_death])?;
        let said = refused(&device)?;
        let expected = match on_death {
            "fail" => "goes away with its server".to_owned(),
            _ => format!("is served by ublk-target ({})", device.pid()?),
        };
        ensure!(said.contains(&expected), "{said}");
        ensure!(look(&device)? == device.described, "{:?}", look(&device)?);
        device.delete()?;
    }
    await_nothing()?;
    Ok(Outcome::Pass)
}

fn record_of(device: &Device) -> PathBuf {
    PathBuf::from(format!("{RUN_DIR}/{}.json", device.id()))
}

/// Fails unless the device is refused with these words and is then as it was.
fn ensure_refused(device: &Device, expected: &str) -> Result<()> {
    let record = record_of(device);
    let state = || -> Result<_> { Ok((look(device)?, fs::read(&record).ok())) };
    let before = state()?;
    let said = refused(device)?;
    println!("{said}");
    ensure!(said.contains(expected), "no `{expected}` in: {said}");
    let after = state()?;
    ensure!(before == after, "{before:?} has become {after:?}");
    ensure!(after.0.state == "QUIESCED" && after.0.pid.is_none(), "{after:?}");
    Ok(())
}

/// A state file that somebody has changed who knows of its checksum: the CRC-32C of the rest as JSON
/// without blanks, the fields in the order of their names.
fn sealed(record: &str) -> Result<String> {
    let mut value: serde_json::Value = serde_json::from_str(record)?;
    let fields = value.as_object_mut().context("a record")?;
    fields.remove("crc32c").context("a checksum")?;
    let rest = serde_json::Value::Object(fields.clone()).to_string();
    fields.insert("crc32c".into(), format!("{:08x}", crc32c::crc32c(rest.as_bytes())).into());
    Ok(serde_json::to_string_pretty(&value)?)
}

fn state_files(_ctx: &Ctx) -> Result<Outcome> {
    let drive = fresh_drive("drive0")?;
    let path = drive.path();
    let mut device = Device::add_loop(&path, &["--on-death", "reissue"])?;
    kill_server(&device)?;
    let record = record_of(&device);
    let good = fs::read_to_string(&record)?;
    let number: u64 = device.attribute("diskseq")?.parse()?;
    let changed = |from: &str, to: &str| -> Result<String> {
        ensure!(good.contains(from), "no `{from}` in {good}");
        sealed(&good.replace(from, to))
    };
    let diskseq = format!("\"diskseq\": {number}");
    let id = format!("\"id\": {}", device.id());
    for (text, expected) in [
        (String::new(), "is corrupt: "),
        (good[..good.len() / 2].to_owned(), "is corrupt: "),
        ("\0".repeat(4096), "is corrupt: "),
        (changed("\"depth\": 128", "\"depth\": -1")?, "is corrupt: "),
        (changed(&id, "\"id\": 99")?, "it belongs to device 99"),
        (
            changed("\"version\": 3", "\"version\": 99")?,
            "has format 99, and this program knows 3 to 4",
        ),
        (good.replace("\"depth\": 128", "\"depth\": 64"), "its checksum is not"),
        (
            changed(&diskseq, &format!("\"diskseq\": {}", number + 1))?,
            "is not this device's: it says disk",
        ),
        (changed("\"depth\": 128", "\"depth\": 64")?, "it says depth 64, and the driver 128"),
        (changed("\"reissue\"", "\"wait\"")?, "it says --on-death wait, and the driver reissue"),
        (changed("\"lend\": \"fused\"", "\"lend\": \"copy\"")?, "it does not lend by fused"),
    ] {
        fs::write(&record, &text)?;
        ensure_refused(&device, expected)?;
    }
    fs::write(&record, &good)?;

    fs::set_permissions(&record, Permissions::from_mode(0o646))?;
    ensure_refused(&device, "is not trusted: it belongs to user 0 and has mode 646")?;
    fs::set_permissions(&record, Permissions::from_mode(0o644))?;
    chown(&record, Some(1000), None)?;
    ensure_refused(&device, "is not trusted: it belongs to user 1000")?;
    chown(&record, Some(0), None)?;

    let away = record.with_extension("away");
    fs::rename(&record, &away)?;
    ensure_refused(&device, "there is no state file")?;
    fs::rename(&away, &record)?;

    // Commands are not given to somebody else's device.
    let node = PathBuf::from(format!("/dev/ublkc{}", device.id()));
    let away = node.with_extension("away");
    fs::rename(&node, &away)?;
    process::run(&["mknod", text(&node)?, "c", "1", "5"])?;
    ensure_refused(&device, "is not the driver's character device")?;
    fs::rename(&away, &node)?;

    // With its own file back it is recovered.
    recover(&mut device, &[])?;
    kill_server(&device)?;
    // And without any it is cleaned up.
    fs::remove_file(&record)?;
    ensure_refused(&device, &format!("del -n {}", device.id()))?;
    device.delete()?;
    await_nothing()?;
    Ok(Outcome::Pass)
}

fn backings(ctx: &Ctx) -> Result<Outcome> {
    let (mount, file) = file_on_drive(ctx, "drive1", 64)?;
    let mut device = Device::add_loop(&file, &["--on-death", "reissue"])?;
    kill_server(&device)?;

    let away = file.with_extension("away");
    fs::rename(&file, &away)?;
    ensure_refused(&device, "does not exist")?;
    File::create(&file)?.set_len(64 << 20)?;
    ensure_refused(&device, "it is inode")?;
    fs::rename(&away, &file)?;

    let resize = |mib: u64| -> Result<()> {
        Ok(File::options().write(true).open(&file)?.set_len(mib << 20)?)
    };
    resize(32)?;
    ensure_refused(&device, "its size is 32 MiB, and it was 64 MiB")?;
    resize(64)?;

    // Somebody else has it: `recover` waits for the dead server's lock only so long.
    recover(&mut device, &[])?;
    kill_server(&device)?;
    // What was added to it is not used.
    resize(96)?;
    recover(&mut device, &[])?;
    ensure!(look(&device)?.size_bytes == 64 << 20, "{:?}", look(&device)?);
    end(device)?;

    // Another drive under the name of the first one.
    let (one, other) = (fresh_drive("drive0")?.path(), fresh_drive("drive2")?.path());
    let device = Device::add_loop(&one, &["--on-death", "reissue"])?;
    kill_server(&device)?;
    let record = record_of(&device);
    let good = fs::read_to_string(&record)?;
    fs::write(&record, sealed(&good.replace(text(&one)?, text(&other)?))?)?;
    ensure_refused(&device, "it is wwid")?;
    device.delete()?;
    mount.unmount()?;
    await_nothing()?;
    Ok(Outcome::Pass)
}

/// What a device is made of is lost, and a client waits for it, where no signal reaches it.
fn lost(_ctx: &Ctx) -> Result<Outcome> {
    for on_death in ["wait", "reissue", "error"] {
        let device = Device::add(&["null", "--on-death", on_death])?;
        let file = direct::open(device.path()?)?;
        let force = [PROGRAM, "del", "-n", &device.id(), "--force"];
        let said = process::run_for_code(&force[..4], 1)?.stderr;
        ensure!(said.contains("is in use") && said.contains("--force"), "{said}");
        ensure!(look(&device)? == device.described, "{:?}", look(&device)?);
        kill_server(&device)?;
        fs::remove_file(record_of(&device))?;
        let client = thread::Builder::new()
            .name("client".into())
            .spawn(move || file.read_exact_at(Aligned::new(4096, 0).bytes(), 0).is_err())?;
        if on_death != "error" {
            let said = process::run_for_code(&[PROGRAM, "del", "-n", &device.id()], 1)?.stderr;
            ensure!(said.contains("is in use") && said.contains("--force"), "{said}");
            ensure!(said.trim_end().lines().count() == 1, "{said}");
        }
        process::run(&force)?;
        let has_failed = client.join().map_err(|_| anyhow!("the client has panicked"))?;
        ensure!(has_failed, "the client has read from nothing");
        await_nothing()?;
        device.was_deleted();
    }
    Ok(Outcome::Pass)
}

fn all(_ctx: &Ctx) -> Result<Outcome> {
    let mut devices = Vec::new();
    for _ in 0..3 {
        let device = Device::add(&["null", "--on-death", "wait"])?;
        kill_server(&device)?;
        devices.push(device);
    }
    fs::write(record_of(&devices[1]), "{}")?;
    let printed = process::run_for_code(&[PROGRAM, "recover", "--all"], 1)?;
    let expected = format!("{}\n{}\n", devices[0].path()?, devices[2].path()?);
    ensure!(printed.stdout == expected, "{printed:?}");
    let said = printed.stderr.trim_end();
    ensure!(said.lines().count() == 1 && said.contains("it has no version"), "{said}");
    let states: Vec<_> =
        devices.iter().map(|it| Ok(look(it)?.state)).collect::<Result<_>>().context("list")?;
    ensure!(states == ["LIVE", "QUIESCED", "LIVE"], "{states:?}");
    process::run(&[PROGRAM, "del", "--all"])?;
    for device in &devices {
        ensure!(!Path::new(device.path()?).exists(), "{device:?} is left");
    }
    await_nothing()?;
    Ok(Outcome::Pass)
}

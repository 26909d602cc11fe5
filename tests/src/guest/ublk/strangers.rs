//! Other namespaces, other users, and what callers leave to a server.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::device::{Device, PROGRAM, file_on_drive, fresh_drive, load_driver, text};
use super::remains;
use super::steps::ID;
use crate::config::DEFAULT;
use crate::guest::losetup::{Caching, KernelLoop};
use crate::guest::{Ctx, Outcome, TestCase, process, wait_for};

pub const TESTS: &[TestCase] = &[
    TestCase::guest("an_add_in_another_pid_namespace_takes_nothing_away", DEFAULT, pid_namespaces),
    TestCase::guest("a_server_keeps_nothing_of_its_caller", DEFAULT, inherited),
    TestCase::guest("a_server_has_files_of_its_own_alone", DEFAULT, files).seconds(180),
    TestCase::guest("hang_up_opens_the_log_again", DEFAULT, hang_up).seconds(180),
    TestCase::guest("a_server_pins_no_mounts", DEFAULT, mounts).seconds(180),
    TestCase::guest("del_names_all_users", DEFAULT, users).seconds(180),
    TestCase::guest("a_replaced_program_stops_in_order", DEFAULT, replaced).seconds(180),
    TestCase::guest("nobody_poses_as_a_process_of_ours", DEFAULT, posing).seconds(180),
    TestCase::guest("a_device_is_recovered_without_a_log", DEFAULT, without_log).seconds(180),
    TestCase::guest("a_lane_that_panics_ends_its_server", DEFAULT, panics).seconds(180),
    TestCase::guest("backings_that_have_changed_are_noticed", DEFAULT, changed).seconds(180),
    TestCase::guest("a_shared_file_keeps_its_blocks", DEFAULT, reflink).seconds(180),
    TestCase::guest("others_choose_no_backing_and_block_none", DEFAULT, others_files).seconds(180),
    TestCase::guest("commands_work_across_pid_namespaces", DEFAULT, commands).seconds(180),
    TestCase::guest("names_of_others_command_no_terminal", DEFAULT, names),
    TestCase::guest("a_supervisor_waits_for_what_is_lacking", DEFAULT, lacking).seconds(240),
    TestCase::guest("an_unplugged_drive_is_not_a_full_one", DEFAULT, unplugged).seconds(180),
    TestCase::guest("a_file_system_without_zeroes_punches_holes", DEFAULT, holes),
];

const PATIENCE: Duration = Duration::from_secs(20);

fn signal(pid: u32, signal: Signal) -> Result<()> {
    Ok(kill(Pid::from_raw(i32::try_from(pid)?), signal)?)
}

/// A process that is killed with its handle.
struct Background(Child);

impl Background {
    fn start(argv: &[&str]) -> Result<Self> {
        let (program, arguments) = argv.split_first().context("a program")?;
        let child = Command::new(program).args(arguments).stdout(Stdio::null()).spawn()?;
        Ok(Self(child))
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Process ids are local to a namespace: 2 is the server there, and another process here.
fn pid_namespaces(ctx: &Ctx) -> Result<Outcome> {
    load_driver()?;
    let drive = fresh_drive("drive0")?;
    let ready = ctx.directory().join("ready");
    let script = format!(
        "{PROGRAM} add loop -f {} -n {ID} && touch {} && exec sleep 1000",
        text(&drive.path())?,
        text(&ready)?
    );
    let elsewhere = ["unshare", "-pf", "--kill-child", "--mount-proc", "sh", "-c"];
    let first = Background::start(&[&elsewhere[..], &[&script]].concat())?;
    wait_for("the first device", PATIENCE, || Ok(ready.exists().then_some(())))?;
    let device = PathBuf::from(format!("/dev/ublkb{ID}"));
    let fails = format!("{PROGRAM} add loop -f /nope -n 8; {PROGRAM} add null -n {ID}; true");
    let said = process::run(&[&elsewhere[..], &[&fails]].concat())?.stderr;
    ensure!(said.contains("/nope") && said.contains("taken"), "{said}");
    let config = ctx.directory().join("serve.toml");
    fs::write(&config, format!("[[device]]\nid = {ID}\ntarget = \"null\"\nsize = \"1M\"\n"))?;
    let serve = format!("{PROGRAM} serve --config {}; test $? = 1", text(&config)?);
    process::run(&[&elsewhere[..], &[&serve]].concat())?;
    let read = File::open(&device)?.read_at(&mut [0; 512], 0)?;
    ensure!(read == 512, "the first device answers no more");
    process::run(&[PROGRAM, "del", "-n", ID])?;
    drop(first);
    remains::wait_for_none()?;
    Ok(Outcome::Pass)
}

/// Its descriptors, and limits that would end it.
fn inherited(ctx: &Ctx) -> Result<Outcome> {
    load_driver()?;
    let lock = ctx.directory().join("lock");
    let (mount, backing) = file_on_drive(ctx, "drive0", 64)?;
    let open = ctx.directory().join("open");
    fs::create_dir(&open)?;
    process::run(&["mount", "-t", "tmpfs", "tmpfs", text(&open)?])?;
    for supervise in [&[][..], &["--supervise"]] {
        // The caller has a lock, a file on another file system, and a limit of 1 MiB for files.
        let script = format!(
            "exec 7>{0}/file; ulimit -f 1024; cd {2}; flock {1} {PROGRAM} add loop -f {3} -n {ID} {4}",
            text(&open)?,
            text(&lock)?,
            text(mount.point())?,
            drive_name(&backing)?,
            supervise.join(" ")
        );
        process::run(&["sh", "-c", &script])?;
        process::run(&["flock", "-n", text(&lock)?, "true"])?;
        process::run(&["umount", text(&open)?])?;
        let write = ["bs=64k", "count=1", "seek=500", "oflag=direct", "status=none"];
        let device = format!("of=/dev/ublkb{ID}");
        process::run(&[&["dd", "if=/dev/zero", &device], &write[..]].concat())?;
        process::run(&[PROGRAM, "del", "-n", ID])?;
        process::run(&["mount", "-t", "tmpfs", "tmpfs", text(&open)?])?;
    }
    process::run(&["umount", text(&open)?])?;
    mount.unmount()?;
    remains::ensure_none()?;
    Ok(Outcome::Pass)
}

/// Whatever the umask, and whatever others have put there.
fn files(ctx: &Ctx) -> Result<Outcome> {
    const DIRECTORIES: [&str; 2] = ["/run/ublk-target", "/var/log/ublk-target"];
    load_driver()?;
    for directory in DIRECTORIES {
        if Path::new(directory).exists() {
            fs::remove_dir_all(directory)?;
        }
    }
    let mode = |path: &str| -> Result<u32> { Ok(fs::metadata(path)?.mode() & 0o7777) };
    let add = |expected: i32| {
        let script = format!("umask 0; exec {PROGRAM} add null -n {ID} --supervise");
        process::run_for_code(&["sh", "-c", &script], expected)
    };
    add(0)?;
    for directory in DIRECTORIES {
        ensure!(mode(directory)? == 0o755, "{directory}: {:o}", mode(directory)?);
        for file in fs::read_dir(directory)? {
            let path = file?.path();
            let mode = mode(text(&path)?)?;
            ensure!(mode & 0o022 == 0, "{}: {mode:o}", path.display());
        }
    }
    process::run(&[PROGRAM, "del", "-n", ID])?;

    // What a user has planted while a folder could be written.
    let secret = ctx.directory().join("secret");
    fs::write(&secret, "secret")?;
    for directory in DIRECTORIES {
        fs::set_permissions(directory, fs::Permissions::from_mode(0o777))?;
    }
    let log = format!("/var/log/ublk-target/{ID}.log");
    fs::remove_file(&log)?;
    symlink(&secret, &log)?;
    symlink(&secret, format!("/run/ublk-target/{ID}.json"))?;
    add(0)?;
    ensure!(fs::read(&secret)? == b"secret", "a link was followed");
    for directory in DIRECTORIES {
        ensure!(mode(directory)? == 0o755, "{directory} can be written by others");
    }
    process::run(&[PROGRAM, "del", "-n", ID])?;
    fs::remove_file(&log)?;

    // A directory of somebody else.
    std::os::unix::fs::chown(DIRECTORIES[0], Some(65534), None)?;
    let refused = add(1)?.stderr;
    ensure!(refused.contains("belongs to another user"), "{refused}");
    std::os::unix::fs::chown(DIRECTORIES[0], Some(0), None)?;
    remains::ensure_none()?;
    Ok(Outcome::Pass)
}

/// What a hook of logrotate does, to the server and to its supervisor.
fn hang_up(_ctx: &Ctx) -> Result<Outcome> {
    for more in [&[][..], &["--supervise"]] {
        let device = Device::add(&[&["null", "-n", ID], more].concat())?;
        let (server, supervisor) = (device.pid()?, device.described.supervisor);
        let log = format!("/var/log/ublk-target/{ID}.log");
        for pid in supervisor.into_iter().chain([server]) {
            let moved = format!("{log}.moved");
            fs::rename(&log, &moved)?;
            signal(pid, Signal::SIGHUP)?;
            wait_for("the log", PATIENCE, || {
                let text = fs::read_to_string(&log).unwrap_or_default();
                Ok(text.contains("open again").then_some(()))
            })?;
            let text = fs::read_to_string(&log)?;
            ensure!(!text.contains('\x1b'), "colours in a file: {text:?}");
            fs::remove_file(&moved)?;
        }
        ensure!(device.pid()? == server && Path::new(device.path()?).exists());
        device.delete()?;
    }
    Ok(Outcome::Pass)
}

/// Whatever is mounted when a server starts, or when the next one does, can be unmounted; its own
/// device, too, though nobody serves that any more when the last server dies.
fn mounts(ctx: &Ctx) -> Result<Outcome> {
    let drive = fresh_drive("drive0")?;
    let other = fresh_drive("drive1")?;
    let at = |name: &str| -> Result<String> {
        let path = ctx.directory().join(name);
        fs::create_dir_all(&path)?;
        Ok(text(&path)?.to_owned())
    };
    let (other_fs, overlay, memory, own) =
        (at("other")?, at("overlay")?, at("memory")?, at("own")?);
    for name in ["lower", "upper", "work"] {
        fs::create_dir_all(ctx.directory().join("memory").join(name))?;
    }
    process::run(&["modprobe", "btrfs"])?;
    process::run(&["mkfs.btrfs", "-q", "-f", text(&other.path())?])?;
    let mount_all = || -> Result<()> {
        process::run(&["mount", text(&other.path())?, &other_fs])?;
        process::run(&["mount", "-t", "tmpfs", "tmpfs", &memory])?;
        for name in ["lower", "upper", "work"] {
            fs::create_dir_all(Path::new(&memory).join(name))?;
        }
        let options =
            format!("lowerdir={memory}/lower,upperdir={memory}/upper,workdir={memory}/work");
        process::run(&["mount", "-t", "overlay", "overlay", "-o", &options, &overlay])?;
        Ok(())
    };
    let unmount_all = || -> Result<()> {
        for point in [&overlay, &memory, &other_fs] {
            process::run(&["umount", point])?;
        }
        // Nobody has it any more: it can be claimed.
        process::run(&["wipefs", text(&other.path())?])?;
        let claimed = File::options()
            .read(true)
            .custom_exclusive()
            .open(other.path())
            .context("the drive is pinned");
        claimed.map(drop)
    };
    for more in [&[][..], &["--supervise"]] {
        mount_all()?;
        let device = Device::add_loop(&drive.path(), &[&["-n", ID], more].concat())?;
        unmount_all()?;
        device.delete()?;
    }
    // Its own file system is there when the next server starts.
    let mut device = Device::add_loop(&drive.path(), &["-n", ID, "--on-death", "wait"])?;
    process::run(&["mkfs.btrfs", "-q", "-f", device.path()?])?;
    process::run(&["mount", device.path()?, &own])?;
    let kill_server = |device: &Device| -> Result<()> {
        signal(device.pid()?, Signal::SIGKILL)?;
        wait_for("a device without a server", PATIENCE, || {
            let devices = remains::devices()?;
            Ok(devices.iter().any(|it| it.state == "QUIESCED").then_some(()))
        })
    };
    let recover = |device: &mut Device| -> Result<()> {
        let printed = process::run(&[PROGRAM, "recover", "-n", ID, "--json"])?.stdout;
        device.described = serde_json::from_str(&printed)?;
        Ok(())
    };
    kill_server(&device)?;
    recover(&mut device)?;
    process::run(&["umount", &own])?;
    kill_server(&device)?;
    recover(&mut device)?;
    device.delete()?;
    Ok(Outcome::Pass)
}

trait CustomExclusive {
    fn custom_exclusive(&mut self) -> &mut Self;
}

impl CustomExclusive for fs::OpenOptions {
    fn custom_exclusive(&mut self) -> &mut Self {
        std::os::unix::fs::OpenOptionsExt::custom_flags(self, nix::libc::O_EXCL)
    }
}

/// Those in another mount namespace, a loop device of the kernel on a partition, and the kernel itself:
/// the answer comes at once, and names them.
fn users(ctx: &Ctx) -> Result<Outcome> {
    let drive = fresh_drive("drive0")?;
    let device = Device::add_loop(&drive.path(), &["-n", ID])?;
    let refused = |expected: &str| -> Result<()> {
        let began = std::time::Instant::now();
        let said = process::run_for_code(&[PROGRAM, "del", "-n", ID], 1)?.stderr;
        ensure!(said.contains("is in use") && said.contains(expected), "{said}");
        ensure!(began.elapsed() < Duration::from_secs(10), "{:?}: {said}", began.elapsed());
        Ok(())
    };
    process::run(&["mkfs.ext4", "-q", "-F", device.path()?])?;
    let point = ctx.directory().join("elsewhere");
    fs::create_dir(&point)?;
    let script = format!("mount {} {} && exec sleep 1000", device.path()?, text(&point)?);
    let elsewhere = Background::start(&["unshare", "-m", "sh", "-c", &script])?;
    wait_for("the mount", PATIENCE, || {
        let mounts = fs::read_to_string(format!("/proc/{}/mounts", elsewhere.0.id()))?;
        Ok(mounts.contains(device.path()?).then_some(()))
    })?;
    refused(&format!("mounted on {} among the mounts of", point.display()))?;
    drop(elsewhere);
    // The namespace goes with its last process.
    wait_for("the device to be free", PATIENCE, || {
        Ok(File::options().read(true).custom_exclusive().open(device.path()?).ok())
    })?;

    let script = format!("echo 'start=2048, size=65536' | sfdisk -q {}", device.path()?);
    process::run(&["sh", "-c", &script])?;
    crate::guest::udev::settle()?;
    let partition = PathBuf::from(format!("{}p1", device.path()?));
    let kernel_loop = KernelLoop::attach(&partition, Caching::Direct)?;
    refused(&format!("attached to {}", kernel_loop.path().display()))?;
    kernel_loop.detach()?;
    crate::guest::udev::settle()?;
    device.delete()?;
    Ok(Outcome::Pass)
}

/// As a package manager replaces it; and a file that others have put in the place of the old one is not
/// run.
fn replaced(ctx: &Ctx) -> Result<Outcome> {
    load_driver()?;
    let own = process::run(&["sh", "-c", &format!("command -v {PROGRAM}")])?.stdout;
    let copy = ctx.directory().join(PROGRAM);
    let planted = ctx.directory().join(format!("{PROGRAM} (deleted)"));
    let ran = ctx.directory().join("ran");
    fs::write(&planted, format!("#!/bin/sh\ntouch {}\n", text(&ran)?))?;
    fs::set_permissions(&planted, fs::Permissions::from_mode(0o755))?;
    let config = ctx.directory().join("serve.toml");
    let device = |id: &str| format!("[[device]]\nid = {id}\ntarget = \"null\"\nsize = \"1M\"\n");
    for kind in ["add", "supervised", "serve"] {
        fs::copy(own.trim(), &copy)?;
        let program = text(&copy)?;
        let mut fleet = None;
        match kind {
            "add" => drop(process::run(&[program, "add", "null", "-n", ID])?),
            "supervised" => {
                drop(process::run(&[program, "add", "null", "-n", ID, "--supervise"])?);
            }
            _ => {
                fs::write(&config, device(ID) + &device("8"))?;
                fleet =
                    Some(Command::new(program).args(["serve", "--config"]).arg(&config).spawn()?);
            }
        }
        let listed = wait_for("the device", PATIENCE, || {
            let devices = remains::devices()?;
            Ok(devices.into_iter().find(|it| it.state == "LIVE" && it.pid.is_some()))
        })?;
        let server = listed.pid.context("a server")?;
        let new = ctx.directory().join("new");
        fs::copy(own.trim(), &new)?;
        fs::rename(&new, &copy)?;
        let link = fs::read_link(format!("/proc/{server}/exe"))?;
        ensure!(text(&link)?.ends_with("(deleted)"), "{}", link.display());
        if let Some(fleet) = &fleet {
            // A reload takes a device away.
            fs::write(&config, device(ID))?;
            signal(fleet.id(), Signal::SIGHUP)?;
            wait_for(
                "the reload",
                PATIENCE,
                || Ok((remains::devices()?.len() == 1).then_some(())),
            )?;
        }
        signal(server, Signal::SIGTERM)?;
        if let Some(mut fleet) = fleet {
            let status = fleet.wait()?;
            ensure!(status.success(), "{status}");
        }
        wait_for("the end", PATIENCE, || {
            Ok((!Path::new(&format!("/proc/{server}")).exists()).then_some(()))
        })?;
        remains::wait_for_none()?;
        ensure!(!ran.exists(), "{kind}: a file of others was run");
    }
    Ok(Outcome::Pass)
}

/// A process of another user that calls itself ours, and does not end when it is told.
fn posing(ctx: &Ctx) -> Result<Outcome> {
    let device = Device::add(&["null", "-n", ID, "--on-death", "wait"])?;
    let pose = ctx.directory().join(PROGRAM);
    fs::copy("/bin/sh", &pose)?;
    fs::set_permissions(&pose, fs::Permissions::from_mode(0o755))?;
    fs::set_permissions(ctx.directory(), fs::Permissions::from_mode(0o755))?;
    // A shell of that name, whose script is called as our command is.
    let fifo = ctx.directory().join("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::from_bits_truncate(0o644))?;
    let script = "trap '' TERM HUP INT; while :; do read line < fifo; done";
    fs::write(ctx.directory().join("supervise"), script)?;
    let start =
        format!("cd {} && exec ./{PROGRAM} supervise -n {ID} --server 1", text(ctx.directory())?);
    let user = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"];
    let posing = Background::start(&[&user[..], &["sh", "-c", &start]].concat())?;
    let name = format!("/proc/{}/comm", posing.0.id());
    wait_for("its name", PATIENCE, || {
        Ok((fs::read_to_string(&name)?.trim() == PROGRAM).then_some(()))
    })?;
    let printed = process::run(&[PROGRAM, "list"])?;
    ensure!(printed.stderr.is_empty(), "{printed:?}");
    device.delete()?;
    process::run(&[PROGRAM, "del", "--all", "--force"])?;
    ensure!(Path::new(&name).exists(), "it was killed");
    drop(posing);
    Ok(Outcome::Pass)
}

/// Where logs belong nothing can be written: early in the boot, or for good.
fn without_log(_ctx: &Ctx) -> Result<Outcome> {
    const LOGS: &str = "/var/log/ublk-target";
    load_driver()?;
    if Path::new(LOGS).exists() {
        fs::remove_dir_all(LOGS)?;
    }
    fs::write(LOGS, "")?;
    for more in [&[][..], &["--supervise"]] {
        let on_death = ["--on-death", "wait"];
        process::run(&[&[PROGRAM, "add", "null", "-n", ID], &on_death[..]].concat())?;
        let fallback = format!("/run/ublk-target/{ID}.log");
        ensure!(fs::read_to_string(&fallback)?.contains("cannot log to"), "no log");
        let server = remains::devices()?.first().and_then(|it| it.pid).context("a server")?;
        signal(server, Signal::SIGKILL)?;
        wait_for("a device without a server", PATIENCE, || {
            Ok(remains::devices()?.iter().any(|it| it.state == "QUIESCED").then_some(()))
        })?;
        process::run(&[&[PROGRAM, "recover", "-n", ID], more].concat())?;
        process::run(&[PROGRAM, "del", "-n", ID])?;
        ensure!(!Path::new(&fallback).exists(), "{fallback} is left");
    }
    fs::remove_file(LOGS)?;
    remains::ensure_none()?;
    Ok(Outcome::Pass)
}

/// In a lane of its own, in one with an I/O lane, and in one that a fleet shares: no I/O hangs, and the
/// device fares as after any death.
fn panics(ctx: &Ctx) -> Result<Outcome> {
    let fault = "UBLK_TARGET_FAULT=panic=3000";
    let read = format!("dd if=/dev/ublkb{ID} of=/dev/null bs=4k count=6000 iflag=direct");
    let state = |expected: &str| {
        wait_for(&format!("a device in state {expected}"), PATIENCE, || {
            let is = |it: &super::device::Description| it.state == expected;
            Ok(remains::devices()?.iter().any(is).then_some(()))
        })
    };
    load_driver()?;
    let drive = fresh_drive("drive0")?;
    let drive = text(&drive.path())?.to_owned();
    let own = ["env", fault, PROGRAM, "add", "loop", "-f", &drive, "-n", ID];
    for more in [&[][..], &["--lend", "slot", "--io-lane"]] {
        process::run(&[&own[..], more].concat())?;
        ensure!(process::run(&["sh", "-c", &read]).is_err(), "the read must fail");
        state("DEAD")?;
        process::run(&[PROGRAM, "del", "-n", ID])?;
        process::run(&[&own[..], more, &["--on-death", "reissue"]].concat())?;
        let mut reader = Background::start(&["sh", "-c", &read])?;
        state("QUIESCED")?;
        // Recovered without the fault, it goes on.
        process::run(&[PROGRAM, "recover", "-n", ID])?;
        ensure!(reader.0.wait()?.success());
        process::run(&[PROGRAM, "del", "-n", ID])?;
    }
    let config = ctx.directory().join("serve.toml");
    let device = |id: &str, more: &str| {
        format!("[[device]]\nid = {id}\ntarget = \"null\"\nsize = \"1G\"\n{more}\n")
    };
    fs::write(&config, device(ID, "on-death = \"reissue\"") + &device("8", ""))?;
    let mut fleet =
        Command::new("env").args([fault, PROGRAM, "serve", "--config"]).arg(&config).spawn()?;
    state("LIVE")?;
    let mut reader = Background::start(&["sh", "-c", &read])?;
    ensure!(!fleet.wait()?.success());
    state("QUIESCED")?;
    state("DEAD")?;
    process::run(&[PROGRAM, "recover", "-n", ID])?;
    ensure!(reader.0.wait()?.success());
    process::run(&[PROGRAM, "del", "--all"])?;
    remains::ensure_none()?;
    Ok(Outcome::Pass)
}

/// A drive whose write cache is on by now: a device that was added without one gets no flushes.
fn changed(_ctx: &Ctx) -> Result<Outcome> {
    let drive = fresh_drive("drive0")?;
    let cache = format!("/sys/class/block/{}/queue/write_cache", drive_name(&drive.path())?);
    let set = |mode: &str| fs::write(&cache, mode).with_context(|| mode.to_owned());
    ensure!(fs::read_to_string(&cache)?.trim() == "write back", "the drive has a cache");
    for (first, then, is_recovered) in
        [("write through", "write back", false), ("write back", "write through", true)]
    {
        set(first)?;
        let device = Device::add_loop(&drive.path(), &["-n", ID, "--on-death", "wait"])?;
        set(then)?;
        if !is_recovered {
            let refused = process::run_for_code(&[PROGRAM, "upgrade", "-n", ID], 1)?.stderr;
            ensure!(
                refused.contains("write cache") && refused.contains("nothing has"),
                "{refused}"
            );
        }
        signal(device.pid()?, Signal::SIGKILL)?;
        wait_for("a device without a server", PATIENCE, || {
            Ok(remains::devices()?.iter().any(|it| it.state == "QUIESCED").then_some(()))
        })?;
        let recover = [PROGRAM, "recover", "-n", ID];
        if !is_recovered {
            let refused = process::run_for_code(&recover, 1)?.stderr;
            ensure!(refused.contains("volatile write cache"), "{refused}");
            set(first)?;
        }
        process::run(&recover)?;
        process::run(&[PROGRAM, "del", "-n", ID])?;
        device.was_deleted();
    }
    set("write back")?;
    remains::ensure_none()?;
    Ok(Outcome::Pass)
}

fn drive_name(path: &Path) -> Result<String> {
    Ok(path.file_name().and_then(|name| name.to_str()).context("a name")?.to_owned())
}

/// XFS wants whole blocks of direct I/O once blocks of a file are shared.
fn reflink(ctx: &Ctx) -> Result<Outcome> {
    let drive = fresh_drive("drive0")?;
    process::run(&["mkfs.xfs", "-q", "-f", text(&drive.path())?])?;
    let point = ctx.directory().join("xfs");
    fs::create_dir(&point)?;
    process::run(&["mount", text(&drive.path())?, text(&point)?])?;
    let image = point.join("img");
    let random = format!("if=/dev/urandom of={} bs=1M count=16 status=none", text(&image)?);
    process::run(&["sh", "-c", &format!("dd {random}")])?;
    let mut device = Device::add_loop(&image, &["-n", ID, "--on-death", "reissue"])?;
    let block = |device: &Device| device.attribute("queue/logical_block_size");
    ensure!(block(&device)? == "512" && !device.described.page_cache);
    let snapshot = point.join("snap");
    process::run(&["cp", "--reflink=always", text(&image)?, text(&snapshot)?])?;
    process::run(&[PROGRAM, "upgrade", "-n", ID])?;
    let listed = process::run(&[PROGRAM, "list", "-n", ID, "--json"])?.stdout;
    device.described = serde_json::from_str(&listed)?;
    ensure!(device.described.page_cache, "{listed}");
    // Blocks of 512 bytes are written, and what is around them stays.
    let before = fs::read(&snapshot)?;
    for sector in [1_usize, 9, 4097] {
        let argv = format!(
            "head -c 512 /dev/zero | dd of={} bs=512 count=1 seek={sector} oflag=direct status=none",
            device.path()?
        );
        process::run(&["sh", "-c", &argv])?;
    }
    process::run(&["blockdev", "--flushbufs", device.path()?])?;
    let mut expected = before.clone();
    for sector in [1_usize, 9, 4097] {
        expected[sector * 512..][..512].fill(0);
    }
    let mut after = vec![0; expected.len()];
    File::open(device.path()?)?.read_exact_at(&mut after, 0)?;
    ensure!(after == expected, "the device has something else");
    ensure!(fs::read(&snapshot)? == before, "the copy has changed");
    signal(device.pid()?, Signal::SIGKILL)?;
    wait_for("a device without a server", PATIENCE, || {
        Ok(remains::devices()?.iter().any(|it| it.state == "QUIESCED").then_some(()))
    })?;
    process::run(&[PROGRAM, "recover", "-n", ID])?;
    process::run(&[PROGRAM, "del", "-n", ID])?;
    device.was_deleted();
    // For a device of one's own that shall have such blocks, as a partition table is made for them.
    let table = format!("echo 'label: gpt' | sfdisk -q --wipe always {}", text(&snapshot)?);
    process::run(&["sh", "-c", &table])?;
    let said = process::run(&[PROGRAM, "add", "loop", "-f", text(&snapshot)?, "-n", ID])?.stderr;
    ensure!(said.contains("--block-size 512 shows them"), "{said}");
    process::run(&[PROGRAM, "del", "-n", ID])?;
    let other = Device::add_loop(&snapshot, &["-n", ID, "--block-size", "512"])?;
    ensure!(block(&other)? == "512" && other.described.page_cache);
    other.delete()?;
    process::run(&["umount", text(&point)?])?;
    Ok(Outcome::Pass)
}

/// Links in a user's folder, and locks of somebody who may only read.
fn others_files(ctx: &Ctx) -> Result<Outcome> {
    load_driver()?;
    let (mount, secret) = file_on_drive(ctx, "drive0", 16)?;
    fs::set_permissions(&secret, fs::Permissions::from_mode(0o644))?;
    let home = mount.point().join("home");
    fs::create_dir(&home)?;
    std::os::unix::fs::chown(&home, Some(65534), Some(65534))?;
    let link = home.join("disk.img");
    symlink(&secret, &link)?;
    std::os::unix::fs::lchown(&link, Some(65534), Some(65534))?;
    let refused = process::run_for_code(&[PROGRAM, "add", "loop", "-f", text(&link)?], 1)?.stderr;
    ensure!(refused.contains("which user 65534 can change"), "{refused}");

    let ready = ctx.directory().join("ready");
    let lock = |user: &str| -> Result<Background> {
        let script = format!(
            "exec 9<{} && flock -s 9 && echo > {} && exec sleep 1000",
            text(&secret)?,
            text(&ready)?
        );
        let _ = fs::remove_file(&ready);
        let user = ["setpriv", "--reuid", user, "--regid", "0", "--clear-groups", "sh", "-c"];
        fs::set_permissions(ctx.directory(), fs::Permissions::from_mode(0o777))?;
        let locked = Background::start(&[&user[..], &[&script]].concat())?;
        wait_for("the lock", PATIENCE, || Ok(ready.exists().then_some(())))?;
        Ok(locked)
    };
    let locking = lock("65534")?;
    let add = [PROGRAM, "add", "loop", "-f", text(&secret)?, "-n", ID];
    let said = process::run(&add)?.stderr;
    ensure!(said.contains("is not root's, has locked the file"), "{said}");
    process::run(&[PROGRAM, "del", "-n", ID])?;
    drop(locking);
    let locking = lock("0")?;
    let refused = process::run_for_code(&add, 1)?.stderr;
    ensure!(refused.contains("locked by "), "{refused}");
    drop(locking);

    fs::set_permissions(ctx.directory(), fs::Permissions::from_mode(0o755))?;
    // Another name of a file that a loop device of the kernel has.
    let name = mount.point().join("name");
    fs::hard_link(&secret, &name)?;
    let kernel_loop = KernelLoop::attach(&name, Caching::Buffered)?;
    let refused = process::run_for_code(&add, 1)?.stderr;
    ensure!(refused.contains("attached to /dev/loop"), "{refused}");
    kernel_loop.detach()?;
    mount.unmount()?;
    remains::ensure_none()?;
    Ok(Outcome::Pass)
}

/// From inside on a server outside, and the other way round, where the client's process id is 0.
fn commands(ctx: &Ctx) -> Result<Outcome> {
    let device = Device::add(&["null", "-n", ID, "--on-death", "wait"])?;
    let elsewhere = |argv: &[&str]| {
        process::run(&[&["unshare", "-pf", "--mount-proc", PROGRAM][..], argv].concat())
    };
    elsewhere(&["stats", "-n", ID, "--interval", "0.2"])?;
    elsewhere(&["resize", "-n", ID, "--size", "300G"])?;
    elsewhere(&["list"])?;
    let refused = process::run_for_code(
        &["unshare", "-pf", "--mount-proc", PROGRAM, "add", "null", "-n", ID],
        1,
    );
    ensure!(refused?.stderr.contains("taken"));
    ensure!(Path::new(device.path()?).exists());
    elsewhere(&["del", "-n", ID])?;
    device.wait_until_gone()?;

    let ready = ctx.directory().join("ready");
    let script = format!(
        "{PROGRAM} add null -n {ID} --on-death reissue && touch {} && exec sleep 1000",
        text(&ready)?
    );
    let inside = ["unshare", "-pf", "--kill-child", "--mount-proc", "sh", "-c", &script];
    let inside = Background::start(&inside)?;
    wait_for("the device", PATIENCE, || Ok(ready.exists().then_some(())))?;
    process::run(&[PROGRAM, "stats", "-n", ID, "--interval", "0.2"])?;
    process::run(&[PROGRAM, "resize", "-n", ID, "--size", "300G"])?;
    process::run(&[PROGRAM, "upgrade", "-n", ID])?;
    process::run(&[PROGRAM, "del", "-n", ID])?;
    drop(inside);
    remains::wait_for_none()?;
    Ok(Outcome::Pass)
}

/// Of a process that uses a device, and of a file.
fn names(ctx: &Ctx) -> Result<Outcome> {
    let device = Device::add(&["null", "-n", ID])?;
    let evil = ctx.directory().join("a\x1b[31m\x07");
    fs::copy("/bin/sleep", &evil)?;
    let open = format!("exec 7<{} && exec \"$0\" 1000", device.path()?);
    let open = Background::start(&["sh", "-c", &open, text(&evil)?])?;
    let exe = format!("/proc/{}/exe", open.0.id());
    wait_for("the device to be open", PATIENCE, || {
        Ok(fs::read_link(&exe)?.ends_with("a\x1b[31m\x07").then_some(()))
    })?;
    let missing = format!("{}-missing", text(&evil)?);
    let said = [
        process::run_for_code(&[PROGRAM, "del", "-n", ID], 1)?.stderr,
        process::run_for_code(&[PROGRAM, "add", "loop", "-f", &missing], 1)?.stderr,
    ];
    for said in said {
        ensure!(said.contains("\\u{1b}[31m"), "{said:?}");
        ensure!(!said.contains('\x1b') && !said.contains('\x07'), "{said:?}");
    }
    drop(open);
    device.delete()?;
    Ok(Outcome::Pass)
}

/// With no room for its state: longer than a supervisor tries where a server fails for good.
fn lacking(ctx: &Ctx) -> Result<Outcome> {
    const RUN: &str = "/run/ublk-target";
    load_driver()?;
    fs::create_dir_all(RUN)?;
    process::run(&["mount", "-t", "tmpfs", "-o", "size=64k,mode=755", "tmpfs", RUN])?;
    let mut device = Device::add(&["null", "-n", ID, "--supervise"])?;
    let filler = Path::new(RUN).join("filler");
    // The supervisor and the next server see other mounts than this one by now, and the same files.
    let _ = fs::write(&filler, vec![0; 1 << 20]);
    let log = format!("/var/log/ublk-target/{ID}.log");
    signal(device.pid()?, Signal::SIGKILL)?;
    let tries = if ctx.long { 25 } else { 12 };
    wait_for("the attempts", Duration::from_secs(120), || {
        let text = fs::read_to_string(&log)?;
        Ok((text.matches(": recovering device").count() > tries).then_some(()))
    })
    .with_context(|| fs::read_to_string(&log).unwrap_or_default())?;
    let text = fs::read_to_string(&log)?;
    ensure!(text.contains("ENOSPC") && !text.contains("given up"), "{text}");
    fs::remove_file(&filler)?;
    let live = wait_for("a live device", Duration::from_secs(60), || {
        let devices = remains::devices()?;
        Ok(devices.into_iter().find(|it| it.state == "LIVE" && it.pid.is_some()))
    })?;
    ensure!(live.trouble.is_none() && live.supervisor == device.described.supervisor, "{live:?}");
    device.described = live;
    device.delete()?;
    process::run(&["umount", RUN])?;
    Ok(Outcome::Pass)
}

/// To multipath and file systems a full disk is something else than a missing one.
fn unplugged(_ctx: &Ctx) -> Result<Outcome> {
    let drive = fresh_drive("drive1")?;
    let name = drive_name(&drive.path())?;
    let device = Device::add_loop(&drive.path(), &["-n", ID])?;
    crate::guest::udev::settle()?;
    let pci = fs::canonicalize(format!("/sys/block/{name}/device/device"))?;
    fs::write(pci.join("remove"), "1")?;
    for direction in [
        format!("dd if=/dev/zero of={} bs=4k count=4 oflag=direct", device.path()?),
        format!("dd if={} of=/dev/null bs=4k count=4 iflag=direct", device.path()?),
    ] {
        let said = process::run_for_code(&["sh", "-c", &direction], 1)?.stderr;
        ensure!(!said.contains("No space left"), "{said}");
        ensure!(said.contains("Input/output error") || said.contains("No such device"), "{said}");
    }
    device.delete()?;
    fs::write("/sys/bus/pci/rescan", "1")?;
    wait_for("the drive", PATIENCE, || Ok(fresh_drive("drive1").ok()))?;
    Ok(Outcome::Pass)
}

/// tmpfs punches holes, and zeroes no ranges.
fn holes(ctx: &Ctx) -> Result<Outcome> {
    let point = ctx.directory().join("memory");
    fs::create_dir(&point)?;
    process::run(&["mount", "-t", "tmpfs", "tmpfs", text(&point)?])?;
    let image = point.join("img");
    File::create(&image)?.set_len(16 << 20)?;
    let blocks = || -> Result<u64> { Ok(fs::metadata(&image)?.blocks()) };
    let errors = || -> Result<usize> {
        Ok(process::run(&["dmesg"])?.stdout.matches(&format!("ublkb{ID}")).count())
    };
    let before = errors()?;
    let device = Device::add_loop(&image, &["-n", ID])?;
    ensure!(
        fs::metadata(&image)?.len() == 16 << 20 && blocks()? == 0,
        "probing has left something"
    );
    let fill = format!("dd if=/dev/urandom of={} bs=1M oflag=direct status=none", device.path()?);
    for command in [["blkdiscard", "-z"], ["blkdiscard", "-f"]] {
        // It ends with the device.
        process::run_for_code(&["sh", "-c", &fill], 1)?;
        ensure!(blocks()? >= (16 << 20) / 512);
        process::run(&[&command[..], &[device.path()?]].concat())?;
        ensure!(blocks()? == 0, "{command:?} has left {} blocks", blocks()?);
        let mut bytes = vec![1; 1 << 20];
        File::open(device.path()?)?.read_exact_at(&mut bytes, 3 << 20)?;
        ensure!(bytes.iter().all(|byte| *byte == 0), "{command:?}");
    }
    ensure!(errors()? == before, "{}", process::run(&["dmesg"])?.stdout);
    device.delete()?;
    process::run(&["umount", text(&point)?])?;
    Ok(Outcome::Pass)
}

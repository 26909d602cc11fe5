//! `ublk-bench run`: what it measures, what it refuses, and that nothing of it stays.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::pty::{Winsize, openpty};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use super::device::{Mount, fresh_drive, text};
use crate::config::DEFAULT;
use crate::guest::drives::Drive;
use crate::guest::{Ctx, Outcome, TestCase, process, wait_for};

pub const TESTS: &[TestCase] = &[
    TestCase::guest("bench_measures_every_subject", DEFAULT, whole_run).seconds(240),
    TestCase::guest("bench_keeps_what_it_has_when_it_is_interrupted", DEFAULT, interrupted),
    TestCase::guest("bench_refuses_with_one_line", DEFAULT, refused),
    TestCase::guest("bench_asks_before_it_overwrites", DEFAULT, asks),
    TestCase::guest("bench_never_writes_when_it_must_not", DEFAULT, read_only),
    TestCase::guest("bench_removes_what_a_killed_run_has_left", DEFAULT, killed),
];

const PROGRAM: &str = "ublk-bench";
/// Where a run writes down what it has made.
const RECORD: &str = "/run/ublk-bench.json";
/// As little as can be measured.
const LITTLE: [&str; 6] = ["--rounds", "1", "--sample", "0.2", "--span", "64M"];
const LIMIT: Duration = Duration::from_secs(60);

/// A run on a drive, with its results in the test's directory.
struct Run {
    backing: String,
    prefix: PathBuf,
}

impl Run {
    fn new(ctx: &Ctx, drive: &Drive) -> Result<Self> {
        let backing = text(&drive.path())?.to_owned();
        Ok(Self { backing, prefix: ctx.directory().join("results") })
    }

    fn argv<'a>(&'a self, more: &[&'a str]) -> Result<Vec<&'a str>> {
        let run = [PROGRAM, "run", "--backing", &self.backing, "--output", text(&self.prefix)?];
        Ok([&run[..], more].concat())
    }

    fn finish(&self, more: &[&str]) -> Result<process::Printed> {
        process::run(&self.argv(more)?)
    }

    fn start(&self, more: &[&str]) -> Result<Child> {
        let argv = self.argv(more)?;
        let said = File::create(self.prefix.with_extension("said"))?;
        let mut command = Command::new(argv[0]);
        command.args(&argv[1..]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(said);
        Ok(command.spawn()?)
    }

    fn json(&self) -> PathBuf {
        self.prefix.with_extension("json")
    }

    fn results(&self) -> Result<Value> {
        Ok(serde_json::from_str(&fs::read_to_string(self.json())?)?)
    }
}

fn whole_run(ctx: &Ctx) -> Result<Outcome> {
    let run = Run::new(ctx, &fresh_drive("drive0")?)?;
    let loads = ["--loads", "randrw-4k-qd32", "--yes"];
    let printed = run.finish(&[&LITTLE[..], &loads].concat())?;
    let page = fs::read_to_string(run.prefix.with_extension("html"))?;
    ensure!(printed.stdout.contains("ours: fused"), "{}", printed.stdout);
    ensure!(page.contains("ours: fused"), "the page does not show ours");
    let results = run.results()?;
    ensure!(results["incomplete"].is_null(), "{}", results["incomplete"]);
    let (subjects, samples) = (array(&results["subjects"])?, array(&results["samples"])?);
    let mut measured = 0;
    for subject in subjects {
        let name = subject["name"].as_str().context("a subject's name")?;
        let of_it: Vec<_> = samples.iter().filter(|sample| sample["subject"] == name).collect();
        if let Some(why) = subject["skipped"].as_str() {
            println!("{name}: {why}");
            // No rublk is in this guest, and options may be planned that this program has not.
            let is_missing = why.contains("no rublk in PATH") || why.contains("ublk-target has no");
            ensure!(is_missing && of_it.is_empty(), "{name} was not measured: {why}");
            continue;
        }
        ensure!(of_it.len() == 1, "{} samples of {name}", of_it.len());
        ensure_sensible(of_it[0], subject["family"] == "ours").context(name.to_owned())?;
        measured += 1;
    }
    ensure!(measured >= 12, "only {measured} subjects were measured");
    ensure_nothing_left()?;
    Ok(Outcome::Pass)
}

fn ensure_sensible(sample: &Value, has_server: bool) -> Result<()> {
    let number = |value: &Value| value.as_f64().with_context(|| format!("no number: {sample}"));
    let iops = number(&sample["iops"])?;
    ensure!(iops > 100.0, "{iops} requests a second");
    let each = number(&sample["bytes_per_s"])? / iops;
    // fio tells times in milliseconds, and not the same for both: on a loaded machine, 4.7 KB were seen.
    ensure!((2048.0..8192.0).contains(&each), "{each} bytes a request");
    let latency = &sample["latency"];
    let (mean, max) = (number(&latency["mean_ns"])?, number(&latency["max_ns"])?);
    ensure!(mean > 1000.0 && mean <= max, "{latency}");
    // 32 are in flight all the time. As above, a loaded machine bends times: 63.5 were seen.
    let in_flight = mean * iops / 1e9;
    ensure!((8.0..128.0).contains(&in_flight), "{in_flight} requests in flight");
    let percentiles = array(&latency["percentiles"])?;
    let percentiles = percentiles.iter().map(|pair| Ok((number(&pair[0])?, number(&pair[1])?)));
    let percentiles = percentiles.collect::<Result<Vec<_>>>()?;
    ensure!(percentiles.first().is_some_and(|first| first.0 <= 1.0), "{latency}");
    ensure!(percentiles.last().is_some_and(|last| last.0 >= 99.99), "{latency}");
    for pair in percentiles.windows(2) {
        ensure!(pair[0].0 < pair[1].0 && pair[0].1 <= pair[1].1, "{latency}");
    }
    let cpu = &sample["cpu"];
    let (machine, client) = (number(&cpu["machine_us"])?, number(&cpu["client_us"])?);
    // Two processors.
    ensure!(machine > 0.0 && machine < 2.2e6 / iops, "{cpu} at {iops} requests a second");
    ensure!(client > 0.0 && client < 1.2e6 / iops, "{cpu} at {iops} requests a second");
    if has_server {
        let server = number(&cpu["server_us"])?;
        ensure!(server > 0.0 && server < 2.2e6 / iops, "{cpu} at {iops} requests a second");
    } else {
        ensure!(cpu["server_us"].is_null(), "{cpu}");
    }
    Ok(())
}

fn array(value: &Value) -> Result<&Vec<Value>> {
    value.as_array().with_context(|| format!("not a list: {value}"))
}

/// The harness looks for devices and processes.
fn ensure_nothing_left() -> Result<()> {
    ensure!(!Path::new(RECORD).exists(), "{RECORD} is left");
    Ok(())
}

fn interrupted(ctx: &Ctx) -> Result<Outcome> {
    let run = Run::new(ctx, &fresh_drive("drive0")?)?;
    let more = ["--only", "ours-fused", "--loads", "randread-4k-qd1", "--rounds", "1000"];
    let mut child = run.start(&[&["--read-only", "--sample", "0.1"], &more[..]].concat())?;
    wait_for("the first round", LIMIT, || Ok(run.json().exists().then_some(())))?;
    wait_for("fio on our device", LIMIT, || Ok(fio_runs_on_ublk().then_some(())))?;
    kill(Pid::from_raw(i32::try_from(child.id())?), Signal::SIGTERM)?;
    let status = child.wait()?;
    let said = fs::read_to_string(run.prefix.with_extension("said"))?;
    ensure!(status.code() == Some(143), "{status}: {said}");
    let why = "interrupted by SIGTERM";
    ensure!(said.trim_end().ends_with(why), "{said}");
    let results = run.results()?;
    ensure!(results["incomplete"] == why, "{}", results["incomplete"]);
    ensure!(array(&results["samples"])?.len() >= 2, "{}", results["samples"]);
    ensure!(!fio_runs_on_ublk(), "fio goes on");
    ensure_nothing_left()?;
    Ok(Outcome::Pass)
}

fn fio_runs_on_ublk() -> bool {
    process::run(&["pgrep", "-f", "^[^ ]*fio .*--filename=/dev/ublkb"]).is_ok()
}

fn refused(ctx: &Ctx) -> Result<Outcome> {
    let drive = fresh_drive("drive0")?;
    let (path, commands_only) = (drive.path(), drive.char_path());
    let (backing, commands_only) = (text(&path)?, text(&commands_only)?);
    let output = text(ctx.directory())?;
    let run = |backing, more: &[&'static str]| {
        [&[PROGRAM, "run", "--backing", backing, "--output", output], more].concat()
    };
    let small = ctx.directory().join("small");
    File::create(&small)?.set_len(63 << 20)?;
    ensure_refused(&run(backing, &[]), "say --yes")?;
    ensure_refused(&run(text(&small)?, &["--yes"]), "at least 64 MiB")?;
    ensure_refused(&run("/dev/none", &["--yes"]), "does not exist")?;
    ensure_refused(&run(commands_only, &["--yes"]), "give the block device")?;
    ensure_refused(&run(backing, &["--yes", "--span", "2G"]), "less than --span 2 GiB")?;
    let nowhere = [PROGRAM, "run", "--yes", "--backing", backing, "--output", "/none/x"];
    ensure_refused(&nowhere, "choose another --output")?;
    process::run(&["blockdev", "--setro", backing])?;
    let read_only = ensure_refused(&run(backing, &["--yes"]), "measure it with --read-only");
    process::run(&["blockdev", "--setrw", backing])?;
    read_only?;
    let user = ["setpriv", "--reuid", "65534", "--clear-groups"];
    ensure_refused(&[&user[..], &run(backing, &["--yes"])].concat(), "run as root")?;
    process::run(&["mkfs.ext4", "-q", "-F", backing])?;
    let mount = Mount::new(ctx, backing, "mnt")?;
    let expected = format!("mounted on {}", text(mount.point())?);
    ensure_refused(&run(backing, &["--yes"]), &expected)?;
    mount.unmount()?;
    ensure_nothing_left()?;
    Ok(Outcome::Pass)
}

/// The program has to fail with one line that holds this.
fn ensure_refused(argv: &[&str], expected: &str) -> Result<()> {
    let said = process::run_for_code(argv, 1)?;
    ensure!(said.stdout.is_empty(), "{argv:?} printed to standard output: {}", said.stdout);
    ensure!(
        said.stderr.trim_end().lines().count() == 1,
        "{argv:?}: not one line:\n{}",
        said.stderr
    );
    ensure!(said.stderr.contains(expected), "{argv:?}: `{expected}` is not in: {}", said.stderr);
    println!("{}", said.stderr.trim_end());
    Ok(())
}

/// A run with a terminal.
struct OnTerminal {
    child: Child,
    terminal: File,
    shown: String,
}

impl OnTerminal {
    fn start(argv: &[&str]) -> Result<Self> {
        let size = Winsize { ws_row: 24, ws_col: 100, ws_xpixel: 0, ws_ypixel: 0 };
        let pair = openpty(&size, None)?;
        let mut command = Command::new(argv[0]);
        command.args(&argv[1..]).stdin(pair.slave.try_clone()?).stdout(Stdio::null());
        command.env("TERM", "xterm");
        let child = command.stderr(pair.slave).spawn()?;
        Ok(Self { child, terminal: pair.master.into(), shown: String::new() })
    }

    /// Reads until the text is shown.
    fn wait_for(&mut self, text: &str) -> Result<()> {
        while !self.shown.contains(text) {
            ensure!(self.read(LIMIT)?, "`{text}` is not shown:\n{}", self.shown);
        }
        Ok(())
    }

    fn wait(mut self) -> Result<(ExitStatus, String)> {
        while self.read(LIMIT)? {}
        Ok((self.child.wait()?, std::mem::take(&mut self.shown)))
    }

    /// Whether there was more.
    fn read(&mut self, limit: Duration) -> Result<bool> {
        let mut fds = [PollFd::new(self.terminal.as_fd(), PollFlags::POLLIN)];
        ensure!(poll(&mut fds, PollTimeout::try_from(limit)?)? > 0, "silent:\n{}", self.shown);
        let mut piece = [0; 4096];
        // It ends with an error when nobody has the other side open any more.
        let count = self.terminal.read(&mut piece).unwrap_or(0);
        self.shown.push_str(&String::from_utf8_lossy(&piece[..count]));
        Ok(count > 0)
    }
}

impl Drop for OnTerminal {
    fn drop(&mut self) {
        // Both fail when it has ended, which is the usual case.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn asks(ctx: &Ctx) -> Result<Outcome> {
    let drive = fresh_drive("drive0")?;
    let run = Run::new(ctx, &drive)?;
    let argv =
        run.argv(&[&LITTLE[..], &["--only", "raw", "--loads", "randwrite-4k-qd1"]].concat())?;
    let answers = [("yes\n", 1, "is not touched"), ("", 130, "interrupted by SIGINT")];
    for (typed, code, expected) in answers {
        let mut asked = OnTerminal::start(&argv)?;
        asked.wait_for("Type its name to go on")?;
        match typed {
            "" => kill(Pid::from_raw(i32::try_from(asked.child.id())?), Signal::SIGINT)?,
            typed => asked.terminal.write_all(typed.as_bytes())?,
        }
        let (status, shown) = asked.wait()?;
        ensure!(status.code() == Some(code) && shown.contains(expected), "{status}:\n{shown}");
        ensure!(!run.json().exists(), "there are results");
    }
    let mut first = [1; 4096];
    File::open(drive.path())?.read_exact(&mut first)?;
    ensure!(first.iter().all(|byte| *byte == 0), "it was written to");
    let mut asked = OnTerminal::start(&argv)?;
    asked.wait_for("Type its name to go on")?;
    asked.terminal.write_all(format!("{}\n", run.backing).as_bytes())?;
    let (status, shown) = asked.wait()?;
    ensure!(status.success(), "{status}:\n{shown}");
    ensure!(shown.contains("round 1 of 1: 4 KiB random write, QD1"), "{shown}");
    ensure!(array(&run.results()?["samples"])?.len() == 1, "{}", run.results()?);
    ensure_nothing_left()?;
    Ok(Outcome::Pass)
}

fn read_only(ctx: &Ctx) -> Result<Outcome> {
    let drive = fresh_drive("drive0")?;
    let run = Run::new(ctx, &drive)?;
    let written = || -> Result<u64> {
        let stat = drive.attribute("stat")?;
        Ok(stat.split_whitespace().nth(6).context("sectors written")?.parse()?)
    };
    let before = written()?;
    let subjects = "dm-linear,ours-fused";
    run.finish(
        &[&LITTLE[..], &["--read-only", "--loads", "randread-4k-qd32", "--only", subjects]]
            .concat(),
    )?;
    ensure!(array(&run.results()?["samples"])?.len() == 3, "{}", run.results()?);
    let written = written()? - before;
    ensure!(written == 0, "{written} sectors were written");
    let writes = run.argv(&["--read-only", "--loads", "randwrite-4k-qd1"])?;
    ensure_refused(&writes, "leaves none of the loads")?;
    ensure_nothing_left()?;
    Ok(Outcome::Pass)
}

fn killed(ctx: &Ctx) -> Result<Outcome> {
    let run = Run::new(ctx, &fresh_drive("drive0")?)?;
    let load = ["--read-only", "--loads", "randread-4k-qd1", "--sample", "0.1"];
    for (subject, device) in [("kernel-loop", "/dev/loop"), ("ours-slot", "/dev/ublkb")] {
        let mut child =
            run.start(&[&load[..], &["--only", subject, "--rounds", "1000"]].concat())?;
        let needle = format!("--filename={device}");
        wait_for("fio on the device", LIMIT, || {
            Ok(process::run(&["pgrep", "-f", &format!("^[^ ]*fio .*{needle}")]).ok())
        })?;
        let second = run.argv(&load)?;
        ensure_refused(&second, "another ublk-bench runs")?;
        child.kill()?;
        child.wait()?;
        ensure!(Path::new(RECORD).exists(), "nothing says what was made");
        let said = run.finish(&[&load[..], &["--only", "raw", "--rounds", "1"]].concat())?.stderr;
        let expected = format!("removed {device}");
        ensure!(said.contains(&expected), "`{expected}` is not in:\n{said}");
        ensure_nothing_left()?;
    }
    Ok(Outcome::Pass)
}

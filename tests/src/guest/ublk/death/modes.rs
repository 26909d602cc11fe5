//! `--on-death`: what applications see of a server's death.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use super::{PATIENCE, await_device, await_nothing, end, kill_server, recover, refused};
use crate::config::DEFAULT;
use crate::guest::direct::{self, Aligned};
use crate::guest::drives::Drive;
use crate::guest::ublk::device::{Device, fresh_drive, text};
use crate::guest::udev::QuietUdev;
use crate::guest::{Ctx, Outcome, TestCase, wait_for};

pub const TESTS: &[TestCase] = &[
    TestCase::guest("death_fail_fails_all_io_and_the_device_goes", DEFAULT, fail),
    TestCase::guest("death_wait_fails_what_was_outstanding", DEFAULT, wait),
    TestCase::guest("death_reissue_fails_nothing", DEFAULT, reissue),
    TestCase::guest("death_error_fails_all_until_recovery", DEFAULT, error),
];

const EIO: i32 = 5;
const ENOSPC: i32 = 28;
const EREMOTEIO: i32 = 121;
/// Where requests are held back, for so long that a server can be killed meanwhile.
const HELD: u64 = 64 << 20;
const DELAY: &str = "range=64M+1M,delay=3s";
/// Where they are not.
const FREE: u64 = 128 << 20;
const BLOCK: usize = 4096;

/// How a request ended; an error is its number.
type Answer = Result<(), i32>;

/// A read or write by a thread of its own, for it may take long.
struct Request(Receiver<Answer>);

impl Request {
    fn write(file: &File, at: u64, byte: u8) -> Result<Self> {
        Self::start(file, move |file| file.write_all_at(Aligned::new(BLOCK, byte).bytes(), at))
    }

    /// Reads a block of `byte`s; other bytes are `EBADMSG`.
    fn read(file: &File, at: u64, byte: u8) -> Result<Self> {
        Self::start(file, move |file| {
            let mut block = Aligned::new(BLOCK, !byte);
            file.read_exact_at(block.bytes(), at)?;
            let is_right = block.bytes().iter().all(|it| *it == byte);
            if is_right { Ok(()) } else { Err(std::io::Error::from_raw_os_error(74)) }
        })
    }

    fn start(
        file: &File,
        request: impl FnOnce(&File) -> std::io::Result<()> + Send + 'static,
    ) -> Result<Self> {
        let file = file.try_clone()?;
        let (answer, answered) = mpsc::channel();
        thread::Builder::new().name("request".into()).spawn(move || {
            let done = request(&file);
            drop(file);
            // Nobody listens any more in a test that has failed.
            let _ = answer.send(done.map_err(|error| error.raw_os_error().unwrap_or(0)));
        })?;
        Ok(Self(answered))
    }

    fn answer(self) -> Result<Answer> {
        self.0.recv_timeout(PATIENCE).context("waiting for a request's answer")
    }

    /// Whether it waits still.
    fn waits(&self) -> Result<bool> {
        match self.0.recv_timeout(Duration::from_millis(500)) {
            Err(mpsc::RecvTimeoutError::Timeout) => Ok(true),
            Err(error) => bail!("{error}"),
            Ok(_) => Ok(false),
        }
    }
}

/// A device whose server is killed while a read and a write are outstanding, what these were
/// answered, and what is to be read where the write was, if its data got there.
struct Scene {
    device: Device,
    drive: Drive,
    /// The device, open since before the kill: while nobody serves it, opening it may have to wait
    /// for udev, which looks at its partitions then.
    file: File,
    read: Request,
    write: Request,
    quiet: QuietUdev,
}

/// On the drive before the write.
const OLD: u8 = 0x11;
const NEW: u8 = 0xa5;

fn kill_with_outstanding(on_death: &str) -> Result<Scene> {
    let drive = fresh_drive("drive0")?;
    let file = direct::open(drive.path())?;
    for at in [HELD, HELD + 8192, FREE] {
        file.write_all_at(Aligned::new(BLOCK, OLD).bytes(), at)?;
    }
    drop(file);
    let path = drive.path();
    let device = Device::add(&[
        "fault",
        "--rule",
        &format!("op=write,{DELAY}"),
        "--rule",
        &format!("op=read,{DELAY}"),
        "loop",
        "-f",
        text(&path)?,
        "--on-death",
        on_death,
    ])?;
    ensure!(device.described.on_death == on_death, "{device:?}");
    let quiet = QuietUdev::new()?;
    let file = direct::open(device.path()?)?;
    let write = Request::write(&file, HELD, NEW)?;
    let read = Request::read(&file, HELD + 8192, OLD)?;
    wait_for("both requests to be outstanding", PATIENCE, || {
        let inflight = device.attribute("inflight")?;
        let inflight: Vec<_> = inflight.split_whitespace().collect();
        Ok((inflight == ["1", "1"]).then_some(()))
    })?;
    kill_server(&device)?;
    Ok(Scene { device, drive, file, read, write, quiet })
}

/// What is on the drive where the write was.
fn on_drive(drive: &Drive, at: u64) -> Result<u8> {
    let mut block = Aligned::new(BLOCK, 0);
    direct::open(drive.path())?.read_exact_at(block.bytes(), at)?;
    let first = block.bytes()[0];
    ensure!(block.bytes().iter().all(|byte| *byte == first), "a torn write");
    Ok(first)
}

/// Everything works.
fn ensure_works(file: &File) -> Result<()> {
    for (at, byte) in [(FREE, 0x77), (FREE + 65536, 0x78)] {
        let write = Request::write(file, at, byte)?.answer()?;
        ensure!(write == Ok(()), "write at {at}: {write:?}");
        let read = Request::read(file, at, byte)?.answer()?;
        ensure!(read == Ok(()), "read at {at}: {read:?}");
    }
    Ok(())
}

fn fail(_ctx: &Ctx) -> Result<Outcome> {
    let Scene { device, drive, file, read, write, quiet } = kill_with_outstanding("fail")?;
    let answers = (write.answer()?, read.answer()?);
    ensure!(answers == (Err(EIO), Err(EIO)), "outstanding: {answers:?}");
    drop(file);
    let now = await_device(&device, "the device to be dead", |now| now.state == "DEAD")?;
    ensure!(now.pid.is_none(), "{now:?}");
    await_no_disk(&device)?;
    drop(quiet);
    let said = refused(&device)?;
    let expected = ["was added with `--on-death fail`", &format!("del -n {}", device.id())];
    ensure!(expected.iter().all(|part| said.contains(part)), "{said}");
    device.delete()?;
    await_nothing()?;

    // Later I/O, of a client that has the device open.
    let device = Device::add_loop(&drive.path(), &["--on-death", "fail"])?;
    let file = direct::open(device.path()?)?;
    kill_server(&device)?;
    await_no_disk(&device)?;
    // A disk that is gone has no bytes.
    let mut block = Aligned::new(BLOCK, 0);
    let read = file.read_at(block.bytes(), FREE)?;
    let write = file.write_at(block.bytes(), FREE).map_err(|error| error.raw_os_error());
    ensure!(read == 0 && write == Err(Some(ENOSPC)), "later: {read:?} {write:?}");
    drop(file);
    device.delete()?;
    await_nothing()?;
    Ok(Outcome::Pass)
}

fn await_no_disk(device: &Device) -> Result<()> {
    wait_for("the block device to go", PATIENCE, || {
        Ok((!device.described.device.exists()).then_some(()))
    })
}

fn wait(_ctx: &Ctx) -> Result<Outcome> {
    let Scene { mut device, drive, file, read, write, quiet } = kill_with_outstanding("wait")?;
    let answers = (write.answer()?, read.answer()?);
    ensure!(answers == (Err(EIO), Err(EIO)), "outstanding: {answers:?}");
    let now = await_device(&device, "the device to wait", |now| now.state == "QUIESCED")?;
    ensure!(now.pid.is_none() && now.on_death == "wait", "{now:?}");
    let later = [Request::write(&file, FREE, NEW)?, Request::read(&file, FREE + 4096, 0)?];
    for request in &later {
        ensure!(request.waits()?, "later I/O must wait");
    }
    // What was outstanding is not done again.
    ensure!(on_drive(&drive, HELD)? == OLD, "the failed write was carried out after all");
    recover(&mut device, &[])?;
    for request in later {
        let answer = request.answer()?;
        ensure!(answer == Ok(()), "later I/O: {answer:?}");
    }
    ensure!(has(&file, FREE, NEW)?, "the later write is lost");
    ensure!(has(&file, HELD, OLD)?, "the failed write was carried out after all");
    ensure_works(&file)?;
    drop(file);
    drop(quiet);
    end(device)?;
    Ok(Outcome::Pass)
}

fn reissue(_ctx: &Ctx) -> Result<Outcome> {
    let Scene { mut device, file, read, write, quiet, .. } = kill_with_outstanding("reissue")?;
    let now = await_device(&device, "the device to wait", |now| now.state == "QUIESCED")?;
    ensure!(now.pid.is_none() && now.on_death == "reissue", "{now:?}");
    let later = Request::write(&file, FREE, NEW)?;
    for (request, what) in [(&read, "read"), (&write, "write"), (&later, "later write")] {
        ensure!(request.waits()?, "the {what} must wait");
    }
    recover(&mut device, &[])?;
    for (request, what) in [(read, "read"), (write, "write"), (later, "later write")] {
        let answer = request.answer()?;
        ensure!(answer == Ok(()), "{what}: {answer:?}");
    }
    for at in [HELD, FREE] {
        ensure!(has(&file, at, NEW)?, "the write at {at} is lost");
    }
    ensure_works(&file)?;
    drop(file);
    drop(quiet);
    end(device)?;
    Ok(Outcome::Pass)
}

fn error(_ctx: &Ctx) -> Result<Outcome> {
    let Scene { mut device, file, read, write, quiet, .. } = kill_with_outstanding("error")?;
    let answers = (write.answer()?, read.answer()?);
    ensure!(answers == (Err(EIO), Err(EIO)), "outstanding: {answers:?}");
    let now = await_device(&device, "the device to fail I/O", |now| now.state == "FAIL_IO")?;
    ensure!(now.pid.is_none() && now.on_death == "error", "{now:?}");
    for _ in 0..3 {
        let write = Request::write(&file, FREE, NEW)?.answer()?;
        let read = Request::read(&file, FREE, OLD)?.answer()?;
        ensure!((write, read) == (Err(EREMOTEIO), Err(EREMOTEIO)), "later: {write:?} {read:?}");
    }
    recover(&mut device, &[])?;
    ensure!(has(&file, HELD, OLD)?, "the failed write was carried out after all");
    ensure_works(&file)?;
    drop(file);
    drop(quiet);
    end(device)?;
    Ok(Outcome::Pass)
}

/// Whether the device has a block of these bytes.
fn has(file: &File, at: u64, byte: u8) -> Result<bool> {
    Ok(Request::read(file, at, byte)?.answer()? == Ok(()))
}

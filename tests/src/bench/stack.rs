//! The devices, in the guest: each is made, measured and removed.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::column::{Column, SPAN};
use super::many::{Many, Null};
use super::row::{DEFAULT_LEND, Subject};
use crate::guest::dm::Mapper;
use crate::guest::ublk::device::{Device, load_driver};
use crate::guest::{process, wait_for};

/// `null_blk` devices that there are.
const NULLS: u32 = 4;
/// Extents of a linear device.
const EXTENTS: u64 = 3;
const SECTOR: u64 = 512;
/// How long rublk may take to make a device or to end.
const RUBLK_TIMEOUT: Duration = Duration::from_secs(10);
/// The program of the crate of the same name.
pub const RUBLK: &str = "rublk";

/// Loads what all devices are made of.
pub fn load_drivers() -> Result<()> {
    process::run(&["modprobe", "null_blk", "nr_devices=0"])?;
    process::run(&["modprobe", "-a", "dm_mod", "loop"])?;
    load_driver()?;
    for number in 0..NULLS {
        for (name, max_sectors) in [(LONG, MAX_SECTORS), (SHORT, DEFAULT_MAX_SECTORS)] {
            Null::make(&format!("{name}{number}"), max_sectors)?.keep();
        }
    }
    crate::guest::udev::settle()
}

/// `null_blk` devices that take all requests as they are, and those that do not take long ones.
const LONG: &str = "long";
const SHORT: &str = "short";
/// Sectors of a request, 1 MiB.
const MAX_SECTORS: u32 = 2048;
/// The driver's own choice, 127.5 KiB.
const DEFAULT_MAX_SECTORS: u32 = 0;

fn nulls(column: &Column) -> Result<Vec<String>> {
    let name = if column.is_cut { SHORT } else { LONG };
    (0..NULLS).map(|number| Null::path_of(&format!("{name}{number}"))).collect()
}

/// A device to measure.
#[derive(Debug)]
pub enum Stack {
    /// A `null_blk` device.
    Raw(String),
    /// A device-mapper device.
    Mapper(Mapper),
    /// A loop device.
    Loop(Loop),
    /// A device of rublk's.
    Rublk(Rublk),
    /// A device of ours.
    Ours(Device),
    /// Several devices.
    Many(Many),
}

impl Stack {
    /// Makes the device that a subject is for a load.
    pub fn make(subject: Subject, column: &Column) -> Result<Self> {
        let nulls = nulls(column)?;
        let first = &nulls[0];
        Ok(match subject {
            Subject::Raw => Self::Raw(first.clone()),
            Subject::DmLinear => {
                let line = format!("0 {} linear {first} 0", SPAN / SECTOR);
                Self::Mapper(Mapper::create("bench", &[line])?)
            }
            Subject::DmStripe(requests) => {
                let (chunk, _) = column.chunk_and_offset(requests);
                Self::Mapper(Mapper::create("bench", &[dm_stripe(chunk, &nulls)])?)
            }
            Subject::KernelLoop => Self::Loop(Loop::add(first)?),
            Subject::RublkLoop => Self::Rublk(Rublk::add_loop(first)?),
            Subject::Null => ours(&["null"], DEFAULT_LEND)?,
            Subject::Loop(lend) => ours(&["loop", "-f", first], lend.unwrap_or(DEFAULT_LEND))?,
            Subject::Layered(layers) => {
                let layers = layers.iter().flat_map(|layer| ["--layer", *layer]);
                let arguments: Vec<_> = ["loop", "-f", first].into_iter().chain(layers).collect();
                ours(&arguments, DEFAULT_LEND)?
            }
            Subject::Linear => {
                let extents: Vec<_> = (0..EXTENTS).zip(&nulls).map(extent).collect();
                ours(&files("linear", &extents), DEFAULT_LEND)?
            }
            Subject::Stripe(requests) => {
                let chunk = column.chunk_and_offset(requests).0.to_string();
                let mut arguments = files("stripe", &nulls);
                arguments.extend(["--chunk", &chunk]);
                ours(&arguments, DEFAULT_LEND)?
            }
            Subject::RawMany(count) => Self::Many(Many::raw(count, max_sectors(column))?),
            Subject::Fleet(count) => Self::Many(Many::ours(count, max_sectors(column))?),
        })
    }

    /// The block device; of several, all with colons between them.
    pub fn path(&self) -> Result<String> {
        Ok(match self {
            Self::Raw(path) => path.clone(),
            Self::Mapper(mapper) => mapper.path().display().to_string(),
            Self::Loop(device) => device.path.clone(),
            Self::Rublk(device) => device.path.clone(),
            Self::Ours(device) => device.path()?.to_owned(),
            Self::Many(many) => many.path(),
        })
    }

    /// Removes it.
    pub fn remove(self) -> Result<()> {
        match self {
            Self::Raw(_) => Ok(()),
            Self::Mapper(mapper) => mapper.remove(),
            Self::Loop(device) => device.remove(),
            Self::Rublk(device) => device.remove(),
            Self::Ours(device) => device.delete(),
            Self::Many(many) => many.remove(),
        }
    }
}

fn max_sectors(column: &Column) -> u32 {
    if column.is_cut { DEFAULT_MAX_SECTORS } else { MAX_SECTORS }
}

/// Table of a device-mapper device over as much of the backings as all of them have.
fn dm_stripe(chunk: u64, backings: &[String]) -> String {
    let legs: String = backings.iter().map(|backing| format!(" {backing} 0")).collect();
    format!("0 {} striped {} {}{legs}", SPAN / SECTOR * 2, backings.len(), chunk / SECTOR)
}

/// An extent that does not begin where its backing does.
fn extent((number, backing): (u64, &String)) -> String {
    format!("{backing},{},{}", number << 20, SPAN / EXTENTS)
}

fn files<'a>(target: &'a str, files: &'a [String]) -> Vec<&'a str> {
    let mut arguments = vec![target];
    files.iter().for_each(|file| arguments.extend(["-f", file]));
    arguments
}

/// A device of ours. The default mode is not asked for, but has to come.
fn ours(arguments: &[&str], lend: &str) -> Result<Stack> {
    let mode: &[&str] = if lend == DEFAULT_LEND { &[] } else { &["--lend", lend] };
    let device = Device::add(&[arguments, mode].concat())?;
    let chosen = &device.described.lend;
    ensure!(chosen == lend, "lend mode {chosen} was chosen instead of {lend}");
    Ok(Stack::Ours(device))
}

/// A device of the loop driver.
#[derive(Debug)]
pub struct Loop {
    path: String,
}

impl Loop {
    fn add(backing: &str) -> Result<Self> {
        let argv = ["losetup", "--find", "--show", "--direct-io=on", backing];
        let path = process::run(&argv)?.stdout.trim().to_owned();
        let device = Self { path };
        let name = device.path.strip_prefix("/dev/").context("losetup named no device")?;
        let direct = std::fs::read_to_string(format!("/sys/block/{name}/loop/dio"))?;
        ensure!(direct.trim() == "1", "{} does not do direct I/O", device.path);
        Ok(device)
    }

    fn remove(self) -> Result<()> {
        process::run(&["losetup", "--detach", &self.path]).map(drop)
    }
}

/// A device of rublk's, with the least id that is free.
#[derive(Debug)]
pub struct Rublk {
    path: String,
}

impl Rublk {
    const ID: &str = "0";

    fn add_loop(backing: &str) -> Result<Self> {
        process::run(&[RUBLK, "add", "loop", "-n", Self::ID, "--zero-copy", "-f", backing])?;
        let path = format!("/dev/ublkb{}", Self::ID);
        wait_for(&path, RUBLK_TIMEOUT, || Ok(Path::new(&path).exists().then_some(())))?;
        Ok(Self { path })
    }

    /// Its server deletes the device too once it is stopped, and `del` fails if it is the later of
    /// the two: what counts is that device and server go.
    fn remove(self) -> Result<()> {
        let said = process::run(&[RUBLK, "del", "-n", Self::ID]);
        wait_for("rublk's end", RUBLK_TIMEOUT, || {
            let is_gone = !Path::new(&self.path).exists();
            Ok((is_gone && process::run(&["pgrep", "-x", RUBLK]).is_err()).then_some(()))
        })
        .or_else(|late| said.and(Err(late)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::column::COLUMNS;
    use crate::bench::row::Requests;

    #[test]
    fn tables_of_stripes_are_whole_rows_that_hold_the_load() {
        for column in COLUMNS {
            for requests in [Requests::Within, Requests::Crossing] {
                let (chunk, offset) = column.chunk_and_offset(requests);
                let nulls: Vec<_> = (0..NULLS).map(|number| format!("/dev/null{number}")).collect();
                let table = dm_stripe(chunk, &nulls);
                let numbers: Vec<u64> =
                    table.split(' ').filter_map(|word| word.parse().ok()).collect();
                let [0, sectors, width, chunk_sectors, ..] = numbers[..] else { panic!("{table}") };
                assert_eq!(sectors % (width * chunk_sectors), 0);
                assert!(sectors * SECTOR >= SPAN + offset);
            }
        }
    }

    #[test]
    fn extents_hold_the_load_together() {
        assert_eq!(SPAN % EXTENTS, 0);
        assert_eq!(SPAN / EXTENTS % (128 << 10), 0, "a request would cross");
        assert_eq!(extent((2, &"/dev/x".to_owned())), "/dev/x,2097152,268435456");
        let extents = ["a,1,2".to_owned(), "b".to_owned()];
        assert_eq!(files("linear", &extents), ["linear", "-f", "a,1,2", "-f", "b"]);
    }
}

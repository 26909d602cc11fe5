//! Proofs with the kernel as witness: the modes that lend copy nothing, a flush and a FUA write reach
//! the drive.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::device::{Device, fresh_drive, text};
use crate::config::TRACING;
use crate::guest::udev::QuietUdev;
use crate::guest::{Ctx, FIGURE, Outcome, TestCase, fio, process};
use crate::witness::{NvmeCommands, Witness};

pub const TESTS: &[TestCase] = &[
    TestCase::guest("lending_copies_nothing_by_the_drivers_functions", TRACING, functions)
        .seconds(600),
    TestCase::guest("lending_gives_the_drive_the_clients_pages", TRACING, pages).seconds(300),
    TestCase::guest("flush_and_fua_reach_the_drive", TRACING, flush_and_fua).seconds(300),
    TestCase::guest("discard_and_write_zeroes_reach_the_drive", TRACING, deallocation).seconds(300),
];

pub const REQUESTS: u64 = 2048;

/// Reads and writes a fixed number of blocks.
fn run_load(ctx: &Ctx, device: &str, rw: &str, block: &str) -> Result<()> {
    let filename = format!("filename={device}");
    let blocks = format!("number_ios={REQUESTS}");
    let (rw, block) = (format!("rw={rw}"), format!("bs={block}"));
    let options = [
        &filename,
        rw.as_str(),
        &block,
        &blocks,
        "iodepth=16",
        "size=64m",
        "io_size=1g",
        "ioengine=io_uring",
        "direct=1",
        "norandommap=1",
    ];
    let report = fio::run(ctx, &options)?;
    ensure!(report.read.requests + report.write.requests == REQUESTS, "{report:?}");
    Ok(())
}

/// The driver's copy function is not called in the modes that lend, and is in the others, which
/// shows that the counter works.
fn functions(ctx: &Ctx) -> Result<Outcome> {
    let drive = fresh_drive("drive0")?;
    let (mut copied_by, mut lent_by) = (BTreeSet::new(), BTreeSet::new());
    for lend in ["fused", "slot", "user-copy", "copy"] {
        for rw in ["randread", "randwrite"] {
            for block in ["4k", "128k"] {
                let device = Device::add_loop(&drive.path(), &["--lend", lend])?;
                crate::guest::udev::settle()?;
                let witness = Witness::new()?;
                run_load(ctx, device.path()?, rw, block)?;
                let counts = witness.counts()?;
                println!("{lend} {rw} {block}: {REQUESTS} requests, {counts}");
                // Something else (a udev probe) may read as well, so there may be more.
                match lend {
                    "fused" | "slot" => counts.ensure_lent(REQUESTS),
                    _ => counts.ensure_copied(REQUESTS),
                }
                .with_context(|| format!("{lend} {rw} {block}"))?;
                copied_by.extend(counts.copies.called());
                lent_by.extend(counts.loans.called());
                drop(witness);
                device.delete()?;
            }
        }
    }
    let names = |names: BTreeSet<&str>| names.into_iter().collect::<Vec<_>>().join(", ");
    println!("{FIGURE}the driver copied by {}, lent by {}", names(copied_by), names(lent_by));
    Ok(Outcome::Pass)
}

/// The first page of each request to the drive is a page that the client's request to the ublk
/// device had. In the copy modes none is.
fn pages(ctx: &Ctx) -> Result<Outcome> {
    let drive = fresh_drive("drive0")?;
    for (lend, is_same) in [("fused", true), ("slot", true), ("copy", false)] {
        for rw in ["randread", "randwrite"] {
            let device = Device::add_loop(&drive.path(), &["--lend", lend])?;
            crate::guest::udev::settle()?;
            let (same, other) = shared_pages(ctx, &device, &drive.name, rw, "4k")?;
            println!("{lend} {rw}: {same} requests with the client's page, {other} with another");
            // Neighbours in a batch may be merged into one request.
            ensure!(same + other >= REQUESTS * 9 / 10, "too few requests were seen");
            ensure!(if is_same { other == 0 } else { same == 0 });
            device.delete()?;
        }
    }
    Ok(Outcome::Pass)
}

/// Counts the requests of a drive that have, and have not, a page of a ublk request.
pub fn shared_pages(
    ctx: &Ctx,
    device: &Device,
    drive: &str,
    rw: &str,
    block: &str,
) -> Result<(u64, u64)> {
    // Its reads have pages of their own.
    let _quiet = QuietUdev::new()?;
    let number = |disk: &str| -> Result<(String, String)> {
        let devt = std::fs::read_to_string(format!("/sys/block/{disk}/dev"))?;
        let (major, minor) = devt.trim().split_once(':').context("a device number")?;
        Ok((major.to_owned(), minor.to_owned()))
    };
    let ublk = number(&format!("ublkb{}", device.described.id))?;
    let nvme = number(drive)?;
    // The pages are compared when all is over, since the kernel may fail to note one: a map's memory
    // is refilled by an interrupt, and sixteen new pages can come before it.
    let script = format!(
        "rawtracepoint:block_rq_issue {{
            $rq = (struct request *)arg0; $disk = $rq->q->disk;
            if ($disk != 0 && $rq->bio != 0 && $rq->__data_len > 0) {{
                $page = (uint64)$rq->bio->bi_io_vec->bv_page;
                if ($disk->major == {} && $disk->first_minor == {}) {{ @lent[$page] = count(); }}
                if ($disk->major == {} && $disk->first_minor == {}) {{ @used[$page] = count(); }}
            }}
        }}",
        ublk.0, ublk.1, nvme.0, nvme.1
    );
    let load = ctx.directory().join("load.sh");
    let fio = format!(
        "#!/bin/sh\nexec fio --name=load --filename={} --rw={rw} --bs={block} --iodepth=16 --size=64m --io_size=1g \
         --number_ios={REQUESTS} --ioengine=io_uring --direct=1 --norandommap=1 --output=/dev/null\n",
        device.path()?
    );
    std::fs::write(&load, fio)?;
    let command = format!("sh {}", text(&load)?);
    let printed = process::run(&["bpftrace", "-f", "json", "-e", &script, "-c", &command])
        .context(
            "the pages of requests are looked for by bpftrace: trace point block_rq_issue, \
             `q->disk`, `bio->bi_io_vec` and `__data_len` of struct request, numbers of struct gendisk",
        )?;
    let maps: Vec<Value> =
        printed.stdout.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let pages = |name: &str| -> Result<BTreeMap<String, u64>> {
        let found = maps.iter().find_map(|line| line.get("data")?.get(name));
        let found = found
            .with_context(|| format!("bpftrace printed\n{}{}", printed.stdout, printed.stderr))?;
        Ok(serde_json::from_value(found.clone())?)
    };
    let (lent, used) = (pages("@lent")?, pages("@used")?);
    let requests = |is_lent: bool| {
        let pages = used.iter().filter(|(page, _)| lent.contains_key(*page) == is_lent);
        pages.map(|(_, requests)| requests).sum::<u64>()
    };
    Ok((requests(true), requests(false)))
}

fn flush_and_fua(_ctx: &Ctx) -> Result<Outcome> {
    let drive = fresh_drive("drive0")?;
    for lend in ["fused", "copy"] {
        let device = Device::add_loop(&drive.path(), &["--lend", lend])?;
        crate::guest::udev::settle()?;
        let output = format!("of={}", device.path()?);
        let dd = |flags: &str| {
            let argv =
                ["dd", "if=/dev/zero", output.as_str(), "bs=4k", "count=10", "status=none", flags];
            process::run(&argv).map(drop)
        };

        let commands = NvmeCommands::record(&[&drive.name])?;
        dd("oflag=direct")?;
        let flushes = commands.count(&["nvme_cmd_flush"])?;
        ensure!(flushes == 0, "{flushes} flushes without a request for one");
        ensure!(commands.count(&["nvme_cmd_write "])? == 10, "{:#?}", commands.lines()?);
        ensure!(fua_writes(&commands)? == 0, "FUA without a request for it");
        drop(commands);

        let commands = NvmeCommands::record(&[&drive.name])?;
        process::run(&["sync", device.path()?])?;
        let flushes = commands.count(&["nvme_cmd_flush"])?;
        ensure!(flushes >= 1, "a sync did not flush the drive: {:#?}", commands.lines()?);
        drop(commands);

        let commands = NvmeCommands::record(&[&drive.name])?;
        dd("oflag=direct,dsync")?;
        let (fua, flushes) = (fua_writes(&commands)?, commands.count(&["nvme_cmd_flush"])?);
        println!("{lend}: 10 synchronous writes became {fua} FUA writes and {flushes} flushes");
        ensure!(fua == 10, "{:#?}", commands.lines()?);
        drop(commands);
        device.delete()?;
    }
    Ok(Outcome::Pass)
}

/// Writes with the FUA bit: bit 30 of command dword 12, bit 14 of its control field.
pub fn fua_writes(commands: &NvmeCommands) -> Result<usize> {
    let writes = commands.lines()?.into_iter().filter(|line| line.contains("nvme_cmd_write "));
    let control = |line: String| {
        let rest = line.split("ctrl=0x").nth(1)?.to_owned();
        u32::from_str_radix(rest.split(|c: char| !c.is_ascii_hexdigit()).next()?, 16).ok()
    };
    Ok(writes.filter_map(control).filter(|control| control & (1 << 14) != 0).count())
}

fn deallocation(_ctx: &Ctx) -> Result<Outcome> {
    let drive = fresh_drive("drive0")?;
    for lend in ["fused", "copy"] {
        let device = Device::add_loop(&drive.path(), &["--lend", lend])?;
        crate::guest::udev::settle()?;
        let commands = NvmeCommands::record(&[&drive.name])?;
        process::run(&["blkdiscard", "-l", "1M", device.path()?])?;
        ensure!(commands.count(&["nvme_cmd_dsm"])? >= 1, "{:#?}", commands.lines()?);
        ensure!(commands.count(&["nvme_cmd_write_zeroes"])? == 0, "a discard wrote zeroes");
        process::run(&["blkdiscard", "-z", "-l", "256k", device.path()?])?;
        ensure!(commands.count(&["nvme_cmd_write_zeroes"])? >= 1, "{:#?}", commands.lines()?);
        ensure!(commands.count(&["nvme_cmd_write "])? == 0, "zeroes were written as data");
        drop(commands);
        device.delete()?;
    }
    Ok(Outcome::Pass)
}

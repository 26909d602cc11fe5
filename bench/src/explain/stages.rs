//! The stages of one I/O, out of the events of a trace.

use super::trace::{DeviceNumber, Event, Request, What};

/// A stage of a read's way. Each lasts from the end of the one before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Stage {
    /// Until the block layer hands the request to the ublk driver.
    Submit,
    /// Until the server's thread runs.
    WakeServer,
    /// Until the block layer hands the server's request to the drive.
    Issue,
    /// Until the drive is done with it, the interrupt included.
    Drive,
    /// Until the server's thread runs again.
    WakeAnswer,
    /// Until the driver completes the request.
    Answer,
    /// Where no drive's events are to be seen: from when the server runs until the driver completes
    /// the request, all that is below included.
    Serve,
    /// Until the client's thread runs.
    WakeClient,
    /// Until the system call has returned.
    Return,
}

/// What a stage is spent on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Cause {
    /// The client's way into the kernel and back.
    Client,
    /// Waking threads.
    Scheduler,
    /// The server, its ring, and the block layer below it.
    Server,
    /// The drive.
    Drive,
    /// The server and all below it.
    Below,
}

/// The stages of a device whose backing shows its requests.
pub const WITH_DRIVE: [Stage; 8] = [
    Stage::Submit,
    Stage::WakeServer,
    Stage::Issue,
    Stage::Drive,
    Stage::WakeAnswer,
    Stage::Answer,
    Stage::WakeClient,
    Stage::Return,
];
/// The stages of one whose backing does not, or that has none.
pub const WITHOUT_DRIVE: [Stage; 5] =
    [Stage::Submit, Stage::WakeServer, Stage::Serve, Stage::WakeClient, Stage::Return];

impl Stage {
    /// What programs call it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Submit => "submit",
            Self::WakeServer => "wake-server",
            Self::Issue => "issue",
            Self::Drive => "drive",
            Self::WakeAnswer => "wake-answer",
            Self::Answer => "answer",
            Self::Serve => "serve",
            Self::WakeClient => "wake-client",
            Self::Return => "return",
        }
    }

    /// What people are told.
    #[must_use]
    pub fn title(self) -> &'static str {
        match self {
            Self::Submit => "client submits: system call, block layer",
            Self::WakeServer => "server's thread is woken",
            Self::Issue => "server takes it up, issues to the drive",
            Self::Drive => "drive",
            Self::WakeAnswer => "server's thread is woken again",
            Self::Answer => "server commits the answer",
            Self::Serve => "server, and all below it",
            Self::WakeClient => "client's thread is woken",
            Self::Return => "client returns from the system call",
        }
    }

    /// What it is spent on.
    #[must_use]
    pub fn cause(self) -> Cause {
        match self {
            Self::Submit | Self::Return => Cause::Client,
            Self::WakeServer | Self::WakeAnswer | Self::WakeClient => Cause::Scheduler,
            Self::Issue | Self::Answer => Cause::Server,
            Self::Drive => Cause::Drive,
            Self::Serve => Cause::Below,
        }
    }
}

impl Cause {
    /// As the subject of a sentence.
    #[must_use]
    pub fn words(self) -> &'static str {
        match self {
            Self::Client => "the client's way into the kernel and back",
            Self::Scheduler => "waking threads",
            Self::Server => "the server, its ring and the block layer below it",
            Self::Drive => "the drive",
            Self::Below => "the server and all below it",
        }
    }
}

/// A read of the load.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Read {
    /// The first sector.
    pub sector: u64,
    /// Before the system call, in microseconds of the monotonic clock.
    pub began_us: u64,
    /// After it.
    pub ended_us: u64,
}

/// Whose events are whose.
#[derive(Debug, Clone)]
pub struct Parties {
    /// The ublk device.
    pub device: DeviceNumber,
    /// What it lies on; empty if that cannot be seen.
    pub backings: Vec<DeviceNumber>,
    /// The threads of the server.
    pub server: Vec<u32>,
    /// The thread that reads.
    pub client: u32,
    /// Sectors of a read.
    pub sectors: u64,
}

/// The reads of a load, divided.
#[derive(Debug, PartialEq, Eq)]
pub struct Division {
    /// The stages.
    pub stages: &'static [Stage],
    /// How long each took, in microseconds, for each read.
    pub reads: Vec<Vec<u64>>,
    /// Reads whose events do not fit: left out.
    pub left_out: usize,
}

/// Divides each read into stages, which add up to the whole.
#[must_use]
pub fn divide(reads: &[Read], events: &[Event], parties: &Parties) -> Division {
    let ways: Vec<Option<Way>> =
        reads.iter().map(|read| way(read, during(read, events), parties)).collect();
    let seen = ways.iter().flatten().filter(|way| way.drive.is_some()).count();
    // One kind for all: what most reads are.
    let with_drive = 2 * seen > ways.iter().flatten().count();
    let divided: Vec<Vec<u64>> = reads
        .iter()
        .zip(&ways)
        .filter_map(|(read, way)| lengths(read, way.as_ref()?, with_drive))
        .collect();
    Division {
        stages: if with_drive { &WITH_DRIVE } else { &WITHOUT_DRIVE },
        left_out: reads.len() - divided.len(),
        reads: divided,
    }
}

/// The events from the beginning of a read to its end.
fn during<'a>(read: &Read, events: &'a [Event]) -> &'a [Event] {
    let first = events.partition_point(|event| event.at_us < read.began_us);
    let end = events.partition_point(|event| event.at_us <= read.ended_us);
    &events[first..end.max(first)]
}

/// When a read passed from one stage to the next.
#[derive(Debug)]
struct Way {
    issued: u64,
    server_runs: u64,
    drive: Option<OnDrive>,
    completed: u64,
    client_runs: u64,
}

#[derive(Debug)]
struct OnDrive {
    issued: u64,
    completed: u64,
    server_runs: u64,
}

fn way(read: &Read, events: &[Event], parties: &Parties) -> Option<Way> {
    let ours = Request { device: parties.device, sector: read.sector, sectors: parties.sectors };
    let issued = position(events, 0, |event| event.what == What::Issued(ours))?;
    let completed = position(events, issued, |event| event.what == What::Completed(ours))?;
    let below = &events[issued..completed];
    let on_backing = |request: &Request| parties.backings.contains(&request.device);
    // Several requests, where a read goes to several drives.
    let first = below
        .iter()
        .position(|event| matches!(&event.what, What::Issued(request) if on_backing(request)));
    let last = below
        .iter()
        .rposition(|event| matches!(&event.what, What::Completed(request) if on_backing(request)));
    let run = |from: &[Event], threads: &[u32], otherwise: u64| {
        let mut runs = from
            .iter()
            .filter(|event| matches!(event.what, What::Runs(thread) if threads.contains(&thread)));
        // A thread that did not sleep needs no waking.
        runs.next().map_or(otherwise, |event| event.at_us)
    };
    let at_us = |index: usize| below[index].at_us;
    let drive = first.zip(last).filter(|(first, last)| first < last).map(|(first, last)| OnDrive {
        issued: at_us(first),
        completed: at_us(last),
        server_runs: run(&below[last..], &parties.server, at_us(last)),
    });
    let until = first.unwrap_or(below.len());
    Some(Way {
        issued: events[issued].at_us,
        server_runs: run(&below[..until], &parties.server, events[issued].at_us),
        drive,
        completed: events[completed].at_us,
        client_runs: run(&events[completed..], &[parties.client], events[completed].at_us),
    })
}

fn position(events: &[Event], from: usize, is: impl Fn(&Event) -> bool) -> Option<usize> {
    Some(from + events[from..].iter().position(is)?)
}

/// The differences between the moments, which rise since the events are in order.
fn lengths(read: &Read, way: &Way, with_drive: bool) -> Option<Vec<u64>> {
    let mut moments = vec![read.began_us, way.issued, way.server_runs];
    if with_drive {
        let drive = way.drive.as_ref()?;
        moments.extend([drive.issued, drive.completed, drive.server_runs]);
    }
    moments.extend([way.completed, way.client_runs, read.ended_us]);
    moments.windows(2).map(|pair| pair[1].checked_sub(pair[0])).collect()
}

#[cfg(test)]
mod tests;

//! The stages of one I/O, from the events of a trace.

use super::trace::{DeviceNumber, Event, Request, What};

/// A stage of a read. Each begins when the previous one ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Stage {
    /// Until the block layer passes the request to the ublk driver.
    Submit,
    /// Until the server's thread runs.
    WakeServer,
    /// Until the block layer passes the server's request to the drive.
    Issue,
    /// Until the drive has completed it, including the interrupt.
    Drive,
    /// Until the server's thread runs again.
    WakeAnswer,
    /// Until the driver completes the request.
    Answer,
    /// If there are no events of a drive: from when the server runs until the driver completes the
    /// request, including everything below.
    Serve,
    /// Until the client's thread runs.
    WakeClient,
    /// Until the system call returns.
    Return,
}

/// The cause of a stage's time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Cause {
    /// The client's system call.
    Client,
    /// Waking threads.
    Scheduler,
    /// The server, its ring, and the block layer below it.
    Server,
    /// The drive.
    Drive,
    /// The server and everything below it.
    Below,
}

/// The stages if the requests to the backing are visible.
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
/// The stages if they are not visible, or there is no backing.
pub const WITHOUT_DRIVE: [Stage; 5] =
    [Stage::Submit, Stage::WakeServer, Stage::Serve, Stage::WakeClient, Stage::Return];

impl Stage {
    /// Its name in JSON.
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

    /// Its title in text.
    #[must_use]
    pub fn title(self) -> &'static str {
        match self {
            Self::Submit => "client submits: system call, block layer",
            Self::WakeServer => "server's thread is woken",
            Self::Issue => "server handles it, issues to the drive",
            Self::Drive => "drive",
            Self::WakeAnswer => "server's thread is woken again",
            Self::Answer => "server commits the answer",
            Self::Serve => "server, and everything below it",
            Self::WakeClient => "client's thread is woken",
            Self::Return => "client returns from the system call",
        }
    }

    /// Its cause.
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
    /// In words, for use in a sentence.
    #[must_use]
    pub fn words(self) -> &'static str {
        match self {
            Self::Client => "the client's system call",
            Self::Scheduler => "waking threads",
            Self::Server => "the server, its ring and the block layer below it",
            Self::Drive => "the drive",
            Self::Below => "the server and everything below it",
        }
    }
}

/// A read of the load.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Read {
    /// The first sector.
    pub sector: u64,
    /// The time before the system call, in microseconds of the monotonic clock.
    pub began_us: u64,
    /// The time after it.
    pub ended_us: u64,
}

/// The devices and threads that events belong to.
#[derive(Debug, Clone)]
pub struct Parties {
    /// The ublk device.
    pub device: DeviceNumber,
    /// The disks below it; empty if they are not visible.
    pub backings: Vec<DeviceNumber>,
    /// The threads of the server.
    pub server: Vec<u32>,
    /// The thread that reads.
    pub client: u32,
    /// Sectors of a read.
    pub sectors: u64,
}

/// The reads of a load, divided into stages.
#[derive(Debug, PartialEq, Eq)]
pub struct Division {
    /// The stages.
    pub stages: &'static [Stage],
    /// For each read, the duration of each stage in microseconds.
    pub reads: Vec<Vec<u64>>,
    /// The number of reads that were left out because their events are inconsistent.
    pub left_out: usize,
}

/// Divides each read into stages, which add up to its duration.
#[must_use]
pub fn divide(reads: &[Read], events: &[Event], parties: &Parties) -> Division {
    let passages: Vec<Option<Passage>> =
        reads.iter().map(|read| passage(read, during(read, events), parties)).collect();
    let seen = passages.iter().flatten().filter(|passage| passage.drive.is_some()).count();
    // All reads are divided in the same way, which fits most of them.
    let with_drive = 2 * seen > passages.iter().flatten().count();
    let divided: Vec<Vec<u64>> = reads
        .iter()
        .zip(&passages)
        .filter_map(|(read, passage)| lengths(read, passage.as_ref()?, with_drive))
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

/// The times at which a read passed from one stage to the next.
#[derive(Debug)]
struct Passage {
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

fn passage(read: &Read, events: &[Event], parties: &Parties) -> Option<Passage> {
    let ours = Request { device: parties.device, sector: read.sector, sectors: parties.sectors };
    let issued = position(events, 0, |event| event.what == What::Issued(ours))?;
    let completed = position(events, issued, |event| event.what == What::Completed(ours))?;
    let below = &events[issued..completed];
    let on_backing = |request: &Request| parties.backings.contains(&request.device);
    // There are several requests if a read goes to several drives.
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
        // A thread that did not sleep is not woken.
        runs.next().map_or(otherwise, |event| event.at_us)
    };
    let at_us = |index: usize| below[index].at_us;
    let drive = first.zip(last).filter(|(first, last)| first < last).map(|(first, last)| OnDrive {
        issued: at_us(first),
        completed: at_us(last),
        server_runs: run(&below[last..], &parties.server, at_us(last)),
    });
    let until = first.unwrap_or(below.len());
    Some(Passage {
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

/// The durations of the stages. The times ascend since the events are in order.
fn lengths(read: &Read, passage: &Passage, with_drive: bool) -> Option<Vec<u64>> {
    let mut moments = vec![read.began_us, passage.issued, passage.server_runs];
    if with_drive {
        let drive = passage.drive.as_ref()?;
        moments.extend([drive.issued, drive.completed, drive.server_runs]);
    }
    moments.extend([passage.completed, passage.client_runs, read.ended_us]);
    moments.windows(2).map(|pair| pair[1].checked_sub(pair[0])).collect()
}

#[cfg(test)]
mod tests;

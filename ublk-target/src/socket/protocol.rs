//! The lines of the protocol. The [parent module](super) describes it.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use ublk_engine::lane::fault::Injected;

use crate::config::{LayerEdit, LayerName};

/// The protocol version.
pub const VERSION: u32 = 1;

/// Longest line that a server reads, in bytes, with the line end.
pub const MAX_REQUEST_BYTES: usize = 16 << 10;
/// Longest line that a client reads, in bytes, with the line end.
pub const MAX_RESPONSE_BYTES: usize = 64 << 20;

/// A command of a client.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case")]
pub enum Command {
    /// A snapshot.
    Snapshot {
        /// Measure latencies for this connection.
        #[serde(default)]
        latencies: bool,
        /// List each lent slot.
        #[serde(default)]
        slots: bool,
    },
    /// Read the new size of the backings. The answer is the largest size of the device; the client
    /// tells the kernel the new size.
    Grow {
        /// The size of a null device, in bytes.
        #[serde(default)]
        size: Option<u64>,
    },
    /// Change the layers of the device. The answer comes when the change is made.
    ChangeLayers {
        /// The change.
        edit: LayerEdit,
        /// How long to wait for the requests that have begun, in milliseconds.
        timeout_ms: u64,
    },
    /// Hand the device over to another program. The answer says whether the server will try.
    Upgrade {
        /// Its absolute path.
        program: PathBuf,
        /// The expected file: its device and inode numbers.
        file: (u64, u64),
        /// A descriptor of the file in the client's process, since the server has left the client's
        /// mounts.
        descriptor: i32,
    },
}

#[derive(Serialize)]
struct Request {
    version: u32,
    #[serde(flatten)]
    command: Command,
}

/// Why a line is not valid.
#[non_exhaustive]
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadRequest {
    /// It is not a JSON object with a version.
    #[error("a line must be a JSON object with a version and a command")]
    NotAnObject,
    /// It has an unknown version.
    #[error("version {0} is not known; this server speaks version {VERSION}")]
    Version(u64),
    /// It has an unknown command, or wrong parameters.
    #[error("the command is not understood: {0}")]
    Command(String),
    /// It is longer than [`MAX_REQUEST_BYTES`].
    #[error("a line has at most {MAX_REQUEST_BYTES} bytes")]
    TooLong,
}

impl Command {
    /// The request as a line, with the line end.
    #[must_use]
    pub fn to_line(&self) -> String {
        to_line(&Request { version: VERSION, command: self.clone() })
    }

    /// Reads a line.
    ///
    /// # Errors
    /// [`BadRequest`].
    pub fn parse(line: &[u8]) -> Result<Self, BadRequest> {
        let request: serde_json::Value =
            serde_json::from_slice(line).map_err(|_| BadRequest::NotAnObject)?;
        let version = request.get("version").and_then(serde_json::Value::as_u64);
        let version = version.ok_or(BadRequest::NotAnObject)?;
        if version != u64::from(VERSION) {
            return Err(BadRequest::Version(version));
        }
        serde_json::from_value(request).map_err(|error| BadRequest::Command(error.to_string()))
    }
}

/// An answer of a server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Response {
    /// [`VERSION`].
    pub version: u32,
    /// The answer.
    #[serde(flatten)]
    pub answer: Answer,
}

/// The kinds of answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// The snapshot.
    Snapshot(Snapshot),
    /// The largest size of the device in bytes.
    Size(u64),
    /// The layers were changed.
    Layers(LayersAnswer),
    /// The server will do it.
    Accepted,
    /// The error text.
    Error(String),
}

/// The result of [`Command::ChangeLayers`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayersAnswer {
    /// The layer that was attached or detached.
    pub name: Option<LayerName>,
    /// How long requests were held back, in microseconds.
    pub pause_us: u64,
}

impl Answer {
    /// The response as a line, with the line end.
    #[must_use]
    pub fn into_line(self) -> String {
        to_line(&Response { version: VERSION, answer: self })
    }
}

fn to_line(message: &impl Serialize) -> String {
    // It cannot fail: all keys are strings.
    let mut line = serde_json::to_string(message).unwrap_or_default();
    line.push('\n');
    line
}

/// A snapshot of a device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// Device id.
    pub device: u32,
    /// Its lanes, without those that have ended.
    pub lanes: Vec<LaneStats>,
    /// Latencies of all lanes together, since the connection's previous snapshot.
    pub latencies: Vec<Latency>,
}

/// A snapshot of a lane.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LaneStats {
    /// The queue.
    pub qid: u16,
    /// Time of the snapshot, in nanoseconds of the monotonic clock.
    pub at_ns: u64,
    /// Its requests, counters and slots.
    #[serde(flatten)]
    pub activity: Activity,
    /// Operations with a fault injected by a test; absent if there were none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub injected: Option<Injected>,
    /// The lent slots; absent unless asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lent: Option<Vec<LentSlot>>,
    /// The first few leaked slots; [`Slots::leaked`] has their number.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub leaks: Vec<LentSlot>,
    /// Latencies since the connection's previous snapshot.
    pub latencies: Vec<Latency>,
}

/// Requests, counters and slots of one lane, or of all lanes of a device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Activity {
    /// Requests that were delivered and not yet committed.
    pub in_flight: u64,
    /// Requests since the start, by kind.
    pub requests: BTreeMap<String, Requests>,
    /// Other counters since the start, by name.
    pub counters: BTreeMap<String, u64>,
    /// The buffer table.
    pub slots: Slots,
}

/// Requests of one kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Requests {
    /// Their number.
    pub requests: u64,
    /// Their bytes.
    pub bytes: u64,
}

/// Numbers of slots of the buffer table by state. `free`, `reserved`, `active`, `retiring` and
/// `quarantined` add up to `capacity`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Slots {
    /// All slots.
    pub capacity: u64,
    /// Slots that are not lent.
    pub free: u64,
    /// Slots that are lent.
    pub lent: u64,
    /// Slots with a registration in flight.
    pub reserved: u64,
    /// Slots that operations may borrow.
    pub active: u64,
    /// Slots that at least one operation borrows.
    pub borrowed: u64,
    /// Operations that borrow.
    pub borrows: u64,
    /// Slots whose buffer is on its way back.
    pub retiring: u64,
    /// Slots whose buffer the kernel may still use.
    pub quarantined: u64,
    /// Lent slots with a lost lease.
    pub leaked: u64,
}

/// A lent slot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LentSlot {
    /// The slot.
    pub slot: u16,
    /// Its state: `reserved`, `active`, `retiring` or `quarantined`.
    pub state: String,
    /// Device id of the request that it is lent for.
    pub device: u32,
    /// Queue of the request.
    pub qid: u16,
    /// Tag of the request.
    pub tag: u16,
    /// Time since it was lent, in nanoseconds.
    pub age_ns: u64,
    /// The operations that borrow it.
    pub borrowers: Vec<Borrower>,
}

/// An operation that borrows a slot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Borrower {
    /// Its number in the registry, hexadecimal.
    pub label: String,
    /// The operation; absent if it is not in flight.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub op: Option<Operation>,
}

/// The unfinished part of an operation on a backing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Operation {
    /// `read`, `write`, `write-fua`, `flush`, `discard`, `write-zeroes`, `read-scratch`,
    /// `write-scratch` or `delay`.
    pub kind: String,
    /// Index of the backing.
    pub backing: u16,
    /// First byte on the backing.
    pub offset: u64,
    /// Length in bytes.
    pub len: u64,
}

/// Latencies of one kind of request in one stage of its life, in nanoseconds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Latency {
    /// The kind of request.
    pub kind: String,
    /// The stage ([`STAGES`](ublk_engine::engine::STAGES)).
    pub stage: String,
    /// Number of requests; never 0.
    pub count: u64,
    /// Mean.
    pub mean_ns: u64,
    /// Smallest.
    pub min_ns: u64,
    /// Median.
    pub p50_ns: u64,
    /// 90 of 100 took no longer.
    pub p90_ns: u64,
    /// 99 of 100 took no longer.
    pub p99_ns: u64,
    /// 999 of 1,000 took no longer.
    pub p99_9_ns: u64,
    /// Greatest.
    pub max_ns: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_lines_and_back() {
        for (latencies, slots) in [(false, false), (true, false), (true, true)] {
            let command = Command::Snapshot { latencies, slots };
            let line = command.to_line();
            assert!(line.ends_with("}\n") && line.len() < MAX_REQUEST_BYTES, "{line}");
            assert_eq!(Command::parse(line.trim_end().as_bytes()), Ok(command));
        }
        let least = br#"{"version":1,"command":"snapshot"}"#;
        let command = Command::Snapshot { latencies: false, slots: false };
        assert_eq!(Command::parse(least), Ok(command));
    }

    #[test]
    fn bad_lines_are_told_apart() {
        let table: [(&[u8], &str); 9] = [
            (b"", "must be a JSON object"),
            (b"snapshot", "must be a JSON object"),
            (b"[1]", "must be a JSON object"),
            (b"{\"command\":\"snapshot\"}", "must be a JSON object"),
            (b"{\"version\":\"1\",\"command\":\"snapshot\"}", "must be a JSON object"),
            (b"{\"version\":2,\"command\":\"snapshot\"}", "version 2 is not known"),
            (b"{\"version\":1}", "missing field `command`"),
            (b"{\"version\":1,\"command\":\"reboot\"}", "unknown variant `reboot`"),
            (b"{\"version\":1,\"command\":\"snapshot\",\"slots\":7}", "invalid type"),
        ];
        for (line, expected) in table {
            let refused = Command::parse(line).unwrap_err().to_string();
            let line = String::from_utf8_lossy(line);
            assert!(refused.contains(expected), "{line}: {refused}");
        }
        assert!(Command::parse(b"\xff\xfe").is_err());
    }

    #[test]
    fn answers_are_lines_and_back() {
        let mut lane = LaneStats { qid: 3, at_ns: 7, ..LaneStats::default() };
        lane.activity.requests.insert("read".into(), Requests { requests: 1, bytes: 4096 });
        lane.lent = Some(Vec::new());
        let snapshot = Snapshot { device: 9, lanes: vec![lane], latencies: Vec::new() };
        for answer in [Answer::Snapshot(snapshot), Answer::Error("no".into())] {
            let line = answer.clone().into_line();
            assert_eq!(line.matches('\n').count(), 1);
            let read: Response = serde_json::from_str(&line).unwrap();
            assert_eq!(read, Response { version: VERSION, answer });
        }
    }
}

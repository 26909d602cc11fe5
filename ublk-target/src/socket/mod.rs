//! Statistics and control of a running server: counters, lent slots, latencies.
//!
//! A server listens on the Unix socket [`socket_path`], which only root can connect to. A separate
//! thread answers. It asks the lanes by messages, so lanes have a cost only when a client asks.
//!
//! # Protocol
//!
//! Both sides send JSON objects, one per line. The client asks:
//!
//! ```json
//! {"version":1,"command":"snapshot","latencies":true,"slots":false}
//! ```
//!
//! and gets one line for each line, [`protocol::Response`]: either a snapshot or an error text.
//!
//! ```json
//! {"version":1,"snapshot":{"device":0,"lanes":[…],"latencies":[…]}}
//! {"version":1,"error":"version 2 is not known; this server speaks version 1"}
//! ```
//!
//! * `latencies` (default false): the lanes measure latencies for this connection until it asks
//!   without `latencies`, or ends. A snapshot has the latencies since the connection's previous
//!   one, so the first snapshot has none. The lanes measure only while such a connection exists.
//! * `slots` (default false): list each lent slot and the operations that borrow it. Leaked slots
//!   are always listed.
//! * An empty line gets no answer; it keeps the connection alive.
//! * After a line that is too long, or with too many connections, the connection ends with an
//!   error. A connection without traffic for [`Limits::idle`] ends without an error.
//!
//! Two commands go to the main thread. `grow` reads the new size of the backings (`size` is for a
//! null device); the client then tells the kernel the new size. `upgrade` hands the device over to
//! another program (`file` has its device and inode numbers as the client sees them):
//!
//! ```json
//! {"version":1,"command":"grow","size":null}
//! {"version":1,"size":1073741824}
//! {"version":1,"command":"upgrade","program":"/usr/bin/ublk-target","file":[66305,131]}
//! {"version":1,"accepted":null}
//! ```
//!
//! Counters count since the server's start. The client computes rates: [`report`] makes them from
//! two snapshots.

pub mod client;
mod connection;
pub mod control_request;
mod lanes;
pub mod protocol;
pub mod report;
mod service;
mod summary;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};

pub use service::{Limits, StatsServer, StatsThread};

/// The path of a device's socket, in the directory of the state files.
#[must_use]
pub fn socket_path(directory: &Path, id: u32) -> PathBuf {
    directory.join(format!("{id}.sock"))
}

/// Whether a device has a socket without a listener: its server is dead.
#[must_use]
pub fn is_deserted(directory: &Path, id: u32) -> bool {
    client::is_deserted(&socket_path(directory, id))
}

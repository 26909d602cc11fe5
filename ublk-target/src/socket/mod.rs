//! What a server tells about itself while it serves: counters, what is lent, latencies.
//!
//! A server listens on the Unix socket [`socket_path`], which only root can connect to. A thread
//! of its own answers; it asks the lanes by messages, so that they pay only when somebody looks.
//!
//! # Protocol
//!
//! Both sides send JSON objects, one a line. The client asks:
//!
//! ```json
//! {"version":1,"command":"snapshot","latencies":true,"slots":false}
//! ```
//!
//! and gets one line for each line, [`protocol::Response`]: either a snapshot or an error in words.
//!
//! ```json
//! {"version":1,"snapshot":{"device":0,"lanes":[…],"latencies":[…]}}
//! {"version":1,"error":"version 2 is not known; this server speaks version 1"}
//! ```
//!
//! * `latencies` (false if left out): latencies are measured for this connection from now until it
//!   asks without, or ends. A snapshot has those since the connection's previous one, so the first
//!   has none. The lanes measure exactly while there is such a connection.
//! * `slots` (false if left out): name each lent slot and what borrows it. Leaked slots are named
//!   in any case.
//! * An empty line gets no answer; it keeps the connection.
//! * After a line that is too long, and where there are too many connections, the connection ends
//!   with the error. So does, without one, a connection on which nothing has moved for
//!   [`Limits::idle`].
//!
//! The main thread is asked to take note of backings that have grown (`size` is for a null device;
//! the kernel is told of the new size by whoever asks), and to hand the device over to another
//! program (`file` are the numbers of its device and inode as the client sees them):
//!
//! ```json
//! {"version":1,"command":"grow","size":null}
//! {"version":1,"size":1073741824}
//! {"version":1,"command":"upgrade","program":"/usr/bin/ublk-target","file":[66305,131]}
//! {"version":1,"accepted":null}
//! ```
//!
//! Counters count since the server's start. Rates are the client's business: [`report`] computes
//! them from two snapshots.

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

/// The socket of the server of a device, in the directory of the state files.
#[must_use]
pub fn socket_path(directory: &Path, id: u32) -> PathBuf {
    directory.join(format!("{id}.sock"))
}

/// Whether nobody listens on the socket of a device: its server is dead.
#[must_use]
pub fn is_deserted(directory: &Path, id: u32) -> bool {
    client::is_deserted(&socket_path(directory, id))
}

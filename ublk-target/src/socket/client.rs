//! The client side.

use std::io::{self, ErrorKind, Read, Write};
use std::ops::ControlFlow;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::net::{self, AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use uring_ext::Errno;
use uring_ext::control::{Control, ControlError};

use crate::backing::usage;
use crate::config::LayerEdit;
use crate::device::description::{self, Description};
use crate::device::paths::RUN_DIR;
use crate::device::program::Program;
use crate::os::procfs;
use crate::os::wait::Wait;
use crate::socket::protocol::{
    Answer, Command, LayersAnswer, MAX_RESPONSE_BYTES, Response, Snapshot, VERSION,
};
use crate::socket::socket_path;

/// The longest wait for an answer of a server.
pub const PATIENCE: Duration = Duration::from_secs(5);
/// The longest wait until a server has quiesced its device.
const TO_STOP_DELIVERIES: Duration = Duration::from_secs(40);
/// How long a live server may be without its socket: while it starts, recovers, or upgrades.
const TO_LISTEN: Duration = Duration::from_secs(5);

/// Why statistics are unavailable.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// There is no such device.
    #[error("there is no ublk device {0}")]
    NoDevice(u32),
    /// The socket is for root only.
    #[error("the statistics of device {0} are for root only: run as root")]
    NotRoot(u32),
    /// The server is dead.
    #[error("the server of device {0} is dead; `ublk-target del -n {0}` cleans up")]
    Dead(u32),
    /// The server is dead, and the device can be recovered.
    #[error(
        "the server of device {0} is dead, and the device waits for the next one: \
         `ublk-target recover -n {0}` starts it"
    )]
    Waits(u32),
    /// The server does not listen yet, or no longer.
    #[error(
        "the server of device {id} ({pid}) cannot be asked: it has no socket in {RUN_DIR}; if it has \
         just been started, recovered or upgraded, try again"
    )]
    NoSocket {
        /// The device.
        id: u32,
        /// Its server.
        pid: u32,
    },
    /// Another program serves the device.
    #[error("device {id} is served by {name} ({pid}); only a server of ublk-target has statistics")]
    Foreign {
        /// The device.
        id: u32,
        /// Its server's name.
        name: String,
        /// Its server.
        pid: u32,
    },
    /// The device went away.
    #[error("device {0} is gone")]
    Gone(u32),
    /// The server does not answer.
    #[error("{server} does not answer (waited {} s)", waited.as_secs())]
    Silent {
        /// The server, in words.
        server: String,
        /// The waited time.
        waited: Duration,
    },
    /// The server refused.
    #[error("the server of device {id} refuses: {error}")]
    Refused {
        /// The device.
        id: u32,
        /// Its error text.
        error: String,
    },
    /// The answer is not valid.
    #[error("the answer of the server of device {id} is not understood: {why}")]
    Corrupt {
        /// The device.
        id: u32,
        /// What is wrong with it.
        why: String,
    },
    /// The socket failed.
    #[error("the server of device {id} cannot be reached: {errno}")]
    Unreachable {
        /// The device.
        id: u32,
        /// Why.
        errno: Errno,
    },
    /// The driver's query of the device failed.
    #[error(transparent)]
    Control(#[from] ControlError),
}

/// A connection to the server of a device.
#[derive(Debug)]
pub struct Client {
    id: u32,
    stream: UnixStream,
    received: Vec<u8>,
    patience: Duration,
}

impl Client {
    /// Connects to the server of the device `id`.
    ///
    /// # Errors
    /// [`ClientError`]: without a socket, the driver's state of the device gives the reason.
    pub fn connect(id: u32) -> Result<Self, ClientError> {
        // Nobody tells when it listens.
        let connected = Wait::at_most(TO_LISTEN).every(Duration::from_millis(10)).until(|| {
            match open(&socket_path(Path::new(RUN_DIR), id), PATIENCE) {
                Ok(stream) => ControlFlow::Break(Ok(Self::new(id, stream, PATIENCE))),
                Err(error) => {
                    let why = why_not(id, &error);
                    if matches!(why, ClientError::NoSocket { .. }) {
                        ControlFlow::Continue(why)
                    } else {
                        ControlFlow::Break(Err(why))
                    }
                }
            }
        });
        connected.unwrap_or_else(|unmet| Err(unmet.reason))
    }

    /// Uses a connected stream to the server of the device `id`, with `patience` as the longest
    /// wait for an answer.
    #[must_use]
    pub fn new(id: u32, stream: UnixStream, patience: Duration) -> Self {
        Self { id, stream, received: Vec::new(), patience }
    }

    /// Asks for a snapshot.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn snapshot(&mut self, latencies: bool, slots: bool) -> Result<Snapshot, ClientError> {
        match self.ask(&Command::Snapshot { latencies, slots })? {
            Answer::Snapshot(snapshot) if snapshot.lanes.is_empty() => {
                Err(ClientError::Gone(self.id))
            }
            Answer::Snapshot(snapshot) => Ok(snapshot),
            answer
            @ (Answer::Size(_) | Answer::Layers(_) | Answer::Accepted | Answer::Error(_)) => {
                Err(self.refused(answer))
            }
        }
    }

    /// Makes the server read the new size of its backings, and returns the largest size of the
    /// device in bytes. `size` is the new size of a null device.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn grow(&mut self, size: Option<u64>) -> Result<u64, ClientError> {
        match self.ask(&Command::Grow { size })? {
            Answer::Size(bytes) => Ok(bytes),
            answer @ (Answer::Snapshot(_)
            | Answer::Layers(_)
            | Answer::Accepted
            | Answer::Error(_)) => Err(self.refused(answer)),
        }
    }

    /// Makes the server change the layers of its device. It waits at most `limit` for the requests that
    /// have begun.
    ///
    /// # Errors
    /// [`ClientError`]: nothing has changed.
    pub fn change_layers(
        &mut self,
        edit: LayerEdit,
        limit: Duration,
    ) -> Result<LayersAnswer, ClientError> {
        // One that answers nothing is not waited for as long as one that works at it.
        if let Err(silent @ ClientError::Silent { .. }) = self.snapshot(false, false) {
            return Err(silent);
        }
        self.patience = self.patience.max(limit.saturating_add(TO_STOP_DELIVERIES));
        let timeout_ms = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
        match self.ask(&Command::ChangeLayers { edit, timeout_ms })? {
            Answer::Layers(changed) => Ok(changed),
            answer @ (Answer::Snapshot(_)
            | Answer::Size(_)
            | Answer::Accepted
            | Answer::Error(_)) => Err(self.refused(answer)),
        }
    }

    /// Makes the server hand the device over to another program. When this returns, the server has
    /// quiesced the device, and is about to close it.
    ///
    /// # Errors
    /// [`ClientError`]: the server still serves the device.
    pub fn upgrade(&mut self, program: &Program) -> Result<(), ClientError> {
        let (path, file) = (program.path().to_owned(), program.identity());
        let descriptor = program.as_raw_fd();
        // One that answers nothing is not waited for as long as one that works at it.
        if let Err(silent @ ClientError::Silent { .. }) = self.snapshot(false, false) {
            return Err(silent);
        }
        self.patience = self.patience.max(TO_STOP_DELIVERIES);
        match self.ask(&Command::Upgrade { program: path, file, descriptor })? {
            Answer::Accepted => Ok(()),
            answer @ (Answer::Snapshot(_)
            | Answer::Size(_)
            | Answer::Layers(_)
            | Answer::Error(_)) => Err(self.refused(answer)),
        }
    }

    fn refused(&self, answer: Answer) -> ClientError {
        match answer {
            Answer::Error(error) => ClientError::Refused { id: self.id, error },
            Answer::Snapshot(_) | Answer::Size(_) | Answer::Accepted | Answer::Layers(_) => {
                let why = "it answers another question".to_owned();
                ClientError::Corrupt { id: self.id, why }
            }
        }
    }

    fn ask(&mut self, command: &Command) -> Result<Answer, ClientError> {
        let line = command.to_line();
        // A server that refuses may have closed its side already; its word is there to be read.
        let sent = self.stream.write_all(line.as_bytes());
        let line = match (self.read_line(), sent) {
            (Ok(line), _) => line,
            (Err(ClientError::Gone(_)), Err(error)) => return Err(self.failed(&error)),
            (Err(error), _) => return Err(error),
        };
        parse(&line).map_err(|why| ClientError::Corrupt { id: self.id, why })
    }

    /// Keeps the connection alive. The server closes a connection that is silent for
    /// [`Limits::idle`](crate::socket::Limits::idle).
    ///
    /// # Errors
    /// [`ClientError::Gone`].
    pub fn keep_alive(&mut self) -> Result<(), ClientError> {
        self.stream.write_all(b"\n").map_err(|error| self.failed(&error))
    }

    /// Why the connection is readable without a request.
    #[must_use]
    pub fn gone(&self) -> ClientError {
        ClientError::Gone(self.id)
    }

    fn read_line(&mut self) -> Result<Vec<u8>, ClientError> {
        let deadline = Instant::now() + self.patience;
        let mut buffer = vec![0; 64 << 10];
        let mut searched = 0;
        loop {
            let fresh = &self.received[searched..];
            if let Some(end) = fresh.iter().position(|byte| *byte == b'\n') {
                return Ok(self.received.drain(..=searched + end).collect());
            }
            searched = self.received.len();
            if searched > MAX_RESPONSE_BYTES {
                let why = format!("a line of more than {MAX_RESPONSE_BYTES} bytes");
                return Err(ClientError::Corrupt { id: self.id, why });
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(silent(self.id, self.patience));
            }
            let read = self.stream.set_read_timeout(Some(left));
            match read.and_then(|()| self.stream.read(&mut buffer)) {
                Ok(0) => return Err(ClientError::Gone(self.id)),
                Ok(count) => self.received.extend_from_slice(&buffer[..count]),
                // The time is over, which shows above.
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(self.failed(&error)),
            }
        }
    }

    fn failed(&self, error: &io::Error) -> ClientError {
        let id = self.id;
        let kind = error.kind();
        if matches!(kind, ErrorKind::BrokenPipe | ErrorKind::ConnectionReset) {
            ClientError::Gone(id)
        } else if kind == ErrorKind::WouldBlock {
            silent(id, self.patience)
        } else {
            ClientError::Unreachable { id, errno: Errno::of(error) }
        }
    }
}

/// Readable when the device is gone, since the server sends nothing unasked.
impl AsFd for Client {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

fn parse(line: &[u8]) -> Result<Answer, String> {
    let response: Response = serde_json::from_slice(line).map_err(|error| error.to_string())?;
    if response.version != VERSION {
        return Err(format!("its version is {}, not {VERSION}", response.version));
    }
    Ok(response.answer)
}

/// Connects. The time limit covers a server that does not accept, and also later writes.
fn open(path: &Path, patience: Duration) -> io::Result<UnixStream> {
    let flags = SocketFlags::CLOEXEC;
    let socket = net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    let stream = UnixStream::from(socket);
    stream.set_write_timeout(Some(patience))?;
    net::connect(&stream, &SocketAddrUnix::new(path)?)?;
    Ok(stream)
}

/// Whether a socket exists, but nobody listens on it.
pub(super) fn is_deserted(path: &Path) -> bool {
    let refused = |error: io::Error| error.kind() == ErrorKind::ConnectionRefused;
    open(path, Duration::from_secs(1)).is_err_and(refused)
}

/// Whether a process listens for the device `id`: then it has a server, perhaps in another pid
/// namespace and without a process id here.
#[must_use]
pub fn is_served(id: u32) -> bool {
    open(&socket_path(Path::new(RUN_DIR), id), Duration::from_secs(1)).is_ok()
}

/// Whether a device without a server stays for the next server.
fn waits(device: &Description) -> bool {
    matches!(device.state.as_str(), "QUIESCED" | "FAIL_IO")
}

/// Describes a server that does not answer, with the reason if one is visible.
fn silent(id: u32, waited: Duration) -> ClientError {
    let mut server = format!("the server of device {id}");
    if let Some(process) = usage::servers_of(id).first() {
        server = format!("{server}, {process},");
    }
    ClientError::Silent { server, waited }
}

/// The error for a failed connection to the socket of a device.
fn why_not(id: u32, error: &io::Error) -> ClientError {
    if error.kind() == ErrorKind::PermissionDenied {
        return ClientError::NotRoot(id);
    }
    if error.kind() == ErrorKind::WouldBlock {
        return silent(id, PATIENCE);
    }
    let described = Control::open().and_then(|control| Description::of(&control, id));
    let server = match described {
        Err(error) if description::is_missing(&error) => return ClientError::NoDevice(id),
        Err(error) => return error.into(),
        Ok(description) if description.pid.is_none() && waits(&description) => {
            return ClientError::Waits(id);
        }
        Ok(description) => description.pid,
    };
    let has_none = matches!(error.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused);
    match server.map(|pid| (pid, procfs::process_name(pid))) {
        None => ClientError::Dead(id),
        Some((pid, name)) if name != env!("CARGO_PKG_NAME") => {
            ClientError::Foreign { id, name, pid }
        }
        Some((pid, _)) if has_none => ClientError::NoSocket { id, pid },
        Some(_) => ClientError::Unreachable { id, errno: Errno::of(error) },
    }
}

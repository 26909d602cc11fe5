//! One client: its pending input and output. Nothing here blocks on it.

use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use ublk_engine::engine::Recorder;

use crate::socket::protocol::{Answer, BadRequest, Command, MAX_REQUEST_BYTES};

/// Bytes per write, so that a big answer does not delay other clients.
const WRITE_BYTES: usize = 256 << 10;

/// A connected client. Its next line is read only after its last answer was written, so answers
/// cannot pile up.
#[derive(Debug)]
pub(super) struct Connection {
    stream: UnixStream,
    received: Vec<u8>,
    to_send: Vec<u8>,
    sent: usize,
    /// The client has closed its sending side, or sent an invalid line.
    ending: bool,
    broken: bool,
    has_asked: bool,
    idle: Duration,
    deadline: Instant,
    /// The latencies of each lane since the last snapshot, if the client wants them.
    pub latencies: Option<Vec<Recorder>>,
    /// Distinguishes it from all other connections of the service.
    pub serial: u64,
    /// The client waits for an answer that is not there yet.
    waits: bool,
    /// Process id of the client, if it is in this pid namespace.
    pub client: Option<u32>,
}

impl Connection {
    /// `idle` is the longest time without traffic, `serial` no other connection has.
    ///
    /// # Errors
    /// Those of `fcntl`.
    pub fn new(
        stream: UnixStream,
        client: Option<u32>,
        idle: Duration,
        serial: u64,
    ) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self {
            stream,
            received: Vec::new(),
            to_send: Vec::new(),
            sent: 0,
            ending: false,
            broken: false,
            has_asked: false,
            idle,
            deadline: Instant::now() + idle,
            latencies: None,
            serial,
            waits: false,
            client,
        })
    }

    pub fn fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }

    /// The poll events of the connection. A hang-up is always reported.
    pub fn interest(&self) -> PollFlags {
        match (self.is_sending(), self.waits) {
            (true, _) => PollFlags::POLLOUT,
            (false, true) => PollFlags::empty(),
            (false, false) => PollFlags::POLLIN,
        }
    }

    /// When the connection ends without traffic. `None` while the client waits for an answer.
    pub fn deadline(&self) -> Option<Instant> {
        (!self.waits).then_some(self.deadline)
    }

    /// Whether the client has been connected for this time without a request.
    pub fn has_not_asked_for(&self, time: Duration, now: Instant) -> bool {
        let has_asked = self.has_asked || !self.received.is_empty();
        !has_asked && now + self.idle >= self.deadline + time
    }

    /// Whether the client has closed the connection. A client that has closed only its sending side
    /// still waits for its answer.
    pub fn has_gone(&self) -> bool {
        let mut fds = [PollFd::new(self.stream.as_fd(), PollFlags::empty())];
        let looked = poll(&mut fds, PollTimeout::ZERO);
        looked.is_ok() && fds[0].revents().is_some_and(|it| it.contains(PollFlags::POLLHUP))
    }

    pub fn is_over(&self, now: Instant) -> bool {
        let said_all = self.ending && !self.is_sending() && !self.has_line();
        self.broken || !self.waits && (said_all || now >= self.deadline)
    }

    /// The answer to the last line comes later. Until then no line is read.
    pub fn wait(&mut self) {
        self.waits = true;
    }

    /// Reads and writes without blocking.
    pub fn exchange(&mut self) {
        if self.waits {
            // Only the end of the client is reported now.
            self.broken = self.has_gone();
            return;
        }
        let exchanged = if self.is_sending() { self.write() } else { self.read() };
        match exchanged {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(_) => self.broken = true,
        }
    }

    /// The next command, once the previous answer is written.
    pub fn next_command(&mut self) -> Option<Result<Command, BadRequest>> {
        loop {
            if self.broken || self.waits || self.is_sending() {
                return None;
            }
            let Some(end) = self.received.iter().position(|byte| *byte == b'\n') else {
                return (self.received.len() > MAX_REQUEST_BYTES).then(|| self.refuse());
            };
            if end >= MAX_REQUEST_BYTES {
                return Some(self.refuse());
            }
            let line: Vec<u8> = self.received.drain(..=end).collect();
            self.moved();
            match line.trim_ascii() {
                [] => {}
                line => {
                    self.has_asked = true;
                    return Some(Command::parse(line));
                }
            }
        }
    }

    /// Queues an answer.
    pub fn send(&mut self, answer: Answer) {
        self.to_send = answer.into_line().into_bytes();
        self.sent = 0;
        self.waits = false;
        self.moved();
        self.exchange();
    }

    /// Closes the connection with an error text, as far as the client reads it.
    pub fn dismiss(mut self, error: &str) {
        self.send(Answer::Error(error.to_owned()));
    }

    fn refuse(&mut self) -> Result<Command, BadRequest> {
        self.ending = true;
        self.received.clear();
        Err(BadRequest::TooLong)
    }

    fn is_sending(&self) -> bool {
        self.sent < self.to_send.len()
    }

    fn has_line(&self) -> bool {
        self.received.contains(&b'\n')
    }

    /// Whether a line can be answered now.
    pub fn has_line_to_answer(&self) -> bool {
        !self.broken && !self.waits && !self.is_sending() && self.has_line()
    }

    fn moved(&mut self) {
        self.deadline = Instant::now() + self.idle;
    }

    fn read(&mut self) -> io::Result<()> {
        let mut buffer = [0; MAX_REQUEST_BYTES];
        // More than a line is not read ahead.
        if self.received.len() > MAX_REQUEST_BYTES || self.has_line() {
            return Ok(());
        }
        match self.stream.read(&mut buffer)? {
            0 => self.ending = true,
            count => self.received.extend_from_slice(&buffer[..count]),
        }
        Ok(())
    }

    fn write(&mut self) -> io::Result<()> {
        let end = self.to_send.len().min(self.sent + WRITE_BYTES);
        self.sent += self.stream.write(&self.to_send[self.sent..end])?;
        self.moved();
        if !self.is_sending() {
            self.to_send = Vec::new();
            self.sent = 0;
        }
        Ok(())
    }
}

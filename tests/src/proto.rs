//! What host and agent say to each other over the virtio port.
//!
//! Every frame is a header of 12 bytes (magic, kind, three zero bytes, length
//! in little endian) and a body: JSON for messages, raw bytes for the output
//! of programs. The magic lets a reader that lost its place say so at once
//! instead of waiting for gigabytes.

use std::io::{self, Read, Write};

use serde::{Deserialize, Serialize};

/// Version of the protocol; host and agent come from the same build, so a
/// difference means a stale payload.
pub const VERSION: u32 = 1;

/// Name of the virtio port in the guest (`/sys/class/virtio-ports/*/name`).
pub const PORT_NAME: &str = "ublk-target.agent";

/// Longest body that a reader accepts, in bytes.
pub const MAX_BODY_BYTES: usize = 8 << 20;

const MAGIC: [u8; 4] = *b"VMH1";
const HEADER_BYTES: usize = 12;

/// One frame on the wire.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame {
    /// JSON text of a [`ToGuest`] or a [`ToHost`].
    Message(Vec<u8>),
    /// Bytes that the running program wrote to its standard output (or its
    /// terminal).
    Stdout(Vec<u8>),
    /// Bytes that the running program wrote to its standard error.
    Stderr(Vec<u8>),
    /// Bytes that the user typed, for the program's terminal.
    Stdin(Vec<u8>),
}

impl Frame {
    fn kind(&self) -> u8 {
        match self {
            Self::Message(_) => 0,
            Self::Stdout(_) => 1,
            Self::Stderr(_) => 2,
            Self::Stdin(_) => 3,
        }
    }

    fn body(&self) -> &[u8] {
        match self {
            Self::Message(b) | Self::Stdout(b) | Self::Stderr(b) | Self::Stdin(b) => b,
        }
    }

    /// Writes the frame with one `write_all`, so that two writers which hold
    /// the same lock never mix their frames.
    ///
    /// # Errors
    /// `InvalidInput` for a body over [`MAX_BODY_BYTES`], else what `out` says.
    pub fn write_to(&self, out: &mut impl Write) -> io::Result<()> {
        let body = self.body();
        let length = u32::try_from(body.len())
            .ok()
            .filter(|_| body.len() <= MAX_BODY_BYTES)
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "frame too long"))?;
        let mut bytes = Vec::with_capacity(HEADER_BYTES + body.len());
        bytes.extend_from_slice(&MAGIC);
        bytes.extend_from_slice(&[self.kind(), 0, 0, 0]);
        bytes.extend_from_slice(&length.to_le_bytes());
        bytes.extend_from_slice(body);
        out.write_all(&bytes)?;
        out.flush()
    }

    /// Reads the next frame; `None` at a clean end of the stream.
    ///
    /// # Errors
    /// `InvalidData` for a wrong magic, kind or length, `UnexpectedEof` for a
    /// frame cut short, else what `input` says.
    pub fn read_from(input: &mut impl Read) -> io::Result<Option<Self>> {
        let mut header = [0u8; HEADER_BYTES];
        if !read_or_end(input, &mut header)? {
            return Ok(None);
        }
        let [m0, m1, m2, m3, kind, _, _, _, l0, l1, l2, l3] = header;
        let bad = |what: String| io::Error::new(io::ErrorKind::InvalidData, what);
        if [m0, m1, m2, m3] != MAGIC {
            return Err(bad(format!("not a frame: {header:02x?}")));
        }
        let length = usize::try_from(u32::from_le_bytes([l0, l1, l2, l3]))
            .ok()
            .filter(|&length| length <= MAX_BODY_BYTES)
            .ok_or_else(|| bad("frame longer than allowed".into()))?;
        let mut body = vec![0; length];
        input.read_exact(&mut body)?;
        match kind {
            0 => Ok(Some(Self::Message(body))),
            1 => Ok(Some(Self::Stdout(body))),
            2 => Ok(Some(Self::Stderr(body))),
            3 => Ok(Some(Self::Stdin(body))),
            other => Err(bad(format!("unknown frame kind {other}"))),
        }
    }

    /// Makes a message frame.
    ///
    /// # Errors
    /// What serde says; the types of this module always serialize.
    pub fn message(message: &impl Serialize) -> io::Result<Self> {
        Ok(Self::Message(serde_json::to_vec(message)?))
    }
}

/// Fills `buffer`, or returns false if the stream ends before its first byte.
fn read_or_end(input: &mut impl Read, buffer: &mut [u8]) -> io::Result<bool> {
    let mut filled = 0;
    while filled < buffer.len() {
        match input.read(&mut buffer[filled..]) {
            Ok(0) if filled == 0 => return Ok(false),
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => filled += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(true)
}

/// A program to run in the guest.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Job {
    /// Program and arguments; the program is looked up in the guest's `PATH`.
    pub argv: Vec<String>,
    /// Variables beside those that the agent sets (`PATH`, `HOME`, `TERM`).
    pub env: Vec<(String, String)>,
    /// Size of the terminal to give it; without one it has pipes and no input.
    pub terminal: Option<WindowSize>,
}

/// Size of a terminal in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct WindowSize {
    /// Lines.
    pub rows: u16,
    /// Columns.
    pub columns: u16,
}

/// How a program ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExitState {
    /// It exited with this code.
    Code(i32),
    /// This signal killed it.
    Signal(i32),
}

impl std::fmt::Display for ExitState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Code(code) => write!(f, "exit code {code}"),
            Self::Signal(signal) => match nix::sys::signal::Signal::try_from(*signal) {
                Ok(name) => write!(f, "killed by {name}"),
                Err(_) => write!(f, "killed by signal {signal}"),
            },
        }
    }
}

/// One record of the guest's kernel log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KmsgRecord {
    /// Sequence number; a gap means that the ring buffer overran.
    pub seq: u64,
    /// Time since boot in microseconds.
    pub time_us: u64,
    /// Log level, 0 (emergency) to 7 (debug).
    pub level: u8,
    /// The text, continuation lines (the device properties) left out.
    pub text: String,
}

/// What the host asks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToGuest {
    /// Run a program; answered by [`ToHost::Exited`] or [`ToHost::Failed`].
    Run(Job),
    /// The running program took too long: log what it hangs on, kill it and
    /// all that it started. The answer is still [`ToHost::Exited`].
    Kill,
    /// Send SIGINT to the running program.
    Interrupt,
    /// The user's terminal has a new size.
    Resize(WindowSize),
    /// Send what the kernel logged since the last time this was asked.
    ReadKmsg,
    /// Take the present state as what a test has to leave behind.
    TakeBaseline,
    /// Say what is there beyond the baseline, then remove it.
    FindLeaks,
    /// Write everything back and switch the machine off.
    PowerOff,
}

/// What the agent says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToHost {
    /// The first message after boot.
    Hello {
        /// [`VERSION`] of the agent.
        version: u32,
        /// `uname -r`.
        kernel: String,
        /// Guest time since the kernel started, in milliseconds.
        uptime_ms: u64,
    },
    /// Sent every few seconds.
    Heartbeat {
        /// Guest time since the kernel started, in milliseconds.
        uptime_ms: u64,
    },
    /// The program has ended; all its output was sent before.
    Exited {
        /// How it ended.
        state: ExitState,
    },
    /// After a [`ToGuest::Kill`], before the killing: what was running and
    /// where in the kernel it hung.
    HangReport {
        /// Text of several lines.
        text: String,
    },
    /// Answer to [`ToGuest::ReadKmsg`].
    Kmsg {
        /// The records, oldest first.
        records: Vec<KmsgRecord>,
        /// There are more to ask for.
        more: bool,
    },
    /// Answer to [`ToGuest::TakeBaseline`].
    BaselineTaken,
    /// Answer to [`ToGuest::FindLeaks`].
    Leaks {
        /// What was left, one line each.
        found: Vec<String>,
        /// What could not be removed: the guest is tainted.
        stuck: Vec<String>,
    },
    /// The request could not be carried out.
    Failed {
        /// Why.
        reason: String,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round_trip(frame: &Frame) -> Frame {
        let mut bytes = Vec::new();
        frame.write_to(&mut bytes).unwrap();
        Frame::read_from(&mut bytes.as_slice()).unwrap().unwrap()
    }

    #[test]
    fn frames_survive_the_wire() {
        for frame in [
            Frame::Stdout(b"a\0\xff\n".to_vec()),
            Frame::Stderr(Vec::new()),
            Frame::Stdin(vec![3]),
            Frame::message(&ToGuest::Run(Job::default())).unwrap(),
        ] {
            assert_eq!(round_trip(&frame), frame);
        }
    }

    #[test]
    fn header_layout_is_fixed() {
        let mut bytes = Vec::new();
        Frame::Stderr(b"xyz".to_vec()).write_to(&mut bytes).unwrap();
        assert_eq!(bytes, b"VMH1\x02\0\0\0\x03\0\0\0xyz");
    }

    #[test]
    fn messages_survive_json() {
        let message = ToHost::HangReport { text: "é\n".into() };
        let Frame::Message(body) = round_trip(&Frame::message(&message).unwrap()) else {
            panic!("not a message");
        };
        assert_eq!(serde_json::from_slice::<ToHost>(&body).unwrap(), message);
    }

    #[test]
    fn end_of_stream_is_not_an_error_but_a_cut_frame_is() {
        assert_eq!(Frame::read_from(&mut [].as_slice()).unwrap(), None);
        let mut bytes = Vec::new();
        Frame::Stdout(b"abc".to_vec()).write_to(&mut bytes).unwrap();
        for length in 1..bytes.len() {
            let error = Frame::read_from(&mut &bytes[..length]).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof, "cut at {length}");
        }
    }

    #[test]
    fn garbage_is_refused() {
        for bytes in [
            b"VMH2\0\0\0\0\0\0\0\0".as_slice(),         // magic
            b"VMH1\x09\0\0\0\0\0\0\0".as_slice(),       // kind
            b"VMH1\0\0\0\0\xff\xff\xff\xff".as_slice(), // length
        ] {
            let error = Frame::read_from(&mut &*bytes).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{bytes:?}");
        }
        assert!(Frame::Stdout(vec![0; MAX_BODY_BYTES + 1]).write_to(&mut Vec::new()).is_err());
    }
}

//! What the kernel's NBD driver sends over its socket, and what it expects to be answered
//! (`include/uapi/linux/nbd.h`; all numbers are big-endian).

use std::io::{self, Read, Write};

const REQUEST_MAGIC: u32 = 0x2560_9513;
const REPLY_MAGIC: u32 = 0x6744_6698;
const HEADER: usize = 28;

const READ: u16 = 0;
const WRITE: u16 = 1;
const DISCONNECT: u16 = 2;
const FLUSH: u16 = 3;
const FLAG_FUA: u16 = 1;

/// What is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    Read { offset: u64, len: usize },
    Write { offset: u64, data: Vec<u8>, fua: bool },
    Flush,
}

/// A command, and the name that its reply has to bear.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    pub cookie: u64,
    pub command: Command,
}

impl Request {
    /// Reads a request; `None` if there will be no more.
    pub fn receive(socket: &mut impl Read) -> io::Result<Option<Self>> {
        let mut header = [0; HEADER];
        match socket.read_exact(&mut header) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            other => other?,
        }
        let [m0, m1, m2, m3, f0, f1, t0, t1, rest @ ..] = header;
        let [c0, c1, c2, c3, c4, c5, c6, c7, o0, o1, o2, o3, o4, o5, o6, o7, l0, l1, l2, l3] = rest;
        if u32::from_be_bytes([m0, m1, m2, m3]) != REQUEST_MAGIC {
            return Err(io::Error::other("no request of NBD"));
        }
        let fua = u16::from_be_bytes([f0, f1]) & FLAG_FUA != 0;
        let cookie = u64::from_be_bytes([c0, c1, c2, c3, c4, c5, c6, c7]);
        let offset = u64::from_be_bytes([o0, o1, o2, o3, o4, o5, o6, o7]);
        let len = u32::from_be_bytes([l0, l1, l2, l3]);
        let len = usize::try_from(len).map_err(io::Error::other)?;
        let command = match u16::from_be_bytes([t0, t1]) {
            READ => Command::Read { offset, len },
            WRITE => {
                let mut data = vec![0; len];
                socket.read_exact(&mut data)?;
                Command::Write { offset, data, fua }
            }
            FLUSH => Command::Flush,
            DISCONNECT => return Ok(None),
            other => return Err(io::Error::other(format!("command {other} was not offered"))),
        };
        Ok(Some(Self { cookie, command }))
    }
}

/// Answers a request with success, and with the data if it was a read.
pub fn reply(socket: &mut impl Write, cookie: u64, data: &[u8]) -> io::Result<()> {
    let mut header = [0; 16];
    header[..4].copy_from_slice(&REPLY_MAGIC.to_be_bytes());
    header[8..].copy_from_slice(&cookie.to_be_bytes());
    socket.write_all(&header)?;
    socket.write_all(data)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(kind: u32, len: u32) -> Vec<u8> {
        let mut bytes = vec![0x25, 0x60, 0x95, 0x13];
        bytes.extend(kind.to_be_bytes());
        bytes.extend(7_u64.to_be_bytes());
        bytes.extend(4096_u64.to_be_bytes());
        bytes.extend(len.to_be_bytes());
        bytes
    }

    fn received(bytes: &[u8]) -> io::Result<Option<Command>> {
        let request = Request::receive(&mut &bytes[..])?;
        Ok(request.map(|request| {
            assert_eq!(request.cookie, 7);
            request.command
        }))
    }

    #[test]
    fn requests_are_told_apart() {
        let write = |flags: u32| [header(1 | flags << 16, 2), vec![0xaa, 0xbb]].concat();
        let written = |fua| Command::Write { offset: 4096, data: vec![0xaa, 0xbb], fua };
        let rows = [
            (header(0, 512), Some(Command::Read { offset: 4096, len: 512 })),
            (write(0), Some(written(false))),
            (write(1), Some(written(true))),
            (header(3, 0), Some(Command::Flush)),
            (header(2, 0), None),
            (Vec::new(), None),
        ];
        for (bytes, command) in rows {
            assert_eq!(received(&bytes).unwrap(), command);
        }
        assert!(received(&header(4, 512)).is_err(), "it was not told of discards");
        assert!(received(&header(1, 2)).is_err(), "the data is missing");
        assert!(received(&[0; 28]).is_err());
    }

    #[test]
    fn replies_bear_the_name_of_their_request() {
        let mut bytes = Vec::new();
        reply(&mut bytes, 0x0102, &[9, 8]).unwrap();
        let expected = [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 2, 9, 8];
        assert_eq!(bytes, expected);
    }
}

//! Reads the kernel log, record by record.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read};
use std::os::unix::fs::OpenOptionsExt;

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::fcntl::OFlag;

use crate::proto::{KmsgRecord, ToHost};

/// Records in one message, far below the limit of a frame.
const BATCH: usize = 2000;

/// A place in the kernel log.
#[derive(Debug)]
pub struct Reader(File);

impl Reader {
    /// Starts at the oldest record.
    pub fn open() -> Result<Self> {
        let mut options = OpenOptions::new();
        options.read(true).custom_flags(OFlag::O_NONBLOCK.bits());
        Ok(Self(options.open("/dev/kmsg").context("open /dev/kmsg")?))
    }

    /// The records since the last time.
    pub fn read_new(&mut self) -> ToHost {
        let mut records = Vec::new();
        let mut buffer = [0; 8 << 10];
        while records.len() < BATCH {
            match self.0.read(&mut buffer) {
                Ok(length) => records.extend(parse(&String::from_utf8_lossy(&buffer[..length]))),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                // The ring buffer went round: goes on with its oldest record.
                Err(error) if error.raw_os_error() == Some(Errno::EPIPE as i32) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    return ToHost::Kmsg { records, more: false };
                }
                Err(error) => {
                    return ToHost::Failed { reason: format!("read /dev/kmsg: {error}") };
                }
            }
        }
        ToHost::Kmsg { records, more: true }
    }
}

/// Parses `priority,sequence,time,flags[,…];text`, and leaves out the lines of
/// properties that may follow.
fn parse(record: &str) -> Option<KmsgRecord> {
    let (header, rest) = record.split_once(';')?;
    let mut fields = header.split(',');
    let priority: u64 = fields.next()?.trim().parse().ok()?;
    let seq = fields.next()?.parse().ok()?;
    let time_us = fields.next()?.parse().ok()?;
    let level = u8::try_from(priority % 8).ok()?; // above are the facility's bits
    let text = rest.lines().next().unwrap_or("").to_owned();
    Some(KmsgRecord { seq, time_us, level, text })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_parsed() {
        let text = "6,339,5140900,-;NET: Registered protocol family\n SUBSYSTEM=net\n DEVICE=n1\n";
        let expected = KmsgRecord {
            seq: 339,
            time_us: 5_140_900,
            level: 6,
            text: "NET: Registered protocol family".into(),
        };
        assert_eq!(parse(text), Some(expected));
    }

    #[test]
    fn facility_and_extra_fields_do_not_matter() {
        let record = parse("12,1,2,-,caller=T1;text; with semicolon\n").unwrap();
        assert_eq!((record.level, record.text.as_str()), (4, "text; with semicolon"));
        assert_eq!(parse("garbage"), None);
        assert_eq!(parse("x,1,2,-;text"), None);
    }
}

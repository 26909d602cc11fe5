//! Generic netlink: requests to a family of the kernel's, and its answers.

use std::os::fd::OwnedFd;

use anyhow::{Context, Result, bail, ensure};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink, recv, send, socket_with,
};

const HEADER: usize = 16;
const GENERIC_HEADER: usize = 4;
const ATTRIBUTE_HEADER: usize = 4;

const NLMSG_ERROR: u16 = 2;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLA_F_NESTED: u16 = 1 << 15;

const GENL_ID_CTRL: u16 = 16;
const CTRL_CMD_GETFAMILY: u8 = 3;
const CTRL_ATTR_FAMILY_ID: u16 = 1;
const CTRL_ATTR_FAMILY_NAME: u16 = 2;

/// Attributes of a message.
#[derive(Debug, Default)]
pub struct Attributes(Vec<u8>);

impl Attributes {
    /// Adds a number of 32 bits.
    pub fn u32(self, kind: u16, value: u32) -> Self {
        self.push(kind, &value.to_ne_bytes())
    }

    /// Adds a number of 64 bits.
    pub fn u64(self, kind: u16, value: u64) -> Self {
        self.push(kind, &value.to_ne_bytes())
    }

    /// Adds a text.
    fn text(self, kind: u16, text: &str) -> Self {
        self.push(kind, &[text.as_bytes(), &[0]].concat())
    }

    /// Adds attributes in an attribute.
    pub fn nested(self, kind: u16, inner: &Self) -> Self {
        self.push(kind | NLA_F_NESTED, &inner.0)
    }

    fn push(mut self, kind: u16, payload: &[u8]) -> Self {
        let length = u16::try_from(ATTRIBUTE_HEADER + payload.len()).unwrap_or(u16::MAX);
        self.0.extend(length.to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(payload);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }

    /// The payload of an attribute.
    fn get(&self, kind: u16) -> Option<&[u8]> {
        let mut rest = &self.0[..];
        while rest.len() >= ATTRIBUTE_HEADER {
            let length = usize::from(u16::from_ne_bytes([rest[0], rest[1]]));
            let found = u16::from_ne_bytes([rest[2], rest[3]]) & !NLA_F_NESTED;
            let payload = rest.get(ATTRIBUTE_HEADER..length)?;
            if found == kind {
                return Some(payload);
            }
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        }
        None
    }

    /// An attribute that is a number of 32 bits.
    ///
    /// # Errors
    /// When there is none.
    pub fn get_u32(&self, kind: u16) -> Result<u32> {
        let payload = self.get(kind).with_context(|| format!("no attribute {kind}"))?;
        Ok(u32::from_ne_bytes(payload.try_into()?))
    }
}

/// A family, and a socket to it.
#[derive(Debug)]
pub struct Family {
    socket: OwnedFd,
    id: u16,
}

impl Family {
    /// Finds a family by its name.
    ///
    /// # Errors
    /// When the kernel has none of this name.
    pub fn open(name: &str) -> Result<Self> {
        let socket = socket_with(
            AddressFamily::NETLINK,
            SocketType::RAW,
            SocketFlags::CLOEXEC,
            Some(netlink::GENERIC),
        )?;
        let mut family = Self { socket, id: GENL_ID_CTRL };
        let asked = Attributes::default().text(CTRL_ATTR_FAMILY_NAME, name);
        let answer = family.request(CTRL_CMD_GETFAMILY, &asked);
        let answer = answer.with_context(|| format!("generic netlink family {name}"))?;
        let id = answer.get(CTRL_ATTR_FAMILY_ID).context("no family id")?;
        family.id = u16::from_ne_bytes(id.try_into()?);
        Ok(family)
    }

    /// Sends a command. Returns the attributes of the answer, none if there was only success.
    ///
    /// # Errors
    /// What the kernel answers.
    pub fn request(&self, command: u8, attributes: &Attributes) -> Result<Attributes> {
        let message = message(self.id, command, attributes)?;
        send(&self.socket, &message, SendFlags::empty())?;
        let mut answer = Attributes::default();
        let mut buffer = vec![0; 32 << 10];
        loop {
            let (_, length) = recv(&self.socket, &mut buffer[..], RecvFlags::empty())?;
            if take(&buffer[..length], &mut answer)? {
                return Ok(answer);
            }
        }
    }
}

fn message(id: u16, command: u8, attributes: &Attributes) -> Result<Vec<u8>> {
    let length = HEADER + GENERIC_HEADER + attributes.0.len();
    let mut message = Vec::with_capacity(length);
    message.extend(u32::try_from(length)?.to_ne_bytes());
    message.extend(id.to_ne_bytes());
    message.extend((NLM_F_REQUEST | NLM_F_ACK).to_ne_bytes());
    message.extend([0; 8]); // sequence number and sender: the socket has one request at a time
    message.extend([command, 1, 0, 0]);
    message.extend(&attributes.0);
    Ok(message)
}

/// Reads the messages of a datagram; says whether the acknowledgement is among them.
fn take(mut datagram: &[u8], answer: &mut Attributes) -> Result<bool> {
    while !datagram.is_empty() {
        ensure!(datagram.len() >= HEADER, "a short message");
        let length = u32::from_ne_bytes(datagram[..4].try_into()?);
        let kind = u16::from_ne_bytes(datagram[4..6].try_into()?);
        let payload = datagram.get(HEADER..usize::try_from(length)?).context("a short message")?;
        if kind == NLMSG_ERROR {
            let error = i32::from_ne_bytes(payload.get(..4).context("no error")?.try_into()?);
            if error != 0 {
                bail!(std::io::Error::from_raw_os_error(-error));
            }
            return Ok(true);
        }
        let attributes = payload.get(GENERIC_HEADER..).context("no header")?;
        answer.0.extend(attributes);
        let next = usize::try_from(length)?.next_multiple_of(4);
        datagram = datagram.get(next..).unwrap_or_default();
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_padded_and_found_again() {
        let inner = Attributes::default().u32(1, 7);
        let attributes = Attributes::default().text(2, "nbd!").u64(5, 1 << 40).nested(7, &inner);
        assert_eq!(attributes.0.len() % 4, 0);
        assert_eq!(attributes.get(2), Some(&b"nbd!\0"[..]));
        assert_eq!(attributes.get(5), Some(&(1_u64 << 40).to_ne_bytes()[..]));
        let nested = Attributes(attributes.get(7).unwrap().to_vec());
        assert_eq!(nested.get_u32(1).unwrap(), 7);
        assert!(attributes.get(3).is_none() && attributes.get_u32(3).is_err());
    }

    #[test]
    fn answers_end_with_an_acknowledgement_or_an_error() {
        let answered = message(33, 1, &Attributes::default().u32(1, 5)).unwrap();
        let ending = |error: i32| {
            let mut ending = message(NLMSG_ERROR, 0, &Attributes::default()).unwrap();
            ending[HEADER..].copy_from_slice(&error.to_ne_bytes());
            ending
        };
        let mut answer = Attributes::default();
        assert!(!take(&answered, &mut answer).unwrap(), "more is to come");
        assert_eq!(answer.get_u32(1).unwrap(), 5);
        assert!(take(&[answered, ending(0)].concat(), &mut answer).unwrap());
        let error = take(&ending(-16), &mut answer).unwrap_err();
        assert_eq!(error.downcast_ref::<std::io::Error>().unwrap().raw_os_error(), Some(16));
        assert!(take(&[1, 2, 3], &mut answer).is_err());
    }
}

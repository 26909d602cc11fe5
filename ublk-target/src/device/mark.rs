//! Identifies the process that has added a device: a number in the device's `ublksrv_flags`, which
//! the driver stores without using it.
//!
//! It is a random number, not a process id: process ids are local to a pid namespace, and are
//! reused. It also distinguishes a device from all others while it exists.

use std::fmt;
use std::str::FromStr;
use std::sync::OnceLock;

use serde::{Deserialize, Serialize};
use uring_ext::sys;

use crate::os::random;

/// The upper bits of the flags of a device of this program: `ub`.
const MARK: u64 = 0x7562;
/// Number of bits of the random number.
const BITS: u32 = 48;

/// The number of a process that adds devices. All devices that it adds have it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Nonce(u64);

static OWN: OnceLock<Nonce> = OnceLock::new();

impl Nonce {
    /// A new random number.
    #[must_use]
    pub fn draw() -> Self {
        Self(random::number() >> (u64::BITS - BITS))
    }

    /// The calling process's number.
    #[must_use]
    pub fn own() -> Self {
        *OWN.get_or_init(Self::draw)
    }

    /// Makes the calling process use the number that its parent has chosen. Without effect if it
    /// already has its own number.
    pub fn adopt(self) {
        let _ = OWN.set(self);
    }

    /// The mark of the devices of a process with this number.
    #[must_use]
    pub const fn flags(self) -> u64 {
        MARK << BITS | self.0
    }

    /// The number of the process that has added a device, if that was a process of this program.
    #[must_use]
    pub fn of(info: &sys::ublksrv_ctrl_dev_info) -> Option<Self> {
        let flags = info.ublksrv_flags;
        (flags >> BITS == MARK).then_some(Self(flags & ((1 << BITS) - 1)))
    }
}

impl fmt::Display for Nonce {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:012x}", self.0)
    }
}

/// The text is not such a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a number of 12 hexadecimal digits")]
pub struct NoNonce;

impl FromStr for Nonce {
    type Err = NoNonce;

    fn from_str(text: &str) -> Result<Self, NoNonce> {
        let is_whole = text.len() == 12 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        let number = u64::from_str_radix(text, 16).ok().filter(|_| is_whole);
        number.map(Self).ok_or(NoNonce)
    }
}

impl TryFrom<String> for Nonce {
    type Error = NoNonce;

    fn try_from(text: String) -> Result<Self, NoNonce> {
        text.parse()
    }
}

impl From<Nonce> for String {
    fn from(nonce: Nonce) -> Self {
        nonce.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_is_read_back() {
        let nonce = Nonce::draw();
        assert_ne!(nonce, Nonce::draw());
        let mut info = sys::ublksrv_ctrl_dev_info::default();
        assert_eq!(Nonce::of(&info), None);
        info.ublksrv_flags = nonce.flags();
        assert_eq!(Nonce::of(&info), Some(nonce));
        // The mark of a version which used process ids.
        info.ublksrv_flags = 0x75_6274 << 32 | 77;
        assert_eq!(Nonce::of(&info), None);
        assert_eq!(nonce.to_string().parse(), Ok(nonce));
        for wrong in ["", "7", "+23456789abc", "0123456789abc", "0123456789ag"] {
            assert_eq!(wrong.parse::<Nonce>(), Err(NoNonce), "{wrong}");
        }
    }
}

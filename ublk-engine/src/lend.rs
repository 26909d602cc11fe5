//! Lend modes: how secondary operations get a request's data.

use std::fmt;

use serde::{Deserialize, Serialize};
use uring_ext::feature::{AUTO_BUF_REG, Feature, Features, SUPPORT_ZERO_COPY, USER_COPY};

/// The lend mode of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LendMode {
    /// The driver registers a request's buffer in the lane's ring at delivery and takes it back
    /// at commit (`UBLK_F_AUTO_BUF_REG`).
    Fused,
    /// The server registers and unregisters it by explicit commands (`UBLK_U_IO_REGISTER_IO_BUF`).
    Slot,
    /// The server copies between the request and a buffer of its own (`UBLK_F_USER_COPY`).
    UserCopy,
    /// The driver copies between the request and a buffer of the server.
    Copy,
}

impl LendMode {
    /// The driver features that the mode requires. Fused mode needs `SUPPORT_ZERO_COPY` too:
    /// without it the driver refuses the explicit registration that replaces a failed automatic
    /// one.
    #[must_use]
    pub const fn needs(self) -> &'static [Feature] {
        match self {
            Self::Fused => &[SUPPORT_ZERO_COPY, AUTO_BUF_REG],
            Self::Slot => &[SUPPORT_ZERO_COPY],
            Self::UserCopy => &[USER_COPY],
            Self::Copy => &[],
        }
    }

    /// Whether the mode lends the requests' pages.
    #[must_use]
    pub const fn is_zero_copy(self) -> bool {
        match self {
            Self::Fused | Self::Slot => true,
            Self::UserCopy | Self::Copy => false,
        }
    }

    /// The driver features that a device of this mode is added with. Modes that lend also use user
    /// copy, for buffers that cannot be registered.
    #[must_use]
    pub fn flags(self, features: Features) -> u64 {
        let needed = self.needs().iter().fold(0, |bits, feature| bits | feature.bit);
        let resort = if self.is_zero_copy() { features.0 & USER_COPY.bit } else { 0 };
        needed | resort
    }

    /// The mode of a device with these features.
    #[must_use]
    pub fn of_flags(flags: u64) -> Self {
        let features = Features(flags);
        let modes = [Self::Fused, Self::Slot, Self::UserCopy];
        let has = |mode: &Self| features.first_missing(mode.needs()).is_none();
        modes.into_iter().find(has).unwrap_or(Self::Copy)
    }
}

impl fmt::Display for LendMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Fused => "fused",
            Self::Slot => "slot",
            Self::UserCopy => "user-copy",
            Self::Copy => "copy",
        })
    }
}

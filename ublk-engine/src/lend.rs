//! Lend modes: how a request's data gets to the secondary operations.

use std::fmt;

use serde::{Deserialize, Serialize};
use uring_ext::feature::{AUTO_BUF_REG, Feature, Features, SUPPORT_ZERO_COPY, USER_COPY};

/// How a device lends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LendMode {
    /// The driver registers a request's buffer in the lane's ring at delivery and takes it back
    /// at commit (`UBLK_F_AUTO_BUF_REG`).
    Fused,
    /// The server registers and unregisters it by commands of its own
    /// (`UBLK_U_IO_REGISTER_IO_BUF`).
    Slot,
    /// The server copies between the request and a buffer of its own (`UBLK_F_USER_COPY`).
    UserCopy,
    /// The driver copies between the request and a buffer of the server.
    Copy,
}

impl LendMode {
    /// The driver features that it cannot do without. Fused mode without `SUPPORT_ZERO_COPY` would
    /// be refused the explicit registration that a failed automatic one falls back to.
    #[must_use]
    pub const fn needs(self) -> &'static [Feature] {
        match self {
            Self::Fused => &[SUPPORT_ZERO_COPY, AUTO_BUF_REG],
            Self::Slot => &[SUPPORT_ZERO_COPY],
            Self::UserCopy => &[USER_COPY],
            Self::Copy => &[],
        }
    }

    /// Whether requests lend their own pages.
    #[must_use]
    pub const fn is_zero_copy(self) -> bool {
        match self {
            Self::Fused | Self::Slot => true,
            Self::UserCopy | Self::Copy => false,
        }
    }

    /// The driver features that a device of this mode is added with. Those that lend add user
    /// copy, the last resort for a buffer that cannot be registered.
    #[must_use]
    pub fn flags(self, features: Features) -> u64 {
        let needed = self.needs().iter().fold(0, |bits, feature| bits | feature.bit);
        let resort = if self.is_zero_copy() { features.0 & USER_COPY.bit } else { 0 };
        needed | resort
    }

    /// The mode of a device that has these features.
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

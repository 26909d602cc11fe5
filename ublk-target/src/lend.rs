//! Lend modes: how a request's data gets to the secondary operations.

use std::fmt;

use serde::{Deserialize, Serialize};
use uring_ext::feature::{AUTO_BUF_REG, Feature, Features, SUPPORT_ZERO_COPY};

use crate::kernel;

/// What the user asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum LendRequest {
    /// The best mode that the kernel offers.
    Auto,
    /// Zero copy by automatic buffer registration (Linux 6.16).
    Fused,
    /// Copies through buffers of the server; works on every kernel.
    Copy,
}

/// How a device lends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LendMode {
    /// The driver registers a request's buffer in the lane's ring at delivery and takes it back
    /// at commit (`UBLK_F_AUTO_BUF_REG`).
    Fused,
    /// The driver copies between the request and a buffer of the server.
    Copy,
}

/// The features that fused mode needs. Without `SUPPORT_ZERO_COPY` the explicit registration that
/// a failed automatic one falls back to is refused with `EINVAL`.
const FUSED: &[Feature] = &[SUPPORT_ZERO_COPY, AUTO_BUF_REG];

/// The mode cannot be had.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "lend mode fused needs the ublk feature {} (Linux {} or newer), which this kernel ({release}) \
     lacks; use `--lend auto` or `--lend copy`", .feature.name, .feature.since
)]
pub struct CannotLend {
    feature: Feature,
    release: String,
}

/// A mode, and why it was chosen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// The mode.
    pub mode: LendMode,
    /// The reason, for the user.
    pub reason: String,
    /// `auto` had to take less than the best.
    pub is_fallback: bool,
}

impl LendRequest {
    /// Chooses the mode for a driver with these features.
    ///
    /// # Errors
    /// [`CannotLend`] if the mode asked for is not to be had.
    pub fn choose(self, features: Features) -> Result<Choice, CannotLend> {
        let missing = features.first_missing(FUSED);
        let release = kernel::release().unwrap_or_default();
        let choice = |mode, reason: String, is_fallback| Ok(Choice { mode, reason, is_fallback });
        match (self, missing) {
            (Self::Copy, _) => choice(LendMode::Copy, "asked for".to_owned(), false),
            (Self::Fused, None) => choice(LendMode::Fused, "asked for".to_owned(), false),
            (Self::Fused, Some(feature)) => Err(CannotLend { feature, release }),
            (Self::Auto, None) => {
                let reason = "the kernel registers request buffers by itself (AUTO_BUF_REG)";
                choice(LendMode::Fused, reason.to_owned(), false)
            }
            (Self::Auto, Some(feature)) => {
                let reason = format!(
                    "zero copy needs the ublk feature {} (Linux {}), which this kernel ({release}) \
                     lacks",
                    feature.name, feature.since
                );
                choice(LendMode::Copy, reason, true)
            }
        }
    }
}

impl LendMode {
    /// The driver features that a device of this mode is added with.
    #[must_use]
    pub fn flags(self) -> u64 {
        match self {
            Self::Fused => FUSED.iter().fold(0, |bits, feature| bits | feature.bit),
            Self::Copy => 0,
        }
    }

    /// The mode of a device that has these features.
    #[must_use]
    pub fn of_flags(flags: u64) -> Option<Self> {
        let features = Features(flags);
        if features.first_missing(FUSED).is_none() {
            return Some(Self::Fused);
        }
        let other = [SUPPORT_ZERO_COPY, uring_ext::feature::USER_COPY];
        other.iter().all(|feature| !features.has(*feature)).then_some(Self::Copy)
    }
}

impl fmt::Display for LendMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Fused => "fused",
            Self::Copy => "copy",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NEW: Features = Features(0xf_ffff);
    const OLD: Features = Features(0x3ff);

    #[test]
    fn auto_takes_the_best_and_says_why() {
        let best = LendRequest::Auto.choose(NEW).unwrap();
        assert_eq!((best.mode, best.is_fallback), (LendMode::Fused, false));
        let rest = LendRequest::Auto.choose(OLD).unwrap();
        assert_eq!((rest.mode, rest.is_fallback), (LendMode::Copy, true));
        assert!(rest.reason.contains("AUTO_BUF_REG (Linux 6.16)"), "{}", rest.reason);
    }

    #[test]
    fn what_was_asked_for_is_taken_or_refused() {
        assert_eq!(LendRequest::Copy.choose(NEW).unwrap().mode, LendMode::Copy);
        assert_eq!(LendRequest::Fused.choose(NEW).unwrap().mode, LendMode::Fused);
        let refused = LendRequest::Fused.choose(OLD).unwrap_err().to_string();
        assert!(refused.contains("use `--lend auto` or `--lend copy`"), "{refused}");
    }

    #[test]
    fn the_mode_of_a_device_is_told_by_its_flags() {
        for mode in [LendMode::Fused, LendMode::Copy] {
            assert_eq!(LendMode::of_flags(mode.flags() | 0x42), Some(mode));
        }
        assert_eq!(LendMode::of_flags(SUPPORT_ZERO_COPY.bit), None, "explicit registration");
    }
}

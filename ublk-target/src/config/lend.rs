//! The choice of a lend mode.

use serde::{Deserialize, Serialize};
use ublk_engine::lend::LendMode;
use uring_ext::feature::{BUF_REG_OFF_DAEMON, Feature, Features};

use crate::os::kernel;

/// What the user asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LendRequest {
    /// The best mode that the kernel offers.
    Auto,
    /// Zero copy by automatic buffer registration (Linux 6.16).
    Fused,
    /// Zero copy: the server registers and unregisters the buffer of each request (Linux 6.15).
    Slot,
    /// Copies by `pread` and `pwrite` on the character device (Linux 6.5).
    UserCopy,
    /// The driver copies to and from buffers of the server; works on every kernel.
    Copy,
}

/// The mode is unavailable.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{what} needs the ublk feature {} (Linux {} or newer), which this kernel ({release}) lacks; \
     {instead}", .feature.name, .feature.since
)]
pub struct CannotLend {
    what: String,
    feature: Feature,
    release: String,
    instead: &'static str,
}

/// A mode, with the reason for the choice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// The mode.
    pub mode: LendMode,
    /// The driver features that the device is added with.
    pub flags: u64,
    /// The reason, for the user.
    pub reason: String,
    /// Whether `auto` had to take a mode that is not the best.
    pub is_fallback: bool,
}

/// What `auto` tries, best first. User copy is not among them: wherever it is available, so is
/// copying by the driver, which costs the server no system call.
const BEST_FIRST: [LendMode; 3] = [LendMode::Fused, LendMode::Slot, LendMode::Copy];

impl LendRequest {
    /// Chooses the mode for a driver with these features.
    ///
    /// # Errors
    /// [`CannotLend`] if the mode asked for is unavailable.
    pub fn choose(self, features: Features) -> Result<Choice, CannotLend> {
        let mode = match self {
            Self::Auto => return Ok(best(features)),
            Self::Fused => LendMode::Fused,
            Self::Slot => LendMode::Slot,
            Self::UserCopy => LendMode::UserCopy,
            Self::Copy => LendMode::Copy,
        };
        if let Some(feature) = features.first_missing(mode.needs()) {
            let what = format!("lend mode {mode}");
            let release = kernel::release().unwrap_or_default();
            let instead = "use `--lend auto` or `--lend copy`";
            return Err(CannotLend { what, feature, release, instead });
        }
        let (flags, reason) = (mode.flags(features), "asked for".to_owned());
        Ok(Choice { mode, flags, reason, is_fallback: false })
    }
}

fn best(features: Features) -> Choice {
    let mut reasons = Vec::new();
    for mode in BEST_FIRST {
        match features.first_missing(mode.needs()) {
            None => {
                reasons.push(advantage(mode).to_owned());
                reasons.rotate_right(1);
                let is_fallback = reasons.len() > 1;
                let (flags, reason) = (mode.flags(features), reasons.join("; "));
                return Choice { mode, flags, reason, is_fallback };
            }
            Some(feature) => {
                let release = kernel::release().unwrap_or_default();
                reasons.push(format!(
                    "{mode} needs the ublk feature {} (Linux {}), which this kernel ({release}) \
                     lacks",
                    feature.name, feature.since
                ));
            }
        }
    }
    unreachable!("copy needs no feature");
}

/// Checks that an I/O lane can issue the operations.
///
/// # Errors
/// [`CannotLend`] if the kernel registers a buffer only for the task that fetched it.
pub fn check_io_lane(features: Features) -> Result<(), CannotLend> {
    let Some(feature) = features.first_missing(&[BUF_REG_OFF_DAEMON]) else { return Ok(()) };
    let release = kernel::release().unwrap_or_default();
    let what = "`--io-lane`".to_owned();
    Err(CannotLend { what, feature, release, instead: "leave it out" })
}

impl From<LendMode> for LendRequest {
    fn from(mode: LendMode) -> Self {
        match mode {
            LendMode::Fused => Self::Fused,
            LendMode::Slot => Self::Slot,
            LendMode::UserCopy => Self::UserCopy,
            LendMode::Copy => Self::Copy,
        }
    }
}

const fn advantage(mode: LendMode) -> &'static str {
    match mode {
        LendMode::Fused => "the kernel registers request buffers by itself (AUTO_BUF_REG)",
        LendMode::Slot => "request buffers can be registered by command (SUPPORT_ZERO_COPY)",
        LendMode::UserCopy => "the server may copy (USER_COPY)",
        LendMode::Copy => "every driver can copy",
    }
}

#[cfg(test)]
mod tests {
    use uring_ext::feature::USER_COPY;

    use super::*;

    /// Linux 7.3, 6.15, 6.12.
    const NEW: Features = Features(0x1f_ffff);
    const EXPLICIT: Features = Features(0x3ff);
    const OLD: Features = Features(0x1fe);

    #[test]
    fn auto_takes_the_best_and_says_why() {
        let best = LendRequest::Auto.choose(NEW).unwrap();
        assert_eq!((best.mode, best.is_fallback), (LendMode::Fused, false));
        let next = LendRequest::Auto.choose(EXPLICIT).unwrap();
        assert_eq!((next.mode, next.is_fallback), (LendMode::Slot, true));
        assert!(next.reason.starts_with("request buffers can be registered"), "{}", next.reason);
        assert!(next.reason.contains("fused needs the ublk feature AUTO_BUF_REG (Linux 6.16)"));
        let rest = LendRequest::Auto.choose(OLD).unwrap();
        assert_eq!((rest.mode, rest.is_fallback), (LendMode::Copy, true));
        assert!(rest.reason.contains("slot needs the ublk feature SUPPORT_ZERO_COPY"));
    }

    #[test]
    fn what_was_asked_for_is_taken_or_refused() {
        let table = [
            (LendRequest::Fused, LendMode::Fused, false),
            (LendRequest::Slot, LendMode::Slot, false),
            (LendRequest::UserCopy, LendMode::UserCopy, true),
            (LendRequest::Copy, LendMode::Copy, true),
        ];
        for (request, mode, on_old) in table {
            assert_eq!(request.choose(NEW).unwrap().mode, mode);
            assert_eq!(request.choose(OLD).is_ok(), on_old, "{mode}");
        }
        let refused = LendRequest::Fused.choose(OLD).unwrap_err().to_string();
        assert!(refused.contains("use `--lend auto` or `--lend copy`"), "{refused}");
    }

    #[test]
    fn zero_copy_has_user_copy_as_its_last_resort() {
        for request in [LendRequest::Fused, LendRequest::Slot] {
            assert_ne!(request.choose(NEW).unwrap().flags & USER_COPY.bit, 0);
        }
        assert_eq!(LendRequest::Copy.choose(NEW).unwrap().flags, 0);
    }

    #[test]
    fn the_mode_of_a_device_is_told_by_its_flags() {
        for request in
            [LendRequest::Fused, LendRequest::Slot, LendRequest::UserCopy, LendRequest::Copy]
        {
            let choice = request.choose(NEW).unwrap();
            assert_eq!(LendMode::of_flags(choice.flags | 0x42), choice.mode);
        }
    }
}

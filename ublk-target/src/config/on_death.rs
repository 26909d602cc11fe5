//! What happens to a device when its server dies.

use serde::{Deserialize, Serialize};
use uring_ext::feature::{
    Feature, Features, QUIESCE, USER_RECOVERY, USER_RECOVERY_FAIL_IO, USER_RECOVERY_REISSUE,
};

use crate::os::kernel;

/// What happens to a device, and to its I/O, when its server dies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnDeath {
    /// The device disappears: outstanding I/O fails (EIO), and later I/O finds no data (writes fail
    /// with ENOSPC, reads are at the end). For scratch data, and below RAID, which replaces a
    /// failed device.
    #[default]
    Fail,
    /// I/O waits for `recover`; outstanding I/O fails (EIO), so nothing is ever written twice. For
    /// applications that handle an error themselves, such as databases.
    Wait,
    /// I/O waits for `recover`; outstanding I/O is issued again, so no application sees an error. A
    /// write may be carried out twice, with the same data, before it is answered. Right for file
    /// systems, databases and others that would do the same after a power cut. Wrong if several
    /// clients write the same blocks and order these writes by other means than the answers.
    Reissue,
    /// I/O fails until `recover`, and then works again. Outstanding I/O fails with EIO, later I/O
    /// with EREMOTEIO, which dm-multipath takes for an error of the data, not of the path. For
    /// clients that must never hang.
    Error,
}

/// The driver cannot keep a device after its server has died.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "--on-death {on_death} needs the ublk feature {} (Linux {} or newer), which this kernel \
     ({release}) lacks; use `--on-death fail`", .feature.name, .feature.since
)]
pub struct CannotRecover {
    on_death: OnDeath,
    feature: Feature,
    release: String,
}

impl OnDeath {
    /// The driver features that the device is added with.
    ///
    /// # Errors
    /// [`CannotRecover`] if the driver lacks a feature that this needs.
    pub fn flags(self, features: Features) -> Result<u64, CannotRecover> {
        if let Some(feature) = features.first_missing(self.needs()) {
            let release = kernel::release().unwrap_or_default();
            return Err(CannotRecover { on_death: self, feature, release });
        }
        let needed = self.needs().iter().fold(0, |bits, feature| bits | feature.bit);
        let quiesce = if self.keeps_io() { features.0 & QUIESCE.bit } else { 0 };
        Ok(needed | quiesce)
    }

    /// Whether the device outlives its server.
    #[must_use]
    pub const fn is_recoverable(self) -> bool {
        !matches!(self, Self::Fail)
    }

    /// Whether I/O waits while there is no server.
    #[must_use]
    pub const fn keeps_io(self) -> bool {
        matches!(self, Self::Wait | Self::Reissue)
    }

    /// The behaviour of a device with these features.
    #[must_use]
    pub const fn of_flags(flags: u64) -> Self {
        let features = Features(flags);
        if !features.has(USER_RECOVERY) {
            Self::Fail
        } else if features.has(USER_RECOVERY_REISSUE) {
            Self::Reissue
        } else if features.has(USER_RECOVERY_FAIL_IO) {
            Self::Error
        } else {
            Self::Wait
        }
    }

    const fn needs(self) -> &'static [Feature] {
        match self {
            Self::Fail => &[],
            Self::Wait => &[USER_RECOVERY],
            Self::Reissue => &[USER_RECOVERY, USER_RECOVERY_REISSUE],
            Self::Error => &[USER_RECOVERY, USER_RECOVERY_FAIL_IO],
        }
    }
}

impl std::fmt::Display for OnDeath {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Fail => "fail",
            Self::Wait => "wait",
            Self::Reissue => "reissue",
            Self::Error => "error",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [OnDeath; 4] = [OnDeath::Fail, OnDeath::Wait, OnDeath::Reissue, OnDeath::Error];

    #[test]
    fn flags_tell_what_was_asked_for() {
        let new = Features(0xf_ffff);
        for on_death in ALL {
            let flags = on_death.flags(new).unwrap();
            assert_eq!(OnDeath::of_flags(flags | 0x42), on_death);
            assert_eq!(Features(flags).has(QUIESCE), on_death.keeps_io(), "{on_death}");
            assert_eq!(flags == 0, !on_death.is_recoverable());
        }
    }

    #[test]
    fn what_the_driver_lacks_is_named() {
        // Linux 6.12.
        let old = Features(0x1ff);
        for on_death in [OnDeath::Fail, OnDeath::Wait, OnDeath::Reissue] {
            assert!(on_death.flags(old).is_ok(), "{on_death}");
        }
        let refused = OnDeath::Error.flags(old).unwrap_err().to_string();
        assert!(refused.contains("--on-death error needs"), "{refused}");
        assert!(refused.contains("USER_RECOVERY_FAIL_IO (Linux 6.13 or newer)"), "{refused}");
    }
}

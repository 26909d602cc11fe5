//! The running kernel: its version, for choices that cannot be probed, and its driver's features.

use uring_ext::control::{Control, ControlError};
use uring_ext::feature::{AUTO_BUF_REG, Features, SUPPORT_ZERO_COPY};

/// A kernel version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct KernelVersion(pub u32, pub u32);

impl KernelVersion {
    /// The version of the running kernel; 0.0 if unknown.
    #[must_use]
    pub fn running() -> Self {
        release().as_deref().and_then(Self::parse).unwrap_or(Self(0, 0))
    }

    fn parse(release: &str) -> Option<Self> {
        let mut numbers = release.split(|c: char| !c.is_ascii_digit());
        Some(Self(numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
    }
}

impl std::fmt::Display for KernelVersion {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}", self.0, self.1)
    }
}

/// The release string of the running kernel, as `uname -r` shows it.
#[must_use]
pub fn release() -> Option<String> {
    Some(nix::sys::utsname::uname().ok()?.release().to_string_lossy().into_owned())
}

/// The features of the driver.
///
/// # Errors
/// Those of [`Control::features`].
pub fn features(control: &Control) -> Result<Features, ControlError> {
    Ok(without_phantoms(control.features()?, KernelVersion::running()))
}

/// Drivers before Linux 6.15 list zero copy and take it back when a device is added
/// (`ublk_ctrl_add_dev`).
fn without_phantoms(features: Features, kernel: KernelVersion) -> Features {
    if kernel >= KernelVersion(6, 15) || features.has(AUTO_BUF_REG) {
        return features;
    }
    Features(features.0 & !SUPPORT_ZERO_COPY.bit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_drivers_have_no_zero_copy_whatever_they_say() {
        let table = [
            (0x1ff, KernelVersion(6, 12), 0x1fe),
            (0x3ff, KernelVersion(6, 15), 0x3ff),
            (0xf_ffff, KernelVersion(7, 2), 0xf_ffff),
            (0x1f_ffff, KernelVersion(7, 3), 0x1f_ffff),
            // A driver that was given to an older kernel.
            (0x803, KernelVersion(6, 12), 0x803),
        ];
        for (said, kernel, found) in table {
            assert_eq!(without_phantoms(Features(said), kernel), Features(found));
        }
    }

    #[test]
    fn releases_are_parsed_and_compared() {
        let table = [
            ("7.3.4+deb13-cloud-amd64", (7, 3)),
            ("7.2.12+deb13-cloud-amd64", (7, 2)),
            ("6.12.0-rc1", (6, 12)),
            ("6.1-foo", (6, 1)),
        ];
        for (release, (major, minor)) in table {
            assert_eq!(KernelVersion::parse(release), Some(KernelVersion(major, minor)));
        }
        assert_eq!(KernelVersion::parse("linux"), None);
        assert!(KernelVersion(6, 9) < KernelVersion(6, 12));
    }
}

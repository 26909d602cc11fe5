//! The version of the running kernel, for choices that cannot be probed.

/// A kernel version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct KernelVersion(pub u32, pub u32);

impl KernelVersion {
    /// The running kernel's; 0.0 if it cannot be told.
    #[must_use]
    pub fn running() -> Self {
        release().as_deref().and_then(Self::parse).unwrap_or(Self(0, 0))
    }

    fn parse(release: &str) -> Option<Self> {
        let mut numbers = release.split(|c: char| !c.is_ascii_digit());
        Some(Self(numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
    }
}

/// The release string of the running kernel, as `uname -r` shows it.
#[must_use]
pub fn release() -> Option<String> {
    Some(nix::sys::utsname::uname().ok()?.release().to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_are_parsed_and_compared() {
        let table =
            [("7.2.12+deb13-cloud-amd64", (7, 2)), ("6.12.0-rc1", (6, 12)), ("6.1-foo", (6, 1))];
        for (release, (major, minor)) in table {
            assert_eq!(KernelVersion::parse(release), Some(KernelVersion(major, minor)));
        }
        assert_eq!(KernelVersion::parse("linux"), None);
        assert!(KernelVersion(6, 9) < KernelVersion(6, 12));
    }
}

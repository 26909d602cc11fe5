//! Features of the ublk driver: bits, names and first kernel versions.

/// One feature flag of the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Feature {
    /// The bit (`UBLK_F_*`).
    pub bit: u64,
    /// The UAPI name without `UBLK_F_`.
    pub name: &'static str,
    /// The first kernel version that offers it.
    pub since: &'static str,
}

/// Declares the features. The bits are literal numbers because the UAPI bindings lack the newest
/// features. `uapi_test` checks them against the kernel's headers.
macro_rules! features {
    ($($name:ident $number:literal $since:literal $doc:literal;)*) => {
        $(
            #[doc = $doc]
            pub const $name: Feature = Feature {
                bit: 1 << $number,
                name: stringify!($name),
                since: $since,
            };
        )*
        /// All features that this crate knows, in the order of their bits.
        pub const ALL: &[Feature] = &[$($name),*];
    };
}

features! {
    SUPPORT_ZERO_COPY 0 "6.15" "Explicit registration of request buffers.";
    URING_CMD_COMP_IN_TASK 1 "6.0" "Completion in task work.";
    NEED_GET_DATA 2 "6.0" "Writes are delivered in two steps.";
    USER_RECOVERY 3 "6.1" "The device survives the death of its server.";
    USER_RECOVERY_REISSUE 4 "6.1" "Outstanding I/O is reissued after recovery.";
    UNPRIVILEGED_DEV 5 "6.3" "Devices of ordinary users.";
    CMD_IOCTL_ENCODE 6 "6.4" "Commands encoded as ioctls.";
    USER_COPY 7 "6.5" "Data copied by pread and pwrite on the character device.";
    ZONED 8 "6.6" "Zoned devices.";
    USER_RECOVERY_FAIL_IO 9 "6.13" "I/O fails until the device is recovered.";
    UPDATE_SIZE 10 "6.16" "Live resize.";
    AUTO_BUF_REG 11 "6.16" "Buffers are registered at delivery and returned at commit.";
    QUIESCE 12 "6.16" "The server can be replaced under a live device.";
    PER_IO_DAEMON 13 "6.16" "Each tag may have its own server task.";
    BUF_REG_OFF_DAEMON 14 "6.17" "Buffers may be registered from another task than the fetching one.";
    BATCH_IO 15 "7.0" "Delivery and commit in batches.";
    INTEGRITY 16 "7.0" "Integrity buffers.";
    SAFE_STOP_DEV 17 "7.0" "A stop that is refused while the device is open.";
    NO_AUTO_PART_SCAN 18 "7.0" "No partition scan at start.";
    SHMEM_ZC 19 "7.1" "Zero copy through memory that client and server share.";
    IO_DESC_SIZE 20 "7.3" "Request descriptors of a size that the server chooses.";
}

/// The feature bits that a driver reported (`UBLK_U_CMD_GET_FEATURES`, Linux 6.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Features(pub u64);

impl Features {
    /// Whether the driver has the feature.
    #[must_use]
    pub const fn has(self, feature: Feature) -> bool {
        self.0 & feature.bit != 0
    }

    /// The first of the wanted features that the driver lacks.
    #[must_use]
    pub fn first_missing(self, wanted: &[Feature]) -> Option<Feature> {
        wanted.iter().copied().find(|feature| !self.has(*feature))
    }

    /// Bits that are not in [`ALL`]: the driver is newer than this crate.
    #[must_use]
    pub fn unknown_bits(self) -> u64 {
        ALL.iter().fold(self.0, |bits, feature| bits & !feature.bit)
    }

    /// The numbers of these bits, 0 to 63, lowest first.
    pub fn unknown(self) -> impl Iterator<Item = u32> {
        let bits = self.unknown_bits();
        (0..u64::BITS).filter(move |number| bits & (1 << number) != 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_are_distinct_and_in_order() {
        for (index, feature) in ALL.iter().enumerate() {
            assert_eq!(feature.bit, 1 << index, "{}", feature.name);
        }
    }

    #[test]
    fn missing_and_unknown_features_are_found() {
        let stable = Features(0x3ff);
        assert_eq!(stable.first_missing(&[SUPPORT_ZERO_COPY, AUTO_BUF_REG]), Some(AUTO_BUF_REG));
        assert_eq!(stable.first_missing(&[USER_COPY]), None);
        let newer = Features(1 << 63 | 1 << 40 | 1);
        assert_eq!(newer.unknown_bits(), 1 << 63 | 1 << 40);
        assert!(newer.unknown().eq([40, 63]));
        assert_eq!(Features(0x1f_ffff).unknown().count(), 0);
    }
}

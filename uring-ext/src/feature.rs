//! Features of the ublk driver: bits, names and first kernel versions.

use libublk::sys;

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

macro_rules! features {
    ($($name:ident $constant:ident $since:literal $doc:literal;)*) => {
        $(
            #[doc = $doc]
            pub const $name: Feature = Feature {
                bit: sys::$constant as u64,
                name: stringify!($name),
                since: $since,
            };
        )*
        /// All features that this crate knows, in the order of their bits.
        pub const ALL: &[Feature] = &[$($name),*];
    };
}

features! {
    SUPPORT_ZERO_COPY UBLK_F_SUPPORT_ZERO_COPY "6.15" "Explicit registration of request buffers.";
    URING_CMD_COMP_IN_TASK UBLK_F_URING_CMD_COMP_IN_TASK "6.0" "Completion in task work.";
    NEED_GET_DATA UBLK_F_NEED_GET_DATA "6.0" "Writes are delivered in two steps.";
    USER_RECOVERY UBLK_F_USER_RECOVERY "6.1" "The device survives its server.";
    USER_RECOVERY_REISSUE UBLK_F_USER_RECOVERY_REISSUE "6.1" "Outstanding I/O is reissued after recovery.";
    UNPRIVILEGED_DEV UBLK_F_UNPRIVILEGED_DEV "6.3" "Devices of ordinary users.";
    CMD_IOCTL_ENCODE UBLK_F_CMD_IOCTL_ENCODE "6.4" "Commands encoded as ioctls.";
    USER_COPY UBLK_F_USER_COPY "6.5" "Data copied by pread and pwrite on the character device.";
    ZONED UBLK_F_ZONED "6.6" "Zoned devices.";
    USER_RECOVERY_FAIL_IO UBLK_F_USER_RECOVERY_FAIL_IO "6.13" "I/O fails until the device is recovered.";
    UPDATE_SIZE UBLK_F_UPDATE_SIZE "6.16" "Live resize.";
    AUTO_BUF_REG UBLK_F_AUTO_BUF_REG "6.16" "Buffers are registered at delivery and returned at commit.";
    QUIESCE UBLK_F_QUIESCE "6.16" "The server can be replaced under a live device.";
    PER_IO_DAEMON UBLK_F_PER_IO_DAEMON "6.16" "Each tag may have its own server task.";
    BUF_REG_OFF_DAEMON UBLK_F_BUF_REG_OFF_DAEMON "6.17" "Buffers may be registered from another task than the fetching one.";
    BATCH_IO UBLK_F_BATCH_IO "7.0" "Delivery and commit in batches.";
    INTEGRITY UBLK_F_INTEGRITY "7.0" "Integrity buffers.";
    SAFE_STOP_DEV UBLK_F_SAFE_STOP_DEV "7.0" "A stop that is refused while the device is open.";
    NO_AUTO_PART_SCAN UBLK_F_NO_AUTO_PART_SCAN "7.0" "No partition scan at start.";
    SHMEM_ZC UBLK_F_SHMEM_ZC "7.1" "Zero copy through shared memory of client and server.";
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

    /// Bits that no feature of [`ALL`] stands for: a driver newer than this crate.
    #[must_use]
    pub fn unknown_bits(self) -> u64 {
        ALL.iter().fold(self.0, |bits, feature| bits & !feature.bit)
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
        assert_eq!(Features(1 << 40 | 1).unknown_bits(), 1 << 40);
    }
}

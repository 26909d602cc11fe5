//! The paths of a device, by its id.

use std::path::{Path, PathBuf};

/// The directory of the state files.
pub const RUN_DIR: &str = "/run/ublk-target";
/// The directory of the servers' logs.
pub const LOG_DIR: &str = "/var/log/ublk-target";
/// The largest id: the driver's device numbers have 20 bits (`UBLK_MINORS`).
pub const MAX_ID: u32 = (1 << 20) - 1;

/// The block device of an id.
#[must_use]
pub fn block_path(id: u32) -> PathBuf {
    PathBuf::from(format!("/dev/ublkb{id}"))
}

/// The character device of an id.
#[must_use]
pub fn char_path(id: u32) -> PathBuf {
    PathBuf::from(format!("/dev/ublkc{id}"))
}

/// The log of the server of a device.
#[must_use]
pub fn log_path(id: u32) -> PathBuf {
    Path::new(LOG_DIR).join(format!("{id}.log"))
}

//! Errors of control commands.

use std::time::Duration;

use super::CONTROL_PATH;
use crate::Errno;

/// Error of a control command.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// The node is missing since the driver is not loaded.
    #[error("{CONTROL_PATH} is missing: the ublk driver is not loaded; run `modprobe ublk_drv`")]
    NoDriver,
    /// The same, for a process that would also lack the permission to open the node.
    #[error(
        "run as root: {CONTROL_PATH} is root's; it is missing, too, for the ublk driver is not \
         loaded: `modprobe ublk_drv` as root"
    )]
    NoDriverNorRoot,
    /// No permission to open the node.
    #[error("{CONTROL_PATH} may not be opened: run as root")]
    NoPermission,
    /// The driver is loaded, but there is no node, or it belongs to another driver.
    #[error(
        "{CONTROL_PATH} is missing here, or is something else, though the ublk driver is loaded: this /dev \
         is not the machine's own, as in a container; it needs the character device {0}"
    )]
    NoNode(String),
    /// The driver does not know the commands that this crate is built on.
    #[error("the ublk driver of this kernel is too old: Linux 6.5 or newer is needed")]
    TooOld,
    /// The kernel has no io_uring, or forbids its use.
    #[error("io_uring is not allowed ({0}); see the sysctl kernel.io_uring_disabled")]
    NoIoUring(Errno),
    /// Opening the node or making the control ring failed.
    #[error("{what}: {errno}")]
    Setup {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        errno: Errno,
    },
    /// The driver refused a command.
    #[error("{command}: {errno}")]
    Refused {
        /// The command by its UAPI name.
        command: &'static str,
        /// Why it failed.
        errno: Errno,
    },
    /// The driver did not answer in time. The command may still take effect.
    #[error("{command}: no answer from the driver within {} s", waited.as_secs())]
    Timeout {
        /// The command by its UAPI name.
        command: &'static str,
        /// How long the caller waited.
        waited: Duration,
    },
}

impl ControlError {
    /// The error number, if the driver returned one.
    #[must_use]
    pub const fn errno(&self) -> Option<Errno> {
        match self {
            Self::Setup { errno, .. } | Self::Refused { errno, .. } => Some(*errno),
            Self::NoDriver
            | Self::NoDriverNorRoot
            | Self::NoNode(_)
            | Self::NoPermission
            | Self::TooOld
            | Self::NoIoUring(_)
            | Self::Timeout { .. } => None,
        }
    }
}

/// The meaning of an error from opening the node. `numbers` are its device numbers, if the driver
/// is loaded.
pub(super) fn open_error(errno: Errno, numbers: Option<&str>, is_root: bool) -> ControlError {
    match errno {
        // ENXIO and ENODEV: a static node without its driver.
        Errno::ENOENT | Errno::ENODEV | Errno::ENXIO => match (numbers, is_root) {
            (Some(numbers), _) => ControlError::NoNode(numbers.to_owned()),
            (None, true) => ControlError::NoDriver,
            (None, false) => ControlError::NoDriverNorRoot,
        },
        Errno::EACCES | Errno::EPERM => ControlError::NoPermission,
        errno => ControlError::Setup { what: "cannot open /dev/ublk-control", errno },
    }
}

/// The meaning of an error from making the control ring.
pub(super) fn ring_error(error: libublk::UblkError) -> ControlError {
    let errno =
        if let libublk::UblkError::IOError(error) = error { Errno::of(&error) } else { Errno::EIO };
    match errno {
        Errno::EPERM | Errno::ENOSYS => ControlError::NoIoUring(errno),
        errno => ControlError::Setup { what: "cannot make the control ring", errno },
    }
}

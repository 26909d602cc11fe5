//! Error numbers, as the kernel returns them, printed by name.

use std::fmt;

/// A positive error number (`EIO` is 5), from `include/uapi/asm-generic/errno*.h`.
///
/// The kernel returns errors negated in CQEs and commits; the sign is handled only by
/// [`Errno::from_result`] and [`Errno::negated`].
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Errno(i32);

impl Errno {
    /// I/O error.
    pub const EIO: Self = Self(libc::EIO);
    /// Operation not supported.
    pub const EOPNOTSUPP: Self = Self(libc::EOPNOTSUPP);
    /// Invalid argument.
    pub const EINVAL: Self = Self(libc::EINVAL);
    /// Try again.
    pub const EAGAIN: Self = Self(libc::EAGAIN);
    /// Interrupted.
    pub const EINTR: Self = Self(libc::EINTR);
    /// Out of memory.
    pub const ENOMEM: Self = Self(libc::ENOMEM);
    /// No such device; as the result of a fetch it means that the device was stopped
    /// (`UBLK_IO_RES_ABORT`).
    pub const ENODEV: Self = Self(libc::ENODEV);
    /// No such device or address.
    pub const ENXIO: Self = Self(libc::ENXIO);
    /// Device or resource busy.
    pub const EBUSY: Self = Self(libc::EBUSY);
    /// No such file or directory.
    pub const ENOENT: Self = Self(libc::ENOENT);
    /// File exists.
    pub const EEXIST: Self = Self(libc::EEXIST);
    /// Permission denied.
    pub const EACCES: Self = Self(libc::EACCES);
    /// Operation not permitted.
    pub const EPERM: Self = Self(libc::EPERM);
    /// Function not implemented.
    pub const ENOSYS: Self = Self(libc::ENOSYS);
    /// No space left.
    pub const ENOSPC: Self = Self(libc::ENOSPC);
    /// The entry to cancel is already running.
    pub const EALREADY: Self = Self(libc::EALREADY);
    /// The operation was cancelled.
    pub const ECANCELED: Self = Self(libc::ECANCELED);
    /// No path to the device.
    pub const ENOLINK: Self = Self(libc::ENOLINK);
    /// A wait in `io_uring_enter(2)` timed out.
    pub const ETIME: Self = Self(libc::ETIME);
    /// A deadline has passed.
    pub const ETIMEDOUT: Self = Self(libc::ETIMEDOUT);
    /// Bad address. For a fixed operation: its slot is empty, or it reaches beyond the buffer.
    pub const EFAULT: Self = Self(libc::EFAULT);
    /// Read-only file system.
    pub const EROFS: Self = Self(libc::EROFS);
    /// The medium has an error (`BLK_STS_MEDIUM`).
    pub const ENODATA: Self = Self(libc::ENODATA);
    /// The drive refuses the range (`BLK_STS_TARGET`).
    pub const EREMOTEIO: Self = Self(libc::EREMOTEIO);
    /// Another host has reserved the drive (`BLK_STS_RESV_CONFLICT`).
    pub const EBADE: Self = Self(libc::EBADE);
    /// Protection information does not match (`BLK_STS_PROTECTION`).
    pub const EILSEQ: Self = Self(libc::EILSEQ);

    /// Makes one from a positive error number.
    #[must_use]
    pub const fn new(errno: i32) -> Self {
        Self(errno)
    }

    /// Splits a kernel result: zero or more is `Ok`, a negated error number is `Err`.
    ///
    /// # Errors
    /// The error in `res`.
    pub fn from_result(res: i32) -> Result<u32, Self> {
        u32::try_from(res).map_err(|_negative| Self(res.wrapping_neg()))
    }

    /// The positive number.
    #[must_use]
    pub const fn number(self) -> i32 {
        self.0
    }

    /// The negated number, as in commits and CQEs.
    #[must_use]
    pub const fn negated(self) -> i32 {
        self.0.wrapping_neg()
    }

    /// The error number of an I/O error, or `EIO` if it has none.
    #[must_use]
    pub fn of(error: &std::io::Error) -> Self {
        Self(error.raw_os_error().unwrap_or(libc::EIO))
    }
}

impl From<Errno> for std::io::Error {
    fn from(errno: Errno) -> Self {
        Self::from_raw_os_error(errno.0)
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let known = nix::errno::Errno::from_raw(self.0);
        if known == nix::errno::Errno::UnknownErrno {
            write!(f, "errno {}", self.0)
        } else {
            write!(f, "{known:?} ({})", known.desc())
        }
    }
}

impl fmt::Debug for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl std::error::Error for Errno {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_split_at_zero() {
        // Compared with literals, so that the test cannot repeat a sign error.
        let table: [(i32, Result<u32, i32>); 5] =
            [(0, Ok(0)), (4096, Ok(4096)), (-5, Err(5)), (-19, Err(19)), (-95, Err(95))];
        for (res, expected) in table {
            assert_eq!(Errno::from_result(res).map_err(Errno::number), expected, "{res}");
        }
        assert_eq!(Errno::EIO.negated(), -5);
        assert_eq!(Errno::ENODEV.negated(), -19);
    }

    #[test]
    fn errors_are_printed_by_name() {
        assert!(Errno::EIO.to_string().starts_with("EIO ("));
        assert_eq!(Errno::new(5000).to_string(), "errno 5000");
    }
}

//! The answer to a request: all of its bytes, or an error.

use uring_ext::Errno;

use crate::request::Request;

/// The answer to a request. There is no answer for a part of it.
///
/// A driver may treat any result that is not an error as the whole: up to Linux 7.2 it delivers the
/// rest of a read or write again, from 7.3 on only for reads that it copies itself
/// (`__ublk_complete_rq` in `drivers/block/ublk_drv.c`). A short result would then lose data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer(i32);

impl Answer {
    /// Success of the whole request, as the driver delivered it.
    #[inline]
    pub(super) fn whole(request: &Request) -> Self {
        if !request.has_data() {
            // For the other kinds, the driver treats any result of 0 or more as success.
            return Self(0);
        }
        // The driver never delivers requests this long.
        i32::try_from(request.len).map_or(Self::failed(Errno::EINVAL), Self)
    }

    /// Success of a request with only one operation, a read or write of the same length, which
    /// ended with `res`. `None` if it has not moved all bytes.
    #[inline(always)]
    pub(super) fn of_transfer(request: &Request, res: i32) -> Option<Self> {
        (u64::try_from(res) == Ok(request.len)).then_some(Self(res))
    }

    /// An error.
    pub(super) fn failed(errno: Errno) -> Self {
        // Some clients would retry on an error that means "try again".
        let again = matches!(errno, Errno::EAGAIN | Errno::EINTR);
        Self(if again { Errno::EIO.negated() } else { errno.negated() })
    }

    /// The result for the driver: the bytes of a read or write, 0 for the other kinds, or a negated
    /// error number.
    #[must_use]
    #[inline]
    pub const fn result(self) -> i32 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::RequestKind;

    const KINDS: [(RequestKind, i32); 5] = [
        (RequestKind::Read, 8192),
        (RequestKind::Write { fua: true }, 8192),
        (RequestKind::Flush, 0),
        (RequestKind::Discard, 0),
        (RequestKind::WriteZeroes { may_unmap: true }, 0),
    ];

    #[test]
    fn a_success_is_all_of_the_request() {
        for (kind, result) in KINDS {
            let request = Request { kind, offset: 512, len: 8192 };
            assert_eq!(Answer::whole(&request).result(), result, "{kind:?}");
        }
        let endless = Request { kind: RequestKind::Read, offset: 0, len: 1 << 31 };
        assert_eq!(Answer::whole(&endless).result(), -22, "a result cannot be this large");
    }

    #[test]
    fn a_part_is_no_answer() {
        let request = Request { kind: RequestKind::Read, offset: 0, len: 8192 };
        for res in [8191, 8193, 512, 0, -5, i32::MIN, i32::MAX] {
            assert_eq!(Answer::of_transfer(&request, res), None, "{res}");
        }
        let whole = Answer::of_transfer(&request, 8192);
        assert_eq!(whole.map(Answer::result), Some(8192));
    }

    #[test]
    fn no_error_asks_for_another_try() {
        for (errno, result) in [(Errno::EIO, -5), (Errno::EAGAIN, -5), (Errno::EINTR, -5)] {
            assert_eq!(Answer::failed(errno).result(), result);
        }
        assert_eq!(Answer::failed(Errno::ENOSPC).result(), -28);
    }
}

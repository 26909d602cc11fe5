//! What a request is answered with: all of it, or an error.

use uring_ext::Errno;

use crate::request::Request;

/// What a request is answered with. There is no answer for a part of it.
///
/// A driver may take any result that is not an error for the whole: up to Linux 7.2 it delivers
/// what is left of a read or write again, from 7.3 on it does so only where it copies a read itself
/// (`__ublk_complete_rq` in `drivers/block/ublk_drv.c`). A short result would then lose data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer(i32);

impl Answer {
    /// All of a request, as the driver has delivered it.
    #[inline]
    pub(super) fn whole(request: &Request) -> Self {
        if !request.has_data() {
            // The driver takes any result of zero or more as success of the other kinds.
            return Self(0);
        }
        // The driver has no requests that long.
        i32::try_from(request.len).map_or(Self::failed(Errno::EINVAL), Self)
    }

    /// All of a request whose only operation, a read or write of as many bytes, has ended with
    /// `res`; `None` if that has not moved them all.
    #[inline(always)]
    pub(super) fn of_transfer(request: &Request, res: i32) -> Option<Self> {
        (u64::try_from(res) == Ok(request.len)).then_some(Self(res))
    }

    /// An error.
    pub(super) fn failed(errno: Errno) -> Self {
        // An error that means "try again" would be taken as such by some who see it.
        let again = matches!(errno, Errno::EAGAIN | Errno::EINTR);
        Self(if again { Errno::EIO.negated() } else { errno.negated() })
    }

    /// As the driver takes it: the bytes of a read or write, 0 for the other kinds, or a negated
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
        assert_eq!(Answer::whole(&endless).result(), -22, "no result can say so much");
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

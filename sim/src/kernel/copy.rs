//! User copy: `pread` and `pwrite` on the character device.

use ublk_engine::engine::MAX_RETRIES;
use uring_ext::Errno;
use uring_ext::pool::Direction;
use uring_ext::sys;

use super::spare::SpareHolder;
use super::{Kernel, Phase};
use crate::GARBAGE;
use crate::draw::Draw as _;
use crate::entry::Work;
use crate::fault::Fault;

impl Kernel {
    /// `LaneIo::copy`.
    pub(super) fn user_copy(
        &mut self,
        tag: u16,
        buffer: u16,
        direction: Direction,
        from: u32,
        to: u32,
    ) -> i32 {
        let model = &self.tags[usize::from(tag)];
        assert!(model.phase == Phase::Serving && model.handled, "copy without a request");
        let expected = match direction {
            Direction::FromRequest => sys::UBLK_IO_OP_WRITE,
            Direction::ToRequest => sys::UBLK_IO_OP_READ,
        };
        assert_eq!(model.iod.op(), expected, "direction of a copy");
        assert!(from < to && to as usize <= model.len, "copy of {from}..{to}");
        assert!(buffer < self.setup.slots.pool, "pool buffer {buffer}");
        let is_spare = self.setup.table_range.spare.is_some();
        assert!(!is_spare || self.spare == SpareHolder::Lane, "the spare buffer is another's");
        self.assert_nothing_uses(buffer);
        if let Some(errno) = self.copy_failure(tag) {
            return errno.negated();
        }
        let mut len = (to - from) as usize;
        if self.strikes(Fault::CopyZero) {
            let faults_met = &mut self.tags[usize::from(tag)].faults_met;
            faults_met.allow(Errno::EIO);
            faults_met.must_fail = true;
            return 0;
        }
        if len > 1 && self.strikes(Fault::CopyPartial) {
            len = 1 + self.rng.index(len - 1);
        }
        let range = from as usize..from as usize + len;
        let model = &mut self.tags[usize::from(tag)];
        model.faults_met.copies_in_a_row = 0;
        model.faults_met.copied = true;
        let bytes = &mut self.pool[usize::from(buffer)][range.clone()];
        match direction {
            Direction::FromRequest => bytes.copy_from_slice(&model.data[range]),
            Direction::ToRequest => {
                model.data[range].copy_from_slice(bytes);
                // Nobody may read these bytes here after they were copied out.
                bytes.fill(GARBAGE);
            }
        }
        self.trace.note(|| format!("copy tag {tag} buffer {buffer} {from}..{to}: {len}"));
        i32::try_from(len).unwrap_or(i32::MAX)
    }

    fn copy_failure(&mut self, tag: u16) -> Option<Errno> {
        let storm = self.tags[usize::from(tag)].faults_met.storm_copy;
        if storm {
            self.tally.note(Fault::CopyStorm);
        }
        if storm || self.strikes(Fault::CopyTransient) {
            let errno = self.rng.pick(&[Errno::EAGAIN, Errno::EINTR]);
            let faults_met = &mut self.tags[usize::from(tag)].faults_met;
            faults_met.copies_in_a_row += 1;
            faults_met.copies += 1;
            assert!(
                faults_met.copies_in_a_row <= u32::from(MAX_RETRIES) + 1,
                "copied again and again"
            );
            if faults_met.copies > u32::from(MAX_RETRIES) {
                faults_met.allow(Errno::EIO);
            }
            return Some(errno);
        }
        if self.strikes(Fault::CopyError) {
            let errno = self.rng.pick(&[Errno::EIO, Errno::EFAULT]);
            let faults_met = &mut self.tags[usize::from(tag)].faults_met;
            faults_met.allow(errno);
            faults_met.must_fail = true;
            return Some(errno);
        }
        None
    }

    /// No operation in flight may use a buffer that is being copied.
    fn assert_nothing_uses(&self, buffer: u16) {
        let slot = self.setup.slots.lent + buffer;
        let flights = self.queued.iter().chain(&self.running);
        let mut entries = self.pushed().chain(flights.flat_map(super::Flight::entries));
        let uses = entries.any(|entry| matches!(entry.work, Work::Transfer(it) if it.slot == slot));
        assert!(!uses, "a copy to or from buffer {buffer} while an operation uses it");
    }
}

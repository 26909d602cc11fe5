//! The event that a completion reports, encoded in its `user_data`.

use bufreg::Incarnation;

use crate::engine::{OpKey, TagKey};
use crate::units::Tag;

/// The event that a completion reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A fetch or commit: a request was delivered, or will not come.
    Fetched(TagKey),
    /// An operation.
    Op(OpKey),
    /// An operation that is an NVMe command: its result is a status.
    Command(OpKey),
    /// The registration of a buffer.
    Registered(TagKey),
    /// The unregistration of a buffer.
    Unregistered(TagKey),
    /// The request to cancel an operation; the operation has a completion of its own.
    Cancelled,
    /// An entry in place of an operation that a test makes fail with `EAGAIN`.
    Injected(OpKey),
    /// There is a message for the lane.
    Wake,
    /// The lane's other ring has entries or completions for this one.
    Notified,
    /// A message to the other ring of the lane could not be sent.
    Unsent,
}

/// The top 4 bits are the kind, the next 12 the incarnation. Below are a tag (16 bits) and its
/// sequence number (32), or an operation's index (16) and serial number (32).
const KIND_SHIFT: u32 = 60;
const INCARNATION_SHIFT: u32 = 48;
const INCARNATION_MASK: u32 = 0xfff;

impl Event {
    /// As `user_data` of an entry.
    #[must_use]
    #[inline(always)]
    pub fn encode(self, incarnation: Incarnation) -> u64 {
        let of_tag = |key: TagKey| (u64::from(key.tag.0) << 32) | u64::from(key.seq);
        let of_op = |key: OpKey| (u64::from(key.index) << 32) | u64::from(key.serial);
        let (kind, payload): (u64, u64) = match self {
            Self::Fetched(key) => (0, of_tag(key)),
            Self::Op(key) => (1, of_op(key)),
            Self::Registered(key) => (2, of_tag(key)),
            Self::Unregistered(key) => (3, of_tag(key)),
            Self::Cancelled => (4, 0),
            Self::Injected(key) => (5, of_op(key)),
            Self::Wake => (6, 0),
            Self::Notified => (7, 0),
            Self::Unsent => (8, 0),
            Self::Command(key) => (9, of_op(key)),
        };
        let incarnation = u64::from(incarnation.0 & INCARNATION_MASK) << INCARNATION_SHIFT;
        (kind << KIND_SHIFT) | incarnation | payload
    }

    /// The lower 12 bits of the incarnation in a completion's `user_data`. They identify the
    /// station.
    #[must_use]
    #[inline(always)]
    pub fn whose(user_data: u64) -> u16 {
        let [.., low, head] = user_data.to_le_bytes();
        u16::from_le_bytes([low, head & 0xf])
    }

    /// Decodes the `user_data` of a completion; `None` for an event of another incarnation, or an
    /// unknown event.
    #[must_use]
    pub fn decode(user_data: u64, incarnation: Incarnation) -> Option<Self> {
        if (user_data >> INCARNATION_SHIFT) & u64::from(INCARNATION_MASK)
            != u64::from(incarnation.0 & INCARNATION_MASK)
        {
            return None;
        }
        let (of_tag, of_op) = (tag_key(user_data), op_key(user_data));
        match user_data >> KIND_SHIFT {
            0 => Some(Self::Fetched(of_tag)),
            1 => Some(Self::Op(of_op)),
            2 => Some(Self::Registered(of_tag)),
            3 => Some(Self::Unregistered(of_tag)),
            4 => Some(Self::Cancelled),
            5 => Some(Self::Injected(of_op)),
            6 => Some(Self::Wake),
            7 => Some(Self::Notified),
            8 => Some(Self::Unsent),
            9 => Some(Self::Command(of_op)),
            _ => None,
        }
    }
}

/// Prefixes of the two most common events, so that one comparison identifies each.
#[derive(Clone, Copy, Debug)]
pub struct Common {
    fetched: u64,
    op: u64,
}

impl Common {
    /// The prefixes of an incarnation.
    pub fn of(incarnation: Incarnation) -> Self {
        let fetched = Event::Fetched(TagKey { tag: Tag(0), seq: 0 });
        let op = Event::Op(OpKey { index: 0, serial: 0 });
        let head = |event: Event| event.encode(incarnation) >> INCARNATION_SHIFT;
        Self { fetched: head(fetched), op: head(op) }
    }

    /// The key of an [`Event::Fetched`].
    #[inline(always)]
    pub fn fetched(&self, user_data: u64) -> Option<TagKey> {
        (user_data >> INCARNATION_SHIFT == self.fetched).then(|| tag_key(user_data))
    }

    /// The key of an [`Event::Op`].
    #[inline(always)]
    pub fn op(&self, user_data: u64) -> Option<OpKey> {
        (user_data >> INCARNATION_SHIFT == self.op).then(|| op_key(user_data))
    }
}

fn tag_key(user_data: u64) -> TagKey {
    let (tag, seq) = halves(user_data);
    TagKey { tag: Tag(tag), seq }
}

fn op_key(user_data: u64) -> OpKey {
    let (index, serial) = halves(user_data);
    OpKey { index, serial }
}

#[inline]
fn halves(user_data: u64) -> (u16, u32) {
    let [l0, l1, l2, l3, h0, h1, ..] = user_data.to_le_bytes();
    (u16::from_le_bytes([h0, h1]), u32::from_le_bytes([l0, l1, l2, l3]))
}

#[cfg(test)]
mod tests {
    use super::*;

    const EVENTS: [Event; 11] = [
        Event::Fetched(TagKey { tag: Tag(4095), seq: u32::MAX }),
        Event::Op(OpKey { index: 0, serial: 0 }),
        Event::Op(OpKey { index: u16::MAX, serial: u32::MAX }),
        Event::Registered(TagKey { tag: Tag(0), seq: 7 }),
        Event::Unregistered(TagKey { tag: Tag(u16::MAX), seq: 0 }),
        Event::Cancelled,
        Event::Injected(OpKey { index: 3, serial: 9 }),
        Event::Wake,
        Event::Notified,
        Event::Unsent,
        Event::Command(OpKey { index: 2047, serial: 1 }),
    ];

    #[test]
    fn events_survive_the_kernel() {
        for incarnation in [Incarnation(0), Incarnation(0xabc), Incarnation(0xffff_ffff)] {
            for event in EVENTS {
                let user_data = event.encode(incarnation);
                assert_eq!(Event::decode(user_data, incarnation), Some(event));
                let common = Common::of(incarnation);
                let fetched = common.fetched(user_data).map(Event::Fetched);
                let found = fetched.or(common.op(user_data).map(Event::Op));
                let is_common = matches!(event, Event::Fetched(_) | Event::Op(_));
                assert_eq!(found, is_common.then_some(event));
                assert_eq!(u32::from(Event::whose(user_data)), incarnation.0 & 0xfff);
            }
        }
    }

    #[test]
    fn events_of_other_incarnations_are_not_believed() {
        for event in EVENTS {
            let user_data = event.encode(Incarnation(5));
            assert_eq!(Event::decode(user_data, Incarnation(6)), None);
        }
        assert_eq!(Event::decode(u64::MAX, Incarnation(0xfff)), None, "nobody's kind");
    }
}

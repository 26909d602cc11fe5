//! Spurious completions: duplicates, completions of an earlier incarnation, invalid ones, and ones
//! of commands that were not issued. They must be counted and have no effect.

use rand_xoshiro::rand_core::Rng as _;
use ublk_engine::engine::{EngineStats, OpKey, TagKey};
use ublk_engine::lane::event::Event;
use ublk_engine::units::Tag;
use uring_ext::ring::Cqe;

use crate::draw::Draw as _;
use crate::fault::Fault;
use crate::world::World;

/// Completions that were handled: the first ones of an incarnation, since their keys recur in the
/// next one, and the latest.
#[derive(Debug)]
pub struct HandledCompletions {
    first: Vec<Cqe>,
    latest: Vec<Cqe>,
    next: usize,
}

const FIRST: usize = 24;
const LATEST: usize = 32;
/// How many completions of an earlier incarnation are kept.
const GHOSTS: usize = 64;

impl Default for HandledCompletions {
    fn default() -> Self {
        Self { first: Vec::with_capacity(FIRST), latest: Vec::with_capacity(LATEST), next: 0 }
    }
}

impl HandledCompletions {
    /// Records a completion that was handled.
    pub fn note(&mut self, cqe: Cqe) {
        if self.first.len() < FIRST {
            self.first.push(cqe);
        } else if self.latest.len() < LATEST {
            self.latest.push(cqe);
        } else {
            self.latest[self.next % LATEST] = cqe;
            self.next += 1;
        }
    }

    /// Keeps completions of an incarnation that has ended.
    pub fn end(&mut self, unreaped: impl Iterator<Item = Cqe>, ghosts: &mut Vec<Cqe>) {
        ghosts.clear();
        ghosts
            .extend(self.first.drain(..).chain(unreaped).chain(self.latest.drain(..)).take(GHOSTS));
        self.next = 0;
    }

    fn pick(&self, number: usize) -> Option<Cqe> {
        let all = self.first.len() + self.latest.len();
        let number = number.checked_rem(all)?;
        self.first.get(number).or_else(|| self.latest.get(number - self.first.len())).copied()
    }
}

impl World {
    /// Passes a spurious completion to the lane.
    ///
    /// # Panics
    /// If it has an effect, or is not counted.
    pub(crate) fn make_noise(&mut self) {
        let choice = self.kernel.borrow_mut().rng.below(8);
        let noise = match choice {
            0..3 => self.duplicate().map(|cqe| (Fault::Duplicated, cqe)),
            3..5 => self.ghost().map(|cqe| (Fault::Ghost, cqe)),
            5 => self.invalid().map(|cqe| (Fault::Invalid, cqe)),
            _ => self.unasked().map(|cqe| (Fault::Unasked, cqe)),
        };
        let Some((fault, cqe)) = noise else { return };
        let before = *self.lane.engine().stats();
        let (pushed, answered) = self.seen();
        {
            let mut kernel = self.kernel.borrow_mut();
            kernel.tally.note(fault);
            kernel.trace.note(|| format!("noise ({}): {cqe:x?}", fault.name()));
            kernel.trace.mix(cqe.user_data);
        }
        self.lane.handle(cqe, &mut self.io);
        assert_eq!(self.seen(), (pushed, answered), "{} changed something", fault.name());
        let after = *self.lane.engine().stats();
        assert_eq!(quiet(after), quiet(before), "{} was counted as something else", fault.name());
        let counted = after.stale + after.unexpected - before.stale - before.unexpected;
        assert_eq!(counted, 1, "{} is counted once: {cqe:x?}", fault.name());
        self.noise += 1;
    }

    fn seen(&self) -> (usize, u64) {
        let kernel = self.kernel.borrow();
        (kernel.pushed().count(), kernel.answered)
    }

    /// A completion that was handled before.
    fn duplicate(&mut self) -> Option<Cqe> {
        let number = self.kernel.borrow_mut().rng.index(FIRST + LATEST);
        self.past.pick(number)
    }

    fn ghost(&mut self) -> Option<Cqe> {
        let ghosts = self.ghosts.len();
        let number = self.kernel.borrow_mut().rng.index(ghosts.max(1));
        self.ghosts.get(number).copied()
    }

    /// A completion with user data that no engine sets: unknown kinds, tags and indices that do not
    /// exist, future sequence numbers.
    fn invalid(&mut self) -> Option<Cqe> {
        let mut kernel = self.kernel.borrow_mut();
        let incarnation = kernel.incarnation;
        let payload = kernel.rng.next_u64() & 0xffff_ffff_ffff;
        let own = Event::Cancelled.encode(incarnation) & 0x0fff_0000_0000_0000;
        let kind = u64::from(kernel.rng.pick(&[0, 1, 2, 3, 5, 9, 12, 15_u32])) << 60;
        let user_data = match kernel.rng.below(3) {
            0 => kernel.rng.next_u64(),
            1 => kind | own | payload,
            // Of a tag that exists, but with a distant sequence number.
            _ => {
                let depth = u32::from(kernel.setup.depth);
                let tag = u64::from(kernel.rng.below(depth));
                kind | own | tag << 32 | (payload & 0xffff_ffff)
            }
        };
        let res = kernel.rng.pick(&[0, 512, 4096, -5, -11, -19, -22, -125, i32::MAX, i32::MIN]);
        let event = Event::decode(user_data, incarnation);
        let has_meaning = match event {
            None => false,
            Some(Event::Op(key) | Event::Command(key) | Event::Injected(key)) => self.is_live(key),
            Some(
                Event::Fetched(TagKey { seq, .. })
                | Event::Registered(TagKey { seq, .. })
                | Event::Unregistered(TagKey { seq, .. }),
            ) => seq < 1 << 20,
            Some(Event::Cancelled | Event::Wake | Event::Notified | Event::Unsent) => true,
        };
        (!has_meaning).then_some(Cqe { user_data, res })
    }

    fn is_live(&self, key: OpKey) -> bool {
        let label = (u64::from(key.index) << 32) | u64::from(key.serial);
        self.lane.engine().borrower(bufreg::Borrower(label)).is_some()
    }

    /// A completion of a command that was not issued, with the tag's current sequence number.
    fn unasked(&mut self) -> Option<Cqe> {
        let mut kernel = self.kernel.borrow_mut();
        let depth = u32::from(kernel.setup.depth);
        let tag = Tag(u16::try_from(kernel.rng.below(depth)).unwrap_or(0));
        // For a tag that the driver owns, only a delivery can arrive.
        if self.lane.engine().has_request(tag) {
            return None;
        }
        let user_data = kernel.tags[tag.index()].fetch_user_data;
        let Some(Event::Fetched(key)) = Event::decode(user_data, kernel.incarnation) else {
            return None;
        };
        let event = kernel.rng.pick(&[Event::Registered(key), Event::Unregistered(key)]);
        let res = kernel.rng.pick(&[0, -12, -22]);
        Some(Cqe { user_data: event.encode(kernel.incarnation), res })
    }

    /// Whether a completion may be duplicated: the lane counts it when it is stale. It ignores
    /// completions of cancellations.
    pub(crate) fn is_counted(&self, cqe: Cqe) -> bool {
        let incarnation = self.lane.engine().config().incarnation;
        Event::decode(cqe.user_data, incarnation) != Some(Event::Cancelled)
    }
}

/// The counters, except those that spurious completions may change.
fn quiet(stats: EngineStats) -> EngineStats {
    EngineStats { stale: 0, unexpected: 0, ..stats }
}

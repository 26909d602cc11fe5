//! Scratch buffers. Each tag has its own, and holds it while its request uses it.

use bufreg::SlotIndex;
use uring_ext::Errno;

use super::Engine;
use super::lending::{StillInUse, retire};
use super::tag::Held;
use crate::plan::Planner;
use crate::units::Tag;

impl<P: Planner> Engine<P> {
    /// Lends the tag its scratch buffer until the request ends.
    #[cold]
    pub(super) fn hold_scratch(&mut self, tag: Tag) -> Result<(), Errno> {
        let slots = self.config.slots;
        if tag.0 >= slots.scratch || !matches!(self.run(tag).scratch, Held::Nothing) {
            return Ok(());
        }
        let slot = SlotIndex(slots.lent + slots.pool + tag.0);
        let lease = self.registry.reserve(slot, self.owner(tag), self.now);
        let lease = lease.map_err(|_busy| Errno::EIO)?;
        self.run(tag).scratch = Held::Active(self.registry.activate(lease));
        Ok(())
    }

    /// Gives the scratch buffer back.
    #[cold]
    pub(super) fn drop_scratch(&mut self, tag: Tag) -> Result<(), StillInUse> {
        let scratch = &mut self.tags[tag.index()].run.scratch;
        if let Some(lease) = retire(&mut self.registry, &mut self.stats, scratch)? {
            self.registry.release(lease);
        }
        Ok(())
    }
}

//! Commands in flight on the control ring of a thread, and their memory, which the kernel uses.
//!
//! The memory stays in place until the command is answered, even if nobody waits for the answer: an
//! abandoned command continues. A late answer frees its memory. At the end of the thread, the
//! memory of unanswered commands is kept until the process ends, since the kernel may still use it.

use std::any::Any;
use std::sync::{Mutex, PoisonError};

use slab::Slab;

/// Memory of a command.
pub(super) type Buffer = Box<dyn Any + Send>;

/// Memory that the kernel may use for ever.
static KEPT: Mutex<Vec<Buffer>> = Mutex::new(Vec::new());

/// The commands of a thread. A key is reused only after its command was answered, so an answer
/// never goes to another command.
#[derive(Debug, Default)]
pub(super) struct InFlight(Slab<Entry>);

#[derive(Debug)]
struct Entry {
    state: State,
    /// The memory that the kernel reads or fills.
    buffer: Option<Buffer>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Awaited,
    /// Nobody waits for the answer.
    Abandoned,
    Answered(i32),
}

/// An answer, and the memory of its command, which the kernel no longer uses.
#[derive(Debug)]
pub(super) struct Answer {
    pub res: i32,
    pub buffer: Option<Buffer>,
}

impl InFlight {
    /// Adds a command. Returns its key, and the address of its memory; 0 without memory.
    pub fn add<T: Send + 'static>(&mut self, buffer: Option<Box<T>>) -> (usize, u64) {
        let entry = self.0.vacant_entry();
        let key = entry.key();
        let buffer = buffer.map(|it| -> Buffer { it });
        let entry = entry.insert(Entry { state: State::Awaited, buffer });
        // The address after the move into the table, for the kernel.
        let value = entry.buffer.as_deref_mut().and_then(|it| it.downcast_mut::<T>());
        (key, value.map_or(0, |value| std::ptr::from_mut(value).expose_provenance() as u64))
    }

    /// Records the answer to a command.
    pub fn answer(&mut self, key: usize, res: i32) {
        let Some(entry) = self.0.get_mut(key) else { return };
        match entry.state {
            State::Awaited => entry.state = State::Answered(res),
            State::Abandoned => drop(self.0.remove(key)),
            // The kernel answers once.
            State::Answered(_) => {}
        }
    }

    /// Takes the answer to a command, if it has come. The key is invalid then.
    pub fn take(&mut self, key: usize) -> Option<Answer> {
        let State::Answered(res) = self.0.get(key)?.state else { return None };
        Some(Answer { res, buffer: self.0.remove(key).buffer })
    }

    /// Abandons a command: nobody waits for its answer.
    pub fn abandon(&mut self, key: usize) {
        let Some(entry) = self.0.get_mut(key) else { return };
        match entry.state {
            State::Awaited => entry.state = State::Abandoned,
            State::Answered(_) => drop(self.0.remove(key)),
            State::Abandoned => {}
        }
    }

    /// Removes a command that the kernel never got.
    pub fn withdraw(&mut self, key: usize) {
        drop(self.0.try_remove(key));
    }

    #[cfg(test)]
    pub fn count(&self) -> usize {
        self.0.len()
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        let is_answered = |entry: &Entry| matches!(entry.state, State::Answered(_));
        let unanswered = self.0.drain().filter(|entry| !is_answered(entry));
        // After a panic of another thread, the list is valid all the same.
        let mut kept = KEPT.lock().unwrap_or_else(PoisonError::into_inner);
        kept.extend(unanswered.filter_map(|entry| entry.buffer));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Weak};

    use super::*;

    struct Memory(Arc<u64>);

    /// Memory, and a weak reference that shows whether it still exists.
    fn memory() -> (Option<Box<Memory>>, Weak<u64>) {
        let memory = Memory(Arc::new(7));
        let watch = Arc::downgrade(&memory.0);
        (Some(Box::new(memory)), watch)
    }

    fn is_there(watch: &Weak<u64>) -> bool {
        watch.strong_count() > 0
    }

    #[test]
    fn memory_is_there_until_the_answer() {
        /// The order of answer and abandonment, and whether the memory exists after each.
        type Case = (&'static str, &'static [(&'static str, bool)]);
        let table: [Case; 4] = [
            ("in time", &[("answer", true), ("take", false)]),
            ("late", &[("abandon", true), ("take", true), ("answer", false), ("take", false)]),
            ("unheard", &[("answer", true), ("abandon", false)]),
            ("never sent", &[("withdraw", false)]),
        ];
        for (name, steps) in table {
            let mut commands = InFlight::default();
            let (buffer, watch) = memory();
            let (key, address) = commands.add(buffer);
            assert_ne!(address, 0);
            for (step, is_left) in steps {
                match *step {
                    "answer" => commands.answer(key, -5),
                    "abandon" => commands.abandon(key),
                    "withdraw" => commands.withdraw(key),
                    _ => {
                        let taken = commands.take(key).map(|it| (it.res, it.buffer.is_some()));
                        assert_eq!(taken, (name == "in time").then_some((-5, true)), "{name}");
                    }
                }
                assert_eq!(is_there(&watch), *is_left, "{name}: {step}");
            }
            assert_eq!(commands.count(), 0, "{name}");
        }
    }

    #[test]
    fn answers_are_told_apart() {
        let mut commands = InFlight::default();
        let (one, address) = commands.add(None::<Box<()>>);
        assert_eq!(address, 0);
        let (two, _) = commands.add(None::<Box<()>>);
        commands.answer(two, 2);
        assert!(commands.take(one).is_none());
        // Neither the answer to an unknown command nor a second answer has an effect.
        commands.answer(99, 9);
        commands.answer(two, 3);
        assert_eq!(commands.take(two).unwrap().res, 2);
        assert!(commands.take(two).is_none());
        commands.abandon(one);
        // The key is in use until the late answer.
        let (three, _) = commands.add(None::<Box<()>>);
        assert_ne!(three, one);
        commands.answer(one, 1);
        assert!(commands.take(three).is_none());
        assert_eq!(commands.count(), 1);
    }

    #[test]
    fn what_is_unanswered_at_the_end_is_kept() {
        let mut commands = InFlight::default();
        let (buffers, watches): (Vec<_>, Vec<_>) = (0..3).map(|_| memory()).unzip();
        let keys: Vec<_> = buffers.into_iter().map(|buffer| commands.add(buffer).0).collect();
        commands.abandon(keys[1]);
        commands.answer(keys[2], 0);
        drop(commands);
        assert_eq!(watches.iter().map(is_there).collect::<Vec<_>>(), [true, true, false]);
    }
}

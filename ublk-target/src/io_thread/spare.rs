//! The spare buffer of a lane, for requests with a buffer that the driver could not lend. The
//! stations of a lane share it, since it is rarely used.
//!
//! A station that holds it needs nothing else to end, and a station that waits for it holds
//! nothing. They get it in the order in which they asked.

use std::collections::VecDeque;

use uring_ext::pool::BufferPool;

/// The maximum number of spare buffers of a lane. A device with longer requests than those before
/// it adds a longer one.
pub(crate) const MAX_SPARES: usize = 16;

/// A spare buffer in its lane.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SpareBuffer {
    /// Its number in the lane.
    pub index: usize,
    /// Its slot in the ring's table.
    pub slot: u16,
    /// Its memory.
    pub pool: BufferPool,
}

/// A spare buffer, its holder, and the stations that wait for it, by name.
#[derive(Debug)]
pub(crate) struct Spare {
    /// Its memory, after the first station has brought it.
    pub pool: Option<BufferPool>,
    holder: Option<u16>,
    waiting: VecDeque<u16>,
    /// The station was taken off `waiting`, and may take the buffer before all others.
    turn: Option<u16>,
}

impl Spare {
    /// A spare buffer for up to `stations` stations.
    pub fn new(stations: usize) -> Self {
        let waiting = VecDeque::with_capacity(stations);
        Self { pool: None, holder: None, waiting, turn: None }
    }

    /// Takes the buffer. Returns `false` if another station has it or asked before.
    pub fn take(&mut self, name: u16) -> bool {
        let is_first = match self.turn {
            Some(turn) => turn == name,
            None => self.waiting.is_empty(),
        };
        if self.holder.is_none() && is_first {
            self.holder = Some(name);
            return true;
        }
        if !self.waiting.contains(&name) {
            self.waiting.push_back(name);
        }
        false
    }

    /// Returns the buffer.
    pub fn give(&mut self, name: u16) {
        if self.holder == Some(name) {
            self.holder = None;
        }
    }

    /// The station whose turn it is, until the next call. `None` if the buffer is in use, or no
    /// station waits.
    pub fn next_turn(&mut self) -> Option<u16> {
        self.turn = None;
        if self.holder.is_none() {
            self.turn = self.waiting.pop_front();
        }
        self.turn
    }

    /// Whether a station waits.
    pub fn is_wanted(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Removes a station. If it held the buffer, the buffer stays in use: an operation may still
    /// use it.
    pub fn forget(&mut self, name: u16) {
        self.waiting.retain(|other| *other != name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stations_have_it_in_the_order_in_which_they_asked() {
        let mut spare = Spare::new(4);
        assert!(spare.take(1) && !spare.is_wanted());
        assert!(!spare.take(2) && !spare.take(3) && !spare.take(2));
        assert_eq!(spare.next_turn(), None, "it is taken");
        spare.give(1);
        assert!(spare.is_wanted());
        assert!(!spare.take(1), "a station that has had it queues behind those that wait");
        assert_eq!(spare.next_turn(), Some(2));
        assert!(!spare.take(3) && spare.take(2));
        spare.give(2);
        assert!(spare.take(2), "it is still its turn: nobody was asked since");
        spare.give(2);
        // A station that does not need it any more.
        assert_eq!(spare.next_turn(), Some(3));
        assert_eq!(spare.next_turn(), Some(1));
        assert!(spare.take(1));
        spare.give(1);
        assert_eq!(spare.next_turn(), None);
        assert!(spare.take(2), "nobody waits");
    }

    #[test]
    fn a_station_that_has_gone_is_not_waited_for() {
        let mut spare = Spare::new(4);
        assert!(spare.take(1) && !spare.take(2) && !spare.take(3));
        spare.forget(2);
        spare.give(1);
        assert_eq!(spare.next_turn(), Some(3));
        assert!(spare.take(3));
        spare.forget(3);
        assert!(!spare.take(1), "an operation of it may use the buffer");
    }
}

//! The death of a server, and what the kernel does with its entries and requests.

use std::collections::VecDeque;

use bufreg::Incarnation;
use uring_ext::ring::Cqe;

use super::spare::SpareHolder;
use super::{Buffer, Kernel, Phase};
use crate::draw::Draw as _;
use crate::fault::Fault;
use crate::setup::Recovery;

impl Kernel {
    /// Ends the server. Entries that were not submitted are lost, operations in flight complete,
    /// the ring is freed with its table, and the driver fails open requests or keeps them for the
    /// next server. Returns the completions that were not reaped.
    pub fn end_server(&mut self) -> impl Iterator<Item = Cqe> + '_ {
        self.trace.note(|| "death".to_owned());
        self.queues.iter_mut().for_each(VecDeque::clear);
        self.queued.clear();
        for mut flight in std::mem::take(&mut self.running) {
            if self.rng.chance(600) {
                self.complete_after_death(&flight);
            }
            if let Some(Buffer::Lent { tag }) = flight.buffer.take() {
                self.put(tag);
            }
        }
        self.fill_table();
        for tag in 0..self.setup.depth {
            self.lose_server(tag);
        }
        (self.broken, self.breakage_reported) = (None, false);
        (self.backlogged, self.refused) = (false, false);
        (self.spare, self.is_spare_wanted) = (SpareHolder::Nobody, false);
        self.incarnation = Incarnation::next(self.incarnation);
        self.begin_shadow();
        self.posted.drain(..).map(|posted| posted.cqe)
    }

    /// Ends the server's ownership of a tag.
    fn lose_server(&mut self, tag: u16) {
        let model = &mut self.tags[usize::from(tag)];
        assert_eq!(model.refs, 0, "a dead server's ring refers to nothing");
        let was = std::mem::replace(&mut model.phase, Phase::NotFetched);
        (model.handled, model.refused, model.auto) = (false, false, None);
        model.held = false;
        model.faults_met.stuck = 0;
        match was {
            Phase::NotFetched | Phase::Waiting | Phase::Ended => {}
            Phase::Committed => panic!("a committed request without references has ended"),
            Phase::Serving => {
                let reissue = match self.setup.recovery {
                    Recovery::Reissue => true,
                    Recovery::Fail => false,
                    Recovery::Either => self.rng.chance(512),
                };
                if reissue {
                    self.tally.note(Fault::Reissued);
                } else {
                    self.tally.note(Fault::FailedAtDeath);
                    self.failed_at_death += 1;
                    self.fail_at_death(tag);
                }
            }
        }
    }
}

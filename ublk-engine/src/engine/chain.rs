//! Chains: register, operation and unregister in one hard-linked submission.

use bufreg::{Lease, Reserved};
use uring_ext::Errno;

use super::inflight::{Cancel, InFlight, Progress};
use super::tag::{BufferPath, Chain, Held, TagState};
use super::{Engine, Port, deadline_of, is_transient};
use crate::plan::{Op, Planner, Verdict};
use crate::units::Tag;

impl<P: Planner> Engine<P> {
    /// Register, operation and unregister in one submission.
    pub(super) fn submit_chain(
        &mut self,
        tag: Tag,
        lease: Lease<Reserved>,
        op: Op,
        port: &mut impl Port,
    ) {
        // The links make the registration precede the operation.
        let lease = self.registry.activate(lease);
        let slot = lease.slot();
        let key = self.inflight.next_key(tag);
        let borrow = key.and_then(|key| self.registry.borrow(&lease, key.borrower()).ok());
        let run = &mut self.tags[tag.index()].run;
        run.held = Held::Active(lease);
        let (Some(key), Some(borrow)) = (key, borrow) else {
            // The table has a window for every tag, so there is space.
            self.stats.unexpected += 1;
            run.buffer_path = BufferPath::Delivered;
            run.fail(Errno::EIO);
            return self.finish(tag, port);
        };
        run.chain = Some(Chain::default());
        run.pending = 1;
        let deadline = deadline_of(self.config.deadline, self.now);
        let (borrow, cancel) = (Some(borrow), Cancel::No);
        let (retries, substitutes, moved) = (run.retries, run.substitutes, run.moved);
        let inflight = InFlight {
            tag,
            op,
            moved,
            borrow,
            retries,
            pause_ns: 0,
            substitutes,
            cancel,
            deadline,
        };
        self.inflight.insert(key, inflight);
        self.stats.ops += 1;
        self.stamp_issue(tag, port);
        let seq = self.next_seq(tag);
        if op.len > self.tags[tag.index()].run.at_first {
            let (op, _) = self.shortened(key);
            port.submit_chain(seq, slot, key, &op);
        } else {
            port.submit_chain(seq, slot, key, &op);
        }
    }

    /// Continues once both the operation and the unregistration of a chain have completed.
    pub(super) fn end_chain(&mut self, tag: Tag, port: &mut impl Port) {
        let Some(chain) = self.tags[tag.index()].chain().copied() else { return };
        let Chain { registration, operation: Some((outcome, ended)), unregistration: Some(res) } =
            chain
        else {
            return;
        };
        let Ok(Some(lease)) = self.retire_held(tag) else { return };
        self.run(tag).chain = None;
        if let Some(errno) = registration {
            // The slot was never filled, so the results of the other two mean nothing. The
            // operation still has to be issued.
            self.registry.release(lease);
            return self.registration_failed(tag, errno, port);
        }
        self.stats.registered += 1;
        let (outcome, mut ended) = self.judge_chain(tag, outcome, ended);
        let unregistered = Errno::from_result(res);
        match unregistered {
            Ok(_) => self.registry.release(lease),
            // A separate unregistration may succeed. If part of the operation remains, copying is
            // better.
            Err(errno) if is_transient(errno) && outcome != Progress::Again => {
                let run = self.run(tag);
                if let Progress::Failed(errno) = outcome {
                    run.fail(errno);
                }
                run.tries = 0;
                self.stats.retries += 1;
                return self.unregister(tag, lease, port);
            }
            Err(_) => self.quarantine(tag, lease),
        }
        let TagState { run, plan, .. } = &mut self.tags[tag.index()];
        match outcome {
            Progress::Again => {
                run.tries = 0;
                if unregistered.is_err() {
                    // Copying begins at a block boundary.
                    ended.rewind(self.config.geometry.block);
                }
                run.replan(plan, ended);
                // Delayed as a planner may delay a window, so it is not issued as a chain.
                plan.delay(ended.pause_ns);
                match unregistered {
                    Ok(_) => self.lend_registered(tag, port),
                    // A tag has at most one slot in quarantine, so that slots do not run out.
                    Err(errno) => self.copy_instead(tag, errno, port),
                }
            }
            Progress::Done => self.answer(tag, port),
            Progress::Failed(errno) => {
                run.fail(errno);
                self.answer(tag, port);
            }
        }
    }

    /// The outcome of a chain's operation, after asking the planner about a failure.
    fn judge_chain(
        &mut self,
        tag: Tag,
        outcome: Progress,
        mut ended: InFlight,
    ) -> (Progress, InFlight) {
        let Progress::Failed(errno) = outcome else { return (outcome, ended) };
        ended.rewind(self.config.geometry.block);
        match self.verdict(tag, &ended, errno) {
            Verdict::Fail => (outcome, ended),
            Verdict::Ignore => (Progress::Done, ended),
            Verdict::Instead { backing, offset } => {
                ended.op = Op { backing, offset, ..ended.op };
                (ended.retries, ended.substitutes) = (0, ended.substitutes + 1);
                ended.pause_ns = 0;
                (Progress::Again, ended)
            }
        }
    }
}

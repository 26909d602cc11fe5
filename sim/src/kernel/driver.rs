//! The ublk driver and its tags.

use ublk_engine::lend::LendMode;
use ublk_engine::request::{Request, RequestKind};
use uring_ext::iod::IoDesc;
use uring_ext::ring::Cqe;
use uring_ext::{Errno, sys};

use super::{Ask, Kernel, Posted, RequestFaults};
use crate::entry::Fetch;
use crate::fault::Fault;
use crate::setup::ShortResults;
use crate::{GARBAGE, MAX_REQUEST};

/// Who owns a tag.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// No one: no server has fetched it.
    NotFetched,
    /// The driver, which may deliver a request.
    Waiting,
    /// The server.
    Serving,
    /// The driver: the request is committed, but its buffer is still in use.
    Committed,
    /// No one: the device is stopped.
    Ended,
}

/// A tag.
#[derive(Debug)]
pub struct TagModel {
    /// Who owns it.
    pub phase: Phase,
    /// The descriptor of its request.
    pub iod: IoDesc,
    /// The engine has handled the delivery of its request.
    pub handled: bool,
    /// The lane holds its request back.
    pub held: bool,
    /// Bytes of the request's buffer.
    pub len: usize,
    /// The request's buffer.
    pub data: Box<[u8]>,
    /// The number of slots with the buffer and of operations that use it.
    pub refs: u32,
    /// The client's request.
    pub ask: Option<Ask>,
    /// In a stack: the device above that made the request, and the number of its operation.
    pub of: Option<(usize, u64)>,
    /// The faults that this request has met in this incarnation.
    pub faults_met: RequestFaults,
    /// [`RequestFaults::stuck`] of the previous request.
    pub stuck_before: u32,
    /// Its commit was refused.
    pub refused: bool,
    /// The result that the request was committed with.
    pub result: i32,
    /// The `user_data` of its fetch.
    pub fetch_user_data: u64,
    pub(super) fetch: Fetch,
    /// The fetch has ended, and no other follows.
    pub(super) fetch_over: bool,
    /// The slot that the driver registered the buffer in.
    pub(super) auto: Option<u16>,
}

impl TagModel {
    pub(super) fn new() -> Self {
        Self {
            phase: Phase::NotFetched,
            iod: IoDesc { op_flags: u32::MAX, nr_sectors: u32::MAX, start_sector: u64::MAX },
            handled: false,
            held: false,
            len: 0,
            data: vec![GARBAGE; MAX_REQUEST as usize].into(),
            refs: 0,
            ask: None,
            of: None,
            faults_met: RequestFaults::default(),
            stuck_before: 0,
            refused: false,
            result: 0,
            fetch: Fetch::default(),
            fetch_user_data: 0,
            fetch_over: false,
            auto: None,
        }
    }

    /// Whether the request has a buffer.
    #[must_use]
    pub const fn has_data(&self) -> bool {
        matches!(self.iod.op(), sys::UBLK_IO_OP_READ | sys::UBLK_IO_OP_WRITE)
    }

    /// The slot that the driver registered the buffer in, and will remove it from.
    #[must_use]
    pub const fn auto_slot(&self) -> Option<u16> {
        self.auto
    }
}

impl Kernel {
    /// `UBLK_U_IO_FETCH_REQ`.
    pub(super) fn fetch(&mut self, fetch: Fetch, user_data: u64) {
        let model = &mut self.tags[usize::from(fetch.tag)];
        assert_eq!(model.phase, Phase::NotFetched, "tag {} is fetched twice", fetch.tag);
        model.phase = Phase::Waiting;
        model.fetch_over = false;
        self.set_fetch(fetch, user_data);
    }

    fn set_fetch(&mut self, fetch: Fetch, user_data: u64) {
        match self.setup.lend {
            LendMode::Fused => {
                let _ = fetch.auto_slot();
            }
            LendMode::Copy => assert_eq!(self.addresses.find(fetch.copy_to).1, 0),
            LendMode::Slot | LendMode::UserCopy => assert_eq!((fetch.auto, fetch.copy_to), (0, 0)),
        }
        let model = &mut self.tags[usize::from(fetch.tag)];
        model.fetch = fetch;
        model.fetch_user_data = user_data;
    }

    /// Delivers a tag's next request to the server.
    pub fn deliver(&mut self, tag: u16) {
        let Some(mut ask) = self.next_ask(tag) else { return };
        ask.note_delivery(self.acknowledged());
        let iod = ask.iod;
        self.trace.note(|| format!("deliver tag {tag} {iod:?}"));
        self.trace.mix(iod.start_sector ^ u64::from(iod.op_flags) << 32);
        let faults_met = self.draw_request_faults(ask.request.is_some());
        let model = &mut self.tags[usize::from(tag)];
        (model.iod, model.phase, model.handled) = (iod, Phase::Serving, false);
        model.held = false;
        model.stuck_before = model.faults_met.stuck;
        (model.faults_met, model.auto) = (faults_met, None);
        model.ask = Some(ask);
        if model.has_data() {
            let sectors = usize::try_from(iod.nr_sectors).unwrap_or(usize::MAX);
            model.len = sectors.saturating_mul(512).min(model.data.len());
            if iod.op() == sys::UBLK_IO_OP_READ {
                model.data[..model.len].fill(GARBAGE);
            }
            match self.setup.lend {
                LendMode::Fused => self.auto_register(tag),
                LendMode::Copy => self.copy_for_server(tag),
                LendMode::Slot | LendMode::UserCopy => {}
            }
        }
        let cqe = Cqe { user_data: self.tags[usize::from(tag)].fetch_user_data, res: 0 };
        self.posted.push(Posted { cqe, of: None });
    }

    fn auto_register(&mut self, tag: u16) {
        let slot = self.tags[usize::from(tag)].fetch.auto_slot();
        let registered = if usize::from(slot) >= self.table.len() {
            self.tally.note(Fault::AutoRegisterBeyond);
            false
        } else if self.strikes(Fault::AutoRegister) {
            false
        } else {
            let inserted = self.insert(tag, slot);
            assert_eq!(inserted, Ok(()), "automatic registration in slot {slot}");
            true
        };
        let model = &mut self.tags[usize::from(tag)];
        if registered {
            model.auto = Some(slot);
        } else {
            model.iod.op_flags |= sys::UBLK_IO_F_NEED_REG_BUF;
        }
    }

    fn copy_for_server(&mut self, tag: u16) {
        let model = &mut self.tags[usize::from(tag)];
        if model.iod.op() == sys::UBLK_IO_OP_WRITE {
            let (buffer, _) = self.addresses.find(model.fetch.copy_to);
            self.pool[usize::from(buffer)][..model.len].copy_from_slice(&model.data[..model.len]);
        }
    }

    /// `UBLK_U_IO_COMMIT_AND_FETCH_REQ`.
    pub(super) fn commit(&mut self, result: i32, fetch: Fetch, user_data: u64) {
        let tag = fetch.tag;
        let model = &self.tags[usize::from(tag)];
        assert!(
            model.phase == Phase::Serving && model.handled,
            "commit of tag {tag}, which is {:?}",
            model.phase
        );
        // The rest of a request with a stuck buffer may be copied, or fail.
        let gave_up = model.faults_met.may_pass && !model.faults_met.copied && result >= 0;
        assert!(!gave_up, "the buffer of tag {tag} was left in its slot too early");
        if !self.closing && self.strikes(Fault::CommitRefused) {
            self.tags[usize::from(tag)].refused = true;
            let cqe = Cqe { user_data, res: Errno::EINVAL.negated() };
            return self.posted.push(Posted { cqe, of: None });
        }
        self.answer(tag, result);
        self.set_fetch(fetch, user_data);
        let model = &mut self.tags[usize::from(tag)];
        // The driver treats a read of 0 bytes as an error.
        let nothing = result == 0 && model.iod.op() == sys::UBLK_IO_OP_READ;
        model.result = if nothing { Errno::EIO.negated() } else { result };
        model.phase = Phase::Committed;
        if self.setup.lend == LendMode::Copy && model.iod.op() == sys::UBLK_IO_OP_READ {
            // The driver copies as many bytes as the result says, even if the request fails.
            let moved = usize::try_from(result).unwrap_or(0).min(model.len);
            let (buffer, _) = self.addresses.find(fetch.copy_to);
            let pooled = &mut self.pool[usize::from(buffer)][..model.len];
            model.data[..moved].copy_from_slice(&pooled[..moved]);
            pooled.fill(GARBAGE);
        }
        // A reference for the duration of the commit, so that removing an automatic registration
        // does not end the request twice.
        model.refs += 1;
        if let Some(slot) = model.auto.take() {
            let removed = self.remove(slot);
            assert_eq!(removed, Some(tag), "the buffer in slot {slot} is not that of tag {tag}");
        }
        self.put(tag);
        if self.stopping {
            self.end_fetch(tag);
        }
    }

    /// Drops a reference to a request's buffer. Dropping the last one ends a committed request.
    pub(super) fn put(&mut self, tag: u16) {
        let model = &mut self.tags[usize::from(tag)];
        model.refs -= 1;
        if model.refs > 0 || model.phase != Phase::Committed {
            return;
        }
        model.phase = Phase::Waiting;
        // The server must not read the descriptor of a request that has ended.
        model.iod = IoDesc { op_flags: u32::MAX, nr_sectors: u32::MAX, start_sector: u64::MAX };
        self.end(tag);
        if self.stopping {
            self.end_fetch(tag);
        }
    }

    /// How many bytes of a request the driver considers done (`__ublk_complete_rq`).
    pub(super) fn believed(&self, request: &Request, result: i32) -> u64 {
        let is_read = request.kind == RequestKind::Read;
        let copied = self.setup.lend == LendMode::Copy && is_read;
        let is_short = request.has_data()
            && match self.setup.short_results {
                ShortResults::Redelivered => true,
                ShortResults::Believed => copied,
            };
        if is_short { u64::try_from(result).unwrap_or(0) } else { request.len }
    }

    /// Requeues the rest of a request that was answered short. Fails it if the device is being
    /// stopped.
    pub(super) fn requeue_rest(&mut self, tag: u16, request: &Request, done: u64) {
        let (offset, len) = (request.offset + done, request.len - done);
        let rest = Ask::sound(Request { offset, len, ..*request });
        if self.stopping {
            if request.kind != RequestKind::Read {
                self.oracle.forget(rest.sectors());
            }
            return;
        }
        let model = &mut self.tags[usize::from(tag)];
        model.ask = Some(rest);
        model.data.copy_within(usize::try_from(done).unwrap_or(usize::MAX).., 0);
        self.asked += 1;
    }

    /// Stops the device: no more requests come, and all fetches end.
    pub fn stop(&mut self) {
        self.stopping = true;
        self.closing = true;
        for tag in 0..self.setup.depth {
            match self.tags[usize::from(tag)].phase {
                // A fetch ends even if the previous request has not.
                Phase::Waiting | Phase::Committed => self.end_fetch(tag),
                Phase::NotFetched | Phase::Serving | Phase::Ended => {}
            }
        }
    }

    fn end_fetch(&mut self, tag: u16) {
        let model = &mut self.tags[usize::from(tag)];
        if model.phase == Phase::Waiting {
            model.phase = Phase::Ended;
        }
        if std::mem::replace(&mut model.fetch_over, true) {
            return;
        }
        let cqe = Cqe { user_data: model.fetch_user_data, res: Errno::ENODEV.negated() };
        self.posted.push(Posted { cqe, of: None });
    }
}

//! A mirror: every write goes to all legs. A leg that fails a write is no longer used. A read that
//! fails is tried on the next leg.

use std::cell::Cell;
use std::rc::Rc;

use ublk_engine::plan::{BackingIndex, Op, OpKind, Plan, Planner, Verdict, WINDOW_OPS};
use ublk_engine::request::Request;
use uring_ext::Errno;

use crate::SECTOR;
use crate::mapping::Spread;

/// The same data on several backings, piece by piece.
#[derive(Clone, Debug)]
pub struct Mirror {
    /// How requests are split, and the legs.
    pub spread: Spread,
    /// A bit for each leg that lacks a write. The next server shares it, as if the legs contained
    /// it.
    out: Rc<Cell<u16>>,
}

impl Mirror {
    /// A mirror with all legs in use.
    #[must_use]
    pub fn new(spread: Spread) -> Self {
        Self { spread, out: Rc::default() }
    }

    /// Whether a leg lacks a write.
    #[must_use]
    pub fn is_out(&self, leg: u16) -> bool {
        self.out.get() & (1 << leg) != 0
    }

    /// The leg that a request is read from first.
    fn first(&self, request: &Request) -> u16 {
        let number = request.offset / SECTOR % u64::from(self.spread.backings);
        u16::try_from(number).unwrap_or(0)
    }

    /// The first leg that lacks no write, cyclically from `from` on and before `end`.
    fn sound_leg(&self, from: u16, end: Option<u16>) -> Option<BackingIndex> {
        let legs = (from..from + self.spread.backings).map(|leg| leg % self.spread.backings);
        let mut legs = legs.take_while(|leg| Some(*leg) != end);
        legs.find(|leg| !self.is_out(*leg)).map(BackingIndex)
    }
}

impl Planner for Mirror {
    fn plan(&self, request: &Request, from: u64, plan: &mut Plan) -> Result<(), Errno> {
        self.spread.plan(request, from, plan, |plan, op| {
            if op.kind == OpKind::Read {
                let backing = self.sound_leg(self.first(request), None).unwrap_or(op.backing);
                return plan.push(Op { backing, ..op }).is_ok();
            }
            if plan.len() + usize::from(self.spread.backings) > WINDOW_OPS {
                return false;
            }
            let legs = (0..self.spread.backings).filter(|leg| !self.is_out(*leg));
            legs.map(BackingIndex).all(|backing| plan.push(Op { backing, ..op }).is_ok())
        })
    }

    fn failed(&self, request: &Request, op: &Op, _errno: Errno) -> Verdict {
        let leg = op.backing.0;
        if op.is_read() {
            let next = self.sound_leg(leg + 1, Some(self.first(request)));
            return next
                .map_or(Verdict::Fail, |backing| Verdict::Instead { backing, offset: op.offset });
        }
        let out = self.out.get() | 1 << leg;
        if out.count_ones() == u32::from(self.spread.backings) {
            return Verdict::Fail;
        }
        self.out.set(out);
        Verdict::Ignore
    }
}

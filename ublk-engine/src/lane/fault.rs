//! Test faults on demand: behaviour that real drivers and drives rarely show.

use serde::{Deserialize, Serialize};

use crate::plan::OpKind;
use crate::random::{STEP, mix};

/// The requested faults, and the number of operations that met them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Faults {
    /// Ask for automatic registration in slots that do not exist (`auto-register`).
    pub auto_register: bool,
    /// Register in slots that do not exist (`register`).
    pub register: bool,
    /// Issue only the first half of one of n transfers of more than one block (`short=N`).
    short_every: Option<u64>,
    /// Fail one of n operations with `EAGAIN` (`again=N`).
    again_every: Option<u64>,
    /// Answer flushes with success without carrying them out (`ignore-flush`).
    ignore_flush: bool,
    /// Carry out writes with FUA without FUA (`ignore-fua`).
    ignore_fua: bool,
    /// Panic at the lane's n-th operation (`panic=N`).
    panic_at: Option<u64>,
    ops: u64,
    injected: Injected,
}

/// The number of operations that met a fault.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Injected {
    /// Operations with only the first half issued.
    pub short: u64,
    /// Failed with `EAGAIN`.
    pub again: u64,
    /// Flushes that were not carried out.
    #[serde(default)]
    pub ignored_flushes: u64,
    /// Writes with FUA that were carried out without FUA.
    #[serde(default)]
    pub ignored_fua: u64,
}

impl std::fmt::Display for Injected {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let counts = [
            (self.short, "short"),
            (self.again, "again"),
            (self.ignored_flushes, "ignored flushes"),
            (self.ignored_fua, "ignored FUA"),
        ];
        let mut separator = "";
        for (count, name) in counts.into_iter().filter(|(count, _)| *count > 0) {
            write!(f, "{separator}{count} {name}")?;
            separator = ", ";
        }
        Ok(())
    }
}

/// An unknown fault.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is no fault; there are auto-register, register, short=N, again=N, \
     ignore-flush, ignore-fua and panic=N"
)]
pub struct UnknownFault(String);

/// The fault for one operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// No fault.
    None,
    /// Issue only this many bytes.
    Short(u64),
    /// Fail with `EAGAIN`.
    Again,
}

impl Faults {
    /// Parses a list of faults.
    ///
    /// # Errors
    /// [`UnknownFault`] with the part that is unknown.
    pub fn parse(list: &str) -> Result<Self, UnknownFault> {
        let mut faults = Self::default();
        for name in list.split(',').filter(|name| !name.is_empty()) {
            let number = |text: &str| text.parse().ok().filter(|n| *n > 0);
            match name.split_once('=') {
                None if name == "auto-register" => faults.auto_register = true,
                None if name == "register" => faults.register = true,
                None if name == "ignore-flush" => faults.ignore_flush = true,
                None if name == "ignore-fua" => faults.ignore_fua = true,
                Some(("short", n)) if number(n).is_some() => faults.short_every = number(n),
                Some(("again", n)) if number(n).is_some() => faults.again_every = number(n),
                Some(("panic", n)) if number(n).is_some() => faults.panic_at = number(n),
                Some(_) | None => return Err(UnknownFault(name.to_owned())),
            }
        }
        Ok(faults)
    }

    /// The fault for the next operation. `len` is its length if it transfers data.
    ///
    /// # Panics
    /// If `panic=N` was requested and this is the N-th operation.
    pub fn next(&mut self, len: Option<u64>, block: u64) -> Fault {
        self.ops += 1;
        assert!(self.panic_at != Some(self.ops), "operation {}: a test asked for it", self.ops);
        // Not every n-th one: where n operations take turns, all faults would hit the same one, until
        // its retries are used up.
        let drawn = mix(self.ops.wrapping_mul(STEP));
        let hit = |one_of: Option<u64>| one_of.is_some_and(|one_of| drawn % one_of == 0);
        if hit(self.again_every) {
            self.injected.again += 1;
            return Fault::Again;
        }
        match len.filter(|len| hit(self.short_every) && *len > block) {
            Some(len) => {
                self.injected.short += 1;
                Fault::Short((len / 2 / block).max(1) * block)
            }
            None => Fault::None,
        }
    }

    /// The replacement for an operation that makes data durable; `None` if it is not carried out at
    /// all.
    pub fn weaken(&mut self, kind: OpKind) -> Option<OpKind> {
        match kind {
            OpKind::Flush if self.ignore_flush => {
                self.injected.ignored_flushes += 1;
                None
            }
            OpKind::Write { fua: true } if self.ignore_fua => {
                self.injected.ignored_fua += 1;
                Some(OpKind::Write { fua: false })
            }
            OpKind::WriteScratch { fua: true } if self.ignore_fua => {
                self.injected.ignored_fua += 1;
                Some(OpKind::WriteScratch { fua: false })
            }
            OpKind::Read
            | OpKind::Write { .. }
            | OpKind::Flush
            | OpKind::Discard
            | OpKind::WriteZeroes { .. }
            | OpKind::ReadScratch
            | OpKind::WriteScratch { .. }
            | OpKind::Delay => Some(kind),
        }
    }

    /// The number of operations that met a fault.
    #[must_use]
    pub const fn injected(&self) -> Injected {
        self.injected
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::MAX_RETRIES;

    #[test]
    fn lists_are_parsed_or_refused() {
        let faults = Faults::parse("auto-register,short=3,again=5").unwrap();
        assert!(faults.auto_register && !faults.register);
        assert_eq!((faults.short_every, faults.again_every), (Some(3), Some(5)));
        assert_eq!(Faults::parse(""), Ok(Faults::default()));
        let faults = Faults::parse("ignore-fua,ignore-flush").unwrap();
        assert!(faults.ignore_flush && faults.ignore_fua);
        for bad in ["flood", "short", "short=0", "again=x", "register=1", "ignore-flush=2"] {
            assert_eq!(Faults::parse(bad), Err(UnknownFault(bad.to_owned())));
        }
    }

    #[test]
    fn one_of_n_operations_meets_a_fault() {
        let mut faults = Faults::parse("short=2,again=3").unwrap();
        let met: Vec<_> = (0..6000).map(|_| faults.next(Some(8192), 512)).collect();
        let count = |fault| u64::try_from(met.iter().filter(|met| **met == fault).count()).unwrap();
        let (short, again) = (count(Fault::Short(4096)), count(Fault::Again));
        assert_eq!(faults.injected(), Injected { short, again, ..Default::default() });
        // Of 6, one is short and not failed, two fail.
        assert!((1900..2100).contains(&again) && (1900..2100).contains(&short), "{again} {short}");
        let mut faults = Faults::parse("short=1").unwrap();
        assert_eq!(faults.next(Some(512), 512), Fault::None, "one block is not divided");
        assert_eq!(faults.next(None, 512), Fault::None);
        assert_eq!(faults.next(Some(1536), 512), Fault::Short(512));
    }

    /// Some operations take turns, as those of a queue whose lane is slower than the drive. An
    /// operation that fails is tried again in its next turn.
    #[test]
    fn faults_do_not_use_up_the_retries_of_an_operation() {
        for one_of in 3..=8 {
            let mut faults = Faults::parse(&format!("again={one_of}")).unwrap();
            let met: Vec<_> =
                (0..1 << 14).map(|_| faults.next(None, 512) == Fault::Again).collect();
            for (turns, first) in (1..=40).flat_map(|turns| (0..turns).map(move |at| (turns, at))) {
                let own = met.iter().skip(first).step_by(turns);
                let (mut in_a_row, mut most) = (0, 0);
                for is_hit in own {
                    in_a_row = if *is_hit { in_a_row + 1 } else { 0 };
                    most = in_a_row.max(most);
                }
                assert!(
                    most < MAX_RETRIES,
                    "again={one_of}: {most} in a row, turn {first} of {turns}"
                );
            }
        }
    }

    #[test]
    fn promises_are_broken_only_if_that_is_asked_for() {
        const KINDS: [OpKind; 5] = [
            OpKind::Flush,
            OpKind::Write { fua: true },
            OpKind::WriteScratch { fua: true },
            OpKind::Write { fua: false },
            OpKind::Read,
        ];
        let weakened = |list: &str| {
            let mut faults = Faults::parse(list).unwrap();
            (KINDS.map(|kind| faults.weaken(kind)), faults.injected())
        };
        let mut expected = KINDS.map(Some);
        assert_eq!(weakened("short=1"), (expected, Injected::default()));
        expected[0] = None;
        let injected = Injected { ignored_flushes: 1, ..Default::default() };
        assert_eq!(weakened("ignore-flush"), (expected, injected));
        expected[1] = Some(OpKind::Write { fua: false });
        expected[2] = Some(OpKind::WriteScratch { fua: false });
        let injected = Injected { ignored_flushes: 1, ignored_fua: 2, ..Default::default() };
        assert_eq!(weakened("ignore-fua,ignore-flush"), (expected, injected));
        assert_eq!(injected.to_string(), "1 ignored flushes, 2 ignored FUA");
    }
}

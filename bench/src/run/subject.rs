//! The subjects.

use crate::results::Family;

/// A subject of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SubjectKind {
    /// Its name in options and results.
    pub name: &'static str,
    /// Its title in tables.
    pub title: &'static str,
    /// How it is made.
    pub maker: Maker,
}

/// How a device is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Maker {
    /// It is the backing itself.
    Raw,
    /// A linear mapping of device-mapper.
    DmLinear,
    /// The kernel's loop driver, with direct I/O.
    KernelLoop,
    /// The loop target of rublk, with these options.
    Rublk(&'static [&'static str]),
    /// The loop target of ublk-target, in this lend mode, with these options.
    Ours(&'static str, &'static [&'static str]),
}

/// Common options of ours and rublk: one queue, since the load is one thread.
pub const QUEUE: [&str; 4] = ["-q", "1", "-d", "128"];

const fn ours(
    name: &'static str,
    title: &'static str,
    lend: &'static str,
    options: &'static [&'static str],
) -> SubjectKind {
    SubjectKind { name, title, maker: Maker::Ours(lend, options) }
}

const fn other(name: &'static str, title: &'static str, maker: Maker) -> SubjectKind {
    SubjectKind { name, title, maker }
}

/// All subjects, in the order of the tables. Each variant of ours is one line. It is skipped if the
/// installed ublk-target does not know its options.
pub const SUBJECTS: &[SubjectKind] = &[
    other(RAW, "the backing itself", Maker::Raw),
    other("dm-linear", "dm-linear", Maker::DmLinear),
    other("kernel-loop", "kernel loop, direct I/O", Maker::KernelLoop),
    other("rublk-copy", "rublk loop, copy", Maker::Rublk(&[])),
    other("rublk", "rublk loop, zero copy", Maker::Rublk(&["--zero-copy"])),
    ours("ours-copy", "ours: copy", "copy", &[]),
    ours("ours-user-copy", "ours: user copy", "user-copy", &[]),
    ours("ours-slot", "ours: slot", "slot", &[]),
    ours("ours-io-lane", "ours: slot, two threads", "slot", &["--io-lane"]),
    ours("ours-fused", "ours: fused", "fused", &[]),
    ours("ours-no-busy-wait", "ours: fused, no busy wait", "fused", &["--busy-wait", "off"]),
    ours("ours-passthru", "ours: fused, passthrough", "fused", &["--passthru"]),
    ours("ours-poll", "ours: fused, polled", "fused", &["--poll"]),
    ours("ours-poll-hybrid", "ours: fused, hybrid polled", "fused", &["--poll", "hybrid"]),
    ours("ours-passthru-poll", "ours: passthrough, polled", "fused", &["--passthru", "--poll"]),
];

/// The limit, which is always measured.
pub const RAW: &str = "raw";
/// The value of `--rivals` for no rivals.
pub const NONE: &str = "none";

impl SubjectKind {
    /// Its maker.
    pub const fn family(&self) -> Family {
        match self.maker {
            Maker::Raw => Family::Raw,
            Maker::DmLinear | Maker::KernelLoop => Family::Kernel,
            Maker::Rublk(_) => Family::Rublk,
            Maker::Ours(..) => Family::Ours,
        }
    }

    /// Whether `--rivals` may name it.
    pub fn is_rival(&self) -> bool {
        matches!(self.family(), Family::Kernel | Family::Rublk)
    }

    /// The command that makes the device, without paths and ids.
    pub fn command(&self) -> String {
        let words = match self.maker {
            Maker::Raw => Vec::new(),
            Maker::DmLinear => vec!["dmsetup", "create"],
            Maker::KernelLoop => vec!["losetup", "--direct-io=on"],
            Maker::Rublk(options) => [&["rublk", "add", "loop"], &QUEUE[..], options].concat(),
            Maker::Ours(lend, options) => {
                [&["ublk-target", "add", "loop"], &QUEUE[..], &["--lend", lend], options].concat()
            }
        };
        words.join(" ")
    }

    fn lend(&self) -> Option<&'static str> {
        match self.maker {
            Maker::Ours(lend, _) => Some(lend),
            Maker::Raw | Maker::DmLinear | Maker::KernelLoop | Maker::Rublk(_) => None,
        }
    }
}

/// The lend modes of ours.
pub fn lend_modes() -> Vec<&'static str> {
    let mut modes: Vec<_> = SUBJECTS.iter().filter_map(SubjectKind::lend).collect();
    modes.dedup();
    modes
}

/// The user's selection. An empty list means all.
#[derive(Debug, Clone, Default)]
pub struct Selection {
    /// Names of subjects.
    pub only: Vec<String>,
    /// Names of rivals, or [`NONE`].
    pub rivals: Vec<String>,
    /// Lend modes of ours.
    pub lend: Vec<String>,
}

impl Selection {
    /// The chosen subjects, in the order of the table. The backing is always among them.
    pub fn chosen(&self) -> Vec<SubjectKind> {
        SUBJECTS.iter().filter(|subject| self.has(subject)).copied().collect()
    }

    fn has(&self, subject: &SubjectKind) -> bool {
        let allows =
            |list: &[String], word: &str| list.is_empty() || list.iter().any(|w| w == word);
        if subject.name == RAW {
            return true;
        }
        allows(&self.only, subject.name)
            && (!subject.is_rival() || allows(&self.rivals, subject.name))
            && subject.lend().is_none_or(|lend| allows(&self.lend, lend))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(only: &[&str], rivals: &[&str], lend: &[&str]) -> Vec<&'static str> {
        let list = |words: &[&str]| words.iter().map(ToString::to_string).collect();
        let selection = Selection { only: list(only), rivals: list(rivals), lend: list(lend) };
        selection.chosen().iter().map(|subject| subject.name).collect()
    }

    #[test]
    fn subjects_are_chosen_by_name_rival_and_lend_mode() {
        assert_eq!(names(&[], &[], &[]).len(), SUBJECTS.len());
        assert_eq!(names(&["ours-slot", "rublk"], &[], &[]), ["raw", "rublk", "ours-slot"]);
        assert_eq!(names(&[], &[NONE], &["copy"]), ["raw", "ours-copy"]);
        let some = ["raw", "dm-linear", "ours-copy", "ours-slot", "ours-io-lane"];
        assert_eq!(names(&[], &["dm-linear"], &["slot", "copy"]), some);
    }

    #[test]
    fn names_are_unique_and_commands_whole() {
        for (n, subject) in SUBJECTS.iter().enumerate() {
            assert!(SUBJECTS[n + 1..].iter().all(|other| other.name != subject.name));
        }
        let command = |name| SUBJECTS.iter().find(|s| s.name == name).unwrap().command();
        let hybrid = "ublk-target add loop -q 1 -d 128 --lend fused --poll hybrid";
        assert_eq!(command("ours-poll-hybrid"), hybrid);
        assert_eq!(command("rublk"), "rublk add loop -q 1 -d 128 --zero-copy");
        assert_eq!(lend_modes(), ["copy", "user-copy", "slot", "fused"]);
    }
}

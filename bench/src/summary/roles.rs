//! The roles of subjects in the comparison. A role depends on the maker and on the command that
//! made the device, not on the name.

use crate::results::{Family, Subject};

/// The role of a subject.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    /// The backing itself, the limit.
    Raw,
    /// A mapping in the kernel: a bound that no server can reach, since it has no second queue.
    Floor,
    /// An alternative for users: the kernel's loop driver, or rublk.
    Rival,
    /// ublk-target with zero copy.
    Ours,
    /// ublk-target in a mode that copies.
    OursCopying,
}

impl Role {
    /// The role of a subject.
    #[must_use]
    pub fn of(subject: &Subject) -> Self {
        match subject.family {
            Family::Raw => Self::Raw,
            Family::Kernel if is_device_mapper(subject) => Self::Floor,
            Family::Kernel | Family::Rublk => Self::Rival,
            Family::Ours if matches!(lend_mode(subject), Some("copy" | "user-copy")) => {
                Self::OursCopying
            }
            Family::Ours => Self::Ours,
        }
    }
}

fn is_device_mapper(subject: &Subject) -> bool {
    subject.name.starts_with("dm-") || subject.command.contains("dmsetup")
}

/// The lend mode that a device was added with, if its command contains it.
#[must_use]
pub fn lend_mode(subject: &Subject) -> Option<&str> {
    let mut words = subject.command.split_whitespace();
    while let Some(word) = words.next() {
        if word == "--lend" {
            return words.next();
        }
        if let Some(mode) = word.strip_prefix("--lend=") {
            return Some(mode);
        }
    }
    None
}

/// The subject of ours in a lend mode without other options.
#[must_use]
pub fn plain(subjects: &[Subject], mode: &str) -> Option<usize> {
    let in_mode = subjects.iter().enumerate().filter(|(_, subject)| {
        subject.family == Family::Ours
            && subject.skipped.is_none()
            && lend_mode(subject) == Some(mode)
    });
    let options = |subject: &Subject| {
        let words = subject.command.split_whitespace();
        (words.clone().filter(|word| word.starts_with("--")).count(), words.count())
    };
    in_mode.min_by_key(|(_, subject)| options(subject)).map(|(index, _)| index)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample::subject;

    #[test]
    fn roles_follow_families_and_commands() {
        let role = |name, family, command: &str| Role::of(&subject(name, family, command));
        for (expected, name, family, command) in [
            (Role::Raw, "raw", Family::Raw, ""),
            (Role::Floor, "dm-linear", Family::Kernel, "dmsetup create x"),
            (Role::Rival, "kernel-loop", Family::Kernel, "losetup --direct-io=on"),
            (Role::Rival, "rublk-zc", Family::Rublk, "rublk add loop --zero-copy"),
            (Role::Ours, "fused", Family::Ours, "ublk-target add loop --lend fused"),
            (Role::Ours, "ours", Family::Ours, "ublk-target add loop"),
            (Role::Ours, "slot", Family::Ours, "ublk-target add loop --lend=slot --poll"),
            (Role::OursCopying, "copy", Family::Ours, "ublk-target add loop --lend copy"),
            (Role::OursCopying, "uc", Family::Ours, "ublk-target add loop --lend=user-copy"),
        ] {
            assert_eq!(role(name, family, command), expected, "{name}");
        }
        assert_eq!(lend_mode(&subject("x", Family::Ours, "add --lend")), None);
    }

    #[test]
    fn the_plain_subject_of_a_mode_has_no_other_options() {
        let mut subjects = vec![
            subject("polled", Family::Ours, "loop --lend fused --poll"),
            subject("fused", Family::Ours, "add loop -q 1 --lend fused"),
            subject("rublk", Family::Rublk, "--lend copy"),
        ];
        assert_eq!(plain(&subjects, "fused"), Some(1));
        assert_eq!(plain(&subjects, "copy"), None, "that one is not ours");
        subjects[1].skipped = Some("no such feature".into());
        assert_eq!(plain(&subjects, "fused"), Some(0));
    }
}

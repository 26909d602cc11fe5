//! The versions of all that is not ours with which the whole of `cargo vmtest` is known to pass:
//! what `check_versions` shows beside those in use. Raise them when a whole run has passed on newer
//! ones (docs/kernel-support.md, "Trying a new kernel").

/// Something that is not ours, and its versions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Known {
    /// What.
    pub name: &'static str,
    /// Its versions, of one name oldest first: `1.85.1`, or `debian 12` where there are several.
    pub versions: &'static [&'static str],
}

/// Names as `runner/versions.rs` has them.
pub const KNOWN: &[Known] = &[
    Known { name: "rustc", versions: &["1.85.1", "1.95.0"] },
    Known { name: "cargo", versions: &["1.85.1", "1.95.0"] },
    Known { name: "host", versions: &["debian 12", "debian 13"] },
    Known { name: "host's kernel", versions: &["6.18.44"] },
    Known { name: "qemu", versions: &["7.2.22", "10.0.13"] },
    Known { name: "mmdebstrap", versions: &["1.3.5", "1.5.7"] },
    Known { name: "valgrind", versions: &["3.19.0", "3.24.0"] },
    Known { name: "newest kernel", versions: &["7.2.12", "7.3.4"] },
    Known { name: "stable kernel", versions: &["6.12.107", "6.12.117"] },
    Known { name: "fio", versions: &["3.39"] },
    Known { name: "bpftrace", versions: &["0.23.2"] },
];

/// The versions of one thing.
pub fn known(name: &str) -> Option<&'static Known> {
    KNOWN.iter().find(|known| known.name == name)
}

//! The environment of the demonstration.

use std::path::PathBuf;
use std::time::Duration;

/// What is emulated, which is what the figures are worth.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Environment {
    /// A guest whose processor and drive are QEMU's.
    EmulatedGuest,
    /// A guest on the machine's processor, with QEMU's drive.
    VirtualizedGuest,
    /// This machine.
    Host,
}

impl Environment {
    /// How long each load runs, of which `measure` has 54.
    pub fn runtime(self) -> Duration {
        match self {
            Self::EmulatedGuest | Self::VirtualizedGuest => Duration::from_millis(500),
            Self::Host => Duration::from_secs(1),
        }
    }
}

/// What is served, and by which program.
#[derive(Debug, Clone)]
pub struct DemoTarget {
    /// Where this is.
    pub environment: Environment,
    /// The backing, by its canonical path; all on it is overwritten.
    pub backing: PathBuf,
    /// The program ublk-target.
    pub program: PathBuf,
}

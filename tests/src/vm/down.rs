//! How a VM ends that was not asked to.

/// Why a VM is no longer there, with the end of its console.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmDown {
    /// What happened, in one line.
    pub reason: String,
    /// The console's last lines, or all of a panic.
    pub console: Vec<String>,
}

impl VmDown {
    /// The guest died of a known bug of old emulators, not of the test: QEMU up
    /// to 8.0 may run a breakpoint that the kernel has already taken out of its
    /// code again (it patches branches while running).
    pub fn is_emulator_bug(&self) -> bool {
        self.console.iter().any(|line| line.contains("Oops: int3"))
    }
}

impl std::fmt::Display for VmDown {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.reason)?;
        for line in &self.console {
            write!(f, "\n  | {line}")?;
        }
        Ok(())
    }
}

impl std::error::Error for VmDown {}

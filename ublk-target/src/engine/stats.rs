//! What an engine counts.

/// Counters of one engine since its construction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EngineStats {
    /// Requests delivered.
    pub requests: u64,
    /// Requests answered with an error.
    pub failed: u64,
    /// Operations issued on backings, without continuations and retries.
    pub ops: u64,
    /// Operations or registrations issued again after `EAGAIN`, `EINTR` or `ENOMEM`.
    pub retries: u64,
    /// Short transfers that were continued.
    pub short: u64,
    /// Requests whose automatic registration failed (`UBLK_IO_F_NEED_REG_BUF`).
    pub need_reg_buf: u64,
    /// Explicit unregistrations that the driver refused.
    pub failed_unregistrations: u64,
    /// Completions that belonged to nothing in flight.
    pub stale: u64,
    /// Events that no correct driver and engine produce.
    pub unexpected: u64,
}

impl std::fmt::Display for EngineStats {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} requests ({} failed), {} ops ({} short, {} retries), {} explicit registrations \
             ({} not undone), {} stale and {} unexpected events",
            self.requests,
            self.failed,
            self.ops,
            self.short,
            self.retries,
            self.need_reg_buf,
            self.failed_unregistrations,
            self.stale,
            self.unexpected
        )
    }
}

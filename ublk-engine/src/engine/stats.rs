//! Counters of an engine.

use serde::{Deserialize, Serialize};

use crate::request::RequestKind;

/// Counters of one engine since its construction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EngineStats {
    /// Requests delivered and understood, by [`RequestKind::index`].
    pub requests: [u64; RequestKind::NAMES.len()],
    /// Their bytes.
    pub bytes: [u64; RequestKind::NAMES.len()],
    /// Requests answered.
    pub commits: u64,
    /// Requests answered with an error.
    pub failed: u64,
    /// Requests refused because their operation is unknown.
    pub refused_unknown: u64,
    /// Requests refused because their range does not fit the device.
    pub refused_malformed: u64,
    /// Operations issued on backings, without continuations and retries.
    pub ops: u64,
    /// Operations, registrations or unregistrations issued again after `EAGAIN`, `EINTR` or
    /// `ENOMEM`, or because a drive demands a retry.
    pub retries: u64,
    /// Partial transfers that were continued.
    pub partial: u64,
    /// Requests that the planner has answered with an error.
    pub planned_errors: u64,
    /// Requests with reads or writes that were first issued for only a part, because the planner
    /// asked for that.
    pub planned_short: u64,
    /// Windows that the planner has delayed, and pauses before operations are issued again.
    pub delays: u64,
    /// How often the planner has deferred a request.
    pub deferred: u64,
    /// Requests held back while the layers of the device were changed.
    pub held_back: u64,
    /// How often a request had to wait for a time, since more came than a throttle lets pass.
    pub throttled: u64,
    /// Failed operations that were issued elsewhere.
    pub substituted: u64,
    /// Failed operations that the planner ignored.
    pub ignored: u64,
    /// Requests with a failed automatic registration (`UBLK_IO_F_NEED_REG_BUF`).
    pub need_reg_buf: u64,
    /// Buffers that the server registered by explicit commands.
    pub registered: u64,
    /// Registrations by the server that failed.
    pub failed_registrations: u64,
    /// Unregistrations that failed. Their slots went into quarantine.
    pub failed_unregistrations: u64,
    /// Requests with data that was copied because the buffer could not be registered.
    pub copied: u64,
    /// Requests that waited for a buffer to copy through.
    pub waited: u64,
    /// Operations that passed their deadline.
    pub timed_out: u64,
    /// Operations for which cancellation was requested.
    pub cancelled: u64,
    /// Slots quarantined because an operation neither completed nor was cancelled in time.
    pub lost_ops: u64,
    /// Stale completions: they belonged to nothing in flight.
    pub stale: u64,
    /// Events that no correct driver and engine produce.
    pub unexpected: u64,
}

impl EngineStats {
    /// Requests of all kinds.
    #[must_use]
    pub fn all_requests(&self) -> u64 {
        self.requests.iter().sum::<u64>() + self.refused_unknown + self.refused_malformed
    }

    /// The counters with their names, except those by kind, in display order.
    #[must_use]
    pub fn named(&self) -> [(&'static str, u64); 26] {
        [
            ("commits", self.commits),
            ("failed", self.failed),
            ("refused_unknown", self.refused_unknown),
            ("refused_malformed", self.refused_malformed),
            ("ops", self.ops),
            ("retries", self.retries),
            ("partial", self.partial),
            ("planned_errors", self.planned_errors),
            ("planned_short", self.planned_short),
            ("delays", self.delays),
            ("deferred", self.deferred),
            ("held_back", self.held_back),
            ("throttled", self.throttled),
            ("substituted", self.substituted),
            ("ignored", self.ignored),
            ("need_reg_buf", self.need_reg_buf),
            ("registered", self.registered),
            ("failed_registrations", self.failed_registrations),
            ("failed_unregistrations", self.failed_unregistrations),
            ("copied", self.copied),
            ("waited", self.waited),
            ("timed_out", self.timed_out),
            ("cancelled", self.cancelled),
            ("lost_ops", self.lost_ops),
            ("stale", self.stale),
            ("unexpected", self.unexpected),
        ]
    }
}

impl std::fmt::Display for EngineStats {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} requests", self.all_requests())?;
        for (name, count) in self.named().into_iter().filter(|(_, count)| *count > 0) {
            write!(f, ", {count} {}", name.replace('_', " "))?;
        }
        Ok(())
    }
}

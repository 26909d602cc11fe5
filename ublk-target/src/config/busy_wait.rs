//! Whether lanes look for completions before they sleep.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Whether lanes look for completions for a while before they sleep.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BusyWait {
    /// They never do.
    Off,
    /// While requests come one by one and waits are short: [`BusyWait::AUTO_LIMIT`].
    #[default]
    Auto,
    /// As `Auto`, with another limit.
    Limit(Duration),
}

impl BusyWait {
    /// No sleep is put off for longer, and none where waits tend to be longer. A lane that does
    /// not sleep therefore deals with 5,000 completions a second at least.
    pub const AUTO_LIMIT: Duration = Duration::from_micros(200);

    /// How long a sleep may be put off at most; `None` for not at all.
    #[must_use]
    pub const fn limit(self) -> Option<Duration> {
        match self {
            Self::Off => None,
            Self::Auto => Some(Self::AUTO_LIMIT),
            Self::Limit(limit) => Some(limit),
        }
    }
}

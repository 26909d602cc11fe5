//! Whether lanes spin for completions before they sleep.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Whether lanes spin for completions before they sleep.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BusyWait {
    /// They never spin.
    Off,
    /// While requests come one by one and waits are short: [`BusyWait::AUTO_LIMIT`].
    #[default]
    Auto,
    /// As `Auto`, with this limit.
    Limit(Duration),
}

impl BusyWait {
    /// The longest spin of `Auto`. A lane does not spin where waits tend to be longer. So a lane that
    /// never sleeps handles at least 5,000 completions per second.
    pub const AUTO_LIMIT: Duration = Duration::from_micros(200);

    /// The longest spin before a sleep; `None` for no spin.
    #[must_use]
    pub const fn limit(self) -> Option<Duration> {
        match self {
            Self::Off => None,
            Self::Auto => Some(Self::AUTO_LIMIT),
            Self::Limit(limit) => Some(limit),
        }
    }
}
